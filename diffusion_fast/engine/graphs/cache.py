"""Captured graphs by key: the least recently used ones go when memory runs out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from .capture import Graph

Key = tuple[Hashable, ...]


class GraphCache:
    """Graphs by everything that they baked in.

    The graphs of a key have a name each, such as a step and the loop that repeats it. They are
    used and go together.

    Args:
        limit: how many bytes the captures of the graphs that are kept may have added to their
            pools. What a graph leaves behind in its pool is there for the next capture. The key
            that is asked for always stays.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._graphs: OrderedDict[Key, dict[str, tuple[Hashable, Graph]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._graphs.values()))

    @property
    def bytes(self) -> int:
        return sum(graph.bytes for key in self._graphs for graph in self._of(key))

    def get(
        self, key: Key, name: str, make: Callable[[], Graph], version: Hashable = None
    ) -> Graph:
        """The graph of this key and name, made if need be; another version makes way for it.

        Out of memory in ``make`` frees the oldest graphs of other keys and makes it once more.

        Raises:
            Exception: what ``make`` raises; the cache then has nothing under this key and name.
        """
        graphs = self._graphs.get(key, {})
        if name not in graphs or graphs[name][0] != version:
            graphs.pop(name, None)
            graphs[name] = version, self._made(make, key)
            self._graphs[key] = graphs
            self._shrink(key)
        self._graphs.move_to_end(key)
        return graphs[name][1]

    def _made(self, make: Callable[[], Graph], key: Key) -> Graph:
        if self._oldest_but(key) is None:
            return make()
        graph = self._or_out_of_memory(make)
        if graph is None:  # and the failed attempt's own tensors are gone by now
            self._free_oldest_but(key)
            graph = make()
        return graph

    @staticmethod
    def _or_out_of_memory(make: Callable[[], Graph]) -> Graph | None:
        try:
            return make()
        except torch.OutOfMemoryError:
            return None

    def _free_oldest_but(self, key: Key) -> None:
        """Free the least recently used graphs and those that share their pool, but for ``key``'s.

        Fewer would free nothing: PyTorch gives the memory of a pool back when the last graph of
        the pool is gone, because it can't know which of them uses what.
        """
        oldest = self._oldest_but(key)
        assert oldest is not None
        pools = {graph.pool for graph in self._of(oldest)}
        for other in list(self._graphs):
            if other != key and any(graph.pool in pools for graph in self._of(other)):
                del self._graphs[other]

    def _shrink(self, key: Key) -> None:
        """Down to the limit, but for the key that was just asked for."""
        while self.bytes > self.limit and (oldest := self._oldest_but(key)) is not None:
            del self._graphs[oldest]

    def _oldest_but(self, key: Key) -> Key | None:
        return next((other for other in self._graphs if other != key), None)

    def _of(self, key: Key) -> list[Graph]:
        return [graph for _, graph in self._graphs[key].values()]

    def drop(self, owner: Hashable) -> None:
        """Forget the graphs whose key begins with ``owner``."""
        for key in [key for key in self._graphs if key[0] is owner]:
            del self._graphs[key]

    def clear(self) -> None:
        self._graphs.clear()
