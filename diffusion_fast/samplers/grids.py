"""Time grids: the noise levels that a sampler's steps go between, and the t its model is told.

The grids are those of diffusers (Lin et al. 2023, table 2, for the names of the spacings), so that
the same settings give the same image, with these differences:

- ``trailing`` always has the asked number of steps (floating point gives diffusers one more, at
  t = -1, for some numbers such as 61 of 1000).
- A single ``leading`` or ``linspace`` step of DDPM, DDIM, Euler and Heun starts at T - 1, not at 0.
- steps = T means every timestep for every spacing of DPM-Solver++ and UniPC (diffusers has no
  leading grid there, and a singular linspace one).
- An offset that moves a timestep past T - 1 raises.
- ``karras`` spans the schedule's full range of sigma for every sampler, DDPM and DDIM included.
  t is interpolated; all but Euler and Heun round it, unless the first two would coincide (diffusers
  then starts at the wrong step). Later ones may still coincide; their noise levels never do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from ..ops import checks
from ..schedule import DiffusionSchedule, FloatArray

SPACINGS = ("leading", "trailing", "linspace", "karras")
FINAL_ALPHAS = ("one", "first")

# Solvers in sigma or log-SNR need them finite: the SNR that diffusers puts in the place of zero.
LEAST_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True)
class Grid:
    """The steps of a sampler, each from x = A x_0 + S epsilon to x' = A' x_0 + S' epsilon'.

    Attributes:
        timesteps: t of each step's start, float64 [n].
        signal, noise: A and S at the start of each step, float64 [n].
        next_signal, next_noise: A' and S' at its end. Mostly the start of the next step, but DDIM
            goes to t - T // n.
    """

    timesteps: FloatArray
    signal: FloatArray
    noise: FloatArray
    next_signal: FloatArray
    next_noise: FloatArray

    @classmethod
    def from_sigmas(cls, sigmas: FloatArray, timesteps: FloatArray) -> Grid:
        """From n + 1 decreasing noise levels sigma = S / A and the n timesteps."""
        return cls.from_alpha_bars(1 / (1 + np.square(sigmas)), timesteps)

    @classmethod
    def from_alpha_bars(
        cls, alpha_bar: FloatArray, timesteps: FloatArray, next_alpha_bar: FloatArray | None = None
    ) -> Grid:
        """From alpha-bars [n + 1], or [n] for the starts and [n] for the ends."""
        if next_alpha_bar is None:
            alpha_bar, next_alpha_bar = alpha_bar[:-1], alpha_bar[1:]
        return cls(
            np.asarray(timesteps, np.float64),
            np.sqrt(alpha_bar),
            np.sqrt(1 - alpha_bar),
            np.sqrt(next_alpha_bar),
            np.sqrt(1 - next_alpha_bar),
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    def tail(self, start: int) -> Grid:
        """The steps from ``start`` on, for image-to-image."""
        return Grid(*(getattr(self, field.name)[start:] for field in fields(self)))

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


def ddpm_grid(
    schedule: DiffusionSchedule, steps: int, spacing: str, offset: int, final_alpha: str
) -> Grid:
    """n integer timesteps; each step goes to the next one."""
    if spacing == "karras":
        return _karras_grid(schedule, steps, final_alpha, rounded=True)
    t = _timesteps(schedule.timesteps, steps, spacing, offset)
    abar = schedule.alpha_bar
    return Grid.from_alpha_bars(np.append(abar[t], _final(abar, final_alpha)), t)


def ddim_grid(
    schedule: DiffusionSchedule, steps: int, spacing: str, offset: int, final_alpha: str
) -> Grid:
    """n integer timesteps; each step goes to t - T // n, whatever the next one is.

    The two are the same for leading spacing. Linspace makes them differ, most for few steps, and
    trailing by up to one; both are as diffusers does it.
    """
    if spacing == "karras":
        return _karras_grid(schedule, steps, final_alpha, rounded=True)
    t = _timesteps(schedule.timesteps, steps, spacing, offset)
    abar = schedule.alpha_bar
    end = t - schedule.timesteps // steps
    return Grid.from_alpha_bars(
        abar[t], t, np.where(end >= 0, abar[end.clip(0)], _final(abar, final_alpha))
    )


def solver_grid(
    schedule: DiffusionSchedule, steps: int, spacing: str, offset: int, final_alpha: str
) -> Grid:
    """DPM-Solver++ and UniPC: the first n of n + 1 integer timesteps.

    Leading spacing therefore starts at n (T // (n + 1)), far from the noise for many steps: at 500
    for n = 500 of 1000. There, trailing is the better choice.
    """
    if spacing == "karras":
        return _karras_grid(schedule, steps, final_alpha, rounded=True)
    count = schedule.timesteps
    if spacing == "trailing" or steps == count:
        t = _timesteps(count, steps, spacing, offset)
    elif spacing == "leading":
        t = _offset(np.arange(steps, 0, -1) * (count // (steps + 1)), offset, count)
    else:
        t = np.linspace(0, count - 1, steps + 1).round()[:0:-1].astype(np.int64)
    abar = _finite_snr(schedule)
    return Grid.from_alpha_bars(np.append(abar[t], _final(abar, final_alpha)), t)


def sigma_grid(
    schedule: DiffusionSchedule, steps: int, spacing: str, offset: int, final_alpha: str
) -> Grid:
    """Euler and Heun: n timesteps, fractional for linspace, where sigma is interpolated."""
    if spacing == "karras":
        return _karras_grid(schedule, steps, final_alpha, rounded=False)
    count = schedule.timesteps
    if spacing == "linspace" and steps > 1:
        t = np.linspace(0, count - 1, steps)[::-1]
    else:
        t = _timesteps(count, steps, spacing, offset).astype(np.float64)
    abar = _finite_snr(schedule)
    sigma = np.interp(t, np.arange(count), _sigma(abar))
    return Grid.from_sigmas(np.append(sigma, _sigma(_final(abar, final_alpha))), t)


def _timesteps(count: int, steps: int, spacing: str, offset: int) -> np.ndarray:
    """n decreasing integers in [0, T)."""
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


def _karras_grid(
    schedule: DiffusionSchedule, steps: int, final_alpha: str, rounded: bool, rho: float = 7.0
) -> Grid:
    """sigma^(1/rho) falls linearly (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    abar = _finite_snr(schedule)
    levels = _sigma(abar)
    high, low = levels[-1] ** (1 / rho), levels[0] ** (1 / rho)
    sigma = (high + np.linspace(0, 1, steps) * (low - high)) ** rho
    t = np.interp(np.log(sigma), np.log(levels), np.arange(len(levels)))
    if rounded and (steps == 1 or t[0].round() != t[1].round()):
        t = t.round()
    return Grid.from_sigmas(np.append(sigma, _sigma(_final(abar, final_alpha))), t)


def _finite_snr(schedule: DiffusionSchedule) -> FloatArray:
    return np.where(schedule.alpha_bar == 0, LEAST_ALPHA_BAR, schedule.alpha_bar)


def _final(alpha_bar: FloatArray, final_alpha: str) -> FloatArray:
    """alpha-bar at the end of the last step: no noise, or that of t = 0."""
    return np.ones(1) if final_alpha == "one" else alpha_bar[:1]


def _sigma(alpha_bar: FloatArray) -> FloatArray:
    return np.sqrt((1 - alpha_bar) / alpha_bar)
