"""UniPC (Zhao et al. 2023, arXiv:2302.04867), data prediction.

A predictor (UniP) takes the step; once the model has been called at its result, a corrector (UniC)
takes the same step again with that new x_0 as one more point of the polynomial. The correction is
linear in the new x_0, so all of it but that term is kept as y and finished by the next row:

    corrected = y + w x0        x' = S'/S corrected + predictor's terms        y' = likewise
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np

from ..ops import checks
from ..schedule import DiffusionSchedule, FloatArray
from .grids import Grid, given, sigma_grid, solver_grid
from .sampler import Calls, DiffusersName, Sampler, SamplerOptions
from .table import INDEX


def calls(grid: Grid, options: SamplerOptions, order: int, *, bh1: bool = False) -> Calls:
    """Predictor of ``order`` 1, 2 or 3 with corrector; the first steps are of lower order.

    x as a model sees it is the predictor's. The last step isn't corrected, and is of first order
    if it goes to no noise.

    Args:
        bh1: the paper's B(h) = h, else "bh2", exp(h) - 1. They differ where a polynomial has a
            single point besides the step's start.
    """
    n = len(grid)
    with np.errstate(divide="ignore"):
        lam = np.log(grid.signal / grid.noise)
        step = -np.log(grid.ratio)  # h, infinite for a step to no noise
    made = Calls.one_per_step(grid)
    source, own = "x", 0.0  # weight of the new x0 in the correction
    for i, row in enumerate(made.coefficients):
        ahead = (
            n - i if options.lower_order_final or (grid.next_noise[-1] == 0 and i + 1 == n) else n
        )
        this_order = min(order, ahead, i + 1)
        decay = grid.next_noise[i] / grid.noise[i]
        past = lam[i - this_order + 1 : i][::-1] - lam[i]  # where h1, h2 lie, from this row

        history = grid.next_signal[i] * _weights(past, step[i], bh1)
        history[0] += decay * own
        _set(row, "c", source, decay, history)
        if i + 1 == n:
            break
        if i in (options.disable_corrector or ()):
            source, own = "x", 0.0
            continue
        history = grid.next_signal[i] * _weights(np.append(past, step[i]), step[i], bh1)
        history, new = history[:-1], history[-1]
        history[0] += decay * own
        _set(row, "d", source, decay, history)
        source, own = "y", new
    return made


def _set(row: FloatArray, letter: str, source: str, decay: float, history: FloatArray) -> None:
    row[INDEX[f"{letter}_{source}"]] = decay
    for k, weight in enumerate(history):
        row[INDEX[f"{letter}_{k}"]] = weight


def _weights(nodes: FloatArray, h: float, bh1: bool) -> FloatArray:
    """Weights of x_0 at tau = 0 and at ``nodes`` in the integral of exp(tau - h) x_0 over [0, h].

    Exact for polynomials through all of these, but with a single node besides 0 the paper's choice
    is the rule of weight 1/2.
    """
    total = -np.expm1(-h)  # integral of exp(tau - h)
    if len(nodes) == 0:
        return np.array([total])
    r = nodes / h
    if len(nodes) == 1:
        weights = 0.5 * (h if bh1 else total) / r
    else:
        powers = np.arange(1, len(nodes) + 1)
        moments = np.empty(len(nodes))  # integral of exp(tau - h) (tau / h)^j, by parts
        moment = total
        for j in powers:
            moment = 1 - j / h * moment
            moments[j - 1] = moment
        weights = np.asarray(np.linalg.solve(r[None, :] ** powers[:, None], moments), np.float64)
    return np.concatenate(([total - weights.sum()], weights))


def _sampler(name: str, order: int, solver_type: str) -> Sampler:
    settings = {"solver_order": order, "solver_type": solver_type, "predict_x0": True}
    return Sampler(
        name,
        solver_grid,
        partial(calls, order=order, bh1=solver_type == "bh1"),
        options={"lower_order_final": True, "disable_corrector": ()},
        diffusers=(DiffusersName("UniPCMultistepScheduler", settings),),
    )


def a1111_grid(schedule: DiffusionSchedule, steps: int, options: SamplerOptions) -> Grid:
    """The evenly spaced t of AUTOMATIC1111's web UI, from T - 1 to 0, where it ends.

    log(A) is interpolated between whole t. There are as many steps as numbers in 0, T // n,
    2 (T // n), ... below T, which may be more than n.

    Raises:
        ValueError: fewer than 3 steps, its order.
    """
    count = schedule.timesteps
    if options.count is not None:
        grid = given(schedule, steps, options, whole=False)
        assert grid is not None
        return grid
    n = len(range(0, count, count // steps))
    checks.whole_between("steps", n, 3)
    t = np.linspace(count - 1, 0, n + 1)
    log_signal = np.interp(t, np.arange(count), 0.5 * np.log(schedule.alpha_bar))
    return Grid.from_alpha_bars(np.exp(2 * log_signal), t[:-1])


LAST_SIGMA = 0.001  # in the place of 0


def comfyui(grid: Grid, options: SamplerOptions, *, bh1: bool) -> Calls:
    """As ComfyUI has it: order 3, at most n - 1, down to sigma = 0.001; the result is x / A."""
    n = len(grid)
    if grid.next_noise[-1] == 0:
        signal, noise = grid.next_signal.copy(), grid.next_noise.copy()
        signal[-1] = 1 / math.hypot(1, LAST_SIGMA)
        noise[-1] = LAST_SIGMA * signal[-1]
        grid = dataclasses.replace(grid, next_signal=signal, next_noise=noise)
    lowering = dataclasses.replace(options, lower_order_final=True)
    made = calls(grid, lowering, order=max(1, min(3, n - 1)), bh1=bh1)
    end = float(grid.next_signal[-1])
    for name in ("c_x", "c_0", "c_1", "c_2", "c_y"):
        made.coefficients[-1, INDEX[name]] /= end
    made.next_signal[-1], made.next_noise[-1] = 1.0, grid.next_noise[-1] / end
    return made


SAMPLERS = (
    _sampler("unipc_1", 1, "bh2"),
    _sampler("unipc", 2, "bh2"),
    _sampler("unipc_3", 3, "bh2"),
    _sampler("unipc_1_bh1", 1, "bh1"),
    _sampler("unipc_bh1", 2, "bh1"),
    _sampler("unipc_3_bh1", 3, "bh1"),
    Sampler(
        "unipc_a1111",
        a1111_grid,
        partial(calls, order=3, bh1=True),
        options={"lower_order_final": True, "disable_corrector": ()},
        a1111="UniPC",
        own_grid=True,
    ),
    *(
        Sampler(
            name,
            sigma_grid,
            partial(comfyui, bh1=name == "uni_pc"),
            comfyui=name,
            drops_penultimate=True,
        )
        for name in ("uni_pc", "uni_pc_bh2")
    ),
)
