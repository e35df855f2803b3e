"""What a network predicts, and how x_0 and epsilon follow from it.

With x = A x_0 + S epsilon, A^2 + S^2 = 1, every prediction type m gives x_0 and epsilon as linear
functions of x and m, that is as two coefficients each:

    epsilon        m = epsilon              x_0 = (x - S m) / A       epsilon = m
    v_prediction   m = A epsilon - S x_0    x_0 = A x - S m           epsilon = S x + A m
    sample         m = x_0                  x_0 = m                   epsilon = (x - A m) / S

(Ho et al. 2020, eq. 15; Salimans & Ho 2022, appendix D.)
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .ops import checks
from .ops.add_noise import TARGETS
from .schedule import DiffusionSchedule, FloatArray

PREDICTION_TYPES = TARGETS


def x0_coefficients(
    prediction_type: str, signal: FloatArray, noise: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(a, b) with x_0 = a x + b m, for signal A and noise S of any one shape.

    Raises:
        ValueError: an unknown prediction type; epsilon where A = 0 (zero SNR: x holds no x_0).
    """
    checks.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "v_prediction":
        return signal, -noise
    if prediction_type == "sample":
        return np.zeros_like(signal), np.ones_like(signal)
    if not np.all(signal):
        _fail_at_zero_snr()
    return 1 / signal, -noise / signal


def epsilon_coefficients(
    prediction_type: str, signal: FloatArray, noise: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(e_x, e_m) with epsilon = e_x x + e_m m, for signal A and noise S of any one shape.

    Raises:
        ValueError: an unknown prediction type; sample where S = 0 (x holds no epsilon).
    """
    checks.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return np.zeros_like(signal), np.ones_like(signal)
    if prediction_type == "v_prediction":
        return noise, signal
    if not np.all(noise):
        checks.fail("prediction_type", "epsilon or v_prediction where there is no noise", "sample")
    return 1 / noise, -signal / noise


def predict_x0(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    schedule: DiffusionSchedule,
    prediction_type: str = "epsilon",
) -> Tensor:
    """x_0 from a model's output at x_t.

    Args:
        x_t, model_output: [B, ...], alike.
        t: int64 [B], values in [0, T).
        prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.

    Returns:
        x_0, like ``x_t``.

    Raises:
        ValueError: arguments that don't match, an unknown prediction type, epsilon at zero SNR.
    """
    signal, noise = _levels(x_t, model_output, t, schedule, prediction_type)
    if prediction_type == "v_prediction":
        x_0 = signal * x_t - noise * model_output
    elif prediction_type == "sample":
        x_0 = model_output
    else:
        # Only a schedule with zero terminal SNR pays for looking at t.
        if schedule.alpha_bar[-1] == 0 and bool((signal == 0).any()):
            _fail_at_zero_snr()
        x_0 = (x_t - noise * model_output) / signal
    return x_0.to(x_t.dtype)


def predict_epsilon(
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    schedule: DiffusionSchedule,
    prediction_type: str = "epsilon",
) -> Tensor:
    """epsilon from a model's output at x_t. Arguments and errors as in :func:`predict_x0`."""
    signal, noise = _levels(x_t, model_output, t, schedule, prediction_type)
    if prediction_type == "v_prediction":
        epsilon = noise * x_t + signal * model_output
    elif prediction_type == "sample":
        epsilon = (x_t - signal * model_output) / noise
    else:
        epsilon = model_output
    return epsilon.to(x_t.dtype)


def _levels(
    x_t: Tensor, model_output: Tensor, t: Tensor, schedule: DiffusionSchedule, prediction_type: str
) -> tuple[Tensor, Tensor]:
    checks.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    checks.floating("x_t", x_t)
    checks.like("model_output", model_output, "x_t", x_t)
    return schedule.gather("signal", t, x_t), schedule.gather("noise", t, x_t)


def _fail_at_zero_snr() -> None:
    checks.fail("prediction_type", "v_prediction or sample at zero SNR (alpha-bar = 0)", "epsilon")
