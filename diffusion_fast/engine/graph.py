"""Which graph a run uses: looked up, captured when it isn't there, or none, and why."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from .. import ops
from ..conditioning import Model
from ..ops import Philox, checks
from .buffers import Generators
from .capture import Capturer, CudaCapturer, Graph
from .graph_cache import GraphCache
from .loop import Loop

GRAPHS = ("auto", "loop", "step", "off")
NOISE_BYTES = 2**28  # of a table with the noise of every row
UNROLLED_ROWS = 100  # of the longest loop that "auto" unrolls
GRAPH_BYTES = 2**33  # of the memory that graphs may add to their pool


@dataclass
class Run:
    """How to go through the rows: one graph for all, a graph for each, or none.

    Attributes:
        mode: ``"loop"``, ``"step"`` or ``"off"``.
        why: in words.
        noise: where a captured step finds it: ``"row"``, ``"table"`` or ``"philox"``.
        graph: of the whole loop or of a step.
    """

    mode: str
    why: str
    noise: str = "row"
    graph: Graph | None = None

    def go(
        self, loop: Loop, rows: Iterable[int], after: Callable[[int], None] | None = None
    ) -> None:
        """From a loop that has started to its end.

        ``after`` is called with each row; it and ``rows`` have no part in a loop that is one graph.
        """
        if self.noise == "table":
            loop.draw_all()
        if self.mode == "loop":
            assert self.graph is not None
            self.graph.replay()
            return
        step = loop.step
        if self.graph is not None:
            step = functools.partial(loop.replay, self.graph, draw=self.noise == "row")
        for row in rows:
            step()
            if after is not None:
                after(row)


class Graphs:
    """The graphs of one engine.

    Args:
        mode: ``"auto"``, ``"loop"``, ``"step"`` or ``"off"``.
        model: only an ``nn.Module`` is captured without being asked for: of another callable,
            nobody can see when its weights change.

    Raises:
        RuntimeError: a graph is asked for and the device can't capture any.
    """

    def __init__(self, mode: str, model: Model, device: torch.device) -> None:
        checks.one_of("graph", mode, GRAPHS)
        self.mode, self.cache = mode, GraphCache(GRAPH_BYTES)
        self.capturer: Capturer = CudaCapturer()
        self._opaque = not isinstance(model, nn.Module)
        self._failed: dict[tuple[Hashable, ...], str] = {}
        self._no_while: str | None = None
        self.last = Run("off", self._no_graph(device) or "no run yet")

    def clear(self) -> None:
        """After a change of the model: what was captured, and what failed, is forgotten."""
        self.cache.clear()
        self._failed.clear()

    def drop(self, loop: Loop) -> None:
        """Forget the graphs of a loop whose buffers are given up."""
        self.cache.drop(loop)
        self._failed = {key: why for key, why in self._failed.items() if key[0] is not loop}

    def choose(
        self, loop: Loop, generator: Generators, *, masked: bool, by_step: str | None
    ) -> Run:
        """What to run a prepared loop with; its state is overwritten if that must be captured.

        Args:
            masked: whether the run keeps an image outside of a mask.
            by_step: why the host must see each step; None if it need not.

        Raises:
            RuntimeError: capture failed, and graphs were asked for by name.
        """
        run = self._choose(loop, generator, masked, by_step)
        self.last = replace(run, graph=None)  # which the cache must be able to free
        return run

    def _no_graph(self, device: torch.device) -> str | None:
        """Why nothing will be captured; raises if it was asked for by name."""
        if self.mode == "off":
            return "as asked"
        why = self.capturer.unavailable(device)
        if why is not None and self.mode != "auto":
            raise RuntimeError(f"graph: {self.mode!r} was asked for and can't run: {why}")
        if why is None and self._opaque and self.mode == "auto":
            why = "the model is no nn.Module, so nobody sees its weights change"
        return why

    def _choose(self, loop: Loop, generator: Generators, masked: bool, by_step: str | None) -> Run:
        why = self._no_graph(loop.buffers.layout.device)
        if why is not None:
            return Run("off", why)
        noise, by_step = self._noise(loop, generator, by_step)
        table = loop.table
        assert table is not None
        rescale = table.rescales
        work = functools.partial(loop.captured_step, noise, masked=masked, rescale=rescale)
        key = (loop, loop.baked, noise, masked, rescale, _surroundings(loop.buffers.layout.device))
        if key in self._failed:
            return Run("off", self._failed[key])
        try:
            return self._captured(key, loop, work, noise, by_step)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            if self.mode != "auto":
                message = f"graph: {self.mode!r} was asked for and can't be captured: {why}"
                raise RuntimeError(message) from error
            self._failed[key] = f"capture failed: {why}"
            warnings.warn(
                f"graph: capture failed, so the loop runs eagerly: {why}",
                RuntimeWarning,
                stacklevel=4,
            )
            return Run("off", self._failed[key])

    def _noise(
        self, loop: Loop, generator: Generators, by_step: str | None
    ) -> tuple[str, str | None]:
        """Where a captured step finds its noise, and why the host must draw it step by step."""
        if self.mode == "step":
            by_step = "as asked"
        if isinstance(generator, Philox):
            return "philox", by_step
        size = loop.buffers.layout.rows * loop.buffers.x.nbytes
        if size <= NOISE_BYTES:
            return "table", by_step
        if by_step is None and loop.draws:
            by_step = f"the noise of all steps takes {size >> 20} MiB (with an ops.Philox, none)"
            if self.mode == "loop":
                expected = f"an ops.Philox with graph='loop', or noise of {NOISE_BYTES >> 20} MiB"
                checks.fail("generator", expected, by_step)
        return "row", by_step

    def _captured(
        self,
        key: tuple[Hashable, ...],
        loop: Loop,
        work: Callable[[], None],
        noise: str,
        by_step: str | None,
    ) -> Run:
        def capture(times: int) -> Graph:
            counter.zero_()
            device = loop.buffers.layout.device
            with _uncached_autocast():
                repeated = functools.partial(_repeat, work, times)
                return self.capturer.capture(device, warm_up, repeated)

        def warm_up() -> None:
            work()
            counter.zero_()

        counter = loop.clock.counter
        step = self.cache.get(key, "step", lambda: capture(1))
        whole = (*key, "loop")
        by_step = by_step or self._failed.get(whole)
        if by_step is not None:
            return Run("step", by_step, noise, step)
        try:
            return self._whole(key, loop, step, noise, capture)
        except RuntimeError as error:
            if self.mode != "auto":
                raise
            self._failed[whole] = str(error)
            return Run("step", self._failed[whole], noise, step)

    def _whole(
        self,
        key: tuple[Hashable, ...],
        loop: Loop,
        step: Graph,
        noise: str,
        capture: Callable[[int], Graph],
    ) -> Run:
        """All rows by one graph: of the captured step, or as a last resort captured as a whole."""
        rows, counter, count = loop.rows, loop.clock.counter, loop.buffers.count
        self._no_while = self._no_while or self.capturer.no_while_loop()
        if self._no_while is None:
            try:
                graph = self.cache.get(
                    key, "loop", lambda: self.capturer.repeat(step, counter, count)
                )
                return Run("loop", "repeated on the device", noise, graph)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._no_while = str(error)
        if self.mode == "auto" and rows > UNROLLED_ROWS:
            why = f"{rows} rows are too many to unroll: {self._no_while}"
            return Run("step", why, noise, step)
        try:
            graph = self.cache.get(key, "loop", lambda: self.capturer.unroll(step, rows), rows)
        except RuntimeError:
            if self.mode == "auto":  # in which the steps one by one are as fast
                raise
            graph = self.cache.get(key, "loop", lambda: capture(rows), rows)
        return Run("loop", f"{rows} rows unrolled: {self._no_while}", noise, graph)


def _repeat(work: Callable[[], None], times: int) -> None:
    for _ in range(times):
        work()


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """A graph must cast weights by itself: those that autocast keeps are freed when it ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _surroundings(device: torch.device) -> Hashable:
    """What else decides which kernels run."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return (
        autocast,
        ops.backend.overrides.everywhere,
        tuple(sorted(ops.backend.overrides.per_op.items())),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
