"""Arguments of make_table: bad ones, clipping, image-to-image, and the table's own checks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scheduler_parity import CORE, run_table

from diffusion_fast.ops.sampler_step import COLUMNS
from diffusion_fast.samplers import make_table
from diffusion_fast.schedule import DiffusionSchedule

CLIP = COLUMNS.index("clip")


@pytest.fixture(scope="module")
def schedule() -> DiffusionSchedule:
    return DiffusionSchedule(100, beta_end=0.2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sampler": "pmls"}, "sampler: expected one of ddpm, ddim, .*, got 'pmls'"),
        ({"timestep_spacing": "even"}, "timestep_spacing: expected one of leading, trailing, lin"),
        ({"final_alpha": 1.0}, "final_alpha: expected one of one, first, got 1.0"),
        ({"prediction_type": "score"}, "prediction_type: expected one of epsilon, v_prediction"),
        ({"sampler": "ddpm", "variance": "learned"}, "variance: expected one of large, small"),
        ({"steps": 0}, r"steps: expected an integer in \[1, 100\], got 0"),
        ({"steps": 101}, r"steps: expected an integer in \[1, 100\], got 101"),
        ({"steps": 10.0}, r"steps: expected an integer in \[1, 100\], got 10.0"),
        ({"steps": True}, r"steps: expected an integer in \[1, 100\], got True"),
        ({"steps_offset": -1}, "steps_offset: expected an integer >= 0, got -1"),
        ({"eta": -0.1}, r"eta: expected a number in \[0, 1\], got -0.1"),
        ({"eta": 1.1}, r"eta: expected a number in \[0, 1\], got 1.1"),
        ({"eta": math.nan}, "eta: expected a finite number, got nan"),
        (
            {"sampler": "euler", "eta": 0.5},
            "eta: expected none for euler, which has no such option, got 0.5",
        ),
        ({"clip_sample": 0.0}, "clip_sample: expected False, True or a number > 0, got 0.0"),
        ({"clip_sample": -1.0}, "clip_sample: expected False, True or a number > 0, got -1.0"),
        ({"clip_sample": math.inf}, "clip_sample: expected a finite number, got inf"),
        ({"clip_sample": "yes"}, "clip_sample: expected a finite number, got 'yes'"),
        ({"strength": 0.0}, r"strength: expected a number in \(0, 1\], got 0.0"),
        ({"strength": 1.01}, r"strength: expected a number in \(0, 1\], got 1.01"),
        ({"strength": 0.05, "steps": 10}, "strength: expected at least 1 / steps = 0.1, got 0.05"),
        ({"guidance_scale": math.inf}, "guidance_scale: expected finite numbers, got inf"),
    ],
)
def test_bad_arguments(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_table(**{"sampler": "ddim", "schedule": schedule, "steps": 10} | arguments)


@pytest.mark.parametrize("clip, column", [(False, math.inf), (True, 1.0), (2.5, 2.5), (3, 3.0)])
@pytest.mark.parametrize("sampler", CORE)
def test_clip_column(schedule, sampler, clip, column):
    table = make_table(sampler, schedule, 5, clip_sample=clip)
    assert set(table.rows[:, CLIP].tolist()) == {column}


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
@pytest.mark.parametrize("sampler", CORE)
def test_wide_clipping_changes_nothing(schedule, sampler, prediction):
    """Where clipping switches the formula (DDIM, Heun), both must agree if nothing is clipped."""
    x = torch.randn(1, 6, dtype=torch.float64)
    plain, clipped = (
        run_table(
            make_table(
                sampler,
                schedule,
                8,
                timestep_spacing="trailing",
                prediction_type=prediction,
                clip_sample=clip,
            ),
            lambda x, t: 0.3 * torch.sin(x + t),
            x,
        )[-1]
        for clip in (False, 1e9)
    )
    torch.testing.assert_close(plain, clipped, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", CORE)
def test_clipping_bounds_the_image(schedule, sampler):
    if sampler == "ddpm":
        sampler = "ddim"  # its last row is noiseless on any grid
    table = make_table(sampler, schedule, 8, clip_sample=0.5)
    x = 30 * torch.randn(1, 6, dtype=torch.float64)
    assert run_table(table, lambda x, t: torch.zeros_like(x), x)[-1].abs().max() <= 0.5


@pytest.mark.parametrize("sampler", CORE)
def test_image_to_image_runs_the_end_of_the_grid(schedule, sampler):
    whole = make_table(sampler, schedule, 20)
    part = make_table(sampler, schedule, 20, strength=0.35)
    assert part.steps == 7
    skipped = len(whole) - len(part)
    assert torch.equal(part.timesteps, whole.timesteps[skipped:])
    assert part.step_of_row[0] == 0
    assert part.initial_scale == 1
    abar = schedule.alpha_bar[int(part.timesteps[0])]
    assert (part.signal, part.noise) == pytest.approx((abar**0.5, (1 - abar) ** 0.5))
    # Nothing earlier than the first row is read.
    x = torch.randn(1, 6, dtype=torch.float64)
    trace = run_table(part, lambda x, t: torch.tanh(x), x, buffers=math.nan)
    assert trace[-1].isfinite().all()


@pytest.mark.parametrize("sampler", CORE)
@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace", "karras"))
def test_start_of_the_state(schedule, sampler, spacing):
    """Euler and Heun start from sigma z as in diffusers, but for leading spacing."""
    table = make_table(sampler, schedule, 10, timestep_spacing=spacing)
    euler_like = sampler in ("euler", "euler_ancestral", "heun")
    expected = table.noise if euler_like and spacing != "leading" else 1.0
    assert table.initial_scale == expected
    part = make_table(sampler, schedule, 10, timestep_spacing=spacing, strength=0.5)
    assert part.initial_scale == 1  # an image comes with its noise


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": torch.zeros(3, 5)}, r"rows: expected shape \[N, len\(COLUMNS\)\]"),
        ({"rows": torch.ones(3, len(COLUMNS))}, "rows: expected torch.float64 on the CPU"),
        ({"timesteps": torch.zeros(2).double()}, r"timesteps: expected shape \[N\] = \[3\]"),
        ({"timesteps": torch.zeros(3)}, "timesteps: expected torch.float64 on the CPU"),
        ({"timesteps": torch.tensor([1.0, 0, -1]).double()}, "timesteps: expected finite values"),
        ({"step_of_row": torch.zeros(3)}, "step_of_row: expected torch.int64 on the CPU"),
        ({"rows": torch.zeros(3, len(COLUMNS)).double()}, "rows: expected a positive clip"),
        (
            {"rows": torch.full((3, len(COLUMNS)), math.inf).double()},
            r"rows: expected finite coefficients, got others in rows \[0, 1, 2\]",
        ),
        ({"halves": "none"}, "halves: expected one of conditional, unconditional, both"),
    ],
)
def test_a_table_checks_itself(schedule, change, message):
    table = make_table("ddim", schedule, 3)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(table, **change)


def test_a_table_needs_a_row(schedule):
    table = make_table("ddim", schedule, 3)
    empty = {name: getattr(table, name)[:0] for name in ("rows", "timesteps", "step_of_row")}
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        dataclasses.replace(table, **empty)


def test_a_table_is_frozen(schedule):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_table("ddim", schedule, 3).halves = "both"
