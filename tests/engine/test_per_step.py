"""Contexts that take turns within a run: what a model is told at each row of every loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close
from prepared import LIKE_SDXL, conditions, unet
from tape import TapeCapturer, captured, tape
from torch import Tensor, nn

import diffusion_fast as df
from diffusion_fast.engine.batch import Batch
from diffusion_fast.engine.slots import Job, Slots
from diffusion_fast.models import UNet2DCondition
from diffusion_fast.samplers import make_table

assert tape  # a fixture
SCHEDULE = df.DiffusionSchedule()
SHAPE = (2, 4, 8, 8)
ORDER = [0, 0, 1, 0, 2]
TABLE: dict[str, Any] = {"sampler": "heun", "steps": len(ORDER), "guidance_scale": 3.0}


class Told(nn.Module):
    """A model whose context is another one at each call, whatever it is given."""

    def __init__(self, model: nn.Module, contexts: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.contexts, self.calls = model, contexts, 0

    def forward(self, x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        self.calls += 1
        output: Tensor = self.model(x, t, **self.contexts[self.calls - 1])
        return output


def given(model: UNet2DCondition) -> tuple[df.PerStep, dict[str, Tensor]]:
    torch.manual_seed(3)
    contexts = [conditions(model, 1) for _ in range(3)]
    return df.PerStep(contexts, ORDER), conditions(model, 1)


def truth(model: UNet2DCondition, x_T: Tensor, swapped: bool = False) -> Tensor:
    """The plain loop, where each call has the halves that it should have."""
    varied, other = given(model)
    calls = []
    for step in make_table(schedule=SCHEDULE, **TABLE).step_of_row.tolist():
        halves = [other, varied.contexts[ORDER[step]]]
        if swapped:
            halves.reverse()
        widened = [{k: v.expand(len(x_T), *v.shape[1:]) for k, v in h.items()} for h in halves]
        calls.append({k: torch.cat([half[k] for half in widened]) for k in other})
    told = Told(model, calls)
    nothing = torch.zeros(1)

    result = df.sample(
        told, SCHEDULE, SHAPE, x_T=x_T, context=nothing, null_context=nothing, **TABLE
    )
    assert told.calls == len(calls) == 9  # two for each step but the last
    return result


@pytest.mark.parametrize("changes", [{}, LIKE_SDXL, {"num_classes": 7}], ids=["", "sdxl", "class"])
@pytest.mark.parametrize("rewrites", ["all", "none", "cached_context", "time_table"])
@torch.no_grad()
def test_each_step_has_its_own(changes: dict[str, Any], rewrites: str) -> None:
    model = unet(torch.float64, **changes)
    torch.manual_seed(1)
    x_T = torch.randn(SHAPE, dtype=torch.float64)
    engine = df.Engine(model, SCHEDULE, graph="off", rewrites=rewrites, **TABLE)
    context, null = given(model)
    for _ in range(2):  # the second time all is there
        assert_close(engine.sample(SHAPE, context, null, x_T), truth(model, x_T))
    assert_close(engine.sample(SHAPE, null, context, x_T), truth(model, x_T, swapped=True))


@pytest.mark.parametrize("graph", ["step", "loop"])
@pytest.mark.parametrize("rewrites", ["all", "none"])
@torch.no_grad()
def test_captured(tape: TapeCapturer, graph: str, rewrites: str) -> None:
    """A capture serves every order of so many contexts."""
    model = unet(torch.float64, **LIKE_SDXL)
    torch.manual_seed(1)
    x_T = torch.randn(SHAPE, dtype=torch.float64)
    engine = df.Engine(model, SCHEDULE, graph=graph, rewrites=rewrites, **TABLE)
    context, null = given(model)
    plain = df.Engine(model, SCHEDULE, graph="off", **TABLE)
    same = engine.sample(SHAPE, null, null, x_T)
    assert_close(engine.sample(SHAPE, context, null, x_T), truth(model, x_T))
    before = set(map(id, captured(engine, "step")))
    other = df.PerStep(context.contexts, [2, 1, 1, 0, 0])
    assert_close(engine.sample(SHAPE, other, null, x_T), plain.sample(SHAPE, other, null, x_T))
    assert_close(engine.sample(SHAPE, null, null, x_T), same)
    assert set(map(id, captured(engine, "step"))) == before


@pytest.mark.parametrize("changes", [{}, LIKE_SDXL], ids=["", "sdxl"])
@pytest.mark.parametrize("graph", ["auto", "off"])
@torch.no_grad()
def test_in_a_shared_batch(tape: TapeCapturer, changes: dict[str, Any], graph: str) -> None:
    model = unet(torch.float64, **changes)
    torch.manual_seed(1)
    x_T = torch.randn(1, *SHAPE[1:], dtype=torch.float64)
    context, null = given(model)
    table = make_table(schedule=SCHEDULE, **TABLE)
    engine = df.Engine(model, SCHEDULE, graph="off", **TABLE)
    asked = [(context, null), (null, null), (null, context)]
    slots = Slots(model, slots=3, max_rows=10, graph=graph)
    batch = Batch(slots, SHAPE[1:])  # type: ignore[arg-type]
    seats = []
    for pair in asked:
        seats.append(slots.take(Job(table, *pair, x_T, None)))
        batch.join(seats[-1])
        batch.step()
    left: dict[int, Tensor] = {}
    while len(batch):
        for seat in batch.step():
            left[seats.index(seat)] = batch.leave(seat)
    for i, pair in enumerate(asked):
        assert_close(left[i], engine.sample((1, *SHAPE[1:]), *pair, x_T))


def test_any_function_may_have_them() -> None:
    def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.append(context[0, 0].item())
        return x

    seen: list[float] = []
    contexts = df.PerStep([torch.zeros(1, 1), torch.ones(1, 1)], [1, 0, 1])
    options: dict[str, Any] = {"sampler": "ddim", "steps": 3}
    df.sample(model, SCHEDULE, (2, 3), context=contexts, **options)
    assert seen == [1, 0, 1]
    seen.clear()
    same = df.PerStep([torch.zeros(1, 1)], [0, 0, 0])
    df.sample(model, SCHEDULE, (2, 3), context=same, **options)
    assert seen == [0, 0, 0]


@pytest.mark.parametrize(
    ("contexts", "order", "message"),
    [
        ([], [0], "contexts: expected at least one"),
        ([torch.zeros(1, 1)], [1], r"order: expected an integer in \[0, 0\], got 1"),
        ([torch.zeros(1, 1)], [0], "context.order: expected one for each of 2 steps, got 1"),
        ([torch.zeros(1, 1), torch.zeros(1, 2)], [0, 1], "context: expected one form at all"),
    ],
)
def test_what_does_not_fit_is_named(contexts: list[Tensor], order: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        df.sample(
            lambda x, t, context: x,
            *(SCHEDULE, (1, 3)),
            context=df.PerStep(contexts, order),
            sampler="ddim",
            steps=2,
        )
