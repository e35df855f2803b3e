"""Images that share a batch at the level of the engine: graphs, classes, what a seat keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compilers import needs_cpu_kernels
from numerics import assert_close
from prepared import unet
from tape import TapeCapturer, tape
from torch import Tensor

from diffusion_fast import DiffusionSchedule, Engine, ops
from diffusion_fast.engine.batch import Batch
from diffusion_fast.engine.slots import Job, Seat, Slots
from diffusion_fast.models import UNet2DCondition
from diffusion_fast.ops import checks
from diffusion_fast.samplers import make_table

assert tape  # a fixture
SCHEDULE = DiffusionSchedule()
SHAPE = (4, 8, 8)
TABLES: list[dict[str, Any]] = [
    {"sampler": "ddim", "steps": 3},
    {"sampler": "heun", "steps": 3, "guidance_scale": 2.0},
    {"sampler": "euler_ancestral", "steps": 4, "guidance_scale": 5.0, "guidance_rescale": 0.4},
    {"sampler": "dpmpp_3m", "steps": 6, "guidance_scale": 3.0},
    {"sampler": "ddim", "steps": 5, "guidance_scale": 0.0},
]

TOKENS = {2: 2, 4: 3}  # chunks of the longer prompts


def context(model: UNet2DCondition, number: int) -> Tensor:
    if model.config.num_classes is not None:
        return torch.tensor([number % model.config.num_classes])
    torch.manual_seed(number)
    size = 1, 77 * TOKENS.get(number, 1), model.config.cross_attention_dim
    return torch.randn(*size, dtype=torch.float64).to(model.conv_in.weight)


def job(model: UNet2DCondition, number: int) -> tuple[Job, Tensor]:
    """An image, and what an engine draws of it alone."""
    given = [context(model, number), context(model, 100)]
    if model.config.num_classes is None:
        given[1] = given[1].repeat(1, TOKENS.get(number, 1), 1)
    torch.manual_seed(number)
    x_T, x_0 = torch.randn(2, 1, *SHAPE, dtype=torch.float64).to(model.conv_in.weight)
    mask = None
    if number == 3:
        mask = (torch.arange(8) > 3).expand(1, 1, 8, 8)
    kept = {"x_0": x_0, "mask": mask} if mask is not None else {}
    engine = Engine(model, SCHEDULE, graph="off", **TABLES[number])
    generator = torch.Generator().manual_seed(number)
    alone = engine.sample((1, *SHAPE), *given, x_T, generator, **kept)
    table = make_table(schedule=SCHEDULE, **TABLES[number])
    return Job(table, *given, x_T, generator.manual_seed(number), **kept), alone


def run(slots: Slots, batch: Batch, jobs: list[Job], join_at: list[int]) -> dict[int, Tensor]:
    """Each job joins at its step; what each leaves behind, by number."""
    waiting = sorted(zip(join_at, range(len(jobs)), strict=True))
    seats: dict[Seat, int] = {}
    results: dict[int, Tensor] = {}
    step = 0
    while waiting or seats:
        while waiting and waiting[0][0] <= step and slots.free:
            number = waiting.pop(0)[1]
            seat = slots.take(jobs[number])
            batch.join(seat)
            seats[seat] = number
        step += 1
        if not seats:
            continue
        for seat in batch.step():
            results[seats.pop(seat)] = batch.leave(seat)
            seat.check_finite()
    return results


@needs_cpu_kernels
def test_in_float32_each_image_reads_its_own_rows() -> None:
    """On the kernels for CPUs, too: images of one batch stand at different steps."""
    exact = unet(torch.float64, resnet_time_scale_shift="scale_shift")
    model = copy.deepcopy(exact).float()
    truth = [job(exact, n)[1] for n in range(len(TABLES))]
    jobs, alone = zip(*(job(model, n) for n in range(len(TABLES))), strict=True)
    slots = Slots(model, slots=4, max_rows=20, graph="off")
    with ops.use_backend(group_norm_silu="cpu"):
        results = run(slots, Batch(slots, SHAPE), list(jobs), [0, 0, 1, 2, 2])
    for number, one in enumerate(alone):
        assert_close(results[number], truth[number], one)


@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize("graphs", [False, True])
def test_joining_and_leaving_at_any_step(
    tape: TapeCapturer, monkeypatch: pytest.MonkeyPatch, classes: int | None, graphs: bool
) -> None:
    """A captured step serves every mixture of its numbers of rows and of tokens."""
    if graphs:  # on a GPU nobody reads the lengths on the host
        monkeypatch.setattr(checks, "values_between", lambda *_: None)
    model = unet(torch.float64, num_classes=classes)
    jobs, alone = zip(*(job(model, n) for n in range(len(TABLES))), strict=True)
    graph = "auto" if graphs else "off"
    slots = Slots(model, slots=4, max_rows=20, graph=graph)
    batch = Batch(slots, SHAPE)
    for join_at in ([0, 0, 1, 2, 2], [4, 0, 3, 0, 0]):
        results = run(slots, batch, [job(model, n)[0] for n in range(len(jobs))], join_at)
        for number, truth in enumerate(alone):
            assert_close(results[number], truth)
    assert slots.free == 4
    if graphs:
        assert slots.sizes == [1, 2, 3, 4, 6, 8]
        before = tape.captures
        # Each with a mask and without, all of one length and not, of 1, 2 and 4 chunks at most.
        assert 0 < before <= 15
        run(slots, batch, [job(model, n)[0] for n in range(len(jobs))], [4, 0, 3, 0, 0])
        assert tape.captures == before
    else:
        assert tape.captures == 0


def test_what_cannot_be_captured_runs_eagerly(tape: TapeCapturer) -> None:
    model = unet(torch.float64)
    one, alone = job(model, 0)
    slots = Slots(model, slots=2, max_rows=20)
    batch = Batch(slots, SHAPE)
    tape.failures.append(RuntimeError("no"))
    with pytest.warns(RuntimeWarning, match="capture failed, so the batch runs eagerly: Runt"):
        results = run(slots, batch, [one], [0])
    assert_close(results[0], alone)


@pytest.mark.parametrize("graphs", [False, True])
def test_an_estimate_is_the_x_0_that_an_engine_previews(
    tape: TapeCapturer, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """Of every sampler, in any company, and outside of a mask what it keeps."""
    if graphs:  # on a GPU nobody reads the lengths on the host
        monkeypatch.setattr(checks, "values_between", lambda *_: None)
    model = unet(torch.float64)
    slots = Slots(model, slots=len(TABLES), max_rows=20, graph="auto" if graphs else "off")
    batch, expected = Batch(slots, SHAPE), {}
    for number in range(len(TABLES)):
        one, _ = job(model, number)
        seat = slots.take(one)
        batch.join(seat)
        assert batch.estimate(seat) is None
        engine = Engine(model, SCHEDULE, graph="off", **TABLES[number])
        generator = torch.Generator().manual_seed(number)
        seen: list[Tensor] = []
        kept = {} if one.mask is None else {"x_0": one.x_0, "mask": one.mask}
        engine.sample(
            (1, *SHAPE),
            one.context,
            one.null_context,
            one.x_T,
            generator,
            **kept,
            preview=lambda step, t, x_0, seen=seen: seen.append(x_0),
        )
        expected[seat] = seen
    compared = steps = 0
    while batch.seats:
        steps += 1
        looked = steps % 3 > 0
        for seat in batch.step(looked):
            batch.leave(seat)
        for seat in batch.seats:
            found = batch.estimate(seat)
            assert (found is not None) == looked
            if found is not None and seat.rows.ends[seat.row - 1]:
                assert_close(found, expected[seat][seat.step - 1])
                compared += 1
    assert compared >= 2 * len(TABLES)


def test_what_does_not_fit_takes_no_slot() -> None:
    model = unet(torch.float64)
    one, _ = job(model, 3)
    slots = Slots(model, slots=2, max_rows=5)
    with pytest.raises(ValueError, match="steps: expected at most 5 model calls, got 6"):
        slots.take(one)
    two = Job(job(model, 0)[0].table, torch.randn(2, 5, 24).double(), None, one.x_T, None)
    with pytest.raises(ValueError, match="context: expected that of one image, got a batch of 2"):
        slots.take(two)
    assert slots.free == 2
