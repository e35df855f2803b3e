"""Prediction types as coefficients and as tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_fast.ops import add_noise
from diffusion_fast.prediction import (
    PREDICTION_TYPES,
    epsilon_coefficients,
    predict_epsilon,
    predict_x0,
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


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_tensor_functions_recover_x_0_and_epsilon(noised, kind):
    schedule, x_0, epsilon, t, pairs = noised
    x_t, target = pairs[kind]
    # The schedule's tables are float32, and 1 / sqrt(abar) is 157 at t = 999.
    torch.testing.assert_close(predict_x0(x_t, target, t, schedule, kind), x_0, rtol=0, atol=3e-5)
    torch.testing.assert_close(
        predict_epsilon(x_t, target, t, schedule, kind), epsilon, rtol=0, atol=3e-5
    )


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dtype_is_kept(kind, dtype):
    x = torch.randn(2, 3, dtype=dtype)
    for predict in (predict_x0, predict_epsilon):
        out = predict(x, x, torch.tensor([0, 5]), DiffusionSchedule(10), kind)
        assert (out.dtype, out.shape) == (dtype, x.shape)


@pytest.mark.parametrize("kind", ("v_prediction", "sample"))
def test_zero_snr_without_epsilon_prediction(kind):
    """At abar = 0 v is -x_0, so x_0 is found from the output alone."""
    schedule = DiffusionSchedule(10, zero_terminal_snr=True)
    x_0, epsilon = torch.randn(2, 1, 4)
    target = -x_0 if kind == "v_prediction" else x_0
    t = torch.tensor([9])
    torch.testing.assert_close(predict_x0(epsilon, target, t, schedule, kind), x_0)
    torch.testing.assert_close(predict_epsilon(epsilon, target, t, schedule, kind), epsilon)


def test_epsilon_at_zero_snr_raises():
    message = r"prediction_type: expected v_prediction or sample at zero SNR .*, got epsilon"
    with pytest.raises(ValueError, match=message):
        x0_coefficients("epsilon", np.array([0.5, 0.0]), np.array([0.8, 1.0]))
    schedule = DiffusionSchedule(10, zero_terminal_snr=True)
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=message):
        predict_x0(x, x, torch.tensor([3, 9]), schedule)
    assert predict_x0(x, x, torch.tensor([3, 8]), schedule).isfinite().all()


def test_epsilon_from_x_0_without_noise_raises():
    with pytest.raises(ValueError, match="prediction_type: expected epsilon or v_prediction"):
        epsilon_coefficients("sample", np.array([1.0]), np.array([0.0]))


@pytest.mark.parametrize("coefficients", (x0_coefficients, epsilon_coefficients))
def test_unknown_types_name_the_known(coefficients):
    message = "prediction_type: expected one of epsilon, v_prediction, sample, got 'score'"
    with pytest.raises(ValueError, match=message):
        coefficients("score", np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match=message):
        predict_x0(
            torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0]), DiffusionSchedule(), "score"
        )


@pytest.mark.parametrize("predict", (predict_x0, predict_epsilon))
def test_arguments_must_match(predict):
    schedule, x = DiffusionSchedule(10), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="model_output: expected shape of x_t"):
        predict(x, torch.zeros(2, 4), torch.tensor([0, 1]), schedule)
    with pytest.raises(ValueError, match=r"t: expected values in \[0, 10\)"):
        predict(x, x, torch.tensor([0, 10]), schedule)
