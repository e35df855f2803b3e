"""Which graph a run uses: looked up, captured when it isn't there, or none, and why.

The least recently used graphs go when memory runs out.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ... import ops
from ...conditioning import Model
from ...ops import checks
from .capture import Capturer, CudaCapturer, Graph

MODES = ("auto", "loop", "step", "off")
NOISE_BYTES = 2**28  # largest table with the noise of every row
UNROLLED_ROWS = 100  # longest loop that "auto" unrolls
GRAPH_BYTES = 2**33  # memory that graphs may add to their pool


_Key = tuple[Hashable, ...]  # everything that graphs baked in


@dataclass(frozen=True)
class Way:
    """How to go through the rows of a table: one graph for all, a graph for each, or none.

    Attributes:
        mode: ``"loop"``, ``"step"`` or ``"off"``.
        why: the reason, in words.
        noise: where a captured step finds its noise: ``"row"``, ``"table"`` or ``"philox"``.
        graph: the graph of the whole loop or of a step.
    """

    mode: str
    why: str
    noise: str = "row"
    graph: Graph | None = None


@dataclass(frozen=True)
class Capturable:
    """A prepared loop, as far as it matters to graphs.

    Attributes:
        owner: what has the buffers that a graph of it reads and writes.
        baked: what a captured step depends on beside the buffers' layout.
        device: where it runs.
        rows: number of the table's rows.
        draws: whether any row reads noise.
        noise_bytes: memory that noise for as many rows as tables may have takes.
        counter, count: int64 [1], the row that a captured step is at, and the number of rows.
        step: one row that only the device knows, with noise that is there as ``"row"`` (drawn
            before it), ``"table"`` or ``"philox"``.
    """

    owner: Hashable
    baked: Hashable
    device: torch.device
    rows: int
    draws: bool
    noise_bytes: int
    counter: Tensor
    count: Tensor
    step: Callable[[str], None]


def attempts(
    mode: str, rows: int, by_step: str | None, refused: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """The ways to run a captured step, best first, and why each is taken: a pure decision.

    Args:
        mode: ``"auto"``, ``"loop"`` or ``"step"``.
        rows: how many there are.
        by_step: why the host must see each step; None if it need not.
        refused: why ways can't be taken; those that fail must be in it when the next is asked for.

    Yields:
        ``"repeat"``: the device repeats the step; ``"unroll"``: one graph of so many steps;
        ``"whole"``: all rows captured as one; ``"step"``: a replay for each row.
    """
    if mode != "step" and by_step is None:
        if "repeat" not in refused:
            yield "repeat", "repeated on the device"
        unrolled = f"{rows} rows unrolled: {refused['repeat']}"
        if mode == "auto" and rows > UNROLLED_ROWS:
            by_step = f"{rows} rows are too many to unroll: {refused['repeat']}"
        else:
            if "unroll" not in refused:
                yield "unroll", unrolled
            if mode == "loop":  # in "auto" the steps one by one are as fast
                yield "whole", unrolled
            by_step = refused["unroll"]
    yield "step", by_step or "as asked"


def noise_place(
    mode: str, loop: Capturable, philox: bool, by_step: str | None
) -> tuple[str, str | None]:
    """Where a captured step finds its noise, and why the host must see each step, if it must.

    Raises:
        ValueError: ``"loop"`` was asked for, and there is too much noise to draw before it.
    """
    if mode == "step":
        by_step = "as asked"
    if philox:
        return "philox", by_step
    if loop.noise_bytes <= NOISE_BYTES:
        return "table", by_step
    if by_step is None and loop.draws:
        size = loop.noise_bytes >> 20
        by_step = f"the noise of all steps takes {size} MiB (with an ops.Philox, none)"
        if mode == "loop":
            expected = f"an ops.Philox with graph='loop', or noise of {NOISE_BYTES >> 20} MiB"
            checks.fail("generator", expected, by_step)
    return "row", by_step


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
        self._graphs: OrderedDict[_Key, dict[str, tuple[Hashable, Graph]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._graphs.values()))

    @property
    def bytes(self) -> int:
        return sum(graph.bytes for key in self._graphs for graph in self._of(key))

    def get(
        self, key: _Key, name: str, make: Callable[[], Graph], version: Hashable = None
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

    def _made(self, make: Callable[[], Graph], key: _Key) -> Graph:
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

    def _free_oldest_but(self, key: _Key) -> None:
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

    def _shrink(self, key: _Key) -> None:
        """Down to the limit, but for the key that was just asked for."""
        while self.bytes > self.limit and (oldest := self._oldest_but(key)) is not None:
            del self._graphs[oldest]

    def _oldest_but(self, key: _Key) -> _Key | None:
        return next((other for other in self._graphs if other != key), None)

    def _of(self, key: _Key) -> list[Graph]:
        return [graph for _, graph in self._graphs[key].values()]

    def drop(self, owner: object) -> None:
        """Forget the graphs whose key begins with ``owner``."""
        for key in [key for key in self._graphs if key[0] is owner]:
            del self._graphs[key]

    def clear(self) -> None:
        self._graphs.clear()


class Graphs:
    """The graphs of one engine.

    Args:
        mode: ``"auto"``, ``"loop"``, ``"step"`` or ``"off"``.
        model: only an ``nn.Module`` is captured without being asked for: of another callable,
            nobody can see when its weights change.
        device: where the engine samples.

    Attributes:
        last: the way of the last run, without its graph.

    Raises:
        RuntimeError: a graph is asked for and the device can't capture any.
    """

    def __init__(self, mode: str, model: Model, device: torch.device) -> None:
        checks.one_of("graph", mode, MODES)
        self.mode, self.cache = mode, GraphCache(GRAPH_BYTES)
        self.capturer: Capturer = CudaCapturer()
        self._is_module = isinstance(model, nn.Module)
        self._refused: dict[_Key, dict[str, str]] = {}  # why, of each attempt
        self._done: set[_Key] = set()  # work that was done once
        self.last = Way("off", self._unavailable(device) or "no run yet")

    def clear(self) -> None:
        """After a change of the model: what was captured, and what failed, is forgotten."""
        self.cache.clear()
        self._refused.clear()
        self._done.clear()

    def drop(self, owner: object) -> None:
        """Forget the graphs of a loop whose buffers are given up, or of a predictor."""
        self.cache.drop(owner)
        self._refused = {key: why for key, why in self._refused.items() if key[0] is not owner}
        self._done = {key for key in self._done if key[0] is not owner}

    def executor(
        self, owner: object, device: torch.device
    ) -> Callable[[Hashable, Callable[[], None]], None]:
        """What does work on tensors that keep their addresses: by a graph from the second time on.

        It is asked with the kind of the work, and the work. The same kind does the same.

        Args:
            owner: what has those tensors, see :meth:`drop`.
            device: where they are.
        """

        def execute(kind: Hashable, work: Callable[[], None]) -> None:
            key = (owner, kind, surroundings(device))
            refused = self._refused.setdefault(key, {})
            if self._unavailable(device) is not None or "off" in refused:
                work()
            elif key not in self._done:  # the first time, which a single image would be slowed by
                work()
                self._done.add(key)
            elif (graph := self._or_refused(key, device, work)) is not None:
                graph.replay()
            else:
                work()

        return execute

    def _or_refused(
        self, key: _Key, device: torch.device, work: Callable[[], None]
    ) -> Graph | None:
        """The graph of work; None where it can't be captured, which a warning says once."""

        def capture() -> Graph:
            with _uncached_autocast():
                return self.capturer.capture(device, work, work)

        try:
            return self.cache.get(key, "work", capture)
        except Exception as error:
            self._refused[key]["off"] = why = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"graph: what is prepared for a run can't be captured, so it runs eagerly: {why}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def choose(self, loop: Capturable, *, philox: bool, by_step: str | None) -> Way:
        """How to run a prepared loop; its state is overwritten if that must be captured.

        Args:
            loop: what is to be run.
            philox: whether its noise is a Philox stream.
            by_step: why the host must see each step; None if it need not.

        Raises:
            RuntimeError: capture failed, and graphs were asked for by name.
        """
        why = self._unavailable(loop.device)
        if why is None:
            noise, by_step = noise_place(self.mode, loop, philox, by_step)
            key = (loop.owner, loop.baked, noise, surroundings(loop.device))
            way = self._captured(key, loop, noise, by_step)
        else:
            way = Way("off", why)
        self.last = replace(way, graph=None)  # which the cache must be able to free
        return way

    def _unavailable(self, device: torch.device) -> str | None:
        """Why nothing will be captured; raises if it was asked for by name."""
        if self.mode == "off":
            return "as asked"
        why = self.capturer.unavailable(device)
        if why is not None and self.mode != "auto":
            raise RuntimeError(f"graph: {self.mode!r} was asked for and can't run: {why}")
        if why is None and not self._is_module and self.mode == "auto":
            why = "the model is no nn.Module, so nobody sees its weights change"
        return why

    def _captured(self, key: _Key, loop: Capturable, noise: str, by_step: str | None) -> Way:
        """The first way that works."""
        refused = self._refused.setdefault(key, {})
        if "off" in refused:
            return Way("off", refused["off"])
        try:
            step = self.cache.get(key, "step", lambda: self._capture(loop, noise, 1))
            return self._first_that_works(key, loop, noise, step, by_step)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            if self.mode != "auto":
                message = f"graph: {self.mode!r} was asked for and can't be captured: {why}"
                raise RuntimeError(message) from error
            refused["off"] = f"capture failed: {why}"
            warnings.warn(
                f"graph: capture failed, so the loop runs eagerly: {why}",
                RuntimeWarning,
                stacklevel=4,
            )
            return Way("off", refused["off"])

    def _first_that_works(
        self,
        key: _Key,
        loop: Capturable,
        noise: str,
        step: Graph,
        by_step: str | None,
    ) -> Way:
        refused, rows = self._refused[key], loop.rows
        no_loop = self.capturer.no_while_loop()
        if no_loop is not None:
            refused.setdefault("repeat", no_loop)
        makers: dict[str, tuple[Callable[[], Graph], Hashable]] = {
            "repeat": (lambda: self.capturer.repeat(step, loop.counter, loop.count), None),
            "unroll": (lambda: self.capturer.unroll(step, rows), rows),
            "whole": (lambda: self._capture(loop, noise, rows), rows),
        }
        for kind, why in attempts(self.mode, rows, by_step, refused):
            if kind == "step":
                break
            make, version = makers[kind]
            try:
                return Way("loop", why, noise, self.cache.get(key, "loop", make, version))
            except RuntimeError as error:
                if kind == "whole":
                    raise
                refused[kind] = str(error)
        return Way("step", why, noise, step)

    def _capture(self, loop: Capturable, noise: str, times: int) -> Graph:
        def work() -> None:
            for _ in range(times):
                loop.step(noise)

        def warm_up() -> None:
            loop.step(noise)
            loop.counter.zero_()

        loop.counter.zero_()
        with _uncached_autocast():
            return self.capturer.capture(loop.device, warm_up, work)


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """A graph must cast weights by itself: those that autocast keeps are freed when it ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def surroundings(device: torch.device) -> Hashable:
    """What decides which kernels run, beside the model and its inputs."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return (
        autocast,
        ops.dispatch.backend.overrides,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
