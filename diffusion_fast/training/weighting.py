r"""Loss weights: how much each noise level counts.

A weighting is a function of the signal-to-noise ratio, SNR = abar / (1 - abar). The papers state
theirs for one prediction type; since the same error in x_0 shows up as

.. math:: \lVert \epsilon - \hat\epsilon \rVert^2 = SNR \, \lVert x_0 - \hat x_0 \rVert^2, \qquad
          \lVert v - \hat v \rVert^2 = (SNR + 1) \, \lVert x_0 - \hat x_0 \rVert^2,

each is kept here as a weight of the error in epsilon and multiplied by what the network's target
makes of it. So a weighting is one and the same objective, whatever the network predicts, also at an
SNR of zero, where the error in x_0 has no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..ops import checks
from ..ops.add_noise import TARGETS
from ..schedule import DiffusionSchedule, FloatArray


class LossWeighting(Protocol):
    """Anything that gives one weight per timestep."""

    def table(self, schedule: DiffusionSchedule, prediction_type: str) -> Tensor:
        """Weights of the squared error of the network's output, float32 [T]."""
        ...


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) on the error in x_0 (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    For epsilon that is min(SNR, gamma) / SNR, for v min(SNR, gamma) / (SNR + 1).

    Args:
        gamma: where the weight stops growing; 5 in the paper.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        checks.finite("gamma", self.gamma)
        if self.gamma <= 0:
            checks.fail("gamma", "a positive number", self.gamma)

    def table(self, schedule: DiffusionSchedule, prediction_type: str) -> Tensor:
        """Weights of the squared error of the network's output, float32 [T].

        Raises:
            ValueError: an unknown prediction type.
        """
        gamma = self.gamma
        return _table(schedule, prediction_type, lambda snr: gamma / np.maximum(snr, gamma))


@dataclass(frozen=True)
class P2:
    """1 / (k + SNR)^gamma on the error in epsilon (Choi et al. 2022, arXiv:2204.00227, eq. 8).

    Args:
        gamma: how strongly the nearly clean steps are played down; 1 (or 0.5) in the paper.
        k: keeps the weight finite where the SNR is small; 1 in the paper.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("gamma", self.gamma), ("k", self.k)):
            checks.finite(name, value)
        if self.gamma < 0:
            checks.fail("gamma", "a number of at least 0", self.gamma)
        if self.k <= 0:
            checks.fail("k", "a positive number", self.k)

    def table(self, schedule: DiffusionSchedule, prediction_type: str) -> Tensor:
        """Weights of the squared error of the network's output, float32 [T].

        Raises:
            ValueError: an unknown prediction type.
        """
        return _table(schedule, prediction_type, lambda snr: (self.k + snr) ** -self.gamma)


@dataclass(frozen=True)
class Debiased:
    """1 / sqrt(SNR) on the error in epsilon (Yu et al. 2023, arXiv:2310.08442, eq. 12)."""

    def table(self, schedule: DiffusionSchedule, prediction_type: str) -> Tensor:
        """Weights of the squared error of the network's output, float32 [T].

        Raises:
            ValueError: an unknown prediction type.
        """
        # The limit is for zero SNR, where the targets v and x_0 have a weight of 0.
        return _table(schedule, prediction_type, lambda snr: np.maximum(snr, 1e-12) ** -0.5)


def _table(
    schedule: DiffusionSchedule,
    prediction_type: str,
    of_epsilon: Callable[[FloatArray], FloatArray],
) -> Tensor:
    """Weights by the SNR of the error in epsilon, for another target."""
    checks.one_of("prediction_type", prediction_type, TARGETS)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    weight = of_epsilon(snr)
    if prediction_type != "epsilon":
        weight = weight * (snr if prediction_type == "sample" else schedule.alpha_bar)
    return torch.from_numpy(weight.astype(np.float32))
