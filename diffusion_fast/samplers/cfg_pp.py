"""CFG++ (Chung et al. 2024, arXiv:2406.08070): to the guided x_0, along the unconditional epsilon.

Guidance then is an interpolation: its scale is small, between 0 and 2, and both halves of the model
run even at 1. Rows read the unconditional output beside the guided one, which no scheduler of
diffusers is given. As ComfyUI has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from ..ops import checks
from . import extrapolation
from .grids import Grid, sigma_grid
from .program import H1, U0, U_EPS, X0, Program, X, Y, Z, ancestral_step
from .sampler import Calls, Sampler, SamplerOptions

CallsOf = Callable[[Grid, SamplerOptions], Calls]


def euler(grid: Grid, options: SamplerOptions) -> Calls:
    """x' = x_0 + sigma' epsilon, ancestral with eta > 0."""
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        down, up = ancestral_step(sigma, after, program.eta)
        program.call(i, sigma, after, X0 + down * U_EPS + program.s_noise * up * Z)
    return program.calls()


def dpmpp_2m(grid: Grid, options: SamplerOptions) -> Calls:
    """DPM-Solver++(2M), whose history is the unconditional x_0."""
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        decay = after / sigma
        state = X0 + decay * (X - U0)
        if i and after:
            ahead, behind = math.log(sigma / after), math.log(program.sigmas[i - 1] / sigma)
            state = state + (1 - decay) * ahead / (2 * behind) * (X0 - H1)
        program.call(i, sigma, after, state, history=U0)
    return program.calls()


def dpmpp_2s_ancestral(grid: Grid, options: SamplerOptions) -> Calls:
    """DPM-Solver++(2S) of the unconditional x_0; guidance is that of a step's first call."""
    program = Program(grid, options)
    for i, sigma, after in program.steps():
        down, up = ancestral_step(sigma, after, program.eta)
        if down == 0:
            program.call(i, sigma, after, X0)
            continue
        middle, decay = math.sqrt(sigma * down), down / sigma
        first = middle / sigma * X + (1 - middle / sigma) * U0
        program.call(i, sigma, middle, first, y=decay * X + X0 - U0)
        program.call(i, middle, after, Y + (1 - decay) * U0 + program.s_noise * up * Z)
    return program.calls()


def unclipped(name: str, calls: CallsOf) -> CallsOf:
    """The same, which refuses to clip: both halves have an x_0."""

    def checked(grid: Grid, options: SamplerOptions) -> Calls:
        if options.clip < math.inf:
            checks.fail("clip_sample", f"False for {name}", options.clip_sample)
        return calls(grid, options)

    return checked


def _sampler(
    name: str, calls: CallsOf, *, ancestral: bool = False, calls_per_step: int = 1
) -> Sampler:
    return Sampler(
        name,
        sigma_grid,
        unclipped(name, calls),
        calls_per_step=calls_per_step,
        options={"eta": 1.0, "s_noise": 1.0} if ancestral else {},
        comfyui=name,
        unconditional=True,
    )


_RES = partial(extrapolation.res_multistep, cfg_pp=True)

SAMPLERS = (
    _sampler("euler_cfg_pp", euler),
    _sampler("euler_ancestral_cfg_pp", euler, ancestral=True),
    _sampler("dpmpp_2m_cfg_pp", dpmpp_2m),
    _sampler("dpmpp_2s_ancestral_cfg_pp", dpmpp_2s_ancestral, ancestral=True, calls_per_step=2),
    _sampler("res_multistep_cfg_pp", _RES),
    _sampler("res_multistep_ancestral_cfg_pp", _RES, ancestral=True),
    _sampler("gradient_estimation_cfg_pp", partial(extrapolation.gradient_estimation, cfg_pp=True)),
)
