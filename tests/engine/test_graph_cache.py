"""Which graphs are kept, and what is given up when memory runs out."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch
from conv_model import SCHEDULE, SHAPE, Model, plain, same, seeded
from tape import Loop, TapeCapturer, TapeGraph, tape

import diffusion_fast as df
from diffusion_fast.engine.graphs import policy
from diffusion_fast.engine.graphs.policy import GraphCache

__all__ = ["tape"]  # a fixture


def test_out_of_memory_frees_the_old_graphs_and_tries_once_more(tape: TapeCapturer) -> None:
    """All of a pool, because it gives nothing back before; and no other place keeps one alive."""
    tape.room = 250
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    engine.sample(SHAPE)
    engine.sample((1, 1, 8, 8))
    assert len(engine._graphs.cache) == len(tape.graphs) == 4  # a step and a loop each
    shape = (2, 1, 8, 8)
    x = engine.sample(shape, generator=seeded())
    assert same(x, plain(model, shape, sampler="ddim", steps=4))
    assert engine.explain()["graph"] == "loop (repeated on the device)"
    assert len(engine._graphs.cache) == len(tape.graphs) == 2
    engine.sample(SHAPE)
    assert tape.captures == 4


def test_out_of_memory_spares_a_younger_pool() -> None:
    """The oldest is the one with the graph that was not used for the longest time."""
    cache = GraphCache(limit=10_000)
    room: list[TapeGraph] = []

    def first_without_room() -> TapeGraph:
        room.append(TapeGraph([], 100, "third"))
        if len(room) == 1:
            raise torch.OutOfMemoryError("no room")
        return room.pop()

    def kept(key: str, name: str) -> set[Hashable]:
        """The keys that are left after another graph."""
        room.clear()
        cache.get((key,), name, first_without_room)
        assert len(room) == 1  # the second attempt's is taken
        return {key for (key,) in cache._graphs}

    for key, pool in (("a", "first"), ("b", "second"), ("c", "second"), ("d", "first")):
        for name in ("step", "loop"):
            cache.get((key,), name, lambda pool=pool: TapeGraph([], 100, pool))
    cache.get(("a",), "step", lambda: pytest.fail("it is there"))
    assert kept("e", "step") == {"d", "a", "e"}
    assert kept("e", "loop") == {"e"}
    assert kept("f", "step") == {"f"}


def test_out_of_memory_twice(tape: TapeCapturer) -> None:
    tape.room = 150
    engine = df.Engine(Model(), SCHEDULE, sampler="ddim", steps=4)
    engine.sample(SHAPE)
    tape.bytes = 200
    with pytest.warns(RuntimeWarning, match="capture failed.*no room"):
        engine.sample((4, 1, 8, 8))
    assert len(tape.graphs) == 0
    tape.failures = [torch.OutOfMemoryError("no room")] * 2
    tape.bytes = 50
    with pytest.warns(RuntimeWarning, match="capture failed.*no room"):
        engine.sample((5, 1, 8, 8))
    assert len(tape.failures) == 1  # with nothing to free there is no second try


def test_what_a_run_needs_is_not_freed(tape: TapeCapturer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver may have no memory for a loop: its own step stays, those of others go."""
    model = Model()
    engine = df.Engine(model, SCHEDULE, graph="loop", sampler="ddim", steps=4)
    engine.sample((1, 1, 8, 8))
    errors = [torch.OutOfMemoryError("no room for the loop")]
    repeat = tape.repeat

    def first_without_room(*args: Any) -> Loop:
        if errors:
            raise errors.pop()
        return repeat(*args)

    monkeypatch.setattr(tape, "repeat", first_without_room)
    x = engine.sample(SHAPE, generator=seeded())
    assert same(x, plain(model, sampler="ddim", steps=4))
    assert not errors
    assert len(engine._graphs.cache) == len(tape.graphs) == 2
    assert tape.captures == 2


@pytest.mark.parametrize("repeats", [True, False], ids=["repeated", "unrolled"])
def test_no_room_for_a_loop(tape: TapeCapturer, repeats: bool) -> None:
    """The mode auto replays the step that is there; loop raises."""
    tape.why_no_loop = None if repeats else "an old driver"
    tape.loop_error = tape.unroll_error = torch.OutOfMemoryError("no room for the loop")
    tape.room = 150  # so that "loop" can't capture it as a whole
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="ddpm", steps=4)
    for seed in (1, 2):
        x = engine.sample(SHAPE, generator=seeded(seed))
        assert same(x, plain(model, sampler="ddpm", steps=4, generator=seeded(seed)))
        assert engine.explain()["graph"] == "step (no room for the loop)"
    tape.loop_error = tape.unroll_error = None
    engine.sample(SHAPE)
    assert engine.explain()["graph"] == "step (no room for the loop)"  # not tried at each run
    engine.refresh()
    engine.sample(SHAPE)
    assert engine.explain()["graph"].startswith("loop")
    tape.loop_error = tape.unroll_error = torch.OutOfMemoryError("no room for the loop")
    del engine
    engine = df.Engine(model, SCHEDULE, graph="loop", sampler="ddim", steps=4)
    with pytest.raises(RuntimeError, match="can't be captured: OutOfMemoryError: no room"):
        engine.sample(SHAPE)


def test_the_memory_of_graphs_has_a_bound(
    tape: TapeCapturer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "GRAPH_BYTES", 250)
    engine = df.Engine(Model(), SCHEDULE, sampler="ddim", steps=4)
    for size in (4, 5, 4, 6):  # 100 bytes each: the third shape drives out the second
        engine.sample((1, 1, size, size))
    assert tape.captures == 3
    assert engine._graphs.cache.bytes == 200
    engine.sample((1, 1, 4, 4))
    assert tape.captures == 3
    engine.sample((1, 1, 5, 5))
    assert tape.captures == 4


def test_a_cache_keeps_what_is_asked_for_whatever_its_size() -> None:
    cache = GraphCache(limit=100)
    cache.get(("a",), "step", lambda: TapeGraph([], 60))
    cache.get(("a",), "loop", lambda: TapeGraph([], 0))
    cache.get(("b",), "step", lambda: TapeGraph([], 500))
    assert (len(cache), cache.bytes) == (1, 500)
    cache.drop("b")
    assert len(cache) == 0


def test_a_new_version_takes_the_place_of_the_old() -> None:
    cache = GraphCache(limit=100)
    first = cache.get(("a",), "loop", lambda: TapeGraph([], 0), version=6)
    assert cache.get(("a",), "loop", lambda: TapeGraph([], 0), version=6) is first
    second = cache.get(("a",), "loop", lambda: TapeGraph([], 0), version=4)
    assert second is not first
    assert len(cache) == 1


def test_graphs_go_with_their_buffers(tape: TapeCapturer) -> None:
    engine = df.Engine(Model(), SCHEDULE, sampler="ddim", steps=4)
    for size in range(3, 9):
        engine.sample((1, 1, size, size))
    assert len(engine._graphs.cache) == 2 * len(engine._loops) == 8
    assert len(engine._predictors) == 1
    for batch in range(2, 6):
        engine.sample((batch, 1, 4, 4))
    assert len(engine._graphs.cache) == 2 * len(engine._loops) == 8
    assert len(engine._predictors) == 4
