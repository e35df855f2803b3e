"""Samplers written as their papers have them: sums of what a step has at hand, call after call.

The state here is x = x_0 + sigma epsilon (Karras et al. 2022). :class:`Program` rewrites it to the
variance-preserving form that the tables keep.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..prediction import epsilon_coefficients, x0_coefficients
from ..schedule import FloatArray
from .grids import Grid
from .sampler import Calls, SamplerOptions
from .table import INDEX, coefficients


class Sum:
    """A sum of what a step has, each with a coefficient: +, - and * by numbers."""

    def __init__(self, terms: Mapping[str, float]) -> None:
        self.terms = dict(terms)

    def __add__(self, other: Sum) -> Sum:
        total = dict(self.terms)
        for name, value in other.terms.items():
            total[name] = total.get(name, 0.0) + value
        return Sum(total)

    def __mul__(self, factor: float) -> Sum:
        return Sum({name: factor * value for name, value in self.terms.items()})

    __rmul__ = __mul__

    def __sub__(self, other: Sum) -> Sum:
        return self + other * -1.0


# The state; the model's x_0 and epsilon = (x - x_0) / sigma; the history, mostly x_0 of the calls
# before; what was kept; and noise. U0 and U_EPS are those of the unconditional half alone.
X, X0, EPS, Y, Z = (Sum({name: 1.0}) for name in ("x", "x0", "eps", "y", "z"))
U0, U_EPS = (Sum({name: 1.0}) for name in ("u0", "u_eps"))
H1, H2, H3 = HISTORY = tuple(Sum({name: 1.0}) for name in ("h1", "h2", "h3"))


class Program:
    """Collects the calls of a sampler.

    Args:
        grid: the steps.
        options: the prediction type, clipping and noise of the run.

    Attributes:
        sigmas: the noise levels of the steps' starts and of the last one's end, [n + 1].
        eta, s_noise: the noise that the options ask for.
        hats: the noise levels that the steps start from after churn (Karras et al. 2022, algorithm
            2), [n].
        churn: the noise that is added before the first call.
    """

    def __init__(self, grid: Grid, options: SamplerOptions) -> None:
        self.grid, self.options = grid, options
        end = grid.next_noise[-1] / grid.next_signal[-1]
        self.sigmas = [*grid.sigma.tolist(), float(end)]
        self.eta, self.s_noise = options.eta or 0.0, options.s_noise or 0.0
        most = min((options.s_churn or 0.0) / len(grid), math.sqrt(2) - 1)
        low, high = options.s_tmin or 0.0, math.inf if options.s_tmax is None else options.s_tmax
        self.hats = [s * (1 + most * (low <= s <= high)) for s in self.sigmas[:-1]]
        self.churn = self.s_noise * math.sqrt(self.hats[0] ** 2 - self.sigmas[0] ** 2)
        self._times = dict(zip(self.sigmas[:-1], grid.timesteps.tolist(), strict=True))
        self._rows: list[FloatArray] = []
        self._points: list[tuple[float, ...]] = []

    def call(
        self,
        step: int,
        sigma: float,
        after: float,
        x: Sum,
        y: Sum | None = None,
        history: Sum | None = X0,
    ) -> None:
        """A model call at noise level ``sigma``, which leads to the state x at level ``after``.

        Args:
            step: the step that the call belongs to.
            y: what to keep; None for nothing.
            history: what enters the history; None for nothing, which leaves it as it is.
        """
        signal, signal_after = 1 / math.hypot(1, sigma), 1 / math.hypot(1, after)
        noise, row = sigma * signal, coefficients(1)[0]
        unconditional = self._unconditional(signal, noise)
        for name, value in _lowered(x, self._epsilon(signal, noise), unconditional).items():
            row[INDEX[_COLUMNS[name]]] += signal_after * value / (signal if name == "x" else 1.0)
        # epsilon of what is kept goes by way of x_0: a row keeps no model output
        by_x0 = {"x": 1 / sigma, "x0": -1 / sigma}
        kept = {} if y is None else _lowered(y, by_x0, unconditional)
        for name, value in kept.items():
            row[INDEX[_KEPT[name]]] += value / (signal if name == "x" else 1.0)
        row[INDEX["e_0"]] = 0.0
        entering = Sum({}) if history is None else history
        for name, value in _lowered(entering, self._epsilon(signal, noise), unconditional).items():
            row[INDEX[_ENTERING[name]]] += value / (signal if name == "x" else 1.0)
        self._rows.append(row)
        t = self._times.get(sigma)
        t = self.grid.time_of(sigma) if t is None else t
        self._points.append((step, t, signal, noise, signal_after, after * signal_after))

    def _epsilon(self, signal: float, noise: float) -> dict[str, float]:
        """epsilon of x and the model's output, or of x_0 where that is clipped."""
        if self.options.clip < math.inf:
            return {"x": signal / noise, "x0": -signal / noise}
        e_x, e_m = epsilon_coefficients(
            self.options.prediction_type, np.array([signal]), np.array([noise])
        )
        return {"x": float(e_x[0]) * signal, "m": float(e_m[0])}

    def _unconditional(self, signal: float, noise: float) -> dict[str, dict[str, float]]:
        """x_0 and epsilon of the unconditional output u; nothing of them is clipped."""
        kind, levels = self.options.prediction_type, (np.array([signal]), np.array([noise]))
        a, b = x0_coefficients(kind, *levels)
        e_x, e_m = epsilon_coefficients(kind, *levels)
        return {
            "u0": {"x": float(a[0]) * signal, "u": float(b[0])},
            "u_eps": {"x": float(e_x[0]) * signal, "u": float(e_m[0])},
        }

    def calls(self, draws: np.ndarray | None = None) -> Calls:
        """All calls so far; ``draws`` as in :class:`~.sampler.Calls`."""
        step, t, *levels = map(np.ascontiguousarray, np.array(self._points).T)
        signal, noise, after, after_noise = levels
        rows, steps = np.stack(self._rows), step.astype(np.int64)
        made = Calls(rows, steps, t, signal, noise, after, after_noise)
        return dataclasses.replace(made, draws=draws, churn=self.churn)

    def steps(self) -> Iterator[tuple[int, float, float]]:
        """(number, noise level at the start, at the end) of each step.

        A step to its own level, as the last one may be, is a call that changes nothing.
        """
        for i, (sigma, after) in enumerate(itertools.pairwise(self.sigmas)):
            if math.isclose(sigma, after, rel_tol=1e-12):
                self.call(i, sigma, sigma, X)
            else:
                yield i, self.hats[i], after

    def raised(self, i: int) -> tuple[float, Sum]:
        """The level that step i ends at, and the noise that leads there: the next step's churn."""
        after = self.sigmas[i + 1]
        level = self.hats[i + 1] if i + 1 < len(self.hats) else after
        return level, self.s_noise * math.sqrt(level**2 - after**2) * Z


_COLUMNS = {
    **{"x": "c_x", "x0": "c_0", "m": "c_m", "h1": "c_1", "h2": "c_2", "h3": "c_3"},
    **{"y": "c_y", "u": "c_u", "z": "s"},
}
_KEPT = {"x": "d_x", "x0": "d_0", "h1": "d_1", "h2": "d_2", "h3": "d_3", "y": "d_y", "u": "d_u"}
_ENTERING = {"x": "e_x", "x0": "e_0", "m": "e_m", "u": "e_u"}


def _lowered(
    total: Sum, epsilon: Mapping[str, float], unconditional: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """The sum in terms that a row reads: without epsilons and the unconditional x_0."""
    terms = dict(total.terms)
    for name, parts in {"eps": epsilon, **unconditional}.items():
        weight = terms.pop(name, 0.0)
        for part, value in parts.items():
            if weight:
                terms[part] = terms.get(part, 0.0) + weight * value
    return terms


def toward(x: Sum, x0: Sum, sigma: float, after: float) -> Sum:
    """The state at level ``after`` of a straight line from x at ``sigma`` to x_0."""
    return after / sigma * x + (1 - after / sigma) * x0


def ancestral_step(start: float, end: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up) of a step: the level to step down to, the noise to add then.

    eta = 1 gives the posterior's noise, eta = 0 none (Song et al. 2021, eq. 16).
    """
    up = min(end, eta * end * math.sqrt(max(1 - (end / start) ** 2, 0.0)))
    return math.sqrt(max(end**2 - up**2, 0.0)), up
