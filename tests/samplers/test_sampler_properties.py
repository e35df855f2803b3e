"""What holds for every sampler, grid and prediction type."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_parity import CORE, run_table, toy_model, worst_error
from torch import Tensor

from diffusion_fast.ops import sampler_step
from diffusion_fast.ops.sampler_step import COLUMNS
from diffusion_fast.samplers import Grid, StepTable, make_table, table_from_grid
from diffusion_fast.samplers.table import INDEX
from diffusion_fast.schedule import KINDS, DiffusionSchedule

STOCHASTIC = tuple(s for s in CORE if s == "ddpm" or s == "euler_ancestral" or "sde" in s)
DETERMINISTIC = [s for s in CORE if s not in STOCHASTIC]


@st.composite
def settings_of_a_table(draw: st.DrawFn) -> dict:
    count = draw(st.sampled_from((1, 2, 3, 10, 100, 1000)))
    zero_snr = count > 1 and draw(st.booleans())
    # beta_end large enough for few timesteps to reach noise, small enough for 1000 of them
    schedule = DiffusionSchedule(
        count,
        beta_end=0.02 if count > 100 else 0.2,
        kind=draw(st.sampled_from(KINDS)),
        zero_terminal_snr=zero_snr,
    )
    return {
        "sampler": draw(st.sampled_from(CORE)),
        "schedule": schedule,
        "steps": draw(st.integers(1, min(count, 40)) | st.just(min(count, 100))),
        "timestep_spacing": draw(st.sampled_from(("leading", "trailing", "linspace", "karras"))),
        "steps_offset": draw(st.integers(0, 2)),
        "final_alpha": draw(st.sampled_from(("one", "first"))),
        "prediction_type": draw(
            st.sampled_from(
                ("v_prediction", "sample") if zero_snr else ("epsilon", "v_prediction", "sample")
            )
        ),
        "clip_sample": draw(st.sampled_from((False, True, 3.0))),
    }


def table_or_none(options: dict) -> StepTable | None:
    """None where the offset leaves the range, which must be what the error says."""
    try:
        return make_table(**options)
    except ValueError as error:
        message = str(error)
    assert options["steps_offset"] > 0
    assert options["timestep_spacing"] == "leading"
    assert message.startswith("steps_offset: expected at most")
    return None


def point_mass_model(table: StepTable, x_0: Tensor):
    """Returns the exact prediction: the m with a x + b m = x_0, row after row."""
    rows = iter(table.rows.tolist())

    def model(x: Tensor, t: float) -> Tensor:
        a, b = next(rows)[:2]
        return (x_0 - a * x) / b

    return model


@settings(max_examples=250, deadline=None)
@given(settings_of_a_table())
def test_tables_are_finite_and_their_timesteps_valid_and_decreasing(options):
    table = table_or_none(options)
    if table is None:
        return
    assert table.steps == options["steps"]
    assert len(table) == (2 * table.steps - 1 if table.sampler == "heun" else table.steps)
    finite = [i for i, name in enumerate(COLUMNS) if name != "clip"]
    assert table.rows[:, finite].isfinite().all()
    per_step = table.timesteps[torch.cat([torch.tensor([True]), table.step_of_row.diff() > 0])]
    assert per_step[0] <= options["schedule"].timesteps - 1
    assert table.timesteps.min() >= 0
    if options["timestep_spacing"] == "karras":
        assert (table.timesteps.diff() <= 0).all()
    else:
        assert (per_step.diff() < 0).all()
    assert 0 < table.initial_scale <= 1
    assert table.signal**2 + table.noise**2 == pytest.approx(1)


@settings(max_examples=150, deadline=None)
@given(settings_of_a_table())
def test_a_point_mass_is_recovered_exactly(options):
    options = options | {"final_alpha": "one", "clip_sample": False}
    table = table_or_none(options)
    if table is None:
        return
    stays_noisy = table.sampler == "ddpm" and table.timesteps[-1] > 0
    if table.sampler == "ddim" and options["timestep_spacing"] != "karras":
        # Its last step goes to t - T // n, which may be t = 0 and not yet the image.
        stays_noisy = table.timesteps[-1] >= options["schedule"].timesteps // options["steps"]
    if stays_noisy:
        return
    x_0, x_T = torch.randn(2, 1, 5, dtype=torch.float64)
    x = run_table(table, point_mass_model(table, x_0), x_T * table.initial_scale)[-1]
    torch.testing.assert_close(x, x_0, rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(settings_of_a_table(), st.sampled_from(DETERMINISTIC))
def test_deterministic_samplers_follow_a_point_mass_along_the_way(options, sampler):
    """x = A x_0 + S epsilon with one epsilon throughout, at the start of every row."""
    options |= {"sampler": sampler, "clip_sample": False, "prediction_type": "v_prediction"}
    if sampler == "ddim" and options["timestep_spacing"] in ("linspace", "trailing"):
        options["timestep_spacing"] = "karras"  # there its steps don't meet
    table = table_or_none(options)
    if table is None:
        return
    x_0, epsilon = torch.randn(2, 1, 5, dtype=torch.float64)
    trace = run_table(
        table,
        point_mass_model(table, x_0),
        table.signal * x_0 + table.noise * epsilon,
    )
    # x_0 = A x - S v, so that the columns are A and -S.
    expected = [a * x_0 - b * epsilon for a, b in table.rows[:, :2].tolist()]
    # Heun multiplies rounding by sigma / sigma', a few million for a floor of the SNR.
    assert worst_error(trace[:-1], expected) <= 1e-8


@settings(max_examples=100, deadline=None)
@given(settings_of_a_table())
def test_a_zero_coefficient_never_reads_its_buffer(options):
    table = table_or_none(options)
    if table is None:
        return
    x = torch.randn(1, 5, dtype=torch.float64)
    clean = run_table(table, toy_model, x)
    poisoned = run_table(table, toy_model, x, buffers=math.nan)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert clean[-1].isfinite().all()


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
def test_ddim_with_eta_one_at_every_step_is_ddpm_with_small_variance(prediction):
    schedule = DiffusionSchedule(100, beta_end=0.2)
    ddim = make_table("ddim", schedule, eta=1.0, prediction_type=prediction)
    ddpm = make_table("ddpm", schedule, variance="small", prediction_type=prediction)
    assert torch.equal(ddim.timesteps, ddpm.timesteps)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    error = worst_error(run_table(ddim, toy_model, x, 3), run_table(ddpm, toy_model, x, 3))
    assert error <= 1e-10


@pytest.mark.parametrize("other", ("dpmpp_1", "euler"))
@pytest.mark.parametrize("steps", (1, 10, 50, 100))
@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
def test_deterministic_ddim_is_first_order_dpm_solver(prediction, steps, other):
    """On the same grid: where T is a multiple of n, trailing is the same for all."""
    schedule = DiffusionSchedule(100, beta_end=0.2)
    options = {"timestep_spacing": "trailing", "prediction_type": prediction}
    ddim = make_table("ddim", schedule, steps, **options)
    solver = make_table(other, schedule, steps, **options)
    assert torch.equal(ddim.timesteps, solver.timesteps)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert worst_error(run_table(ddim, toy_model, x), run_table(solver, toy_model, x)) <= 1e-12


def test_ancestral_steps_are_the_posterior():
    """Euler-ancestral and DDPM with small variance take the same step (see samplers/euler.py)."""
    schedule = DiffusionSchedule(100, beta_end=0.2)
    euler = make_table("euler_ancestral", schedule, 10)
    ddpm = make_table("ddpm", schedule, 10, variance="small")
    torch.testing.assert_close(euler.rows, ddpm.rows, rtol=1e-12, atol=1e-12)


def test_the_third_order_step_is_exact_for_quadratic_x_0():
    """x_0 a quadratic in lambda: 3M integrates it exactly, the diffusers variant doesn't."""
    lam = np.linspace(-2, 2, 9)
    grid = Grid.from_sigmas(np.exp(-lam), lam[:-1] + 2)

    def x_0(lam: float) -> float:
        return 0.3 * lam**2 - 0.2 * lam + 1

    def integral(start: float, end: float) -> float:
        """exp(lam - end) x_0(lam) over the step; antiderivative by parts."""

        def primitive(u: float) -> float:
            return np.exp(u - end) * (0.3 * (u**2 - 2 * u + 2) - 0.2 * (u - 1) + 1)

        return primitive(end) - primitive(start)

    errors = {}
    for sampler in ("dpmpp_3m", "dpmpp_3m_diffusers"):
        row = table_from_grid(sampler, grid).rows[5]
        history = (x_0(lam[5]), x_0(lam[4]), x_0(lam[3]))
        weights = row[[INDEX["c_0"], INDEX["c_1"], INDEX["c_2"]]].tolist()
        step = sum(w * v for w, v in zip(weights, history, strict=True))
        errors[sampler] = abs(step - grid.next_signal[5] * integral(lam[5], lam[6]))
    assert errors["dpmpp_3m"] < 1e-14
    assert errors["dpmpp_3m_diffusers"] > 1e-4


def test_noise_is_drawn_only_where_a_row_reads_it():
    schedule = DiffusionSchedule()
    assert make_table("ddpm", schedule, 10).draws.tolist() == [True] * 9 + [False]
    assert not make_table("ddim", schedule, 10).draws.any()
    assert make_table("ddim", schedule, 10, eta=0.3).draws.tolist() == [True] * 9 + [False]


def test_only_what_is_needed_is_kept():
    schedule = DiffusionSchedule()
    needs = {
        sampler: (table.needs_y, table.needs_h1, table.needs_h2)
        for sampler in CORE
        for table in [make_table(sampler, schedule, 20)]
    }
    expected = {
        "ddpm": (False, False, False),
        "ddim": (False, False, False),
        "dpmpp_1": (False, False, False),
        "dpmpp_2m": (False, True, False),
        "dpmpp_3m": (False, True, True),
        "dpmpp_3m_diffusers": (False, True, True),
        "dpmpp_2m_sde": (False, True, False),
        "euler": (False, False, False),
        "euler_ancestral": (False, False, False),
        "heun": (True, False, False),
        "unipc": (True, True, False),
        "unipc_3": (True, True, True),
    }
    assert needs | expected == needs


@pytest.mark.parametrize("sampler", CORE)
def test_the_device_path_of_the_op_gives_the_same(sampler):
    """A row picked by a step counter in a tensor, as in a captured graph."""
    table = make_table(sampler, DiffusionSchedule(), 8, timestep_spacing="trailing")
    x = torch.randn(1, 5, dtype=torch.float64)
    expected = run_table(table, toy_model, x)
    kept = {name: torch.full_like(x, math.nan) for name in table.kept}
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(table.timesteps.tolist()):
        z = torch.randn(x.shape, generator=generator).double() if table.draws[i] else None
        step = torch.tensor([i])
        sampler_step(x, toy_model(x, t), table.rows, step, noise=z, **kept)
        torch.testing.assert_close(x, expected[i + 1], rtol=1e-10, atol=1e-12)
