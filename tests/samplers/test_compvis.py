"""AUTOMATIC1111's DDIM, PLMS and DDIM CFG++ against their formulas, in float64, noise given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scheduler_parity import run_table, toy_model
from torch import Tensor

from diffusion_fast.ops import sampler_step
from diffusion_fast.samplers import make_table
from diffusion_fast.schedule import DiffusionSchedule

T = 1000
SCHEDULE = DiffusionSchedule(T, 0.00085, 0.012, "scaled_linear")
ABAR = SCHEDULE.alpha_bar
STEPS = (2, 3, 7, 20, 30)  # 7 and 30 are no divisors of T: there are more steps then


def timesteps(steps: int) -> list[int]:
    """Rising, as there."""
    return [min(t + 1, T - 1) for t in range(0, T, T // steps)]


def epsilon(x: Tensor, t: int, kind: str) -> Tensor:
    """Of the toy model, which predicts epsilon or v."""
    out = toy_model(x, t)
    return out if kind == "epsilon" else math.sqrt(1 - ABAR[t]) * x + math.sqrt(ABAR[t]) * out


def moved(x: Tensor, to_x0: Tensor, eps: Tensor, t: int, before: int, std: float = 0.0) -> Tensor:
    """DDIM's step from t, without its noise: to the x_0 of one epsilon, along another."""
    x_0 = (x - math.sqrt(1 - ABAR[t]) * to_x0) / math.sqrt(ABAR[t])
    return math.sqrt(ABAR[before]) * x_0 + math.sqrt(1 - ABAR[before] - std**2) * eps


def posterior(t: int, before: int) -> float:
    ratio = ABAR[t] / ABAR[before]
    return math.sqrt((1 - ABAR[before]) / (1 - ABAR[t]) * (1 - ratio))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("steps", STEPS)
def test_ddim(steps: int, eta: float, kind: str) -> None:
    table = make_table("DDIM", SCHEDULE, steps, eta=eta, prediction_type=kind)
    x, t = torch.randn(2, 3, dtype=torch.float64), timesteps(steps)
    assert table.timesteps.tolist() == t[:0:-1]
    assert table.initial_scale == 1
    ours = run_table(table, toy_model, x, 5)[-1]
    generator = torch.Generator().manual_seed(5)
    for i in range(len(t) - 1, 0, -1):
        e, std = epsilon(x, t[i], kind), eta * posterior(t[i], t[i - 1])
        x = moved(x, e, e, t[i], t[i - 1], std)
        if eta:
            x = x + std * torch.randn(x.shape, generator=generator).double()
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", STEPS)
def test_plms(steps: int, kind: str) -> None:
    table = make_table("PLMS", SCHEDULE, steps, prediction_type=kind)
    x, t = torch.randn(2, 3, dtype=torch.float64), timesteps(steps)
    ours = run_table(table, toy_model, x)[-1]
    old: list[Tensor] = []
    for i in range(len(t) - 1, 0, -1):
        e = epsilon(x, t[i], kind)
        if not old:
            there = moved(x, e, e, t[i], t[i - 1])
            mean = (e + epsilon(there, t[i - 1], kind)) / 2
        elif len(old) == 1:
            mean = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            mean = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mean = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x, old = moved(x, mean, mean, t[i], t[i - 1]), [*old, e]
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_ddim_cfg_pp(scale: float, eta: float, kind: str) -> None:
    """The scale is a 12.5th, and the direction is that of the unconditional half."""
    table = make_table(
        "DDIM CFG++", SCHEDULE, 7, eta=eta, guidance_scale=scale, prediction_type=kind
    )
    assert (table.halves, table.reads_unconditional) == ("both", True)
    x, t = torch.randn(2, 3, dtype=torch.float64), timesteps(7)
    draw = torch.Generator().manual_seed(3)
    state, kept = x.clone(), {name: torch.zeros_like(x) for name in table.kept}
    for i, at in enumerate(table.timesteps.tolist()):
        z = torch.randn(x.shape, generator=draw, dtype=x.dtype) if table.draws[i] else None
        halves = torch.cat((toy_model(-state, at), toy_model(state, at)))
        sampler_step(state, halves, table.rows, i, noise=z, **kept)
    draw.manual_seed(3)
    for i in range(len(t) - 1, 0, -1):
        cond = epsilon(x, t[i], kind)
        out = toy_model(-x, t[i])
        signal, noise = math.sqrt(ABAR[t[i]]), math.sqrt(1 - ABAR[t[i]])
        uncond = out if kind == "epsilon" else noise * x + signal * out
        std = eta * posterior(t[i], t[i - 1])
        guided = uncond + scale / 12.5 * (cond - uncond)
        x = moved(x, guided, uncond, t[i], t[i - 1], std)
        if eta:
            x = x + std * torch.randn(x.shape, generator=draw, dtype=x.dtype)
    torch.testing.assert_close(state, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["DDIM", "PLMS", "DDIM CFG++"])
def test_grids(name: str) -> None:
    with pytest.raises(ValueError, match=r"steps: expected at least 2 for .*, got 1"):
        make_table(name, SCHEDULE, 1)
    own = make_table(name, SCHEDULE, timesteps=[900, 400, 100])
    assert own.steps == 3
    assert np.isfinite(make_table(name, SCHEDULE, T).rows[:, :2]).all()


def test_an_order_of_ones_own_ends_without_noise() -> None:
    last = make_table("DDIM", SCHEDULE, timesteps=[900, 400, 100]).next_levels[-1]
    assert last.tolist() == [1.0, 0.0]
