"""Training on a GPU: our kernels against plain PyTorch, from the same seed; resuming there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import diffusion_fast as df
from diffusion_fast import ops
from diffusion_fast.training import Batches, Checkpoints, MinSNR

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STEPS = 12


def trainer(**changes: Any) -> df.Trainer:
    torch.manual_seed(1)
    model = df.UNet2DCondition(df.UNetConfig.preset("digits")).to(DEVICE)
    data = TensorDataset(torch.rand(64, 1, 8, 8) * 2 - 1, torch.randint(10, (64,)))
    options: dict[str, Any] = {
        "null_context": torch.tensor([model.null_class]),
        "condition_dropout": 0.1,
        "loss_weighting": MinSNR(),
        "gradient_clip": 1.0,
        "ema_decay": 0.9,
        "learning_rate": 1e-3,
        "seed": 2,
    }
    return df.Trainer(model, Batches(data, 16), df.DiffusionSchedule(), **options | changes)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_losses_are_those_of_plain_pytorch(precision: str) -> None:
    losses = trainer(precision=precision).fit(STEPS)
    ran = {choice.op: choice.last_ran for choice in ops.explain()}
    assert ran["group_norm_silu"] == ran["group_norm_silu_backward"] == "triton"
    with ops.use_backend("reference"):
        plain = trainer(precision=precision).fit(STEPS)
    assert losses[-1] < losses[0]
    relative = 1e-3 if precision == "float32" else 0.05
    assert losses == pytest.approx(plain, rel=relative)


def test_a_run_that_is_resumed(tmp_path: Path) -> None:
    whole = trainer().fit(STEPS)
    trainer(checkpoints=Checkpoints(tmp_path, every=5)).fit(5)
    rest = trainer(checkpoints=Checkpoints(tmp_path, every=5))
    rest.resume()
    assert rest.fit(STEPS) == pytest.approx(whole, rel=1e-4)
