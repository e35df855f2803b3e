"""Loss weights: the papers' formulas, and that the prediction type changes no objective."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics import error

import diffusion_fast as df
from diffusion_fast.prediction import x0_coefficients
from diffusion_fast.training import P2, LossWeighting, MinSNR

SCHEDULE = df.DiffusionSchedule(timesteps=100)
SNR = SCHEDULE.alphas_cumprod.double() / (1 - SCHEDULE.alphas_cumprod.double())
TYPES = ("epsilon", "v_prediction", "sample")


def test_min_snr_as_in_the_paper() -> None:
    clipped = SNR.clamp(max=5)
    tables = {"epsilon": clipped / SNR, "v_prediction": clipped / (SNR + 1), "sample": clipped}
    for prediction_type, table in tables.items():
        assert error(MinSNR().table(SCHEDULE, prediction_type), table) < 1e-5
    assert MinSNR(gamma=1e9).table(SCHEDULE, "epsilon").tolist() == [1.0] * 100


def test_p2_as_in_the_paper() -> None:
    assert error(P2().table(SCHEDULE, "epsilon"), 1 / (1 + SNR)) < 1e-5
    assert error(P2(0.5, 2.0).table(SCHEDULE, "epsilon"), (2 + SNR).rsqrt()) < 1e-5
    assert P2(gamma=0).table(SCHEDULE, "epsilon").tolist() == pytest.approx([1.0] * 100)


@pytest.mark.parametrize("weighting", [MinSNR(), P2()], ids=repr)
@pytest.mark.parametrize("pair", [*itertools.combinations(TYPES, 2)], ids="-".join)
def test_the_prediction_type_does_not_change_the_objective(
    weighting: LossWeighting, pair: tuple[str, str]
) -> None:
    """One wrong guess of x_0, told as epsilon, v or x_0, costs the same."""
    x_0, guess, noise = (torch.randn(100, 3, dtype=torch.float64) for _ in range(3))
    alpha_bar = torch.from_numpy(SCHEDULE.alpha_bar)[:, None]
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = a * x_0 + s * noise
    costs = []
    for prediction_type in pair:
        target, told = (
            {"epsilon": (x_t - a * x) / s, "v_prediction": (a * x_t - x) / s, "sample": x}
            for x in (x_0, guess)
        )
        levels = x0_coefficients(prediction_type, a.numpy(), s.numpy())
        of_x, of_output = (torch.from_numpy(one) for one in levels)
        assert error(of_x * x_t + of_output * told[prediction_type], guess) < 1e-9
        wrong = (target[prediction_type] - told[prediction_type]).square().sum(1)
        costs.append(weighting.table(SCHEDULE, prediction_type) * wrong)
    torch.testing.assert_close(*costs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", [MinSNR(), P2(), P2(0.0)], ids=repr)
def test_at_an_snr_of_zero_the_error_in_x_0_has_no_weight(weighting: LossWeighting) -> None:
    zero = df.DiffusionSchedule(timesteps=10, zero_terminal_snr=True)
    tables = {kind: weighting.table(zero, kind) for kind in TYPES}
    assert all(table.isfinite().all() for table in tables.values())
    assert [tables[kind][-1].item() for kind in TYPES] == [1, 0, 0]
    snr = zero.alphas_cumprod / (1 - zero.alphas_cumprod)
    assert error(tables["sample"], tables["epsilon"] * snr) < 1e-5
    assert error(tables["v_prediction"], tables["sample"] / (1 + snr)) < 1e-5


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="gamma: expected a positive number, got 0"):
        MinSNR(0)
    with pytest.raises(ValueError, match="k: expected a positive number, got 0"):
        P2(k=0)
    with pytest.raises(ValueError, match="gamma: expected a number of at least 0"):
        P2(gamma=-1)
    with pytest.raises(ValueError, match="prediction_type: expected one of epsilon"):
        MinSNR().table(SCHEDULE, "noise")
