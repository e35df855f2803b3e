"""Capture, without a GPU: what is captured, when, and that nothing stale is ever replayed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conv_model import CONTEXTS, SCHEDULE, SHAPE, Draws, Model, Reads, plain, same, seeded
from numerics import error
from tape import TapeCapturer, TapeGraph, Unrolled, tape
from torch import Tensor

import diffusion_fast as df
from diffusion_fast import ops
from diffusion_fast.engine.graphs import policy
from diffusion_fast.samplers import SAMPLERS

__all__ = ["tape"]  # a fixture


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "guidance",
    [
        {},
        {"guidance_scale": 0.0},
        {"guidance_scale": [3.0, 0.0, 1.0, 7.5, 2.0]},
        {"guidance_scale": 4.0, "guidance_rescale": 0.7},
    ],
    ids=["conditional", "unconditional", "per step", "rescale"],
)
def test_a_graph_is_the_loop(
    tape: TapeCapturer, prediction_type: str, guidance: dict[str, Any]
) -> None:
    """Every sampler, from one capture for whole timesteps and one for others; in float32 as well,
    each held to its own tolerance."""
    model, options = Model(), {"prediction_type": prediction_type, "steps": 5, **guidance}
    whole = df.Engine(model, SCHEDULE, graph="loop", **options)
    step = df.Engine(model, SCHEDULE, graph="step", **options)
    for sampler in SAMPLERS:
        clip_sample = 0.9 if sampler == "ddim" else False
        asked = {"sampler": sampler, "clip_sample": clip_sample, **options}
        if SAMPLERS[sampler].own_grid and isinstance(scale := guidance.get("guidance_scale"), list):
            asked["guidance_scale"] = scale[
                : df.Engine(model, SCHEDULE, sampler=sampler, steps=5).table.steps
            ]
        truth = plain(model, **CONTEXTS, **asked)
        for engine in (whole, step):
            engine.configure(**asked)
            assert same(engine.sample(SHAPE, **CONTEXTS, generator=seeded()), truth), sampler
    # For each way: a history of three or less, the unconditional output read alone or not, and
    # timesteps that are whole or not.
    assert tape.captures == 10


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "heun"])
def test_half_and_single_precision(tape: TapeCapturer, sampler: str) -> None:
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model = Model(dtype)
        engine = df.Engine(model, SCHEDULE, sampler=sampler, steps=5)
        x = engine.sample(SHAPE, generator=seeded())
        assert engine.explain()["graph"] == "loop (repeated on the device)"
        assert x.dtype == torch.float32
        assert error(x, plain(model, sampler=sampler, steps=5)) < allowed


def test_autocast_ends_between_two_runs(tape: TapeCapturer) -> None:
    """What it keeps of the weights ends with it, so the graph may not read that."""
    cached: list[bool] = []
    model = Model(torch.float32)
    model.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    for seed in (1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            x = engine.sample(SHAPE, generator=seeded(seed))
            assert torch.is_autocast_cache_enabled()
        assert x.isfinite().all()
    assert tape.captures == 1
    assert cached
    assert not any(cached)


@pytest.mark.parametrize("why_no_loop", [None, "an old driver"])
def test_what_does_not_capture_again(tape: TapeCapturer, why_no_loop: str | None) -> None:
    tape.why_no_loop = why_no_loop
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=10, guidance_scale=2.0, max_steps=40)
    engine.sample(SHAPE, **CONTEXTS, generator=seeded())
    for change in (
        {},
        {"guidance_scale": 7.5},
        {"steps": 3},
        {"steps": 40, "sampler": "ddpm"},
        {"sampler": "dpmpp_3m"},
        {"guidance_scale": [0.0, 1.0, 2.0, 3.0], "steps": 4},
        {"guidance_interval": (0.5, 2.0), "guidance_scale": 3.0},
        {"clip_sample": True, "prediction_type": "v_prediction"},
    ):
        engine.configure(**change)
        options = vars(engine._options) | {"generator": seeded(5)}
        contexts = {name: torch.randn(3, 2, 5) for name in CONTEXTS}
        x = engine.sample(SHAPE, **contexts, generator=seeded(5))
        assert same(x, plain(model, **contexts, **options))
        unrolled = f"loop ({len(engine.table)} rows unrolled: an old driver)"
        how = unrolled if why_no_loop else "loop (repeated on the device)"
        assert engine.explain()["graph"] == how
    assert tape.captures == 1
    assert len(engine._graphs.cache) == 2  # one loop beside the step, whatever its length
    engine.configure(steps=41, guidance_interval=None)
    assert same(
        engine.sample(SHAPE, **CONTEXTS, generator=seeded()),
        plain(model, **CONTEXTS, **vars(engine._options)),
    )
    assert tape.captures == 2


def test_what_captures_again(tape: TapeCapturer) -> None:
    """Each with its right result; and nothing is captured twice."""
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="euler", steps=5, guidance_scale=2.0)
    long = {name: torch.randn(3, 7, 5) for name in CONTEXTS}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {**CONTEXTS}),
        ({}, long),
        ({"guidance_scale": 1.0}, {**CONTEXTS}),
        ({"timestep_spacing": "linspace"}, {**CONTEXTS}),  # fractional timesteps
        ({"guidance_rescale": 0.5}, {**CONTEXTS}),
        ({}, {**CONTEXTS, "shape": (3, 1, 6, 5)}),
        ({}, {**CONTEXTS, "mask": torch.ones(1, 1, 4, 4), "x_0": torch.zeros(SHAPE)}),
        ({}, {**CONTEXTS, "generator": ops.Philox(3)}),
    ]
    start = dict(vars(engine._options))
    for turn in range(2):
        for i, (change, call) in enumerate(cases):
            engine.configure(**{"timestep_spacing": "leading", "guidance_rescale": 0.0, **start})
            engine.configure(**change)
            x = engine.sample(**{"shape": SHAPE, "generator": seeded(), **call})
            assert same(x, plain(model, **call, **vars(engine._options))), change
            assert tape.captures == (i + 1 if turn == 0 else len(cases)), change


def test_a_callback_gets_a_replay_per_step(tape: TapeCapturer) -> None:
    engine = df.Engine(Model(), SCHEDULE, sampler="heun", steps=4)
    seen: list[tuple[int, float, Tensor]] = []
    x = engine.sample(SHAPE, generator=seeded(), callback=lambda *a: seen.append(a))
    assert engine.explain()["graph"].startswith("step (a callback")
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][2], x)
    assert not torch.equal(seen[0][2], x)
    assert torch.equal(engine.sample(SHAPE, generator=seeded()), x)
    assert engine.explain()["graph"].startswith("loop")
    assert tape.captures == 1
    with pytest.raises(ValueError, match="callback: expected None, because graph='loop'"):
        df.Engine(Model(), SCHEDULE, graph="loop").sample(SHAPE, callback=print)
    with pytest.raises(ValueError, match="progress: expected False, because graph='loop'"):
        df.Engine(Model(), SCHEDULE, graph="loop", progress=True)
    engine = df.Engine(Model(), SCHEDULE, graph="loop")
    engine.progress = True
    with pytest.raises(ValueError, match="progress: expected False, because graph='loop'"):
        engine.sample(SHAPE)


@pytest.mark.parametrize("refuses", [False, True], ids=["not there", "the driver refuses"])
def test_without_while_nodes_the_loop_is_unrolled(
    tape: TapeCapturer, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    if refuses:
        tape.loop_error = RuntimeError("an old driver")
    else:
        tape.why_no_loop = "an old driver"
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="ddpm", steps=6, max_steps=6)
    for steps in (6, 4, 6):
        engine.configure(steps=steps)
        x = engine.sample(SHAPE, generator=seeded())
        assert engine.explain()["graph"] == f"loop ({steps} rows unrolled: an old driver)"
        assert same(x, plain(model, sampler="ddpm", steps=steps))
        assert {type(graph) for graph in tape.graphs} == {TapeGraph, Unrolled}
    assert tape.captures == 1
    monkeypatch.setattr(policy, "UNROLLED_ROWS", 5)
    engine.refresh()
    assert same(engine.sample(SHAPE, generator=seeded()), plain(model, sampler="ddpm", steps=6))
    assert engine.explain()["graph"].startswith("step (6 rows are too many to unroll: an old")
    assert tape.captures == 2


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_where_nothing_makes_a_loop_of_a_step(tape: TapeCapturer, sampler: str) -> None:
    """The mode auto replays the step, as fast; loop is one graph all the same, captured whole."""
    why = "cuda-bindings is not installed"
    tape.why_no_loop, tape.unroll_error = why, RuntimeError(why)
    model = Model()
    auto = df.Engine(model, SCHEDULE, sampler=sampler, max_steps=12)
    loop = df.Engine(model, SCHEDULE, graph="loop", sampler=sampler, max_steps=12)
    for steps in (6, 4, 4, 6):
        truth = plain(model, sampler=sampler, steps=steps)
        for engine in (auto, loop):
            engine.configure(steps=steps)
            assert same(engine.sample(SHAPE, generator=seeded()), truth)
        rows = len(loop.table)
        assert auto.explain()["graph"] == f"step ({why})"
        assert loop.explain()["graph"] == f"loop ({rows} rows unrolled: {why})"
    assert tape.captures == 1 + 1 + 3  # a step each, and "loop" again where the number changes


def test_auto_falls_back_and_says_so(tape: TapeCapturer) -> None:
    tape.failures = [RuntimeError("operation not permitted")]
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    with pytest.warns(RuntimeWarning, match="graph: capture failed.*operation not permitted"):
        x = engine.sample(SHAPE, generator=seeded())
    assert same(x, plain(model, sampler="ddim", steps=4))
    assert engine.explain()["graph"].startswith("off (capture failed: RuntimeError: operation")
    assert same(
        engine.sample(SHAPE, generator=seeded(1)),
        plain(model, sampler="ddim", steps=4, generator=seeded(1)),
    )
    assert tape.captures == 0  # not tried again
    engine.refresh()
    engine.sample(SHAPE)
    assert tape.captures == 1


@pytest.mark.parametrize("graph", ["loop", "step"])
def test_a_graph_asked_for_by_name_raises(tape: TapeCapturer, graph: str) -> None:
    tape.failures = [RuntimeError("operation not permitted")]
    engine = df.Engine(Model(), SCHEDULE, graph=graph, sampler="ddim", steps=4)
    with pytest.raises(RuntimeError, match=f"graph: '{graph}' was asked for and can't be captured"):
        engine.sample(SHAPE)
    engine.sample(SHAPE)
    assert tape.captures == 1


@pytest.mark.parametrize(
    ("model", "why"), [(Reads, "not permitted"), (Draws, r"draws random numbers \(aten.randn")]
)
def test_models_that_no_graph_can_hold(tape: TapeCapturer, model: type[Model], why: str) -> None:
    engine = df.Engine(model(), SCHEDULE, sampler="ddim", steps=4)
    with pytest.warns(RuntimeWarning, match=why):
        engine.sample(SHAPE)
    engine.sample(SHAPE)


def test_random_numbers_of_the_first_call_do_no_harm(tape: TapeCapturer) -> None:
    """Kernels are measured on random data before they are chosen."""

    class DrawsOnce(Model):
        def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
            if self.calls == 0:
                torch.randn_like(x)
            return super().forward(x, t)

    engine = df.Engine(DrawsOnce(), SCHEDULE, graph="loop", sampler="ddim", steps=4)
    engine.sample(SHAPE)
    assert tape.captures == 1


def test_a_plain_callable_is_captured_only_when_asked(tape: TapeCapturer) -> None:
    model = Model(torch.float32)
    engine = df.Engine(lambda x, t: model(x, t), SCHEDULE, sampler="ddim", steps=4)
    engine.sample(SHAPE)
    assert "no nn.Module" in engine.explain()["graph"]
    assert tape.captures == 0
    df.Engine(lambda x, t: x * 0.5, SCHEDULE, graph="loop", sampler="ddim", steps=4).sample(SHAPE)
    assert tape.captures == 1


def test_large_noise_is_drawn_by_step_or_by_philox(
    tape: TapeCapturer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "NOISE_BYTES", 1000)
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="ddpm", steps=5)
    assert same(engine.sample(SHAPE, generator=seeded()), plain(model, sampler="ddpm", steps=5))
    assert engine.explain()["graph"].startswith("step (the noise of all steps takes")
    engine.configure(sampler="ddim")
    engine.sample(SHAPE)
    assert engine.explain()["graph"].startswith("loop")
    named = df.Engine(model, SCHEDULE, graph="loop", sampler="ddpm", steps=5)
    with pytest.raises(ValueError, match=r"generator: expected an ops.Philox with graph='loop'"):
        named.sample(SHAPE)
    philox = ops.Philox(11, 5)
    x = named.sample(SHAPE, generator=philox)
    assert same(x, plain(model, sampler="ddpm", steps=5, generator=philox))


def test_backends_are_part_of_the_key(tape: TapeCapturer) -> None:
    engine = df.Engine(Model(), SCHEDULE, sampler="ddim", steps=4)
    engine.sample(SHAPE)
    with ops.use_backend("reference"):
        engine.sample(SHAPE)
    assert tape.captures == 2
    engine.sample(SHAPE)
    assert tape.captures == 2


def test_two_threads_share_an_engine(tape: TapeCapturer) -> None:
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="ddpm", steps=8)
    shapes = [SHAPE, (2, 1, 5, 5), SHAPE, (2, 1, 5, 5), SHAPE, SHAPE]
    got: dict[int, list[Tensor]] = {i: [] for i in range(len(shapes))}

    def run(i: int) -> None:
        for _ in range(3):
            got[i].append(engine.sample(shapes[i], generator=seeded(i)))

    threads = [threading.Thread(target=run, args=(i,)) for i in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, images in got.items():
        truth = plain(model, shapes[i], sampler="ddpm", steps=8, generator=seeded(i))
        assert len(images) == 3
        assert all(same(image, truth) for image in images)
    assert tape.captures == 2


def test_results_are_copies(tape: TapeCapturer) -> None:
    engine = df.Engine(Model(), SCHEDULE, sampler="ddim", steps=4)
    first = engine.sample(SHAPE, generator=seeded(1))
    kept = first.clone()
    engine.sample(SHAPE, generator=seeded(2))
    assert torch.equal(first, kept)
    assert torch.equal(engine.sample(SHAPE, generator=seeded(1)), kept)


def test_what_is_not_finite_is_found_in_a_graph(tape: TapeCapturer) -> None:
    class Breaks(Model):
        def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.where(t.view(-1, 1, 1, 1) <= 50, float("nan"), 0.0) + x

    engine = df.Engine(Breaks(), SCHEDULE, graph="loop", sampler="ddim", steps=4)
    with pytest.raises(FloatingPointError, match=r"first at step 1 \(t = 50;"):
        engine.sample(SHAPE)


def tried(mode: str, rows: int, by_step: str | None, failing: dict[str, str]) -> list[str]:
    """What is tried one after the other, and why the last one is taken."""
    refused: dict[str, str] = {}
    kinds: list[str] = []
    for kind, why in policy.attempts(mode, rows, by_step, refused):
        kinds.append(kind)
        if kind not in failing:
            return [*kinds, why]
        refused[kind] = failing[kind]
    raise AssertionError("nothing is left")


@pytest.mark.parametrize(
    ("mode", "rows", "by_step", "failing", "expected"),
    [
        ("auto", 20, None, {}, ["repeat", "repeated on the device"]),
        ("auto", 20, "a callback", {}, ["step", "a callback"]),
        ("step", 20, None, {}, ["step", "as asked"]),
        ("auto", 20, None, {"repeat": "old"}, ["repeat", "unroll", "20 rows unrolled: old"]),
        (
            *("auto", 101, None, {"repeat": "old"}),
            ["repeat", "step", "101 rows are too many to unroll: old"],
        ),
        (
            *("auto", 20, None, {"repeat": "old", "unroll": "no room"}),
            ["repeat", "unroll", "step", "no room"],
        ),
        ("loop", 101, None, {"repeat": "old"}, ["repeat", "unroll", "101 rows unrolled: old"]),
        (
            *("loop", 20, None, {"repeat": "old", "unroll": "no room"}),
            ["repeat", "unroll", "whole", "20 rows unrolled: old"],
        ),
    ],
)
def test_the_order_of_attempts(
    mode: str, rows: int, by_step: str | None, failing: dict[str, str], expected: list[str]
) -> None:
    assert tried(mode, rows, by_step, failing) == expected
