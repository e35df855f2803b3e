"""What is derived from a prompt and a time grid: once for the same values, later by a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import error
from prepared import LIKE_SDXL, TEXT_TIME, conditions, unet
from tape import TapeCapturer, captured, tape

import diffusion_fast as df
from diffusion_fast.engine.rewrites.derived import Derived, eagerly
from diffusion_fast.models import UNet2DCondition

__all__ = ["tape"]  # a fixture
SCHEDULE = df.DiffusionSchedule()
SHAPE = (2, 4, 8, 8)


def test_the_same_values_are_computed_once() -> None:
    calls: list[Any] = []

    def make(inputs: Any) -> Any:
        calls.append(inputs)
        return [inputs[0] * 2, None]

    derived, one = Derived(), torch.tensor([1.0, 2.0])
    first = derived.compute([one, None], make, eagerly, "here")
    again = derived.compute([one.clone(), None], make, eagerly, "here")
    assert len(calls) == 1
    assert again[0] is first[0]
    one.add_(1)
    other = derived.compute([one, None], make, eagerly, "here")
    assert other[0] is first[0]
    assert other[0].tolist() == [4.0, 6.0]
    derived.compute([one, None], make, eagerly, "elsewhere")
    derived.compute([one.double(), None], make, eagerly, "elsewhere")
    derived.compute([one.double(), None], make, eagerly, "elsewhere")
    assert len(calls) == 4
    derived.forget()
    derived.compute([one.double(), None], make, eagerly, "elsewhere")
    assert len(calls) == 5
    for _ in range(2):
        derived.compute([one, None], make, eagerly, None)
    assert len(calls) == 7


def test_what_failed_is_computed_again() -> None:
    derived, one = Derived(), torch.ones(1)

    def fails(inputs: Any) -> Any:
        raise ArithmeticError

    derived.compute([one], lambda x: x[0] + 1, eagerly, "here")
    with pytest.raises(ArithmeticError):
        derived.compute([one * 3], fails, eagerly, "here")
    made = derived.compute([one], lambda x: x[0] + 5, eagerly, "here")
    assert made.item() == 6


def contexts(model: UNet2DCondition, seed: int, tokens: int = 5) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "context": conditions(model, 2, tokens),
        "null_context": conditions(model, 2, tokens),
        "generator": torch.Generator().manual_seed(seed),
    }


@pytest.mark.parametrize("changes", [{}, LIKE_SDXL | TEXT_TIME], ids=["sd15", "sdxl"])
def test_new_prompts_are_prepared_by_a_graph(tape: TapeCapturer, changes: dict[str, Any]) -> None:
    """From the second prompt of a length on; each image is the one that a new engine draws."""
    model = unet(torch.float64, **changes)
    options: dict[str, Any] = {"sampler": "ddim", "guidance_scale": 3.0}
    engine = df.Engine(model, SCHEDULE, steps=3, **options)
    found = []
    for seed, steps, tokens in ((1, 3, 5), (2, 3, 5), (3, 3, 5), (3, 4, 5), (4, 3, 8), (5, 3, 5)):
        given = contexts(model, seed, tokens)
        x = engine.sample(SHAPE, **given, table={"steps": steps})
        found.append(len(captured(engine, "work")))
        fresh = df.Engine(model, SCHEDULE, graph="off", steps=steps, **options)
        truth = fresh.sample(SHAPE, **contexts(model, seed, tokens))
        assert error(x, truth) < 1e-12
    # Pooled text makes the table of times depend on the prompt. Without it, a table of three rows
    # is written for the second time after that of four.
    assert found == ([0, 2, 2, 2, 2, 2] if changes else [0, 1, 1, 1, 2, 2])


def test_a_known_prompt_replays_nothing(tape: TapeCapturer) -> None:
    model = unet()
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=3, guidance_scale=3.0)
    for seed in (1, 2, 3):
        engine.sample(SHAPE, **contexts(model, seed))
    (graph,) = captured(engine, "work")
    assert graph.replays == 2
    engine.sample(SHAPE, **contexts(model, 3))
    assert graph.replays == 2
    engine.sample(SHAPE, **contexts(model, 1))
    assert graph.replays == 3


def test_edits_are_prepared_anew(tape: TapeCapturer) -> None:
    model = unet(torch.float64)
    options: dict[str, Any] = {"sampler": "ddim", "steps": 3, "guidance_scale": 3.0}
    engine = df.Engine(model, SCHEDULE, **options)
    for seed in (1, 2, 3):
        engine.sample(SHAPE, **contexts(model, seed))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.1)
    for seed in (3, 4, 5):
        x = engine.sample(SHAPE, **contexts(model, seed))
        truth = df.Engine(model, SCHEDULE, graph="off", **options)
        assert error(x, truth.sample(SHAPE, **contexts(model, seed))) < 1e-12
    assert len(captured(engine, "work")) == 1


def test_a_capture_that_fails_is_told_of_once(tape: TapeCapturer) -> None:
    model = unet(torch.float64)
    options: dict[str, Any] = {"sampler": "ddim", "steps": 3, "guidance_scale": 3.0}
    engine = df.Engine(model, SCHEDULE, **options)
    engine.sample(SHAPE, **contexts(model, 1))
    tape.failures = [RuntimeError("no")]
    with pytest.warns(RuntimeWarning, match="what is prepared for a run can't be captured.*no"):
        engine.sample(SHAPE, **contexts(model, 2))
    for seed in (3, 4):
        x = engine.sample(SHAPE, **contexts(model, seed))
        truth = df.Engine(model, SCHEDULE, graph="off", **options)
        assert error(x, truth.sample(SHAPE, **contexts(model, seed))) < 1e-12


def test_graphs_go_with_the_predictor(tape: TapeCapturer) -> None:
    model = unet()
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=2, guidance_scale=3.0)
    for seed in (1, 2):
        engine.sample(SHAPE, **contexts(model, seed))
    assert len(captured(engine, "work")) == 1
    for batch in range(3, 7):
        null, text = (conditions(model, 1) for _ in range(2))
        engine.sample((batch, 4, 8, 8), null_context=null, context=text)
    assert not captured(engine, "work")
