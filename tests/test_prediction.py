"""Prediction types as coefficients and as tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_fast.ops import add_noise
from diffusion_fast.prediction import (
    PREDICTION_TYPES,
    epsilon_coefficients,
    x0_coefficients,
)
from diffusion_fast.schedule import DiffusionSchedule


@pytest.fixture(scope="module")
def noised():
    """x_0, epsilon, t, and per prediction type x_t with the perfect prediction."""
    schedule = DiffusionSchedule(1000)
    generator = torch.Generator().manual_seed(0)
    x_0, epsilon = torch.randn((2, 4, 3, 2), generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 100, 500, 999])
    signal = schedule.alphas_cumprod.double().sqrt()
    sigma = (1 - schedule.alphas_cumprod.double()).sqrt()
    pairs = {
        kind: add_noise(x_0, epsilon, t, signal, sigma, target=kind) for kind in PREDICTION_TYPES
    }
    return schedule, x_0, epsilon, t, pairs


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_coefficients_recover_x_0_and_epsilon_from_the_training_target(noised, kind):
    schedule, x_0, epsilon, t, pairs = noised
    x_t, target = pairs[kind]
    abar = schedule.alpha_bar[t.numpy()].reshape(-1, 1, 1)
    a, b = x0_coefficients(kind, np.sqrt(abar), np.sqrt(1 - abar))
    e_x, e_m = epsilon_coefficients(kind, np.sqrt(abar), np.sqrt(1 - abar))
    np.testing.assert_allclose(a * x_t.numpy() + b * target.numpy(), x_0, atol=1e-12)
    np.testing.assert_allclose(e_x * x_t.numpy() + e_m * target.numpy(), epsilon, atol=1e-12)


@pytest.mark.parametrize("kind", ("v_prediction", "sample"))
def test_zero_snr_without_epsilon_prediction(kind):
    """At abar = 0 v is -x_0, so x_0 is found from the output alone."""
    signal, noise = np.zeros(1), np.ones(1)
    (a,), (b,) = x0_coefficients(kind, signal, noise)
    assert (a, b) == (0, -1 if kind == "v_prediction" else 1)
    (e_x,), (e_m,) = epsilon_coefficients(kind, signal, noise)
    assert (e_x, e_m) == (1, 0)


def test_epsilon_at_zero_snr_raises():
    message = r"prediction_type: expected v_prediction or sample at zero SNR .*, got epsilon"
    with pytest.raises(ValueError, match=message):
        x0_coefficients("epsilon", np.array([0.5, 0.0]), np.array([0.8, 1.0]))


def test_epsilon_from_x_0_without_noise_raises():
    with pytest.raises(ValueError, match="prediction_type: expected epsilon or v_prediction"):
        epsilon_coefficients("sample", np.array([1.0]), np.array([0.0]))


@pytest.mark.parametrize("coefficients", (x0_coefficients, epsilon_coefficients))
def test_unknown_types_name_the_known(coefficients):
    message = "prediction_type: expected one of epsilon, v_prediction, sample, got 'score'"
    with pytest.raises(ValueError, match=message):
        coefficients("score", np.ones(1), np.ones(1))
