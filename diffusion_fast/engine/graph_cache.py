"""Captured graphs by key: the least recently used ones go when memory runs out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from .capture import Graph


class GraphCache:
    """Graphs by everything that they baked in.

    A key is a tuple. Those that differ in their last part only are a group, such as a step and the
    loop that repeats it, and go together.

    Args:
        limit: how many bytes the graphs' captures may have added to their pool; the graph that is
            asked for always stays.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._graphs: OrderedDict[tuple[Hashable, ...], Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        return sum(graph.bytes for graph in self._graphs.values())

    def get(self, key: tuple[Hashable, ...], capture: Callable[[], Graph]) -> Graph:
        """The graph of this key, captured if need be.

        Out of memory in a capture frees the graphs that are there and captures once more.

        Raises:
            Exception: what ``capture`` raises; the cache then has nothing under this key.
        """
        if key not in self._graphs:
            graph = self._or_out_of_memory(capture) if self._graphs else capture()
            if graph is None:  # and the failed attempt's own tensors are gone by now
                self.clear()
                graph = capture()
            self._graphs[key] = graph
            self._shrink(key[:-1])
        self._graphs.move_to_end(key)
        return self._graphs[key]

    @staticmethod
    def _or_out_of_memory(capture: Callable[[], Graph]) -> Graph | None:
        try:
            return capture()
        except torch.OutOfMemoryError:
            return None

    def _shrink(self, group: tuple[Hashable, ...]) -> None:
        """Down to the limit, but for the group that was just asked for."""
        while self.bytes > self.limit:
            oldest = next((key[:-1] for key in self._graphs if key[:-1] != group), None)
            if oldest is None:
                break
            for key in [key for key in self._graphs if key[:-1] == oldest]:
                del self._graphs[key]

    def drop(self, owner: Hashable) -> None:
        """Forget the graphs whose key begins with ``owner``."""
        for key in [key for key in self._graphs if key[0] is owner]:
            del self._graphs[key]

    def clear(self) -> None:
        self._graphs.clear()
