r"""Which timesteps to train on: uniform, around the middle, or where the loss is.

Whatever the distribution p_t, a loss L_t weighted by 1 / (T p_t) has the expectation of uniform
sampling, (1 / T) \sum_t L_t: the objective stays, only its variance changes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops import checks


class UniformSampler:
    """Every timestep as often as any other; the base of the other samplers.

    Args:
        timesteps: number of timesteps of the schedule, T.
    """

    learns = False  # whether update() wants the losses

    def __init__(self, timesteps: int) -> None:
        checks.positive_int("timesteps", timesteps)
        self.timesteps = timesteps

    def to(self, device: torch.device) -> None:
        """Move the tables to where the timesteps are drawn."""

    def sample(
        self, batch: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Timesteps int64 [B], and what their losses have to be weighted with, float32 [B].

        None for the weight stands for ones.
        """
        t = torch.randint(self.timesteps, (batch,), generator=generator, device=device)
        return t, None

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from what was measured: timesteps int64 [B], one loss per image [B]."""

    def settings(self) -> dict[str, Any]:
        """What makes this sampler, as JSON can hold it."""
        return {"kind": type(self).__name__, "timesteps": self.timesteps}

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state_dict` of a sampler with the same settings.

        Raises:
            ValueError: it has other keys or shapes.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            checks.fail("state", f"the keys {sorted(own)}", sorted(state))
        for name, value in own.items():
            checks.shape(f"state[{name!r}]", state[name], value.shape, "of this sampler")
            value.copy_(state[name])


class LogitNormalSampler(UniformSampler):
    r"""More of the middle: logit(u) ~ N(mean, std^2), t = floor(u T) (Esser et al. 2024, eq. 19).

    Both ends, where the task is either trivial or hopeless, are drawn less. Drawn so and not
    weighted, the objective itself leans to the middle, as in the paper. ``unbiased`` keeps the
    uniform objective instead by weighting with 1 / (T p_t); the ends are then rare but heavy, and
    the gradient noisier than with uniform sampling where losses are alike.

    Args:
        timesteps: number of timesteps of the schedule, T.
        mean: above 0 for more noise.
        std: width of the normal distribution before the sigmoid.
        unbiased: weight the losses so that the objective stays that of uniform sampling.
    """

    def __init__(
        self, timesteps: int, mean: float = 0.0, std: float = 1.0, unbiased: bool = False
    ) -> None:
        super().__init__(timesteps)
        checks.finite("mean", mean)
        checks.finite("std", std)
        if std <= 0:
            checks.fail("std", "a positive number", std)
        self.mean, self.std, self.unbiased = mean, std, unbiased
        edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        z = (torch.logit(edges) - mean) / std  # -inf and inf at the ends
        cumulative = 0.5 * torch.erfc(-z / math.sqrt(2))
        self.probabilities = cumulative.diff()  # [T], float64
        if unbiased and not self.probabilities.all():
            checks.fail("std", "one that gives every timestep a chance, to be unbiased", std)

    def to(self, device: torch.device) -> None:
        self.probabilities = self.probabilities.to(device)

    def sample(
        self, batch: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        t, weight = _draw(self.probabilities.to(device), batch, generator)
        return t, weight if self.unbiased else None

    def settings(self) -> dict[str, Any]:
        own = {"mean": self.mean, "std": self.std, "unbiased": self.unbiased}
        return super().settings() | own


class ImportanceSampler(UniformSampler):
    r"""Timesteps in proportion to \sqrt{E[L_t^2]} (Nichol & Dhariwal 2021, section 3.3, eq. 18).

    The expectation is over the last losses seen at each timestep. Until every timestep has been
    seen that often, sampling is uniform. The weights keep the objective that of uniform sampling.

    Args:
        timesteps: number of timesteps of the schedule, T.
        history: losses kept per timestep.
        uniform: share of the draws that stays uniform, so that no timestep is ever forgotten.
    """

    learns = True

    def __init__(self, timesteps: int, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__(timesteps)
        checks.positive_int("history", history)
        if not 0 < uniform <= 1:
            checks.fail("uniform", "a share in (0, 1]", uniform)
        self.history, self.uniform = history, uniform
        # The last row is written by what must not be kept: no branch, so no wait for the GPU.
        self._losses = torch.zeros(timesteps + 1, history, dtype=torch.float64)
        self._counts = torch.zeros(timesteps, dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        self._losses, self._counts = self._losses.to(device), self._counts.to(device)

    @property
    def probabilities(self) -> Tensor:
        """p_t, float64 [T]."""
        rms = self._losses[:-1].square().mean(1).sqrt()
        mixed = (1 - self.uniform) * rms / rms.sum() + self.uniform / self.timesteps
        ready = self._counts.min() >= self.history
        # rms / rms.sum() is NaN where all losses are 0
        return torch.where(ready & (rms.sum() > 0), mixed, 1 / self.timesteps)

    def sample(
        self, batch: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return _draw(self.probabilities.to(device), batch, generator)

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        checks.timesteps("t", t, len(t), self.timesteps)
        checks.shape("losses", losses, t.shape, "[B]")
        same = t[:, None] == t[None, :]  # [B, B]
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
        # Rings: only the set of the last losses counts, not their order.
        slot = (self._counts[t] + earlier) % self.history
        row = torch.where(later < self.history, t, self.timesteps)
        self._losses[row, slot] = losses.to(self._losses)
        self._counts.index_add_(0, t, torch.ones_like(t))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"history": self.history, "uniform": self.uniform}

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self._losses[:-1], "counts": self._counts}


def _draw(
    probabilities: Tensor, batch: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Timesteps by the inverse of the distribution function, and 1 / (T p_t)."""
    device, count = probabilities.device, len(probabilities)
    u = torch.rand(batch, generator=generator, dtype=torch.float64, device=device)
    cumulative = probabilities.cumsum(0)
    t = torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp_(max=count - 1)
    return t, (1 / (count * probabilities[t])).float()
