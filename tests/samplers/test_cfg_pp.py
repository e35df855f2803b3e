"""CFG++ against its formulas, in float64, noise given: both halves of guidance, at small scales."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_fast.ops import sampler_step
from diffusion_fast.samplers import SAMPLERS, Grid, make_table, table_from_grid
from diffusion_fast.schedule import DiffusionSchedule

SIGMAS = [*np.geomspace(15.0, 0.05, 7).tolist(), 0.0]
# Those of ComfyUI; test_compvis.py has DDIM's.
NAMES = [name for name, one in SAMPLERS.items() if one.unconditional and one.comfyui]


def halves(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """x_0 of the unconditional and the conditional half."""
    u = torch.tanh(x / (1 + sigma))
    return 0.7 * u + 0.1, 0.8 * u + 0.3 * torch.sin(u.roll(1, -1) + 0.1 * sigma)


class Formula:
    """x = x_0 + sigma z, the samplers' loops as ComfyUI's formulas have them."""

    def __init__(self, scale: float, eta: float, s_noise: float, draw) -> None:
        self.scale, self.eta, self.s_noise, self.draw = scale, eta, s_noise, draw

    def both(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        uncond, cond = halves(x, sigma)
        return uncond + self.scale * (cond - uncond), uncond

    def split(self, start: float, end: float) -> tuple[float, float]:
        up = self.eta * end * math.sqrt(1 - (end / start) ** 2)
        return math.sqrt(end**2 - up**2), up

    def noise(self, up: float) -> Tensor | float:
        return self.s_noise * up * self.draw() if up else 0.0

    def euler(self, x: Tensor) -> Tensor:
        for start, end in itertools.pairwise(SIGMAS):
            x_0, uncond = self.both(x, start)
            down, up = self.split(start, end)
            x = x_0 + down * (x - uncond) / start + self.noise(up)
        return x

    euler_ancestral = euler

    def dpmpp_2m(self, x: Tensor) -> Tensor:
        old = None
        for i, (start, end) in enumerate(itertools.pairwise(SIGMAS)):
            x_0, uncond = self.both(x, start)
            mix = -end / start * uncond
            if old is not None and end:
                r = math.log(SIGMAS[i - 1] / start) / math.log(start / end)
                mix = mix + (1 - end / start) / (2 * r) * (x_0 - old)
            x, old = x_0 + mix + end / start * x, uncond
        return x

    def dpmpp_2s_ancestral(self, x: Tensor) -> Tensor:
        for start, end in itertools.pairwise(SIGMAS):
            x_0, uncond = self.both(x, start)
            down, up = self.split(start, end)
            change = x_0 - uncond
            if down:
                middle = math.sqrt(start * down)
                there = middle / start * x + (1 - middle / start) * uncond
                uncond = self.both(there, middle)[1]
            x = down / start * x + (1 - down / start) * uncond + self.noise(up) + change
        return x

    def res_multistep(self, x: Tensor) -> Tensor:
        before = None
        for i, (start, end) in enumerate(itertools.pairwise(SIGMAS)):
            x_0, uncond = self.both(x, start)
            down, up = self.split(start, end)
            if before is None or not down:
                x = x_0 + down * (x - uncond) / start
            else:
                h, last = math.log(start / down), math.log(before[0] / SIGMAS[i - 1])
                slope = 1 - (1 - math.exp(-h)) / h
                share = slope * h / last if last else 0.0
                x = math.exp(-h) * (x + x_0 - uncond) + (1 - math.exp(-h)) * uncond
                x = x + share * (before[1] - uncond)
            x = x + self.noise(up)
            before = down, uncond
        return x

    res_multistep_ancestral = res_multistep

    def gradient_estimation(self, x: Tensor) -> Tensor:
        before = None
        for start, end in itertools.pairwise(SIGMAS):
            x_0, uncond = self.both(x, start)
            slope = (x - uncond) / start
            x = x_0 + end * slope
            if before is not None and end:
                x = x + (end - start) * (slope - before)
            before = slope
        return x


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_formula(name: str, scale: float, prediction_type: str) -> None:
    options = {"eta": 0.7, "s_noise": 1.1} if "eta" in SAMPLERS[name].options else {}
    levels = np.array(SIGMAS)
    more = {"guidance_scale": scale, "prediction_type": prediction_type, **options}
    table = table_from_grid(name, Grid.from_sigmas(levels, levels[:-1]), **more)
    assert table.halves == "both"
    start = torch.Generator().manual_seed(1)
    x = SIGMAS[0] * torch.randn(2, 3, 4, generator=start, dtype=torch.float64)

    generator = torch.Generator().manual_seed(2)

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    given = {"eta": 0.0, "s_noise": 1.0, **options}
    truth = getattr(Formula(scale, draw=noise, **given), name.removesuffix("_cfg_pp"))(x)
    generator.manual_seed(2)
    state = x / math.hypot(1, SIGMAS[0])
    kept = {one: torch.full_like(x, math.nan) for one in table.kept}
    for i, sigma in enumerate(table.timesteps.tolist()):
        wide = state / table.levels[i, 0]
        both = halves(wide, sigma)
        if prediction_type == "epsilon":
            both = tuple((wide - one) / sigma for one in both)
        drawn = noise() if table.draws[i] else None
        sampler_step(state, torch.cat(both), table.rows, i, noise=drawn, **kept)
    torch.testing.assert_close(state / table.next_levels[-1, 0], truth, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_meaning_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"clip_sample: expected False for {name}"):
        make_table(name, DiffusionSchedule(), 5, clip_sample=True)


def test_other_samplers_read_no_half_alone() -> None:
    schedule = DiffusionSchedule()
    for name, sampler in SAMPLERS.items():
        assert make_table(name, schedule, 6).reads_unconditional == sampler.unconditional, name
