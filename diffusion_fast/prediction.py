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

from .ops import checks
from .ops.add_noise import TARGETS
from .schedule import FloatArray

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
        expected = "v_prediction or sample at zero SNR (alpha-bar = 0)"
        checks.fail("prediction_type", expected, "epsilon")
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
