"""Time grids: the noise levels that a sampler's steps go between, and the t its model is told.

The grids are those of diffusers (Lin et al. 2023, table 2, for the names of the spacings), so that
the same settings give the same image, with these differences:

- ``trailing`` always has the asked number of steps (floating point gives diffusers one more, at
  t = -1, for some numbers such as 61 of 1000).
- A single ``leading`` or ``linspace`` step of DDPM, DDIM, Euler and Heun starts at T - 1, not at 0.
- steps = T means every timestep for every spacing of DPM-Solver++ and UniPC (diffusers has no
  leading grid there, and a singular linspace one).
- An offset that moves a timestep past T - 1 raises.
- ``karras``, ``exponential`` and ``beta`` as a spacing span the schedule's full range of sigma for
  every sampler, DDPM and DDIM included. t is interpolated; all but Euler and Heun make it whole,
  unless the first two would coincide (diffusers then starts at the wrong step). Later ones may
  still coincide; their noise levels never do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..ops import checks
from ..schedule import DiffusionSchedule, FloatArray

FINAL_ALPHAS = ("one", "first")

# Solvers in sigma or log-SNR need them finite: the SNR that diffusers puts in the place of zero.
LEAST_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True)
class GridOptions:
    """What chooses a grid beside the schedule and the number of steps.

    Attributes:
        timestep_spacing: ``"leading"``, ``"trailing"``, ``"linspace"``, ``"karras"``,
            ``"exponential"`` or ``"beta"``; the head of :mod:`.grids` says where these differ from
            diffusers.
        steps_offset: added to every timestep of leading spacing.
        final_alpha: alpha-bar after the last step: ``"one"`` (no noise) or ``"first"``, that of
            t = 0 (``set_alpha_to_one=False`` and ``final_sigmas_type="sigma_min"`` in diffusers).
        sigma_spacing: how Euler and Heun place the noise levels between those of the first and the
            last timestep: ``"karras"``, ``"exponential"``, ``"beta"``, or ``"log_linear"``, which
            goes from the schedule's highest to its lowest level and keeps the timesteps.
        sigma_min, sigma_max: other ends for ``sigma_spacing``, or for a spacing of noise levels.
        lambda_min: the lowest log(A / S) that DPM-Solver++ begins at (``lambda_min_clipped``).
        convention: whose grid a name means: ``"diffusers"``; ``"k_diffusion"`` (and
            AUTOMATIC1111's) or ``"comfyui"``, whose schedules :mod:`.schedules` has.
        whole_timesteps: round the timesteps of ``sigma_spacing``.
        timesteps: the grid itself: decreasing timesteps, one for each step.
        sigmas: the grid itself: decreasing noise levels, one more than there are steps; the last
            two may be equal.
    """

    timestep_spacing: str = "leading"
    steps_offset: int = 0
    final_alpha: str = "one"
    sigma_spacing: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    lambda_min: float | None = None
    convention: str = "diffusers"
    whole_timesteps: bool = False
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that is none of those above.
        """
        if self.convention == "diffusers":
            checks.one_of("timestep_spacing", self.timestep_spacing, SPACINGS)
        checks.one_of("final_alpha", self.final_alpha, FINAL_ALPHAS)
        checks.whole_between("steps_offset", self.steps_offset, 0)
        if self.sigma_spacing is not None:
            checks.one_of("sigma_spacing", self.sigma_spacing, (*SIGMAS, "log_linear"))
        for name in ("sigma_min", "sigma_max"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                checks.fail(name, "a number > 0", value)
        if self.timesteps is not None and self.sigmas is not None:
            checks.fail("sigmas", "None beside timesteps", "both")

    @property
    def count(self) -> int | None:
        """The number of steps of a grid of one's own."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return None if self.sigmas is None else len(self.sigmas) - 1


@dataclass(frozen=True)
class Grid:
    """The steps of a sampler, each from x = A x_0 + S epsilon to x' = A' x_0 + S' epsilon'.

    Attributes:
        timesteps: t of each step's start, float64 [n].
        signal, noise: A and S at the start of each step, float64 [n].
        next_signal, next_noise: A' and S' at its end. Mostly the start of the next step, but DDIM
            goes to t - T // n.
        initial_scale: the standard deviation of the state's pure noise at the first step.
        levels: the noise levels of the schedule's timesteps, [T], increasing; None where there is
            no schedule, and t is the noise level itself.
        whole: whether the model is told whole timesteps.
    """

    timesteps: FloatArray
    signal: FloatArray
    noise: FloatArray
    next_signal: FloatArray
    next_noise: FloatArray
    initial_scale: float = field(default=1.0, kw_only=True)
    levels: FloatArray | None = field(default=None, kw_only=True)
    whole: bool = field(default=False, kw_only=True)

    @classmethod
    def from_sigmas(cls, sigmas: FloatArray, timesteps: FloatArray) -> Grid:
        """From n + 1 decreasing noise levels sigma = S / A and the n timesteps."""
        return cls.from_alpha_bars(1 / (1 + np.square(sigmas)), timesteps)

    @classmethod
    def from_alpha_bars(
        cls, alpha_bar: FloatArray, timesteps: np.ndarray, next_alpha_bar: FloatArray | None = None
    ) -> Grid:
        """From alpha-bars [n + 1], or [n] for the starts and [n] for the ends."""
        if next_alpha_bar is None:
            alpha_bar, next_alpha_bar = alpha_bar[:-1], alpha_bar[1:]
        return cls(
            np.array(timesteps, np.float64, order="C"),
            np.sqrt(alpha_bar),
            np.sqrt(1 - alpha_bar),
            np.sqrt(next_alpha_bar),
            np.sqrt(1 - next_alpha_bar),
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    def part(self, start: int, end: int | None = None) -> Grid:
        """The steps from ``start`` on, up to ``end``; they start from an image."""
        arrays = {name: array[start:end] for name, array in self._arrays().items()}
        return replace(self, initial_scale=1.0, **arrays)

    def then(self, other: Grid) -> Grid:
        """These steps and those of another grid."""
        more = other._arrays()
        arrays: dict[str, Any] = {k: np.append(v, more[k]) for k, v in self._arrays().items()}
        return replace(self, **arrays)

    def _arrays(self) -> dict[str, Any]:
        names = ("timesteps", "signal", "noise", "next_signal", "next_noise")
        return {name: getattr(self, name) for name in names}

    def starting(self, scale: float) -> Grid:
        """The same with another standard deviation of the first state."""
        return replace(self, initial_scale=scale)

    def time_of(self, sigma: float) -> float:
        """What the model is told at a noise level between the grid's, interpolated in log sigma."""
        if self.levels is None:
            return sigma
        t = float(_time_of(np.array([sigma]), self.levels)[0])
        return round(t) if self.whole else t

    def level_of(self, t: float) -> float:
        """The noise level at a timestep, interpolated in log sigma; t itself without a schedule."""
        if self.levels is None:
            return t
        return float(np.exp(np.interp(t, np.arange(len(self.levels)), np.log(self.levels))))

    @property
    def sigma(self) -> FloatArray:
        """S / A at the start of each step; infinite at zero SNR."""
        with np.errstate(divide="ignore"):
            return self.noise / self.signal

    @property
    def ratio(self) -> FloatArray:
        """sigma' / sigma = exp(-h), h the step in lambda = log(A / S); 0 for a step to no noise."""
        return self.next_noise * self.signal / (self.noise * self.next_signal)

    @property
    def posterior_std(self) -> FloatArray:
        """Standard deviation of q(x' | x, x_0) (DDIM, Song et al. 2021, eq. 16 with eta = 1)."""
        return self.next_noise * np.sqrt(np.maximum(1 - self.ratio**2, 0))


def ddpm_grid(schedule: DiffusionSchedule, steps: int, options: GridOptions) -> Grid:
    """n integer timesteps; each step goes to the next one."""
    known = given(schedule, steps, options, whole=True)
    if known is not None:
        return known
    t = _timesteps(schedule.timesteps, steps, options)
    abar = schedule.alpha_bar
    return Grid.from_alpha_bars(np.append(abar[t], _final(abar, options)), t)


def ddim_grid(schedule: DiffusionSchedule, steps: int, options: GridOptions) -> Grid:
    """n integer timesteps; each step goes to t - T // n, whatever the next one is.

    The two are the same for leading spacing. Linspace makes them differ, most for few steps, and
    trailing by up to one; both are as diffusers does it.
    """
    known = given(schedule, steps, options, whole=True)
    if known is not None:
        return known
    t = _timesteps(schedule.timesteps, steps, options)
    return ddim_steps(schedule, t, schedule.timesteps // steps, options)


def ddim_steps(
    schedule: DiffusionSchedule, t: np.ndarray, distance: int, options: GridOptions
) -> Grid:
    """Steps from each of the integer timesteps t to t - distance."""
    abar, end = schedule.alpha_bar, t - distance
    after = np.where(end >= 0, abar[end.clip(0)], _final(abar, options))
    return Grid.from_alpha_bars(abar[t], t, after)


def solver_grid(schedule: DiffusionSchedule, steps: int, options: GridOptions) -> Grid:
    """DPM-Solver++ and UniPC: the first n of n + 1 integer timesteps.

    Leading spacing therefore starts at n (T // (n + 1)), far from the noise for many steps: at 500
    for n = 500 of 1000. There, trailing is the better choice.
    """
    known = given(schedule, steps, options, whole=True)
    if known is not None:
        return known
    count, spacing = schedule.timesteps, options.timestep_spacing
    abar = _finite_snr(schedule)
    last = count
    if options.lambda_min is not None:
        last = int((-np.log(_sigma(abar)) >= options.lambda_min).sum())
        if last < (steps if spacing == "linspace" else steps + 1):
            checks.fail("lambda_min", f"one that leaves more than {steps} timesteps", last)
    if spacing == "trailing" and last < count:
        t = np.arange(last, 0, -count / steps).round().astype(np.int64) - 1
    elif spacing == "trailing" or steps == count:
        t = _timesteps(count, steps, options)
    elif spacing == "leading":
        t = _offset(np.arange(steps, 0, -1) * (last // (steps + 1)), options.steps_offset, count)
    else:
        t = np.linspace(0, last - 1, steps + 1).round()[:0:-1].astype(np.int64)
    return Grid.from_alpha_bars(np.append(abar[t], _final(abar, options)), t)


def sigma_grid(schedule: DiffusionSchedule, steps: int, options: GridOptions) -> Grid:
    """Euler and Heun: n timesteps, fractional for linspace, where sigma is interpolated.

    They start from sigma z but for leading spacing, where the start is sqrt(1 + sigma^2) z.
    """
    grid = given(schedule, steps, options, whole=False)
    if grid is None:
        grid = _spaced_sigmas(schedule, steps, options)
    if options.sigma_spacing == "log_linear":
        levels = _sigma(_finite_snr(schedule))
        sigma = np.geomspace(levels[-1], levels[0], len(grid) + 1)
        grid = Grid.from_sigmas(sigma, grid.timesteps)
    leading = options.timestep_spacing == "leading"
    return grid.starting(1.0 if leading else float(grid.noise[0]))


def schedule_levels(schedule: DiffusionSchedule) -> FloatArray:
    """The noise levels of a schedule's timesteps, [T], finite and increasing."""
    return _sigma(_finite_snr(schedule))


def _spaced_sigmas(schedule: DiffusionSchedule, steps: int, options: GridOptions) -> Grid:
    count, spacing = schedule.timesteps, options.timestep_spacing
    if spacing == "linspace" and steps > 1:
        t = np.linspace(0, count - 1, steps)[::-1]
    else:
        t = _timesteps(count, steps, options).astype(np.float64)
    abar = _finite_snr(schedule)
    levels, end = _sigma(abar), _sigma(_final(abar, options))
    sigma = np.interp(t, np.arange(count), levels)
    if options.sigma_spacing in SIGMAS:
        sigma = _between(options.sigma_spacing, sigma[-1], sigma[0], steps, options)
        t = _time_of(sigma, levels)
        t = t.round() if options.whole_timesteps else t
    return Grid.from_sigmas(np.append(sigma, end), t)


def given(
    schedule: DiffusionSchedule, steps: int, options: GridOptions, *, whole: bool
) -> Grid | None:
    """The grid where noise levels or a list decide it; None for a spacing of timesteps."""
    abar = _finite_snr(schedule)
    levels, end = _sigma(abar), _sigma(_final(abar, options))
    spacing = options.timestep_spacing
    if options.timesteps is not None:
        t = _decreasing("timesteps", options.timesteps, 0, schedule.timesteps - 1)
        if whole:
            t = t.astype(np.int64)
        sigma = np.append(np.interp(t, np.arange(len(levels)), levels), end)
        if whole:
            return Grid.from_alpha_bars(np.append(abar[t], _final(abar, options)), t)
        return Grid.from_sigmas(sigma, t)
    if options.sigmas is not None:
        sigma = _decreasing("sigmas", options.sigmas, 0, np.inf)
        t = _time_of(sigma[:-1], levels)
        return Grid.from_sigmas(sigma, t.round() if whole else t)
    if spacing not in SIGMAS:
        return None
    sigma = _between(spacing, levels[0], levels[-1], steps, options)
    t = _time_of(sigma, levels)
    rounded = SIGMAS[spacing].rounding(t)
    if whole and (steps == 1 or rounded[0] != rounded[1]):
        t = rounded
    return Grid.from_sigmas(np.append(sigma, end), t)


def _decreasing(name: str, values: Sequence[float], low: float, high: float) -> FloatArray:
    """
    Raises:
        ValueError: values that are not numbers in [low, high], or that do not decrease.
    """
    least = 2 if name == "sigmas" else 1
    expected = f"at least {least} decreasing numbers in [{low:g}, {high:g}]"
    try:
        array = np.array([float(value) for value in values])
    except (TypeError, ValueError):
        checks.fail(name, expected, repr(values)[:60])
    inside = len(array) >= least and array[0] <= high and array[-1] >= low
    falls = np.diff(array) < 0
    if name == "sigmas" and inside:  # the last step may go nowhere
        falls[-1] = array[-1] <= array[-2]
    if not (inside and np.isfinite(array).all() and falls.all()):
        checks.fail(name, expected, array.tolist())
    return array


def _between(name: str, low: float, high: float, steps: int, options: GridOptions) -> FloatArray:
    low = low if options.sigma_min is None else options.sigma_min
    high = high if options.sigma_max is None else options.sigma_max
    if not low < high and steps > 1:
        checks.fail("sigma_min", f"a number below the highest noise level {high:g}", low)
    return SIGMAS[name].levels(low, high, np.linspace(0, 1, steps))


def _time_of(sigma: FloatArray, levels: FloatArray) -> FloatArray:
    """t of noise levels, interpolated in log sigma."""
    return np.interp(np.log(sigma), np.log(levels), np.arange(len(levels)))


@dataclass(frozen=True)
class SigmaSpacing:
    """Noise levels between two ends.

    Attributes:
        levels: of (low, high, u), the levels at u [n], which rises from 0 to 1.
        rounding: how solvers make the timesteps whole.
    """

    levels: Callable[[float, float, FloatArray], FloatArray]
    rounding: Callable[[FloatArray], FloatArray]


def _karras(low: float, high: float, u: FloatArray, rho: float = 7.0) -> FloatArray:
    """sigma^(1/rho) falls linearly (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return (first + u * (last - first)) ** rho


def _exponential(low: float, high: float, u: FloatArray) -> FloatArray:
    """log sigma falls linearly."""
    return np.exp(np.log(high) + u * (np.log(low) - np.log(high)))


def _beta(low: float, high: float, u: FloatArray) -> FloatArray:
    """Quantiles of Beta(0.6, 0.6) (Lee et al. 2024, arXiv:2407.12173)."""
    return low + beta_quantile(1 - u) * (high - low)


def beta_quantile(u: FloatArray) -> FloatArray:
    """Quantiles of Beta(0.6, 0.6).

    Raises:
        ImportError: SciPy is not installed.
    """
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        message = "a beta schedule needs SciPy: pip install diffusion-fast[schedules], or scipy"
        raise ImportError(message) from error
    return np.asarray(betaincinv(0.6, 0.6, u), np.float64)


SIGMAS = {
    "karras": SigmaSpacing(_karras, np.round),
    "exponential": SigmaSpacing(_exponential, np.floor),
    "lu": SigmaSpacing(_exponential, np.round),
    "beta": SigmaSpacing(_beta, np.floor),
}
SPACINGS = ("leading", "trailing", "linspace", *SIGMAS)


def _timesteps(count: int, steps: int, options: GridOptions) -> np.ndarray:
    """n decreasing integers in [0, T)."""
    spacing, offset = options.timestep_spacing, options.steps_offset
    if steps == count or (steps == 1 and spacing != "trailing"):
        t = np.arange(count - 1, count - 1 - steps, -1)
        return _offset(t, offset, count) if spacing == "leading" and steps == count else t
    if spacing == "leading":
        return _offset(np.arange(steps - 1, -1, -1) * (count // steps), offset, count)
    if spacing == "trailing":
        return np.arange(count, 0, -count / steps)[:steps].round().astype(np.int64) - 1
    return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)


def _offset(t: np.ndarray, offset: int, count: int) -> np.ndarray:
    if t[0] + offset >= count:
        checks.fail(
            "steps_offset",
            f"at most {count - 1 - t[0]} for {len(t)} leading steps of T = {count}",
            offset,
        )
    return t + offset


def _finite_snr(schedule: DiffusionSchedule) -> FloatArray:
    return np.where(schedule.alpha_bar == 0, LEAST_ALPHA_BAR, schedule.alpha_bar)


def _final(alpha_bar: FloatArray, options: GridOptions) -> FloatArray:
    """alpha-bar at the end of the last step: no noise, or that of t = 0."""
    return np.ones(1) if options.final_alpha == "one" else alpha_bar[:1]


def _sigma(alpha_bar: FloatArray) -> FloatArray:
    return np.sqrt((1 - alpha_bar) / alpha_bar)
