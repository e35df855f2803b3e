"""What noise offset, input perturbation, masks and weights make of a batch, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import diffusion_fast as df
from diffusion_fast.training import Batches, Debiased, Trainer
from diffusion_fast.training.optimizers import OPTIMIZERS

SCHEDULE = df.DiffusionSchedule(timesteps=50, beta_start=1e-3, beta_end=0.3)


class Scale(nn.Module):
    """x times a number, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.factor * x


def loss_and_draws(
    weight: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The objective's loss of a batch x_0, and what it draws, in its order."""
    x_0 = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    data = Batches(TensorDataset(x_0), 4)
    trainer = Trainer(Scale(), data, SCHEDULE, seed=9, **options)
    loss = trainer.objective.backward((x_0, None, weight) if weight is not None else (x_0,))
    generator = torch.Generator().manual_seed(9)
    t = torch.randint(50, (4,), generator=generator)
    shapes = [(4, 3, 2, 2), *([(4, 3, 1, 1)] if "noise_offset" in options else [])]
    shapes += [(4, 3, 2, 2)] * ("input_perturbation" in options)
    draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return loss.detach(), x_0, t, draws


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    abar = torch.tensor(SCHEDULE.alpha_bar)[t].view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def near(found: Tensor, truth: Tensor) -> None:
    assert abs(found.item() / truth.item() - 1) < 1e-6  # the tables of levels are float32


def test_noise_offset() -> None:
    """eps = noise + 0.1 delta, both in x_t and as the target."""
    loss, x_0, t, (noise, delta) = loss_and_draws(noise_offset=0.1)
    signal, level = levels(t)
    eps = noise + 0.1 * delta
    near(loss, (0.7 * (signal * x_0 + level * eps) - eps).square().mean())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_input_perturbation(prediction: str) -> None:
    """x_t has eps + 0.2 xi, the target eps alone."""
    options = {"input_perturbation": 0.2, "prediction_type": prediction}
    loss, x_0, t, (eps, xi) = loss_and_draws(**options)
    signal, level = levels(t)
    target = eps if prediction == "epsilon" else signal * eps - level * x_0
    near(loss, (0.7 * (signal * x_0 + level * (eps + 0.2 * xi)) - target).square().mean())


def test_masks_and_weights() -> None:
    for weight in (torch.rand(4, 1, 2, 2, dtype=torch.float64), torch.rand(4).double()):
        loss, x_0, t, (eps,) = loss_and_draws(weight)
        signal, level = levels(t)
        square = (0.7 * (signal * x_0 + level * eps) - eps).square()
        near(loss, (square * weight.view(4, 1, *weight.shape[2:] or (1, 1))).mean())


def test_debiased() -> None:
    snr = SCHEDULE.alpha_bar / (1 - SCHEDULE.alpha_bar)
    found = Debiased().table(SCHEDULE, "epsilon").double().numpy()
    assert np.allclose(found, 1 / np.sqrt(snr), rtol=1e-6)
    # The same objective for v, whose error is (SNR + 1) / SNR times that in epsilon.
    of_v = Debiased().table(SCHEDULE, "v_prediction").double().numpy()
    assert np.allclose(of_v, np.sqrt(snr) / (snr + 1), rtol=1e-6)
    zero = df.DiffusionSchedule(kind="scaled_linear", zero_terminal_snr=True)
    assert Debiased().table(zero, "v_prediction")[-1] == 0


@pytest.mark.parametrize("bad", [{"noise_offset": -0.1}, {"input_perturbation": float("nan")}])
def test_errors(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(bad))}: expected a"):
        loss_and_draws(**bad)


@pytest.mark.parametrize("name", [one for one in OPTIMIZERS if one != "adamw8bit"])
def test_optimizers_go_on_where_they_were(name: str, tmp_path: Any) -> None:
    from diffusion_fast.training import Checkpoints

    data = TensorDataset(torch.randn(8, 3, 2, 2))

    def trainer() -> Trainer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 1))
        model.forward = lambda x, t: model[0](x)  # type: ignore[method-assign]
        options = {"optimizer": name, "learning_rate": 0.1, "weight_decay": 0.01, "seed": 1}
        folder = Checkpoints(tmp_path / name, every=3)
        return Trainer(model, Batches(data, 4), SCHEDULE, checkpoints=folder, **options)

    whole = trainer()
    whole.fit(6)
    truth = {n: v.clone() for n, v in whole.weights().items()}
    import shutil

    shutil.rmtree(tmp_path / name / "step_00000006")
    resumed = trainer()
    assert resumed.resume() == 3
    resumed.fit(6)
    assert all(torch.equal(value, truth[n]) for n, value in resumed.weights().items())
