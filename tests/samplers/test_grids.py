"""Time grids, above all where diffusers' are broken."""

from __future__ import annotations

import numpy as np
import pytest
from scheduler_parity import CORE

from diffusion_fast.samplers import make_table, table_from_grid
from diffusion_fast.samplers.grids import (
    Grid,
    GridOptions,
    ddim_grid,
    ddpm_grid,
    sigma_grid,
    solver_grid,
)
from diffusion_fast.schedule import DiffusionSchedule

T = 1000
GRIDS = (ddpm_grid, ddim_grid, solver_grid, sigma_grid)
FINITE_SIGMA = (
    "heun",
    *(s for s in CORE if s.startswith("unipc")),
)  # their own grids put a small SNR in its place
# Where floating point gives numpy.arange(T, 0, -T / n) one element too many.
ONE_TOO_MANY = [n for n in range(1, T + 1) if len(np.arange(T, 0, -(T / n))) != n]


@pytest.fixture(scope="module")
def schedule() -> DiffusionSchedule:
    return DiffusionSchedule(T)


@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("grid_of", GRIDS)
def test_every_number_of_steps_gives_valid_decreasing_timesteps(schedule, grid_of, spacing):
    for steps in range(1, T + 1):
        grid = grid_of(schedule, steps, GridOptions(spacing))
        t = grid.timesteps
        assert len(t) == steps, steps
        assert t[0] <= T - 1, steps
        assert t[-1] >= 0, steps
        assert (np.diff(t) < 0).all(), steps
        assert (grid.next_noise < grid.noise).all(), steps


@pytest.mark.parametrize("kind", ("linear", "scaled_linear", "cosine"))
@pytest.mark.parametrize("grid_of", GRIDS)
def test_karras_noise_levels_decrease_for_every_number_of_steps(grid_of, kind):
    schedule = DiffusionSchedule(T, kind=kind)
    for steps in (*range(1, 80), 333, 999, T):
        grid = grid_of(schedule, steps, GridOptions("karras"))
        t = grid.timesteps
        assert len(t) == steps, steps
        assert t[0] == T - 1, steps
        assert t[-1] >= 0, steps
        assert (np.diff(t) <= 0).all(), steps
        assert steps == 1 or t[1] < t[0], steps
        assert (np.diff(grid.noise / grid.signal) < 0).all(), steps


def test_karras_follows_the_paper(schedule):
    """Karras et al. 2022, eq. 5, with rho = 7."""
    grid = solver_grid(schedule, 10, GridOptions("karras"))
    sigma = np.sqrt(1 / schedule.alpha_bar - 1)
    low, high = sigma[0] ** (1 / 7), sigma[-1] ** (1 / 7)
    expected = [(high + i / 9 * (low - high)) ** 7 for i in range(10)]
    np.testing.assert_allclose(grid.noise / grid.signal, expected, rtol=1e-9)


def test_there_are_62_numbers_of_steps_where_trailing_used_to_break():
    assert len(ONE_TOO_MANY) == 62
    assert ONE_TOO_MANY[:3] == [61, 103, 121]


@pytest.mark.parametrize("sampler", CORE)
@pytest.mark.parametrize("steps", (61, 103, 121))
def test_trailing_has_the_steps_asked_for(schedule, sampler, steps):
    table = make_table(sampler, schedule, steps, timestep_spacing="trailing")
    assert table.steps == steps
    assert table.timesteps[0] == T - 1
    assert table.timesteps.min() >= 0


@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("sampler", CORE)
def test_all_steps_are_every_timestep(sampler, spacing):
    table = make_table(sampler, DiffusionSchedule(50), timestep_spacing=spacing)
    assert table.timesteps.unique().tolist() == pytest.approx(range(50))
    assert table.steps == 50


@pytest.mark.parametrize("steps", (999, 1000))
@pytest.mark.parametrize("sampler", CORE)
def test_an_offset_past_the_end_raises(schedule, sampler, steps):
    solver = solver_grid(schedule, steps, GridOptions("leading")).timesteps[0]
    sampler_is_solver = sampler.startswith(("dpm", "unipc"))
    first = solver if sampler_is_solver else steps - 1
    if first + 1 < T:
        table = make_table(sampler, schedule, steps, steps_offset=1)
        assert table.timesteps[0] == first + 1
    else:
        with pytest.raises(ValueError, match=r"steps_offset: expected at most 0 .*, got 1"):
            make_table(sampler, schedule, steps, steps_offset=1)


@pytest.mark.parametrize("spacing", ("leading", "linspace"))
@pytest.mark.parametrize("sampler", ("ddpm", "ddim", "euler", "euler_ancestral", "heun"))
def test_a_single_step_starts_at_the_noise(schedule, sampler, spacing):
    table = make_table(sampler, schedule, 1, timestep_spacing=spacing)
    assert table.timesteps.tolist() == [T - 1]
    assert table.rows[0, 4] == 1  # c_0: the step ends at x_0


@pytest.mark.parametrize("sampler", ("dpmpp_2m", "unipc"))
def test_karras_keeps_fractions_where_the_first_timesteps_would_coincide(sampler):
    cosine = DiffusionSchedule(T, kind="cosine")
    table = make_table(sampler, cosine, 20, timestep_spacing="karras")
    assert not table.integer_timesteps
    assert (table.timesteps.diff() < 0).all()
    linear = make_table(sampler, DiffusionSchedule(T), 20, timestep_spacing="karras")
    assert linear.integer_timesteps


@pytest.mark.parametrize("sampler", CORE)
def test_epsilon_at_zero_snr_raises(sampler):
    schedule = DiffusionSchedule(T, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="prediction_type: expected v_prediction or sample"):
        make_table(sampler, schedule, 10, timestep_spacing="trailing")
    make_table(sampler, schedule, 10, timestep_spacing="leading")  # starts below T - 1


def test_ddim_with_eta_at_zero_snr_is_finite():
    schedule = DiffusionSchedule(T, zero_terminal_snr=True)
    table = make_table(
        "ddim",
        schedule,
        10,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        eta=1.0,
    )
    assert table.signal == 0
    assert table.rows[:, :2].isfinite().all()
    assert table.rows[:, 3:].isfinite().all()


@pytest.mark.parametrize("sampler", [s for s in CORE if s not in FINITE_SIGMA])
def test_a_grid_that_starts_at_zero_snr_itself(sampler):
    """Exactly zero, as in a table of DDPM or DDIM: lambda is infinite there."""
    alpha_bar = np.array([0.0, 0.2, 0.5, 0.8, 0.95])
    grid = Grid.from_alpha_bars(alpha_bar, np.array([4.0, 3, 2, 1]))
    table = table_from_grid(sampler, grid, prediction_type="sample")
    assert table.rows[:, 3:].isfinite().all()


def test_ddim_goes_a_fixed_distance_and_ddpm_to_the_next_timestep(schedule):
    ddim = ddim_grid(schedule, 7, GridOptions("linspace"))
    ddpm = ddpm_grid(schedule, 7, GridOptions("linspace"))
    assert (ddim.timesteps == ddpm.timesteps).all()
    abar = schedule.alpha_bar
    t = ddim.timesteps.astype(int)
    np.testing.assert_allclose(ddpm.next_signal**2, [*abar[t[1:]], 1.0])
    np.testing.assert_allclose(ddim.next_signal**2, [*abar[t[:-1] - T // 7], 1.0])


@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace", "karras"))
@pytest.mark.parametrize("sampler", CORE)
def test_the_known_grids_of_fifty_steps(schedule, sampler, spacing):
    first = make_table(sampler, schedule, 50, timestep_spacing=spacing).timesteps[0].item()
    solver = sampler.startswith(("dpm", "unipc"))
    leading = 950 if solver else 980
    assert first == (leading if spacing == "leading" else T - 1)
