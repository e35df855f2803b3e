"""Orders of convergence in float64 on data whose score is known, and the stochastic samplers' law.

The grids are uniform in log-SNR and end at a noise level above zero. They span all levels at which
x_0's prediction changes: multistep solvers start (and UniPC ends) with a row of first order, whose
error is of second order in the step, but vanishes where the prediction is constant. The timestep
handed to the model is sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scheduler_parity import run_table
from torch import Tensor

from diffusion_fast.samplers import SAMPLERS, Grid, make_table, table_from_grid
from diffusion_fast.schedule import DiffusionSchedule

SIGMA_START, SIGMA_END = 200.0, 1e-3
ORDERS = {
    "ddim": 1,
    "euler": 1,
    "dpmpp_1": 1,
    "heun": 2,
    "dpmpp_2m": 2,
    "dpmpp_3m_diffusers": 2,
    "dpmpp_3m": 3,
    "unipc": 3,
    "unipc_3": 3,
    "dpm_2": 2,
    "exp_heun_2_x0": 2,
    "res_multistep": 2,
    "lms": 3,  # nearly 4
    "ipndm": 2,  # as if its steps were of one length
    "ipndm_v": 2,
    "deis": 2,  # nearly 3
    "deis_1": 1,
    "deis_2": 2,
    "deis_3": 2.8,  # towards 3
    "pndm": 2,
    "sa_solver_diffusers": 2,
    "sa_solver_noise": 2,
    "sa_solver": 3,
    "sa_solver_pece": 3,
    "dpm_solver_1": 1,
    "dpm_solver_2m": 2,
    "dpm_solver_2m_heun": 2,
    "dpm_solver_3m": 2,
    "dpmpp_2s": 2,
    "dpmpp_2s_heun": 2,
    "dpmpp_3s": 3,
    "dpm_solver_2s": 2,
    "dpm_solver_2s_heun": 2,
    "dpm_solver_3s": 3,
    "heunpp2": 1,
    "gradient_estimation": 0.9,
}
MEAN, STD = 0.7, 0.4  # of the Gaussian


def gaussian_epsilon(x: Tensor, sigma: float) -> Tensor:
    """E[epsilon | x] = -S score(x), for x = A x_0 + S epsilon and x_0 ~ N(MEAN, STD^2)."""
    A = 1 / math.sqrt(1 + sigma**2)
    S = sigma * A
    return S * (x - A * MEAN) / (A**2 * STD**2 + S**2)


def mixture_epsilon(x: Tensor, sigma: float) -> Tensor:
    """The same for an uneven mixture of three Gaussians."""
    A = 1 / math.sqrt(1 + sigma**2)
    S = sigma * A
    means, stds, weights = torch.tensor(
        [[-1.0, 0.2, 1.5], [0.4, 0.5, 0.3], [0.3, 0.5, 0.2]], dtype=torch.float64
    )
    variance = A**2 * stds**2 + S**2
    offset = x[..., None] - A * means
    share = torch.softmax(weights.log() - variance.log() / 2 - offset**2 / (2 * variance), -1)
    return S * (share * offset / variance).sum(-1)


def start() -> Tensor:
    return torch.linspace(-2, 2, 9, dtype=torch.float64)[None]


def solve(sampler: str, epsilon: Callable[[Tensor, float], Tensor], steps: int) -> Tensor:
    sigmas = np.geomspace(SIGMA_START, SIGMA_END, steps + 1)
    levels = np.geomspace(SIGMA_END / 2, 2 * SIGMA_START, 1000)  # SA-Solver asks for a schedule's
    grid = replace(Grid.from_sigmas(sigmas, sigmas[:-1]), levels=levels)
    grid = grid if sampler in ("sa_solver", "sa_solver_pece") else replace(grid, levels=None)
    options = {"eta": 0.0} if SAMPLERS[sampler].options.get("eta") else {}
    table = table_from_grid(sampler, grid, **options)
    return run_table(table, epsilon, start())[-1]


def gaussian_solution() -> Tensor:
    """The probability-flow ODE keeps (x - A m) / sqrt(A^2 s^2 + S^2)."""

    def law(sigma: float) -> tuple[float, float]:
        abar = 1 / (1 + sigma**2)
        return math.sqrt(abar) * MEAN, math.sqrt(abar * STD**2 + 1 - abar)

    (mean, std), (end_mean, end_std) = law(SIGMA_START), law(SIGMA_END)
    return end_mean + end_std * (start() - mean) / std


@pytest.fixture(scope="module")
def mixture_solution() -> Tensor:
    """By classical Runge-Kutta of fourth order, independent of the samplers: in
    xi = x / A and sigma the ODE is dxi / dsigma = epsilon."""
    steps = 2000
    log_sigmas = np.linspace(math.log(SIGMA_START), math.log(SIGMA_END), steps + 1)

    def slope(xi: Tensor, log_sigma: float) -> Tensor:
        sigma = math.exp(log_sigma)
        return sigma * mixture_epsilon(xi / math.sqrt(1 + sigma**2), sigma)

    xi = start() * math.sqrt(1 + SIGMA_START**2)
    h = log_sigmas[1] - log_sigmas[0]
    for u in log_sigmas[:-1]:
        k1 = slope(xi, u)
        k2 = slope(xi + h / 2 * k1, u + h / 2)
        k3 = slope(xi + h / 2 * k2, u + h / 2)
        k4 = slope(xi + h * k3, u + h)
        xi = xi + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return xi / math.sqrt(1 + SIGMA_END**2)


def order(sampler: str, epsilon: Callable[[Tensor, float], Tensor], solution: Tensor) -> float:
    coarse, fine = (
        (solve(sampler, epsilon, steps) - solution).abs().max().item() for steps in (160, 320)
    )
    return math.log2(coarse / fine)


@pytest.mark.parametrize("sampler", ORDERS)
def test_order_on_a_gaussian(sampler):
    assert order(sampler, gaussian_epsilon, gaussian_solution()) >= ORDERS[sampler] - 0.05


@pytest.mark.parametrize("sampler", ORDERS)
def test_order_on_a_mixture(sampler, mixture_solution):
    assert order(sampler, mixture_epsilon, mixture_solution) >= ORDERS[sampler] - 0.05


@pytest.mark.parametrize(
    "sampler, options",
    [
        ("ddpm", {"variance": "large"}),
        ("ddpm", {"variance": "small"}),
        ("ddim", {"eta": 0.5}),
        ("ddim", {"eta": 1.0}),
        ("euler_ancestral", {}),
        ("dpmpp_2m_sde", {"timestep_spacing": "trailing"}),
    ],
)
def test_stochastic_samplers_end_in_the_distribution_of_the_data(sampler, options):
    schedule = DiffusionSchedule()
    table = make_table(sampler, schedule, 500, **options)
    sigma = np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)
    samples = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0))
    x = run_table(table, lambda x, t: gaussian_epsilon(x, sigma[int(t)]), samples, seed=1)[-1]
    # The standard errors are 0.002 and 0.0014.
    assert x.mean().item() == pytest.approx(MEAN, abs=0.008)
    assert x.std().item() == pytest.approx(STD, abs=0.008)
