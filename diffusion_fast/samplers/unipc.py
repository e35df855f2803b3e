"""UniPC (Zhao et al. 2023, arXiv:2302.04867), data prediction, B(h) = exp(h) - 1 ("bh2").

A predictor (UniP) takes the step; once the model has been called at its result, a corrector (UniC)
takes the same step again with that new x_0 as one more point of the polynomial. The correction is
linear in the new x_0, so all of it but that term is kept as y and finished by the next row:

    corrected = y + w x0        x' = S'/S corrected + predictor's terms        y' = likewise
"""

from __future__ import annotations

import numpy as np

from ..schedule import FloatArray
from .grids import Grid
from .table import INDEX, rows_of


def unipc_rows(grid: Grid, order: int = 2) -> FloatArray:
    """Predictor of ``order`` (2 or 3) with corrector; the first and last steps are of lower order.

    x as a model sees it is the predictor's, and the last step, to no noise, isn't corrected.
    """
    n = len(grid)
    with np.errstate(divide="ignore"):
        lam = np.log(grid.signal / grid.noise)
        step = -np.log(grid.ratio)  # h, infinite for a step to no noise
    rows = rows_of(n)
    own = 0.0  # weight of the new x0 in the correction
    for i in range(n):
        this_order = min(order, n - i, i + 1)
        decay = grid.next_noise[i] / grid.noise[i]
        past = lam[i - this_order + 1 : i][::-1] - lam[i]  # where h1, h2 lie, from this row
        source = "y" if i else "x"

        history = grid.next_signal[i] * _weights(past, step[i])
        history[0] += decay * own
        _set(rows[i], "c", source, decay, history)
        if i + 1 < n:
            history = grid.next_signal[i] * _weights(np.append(past, step[i]), step[i])
            history, new = history[:-1], history[-1]
            history[0] += decay * own
            _set(rows[i], "d", source, decay, history)
            own = new
    return rows


def _set(row: FloatArray, letter: str, source: str, decay: float, history: FloatArray) -> None:
    row[INDEX[f"{letter}_{source}"]] = decay
    for k, weight in enumerate(history):
        row[INDEX[f"{letter}_{k}"]] = weight


def _weights(nodes: FloatArray, h: float) -> FloatArray:
    """Weights of x_0 at tau = 0 and at ``nodes`` in the integral of exp(tau - h) x_0 over [0, h].

    Exact for polynomials through all of these, but with a single node besides 0 the paper's choice
    is the rule of weight 1/2.
    """
    total = -np.expm1(-h)  # integral of exp(tau - h)
    if len(nodes) == 0:
        return np.array([total])
    r = nodes / h
    if len(nodes) == 1:
        weights = 0.5 * total / r
    else:
        powers = np.arange(1, len(nodes) + 1)
        moments = np.empty(len(nodes))  # integral of exp(tau - h) (tau / h)^j, by parts
        moment = total
        for j in powers:
            moment = 1 - j / h * moment
            moments[j - 1] = moment
        weights = np.linalg.solve(r[None, :] ** powers[:, None], moments)
    return np.concatenate(([total - weights.sum()], weights))
