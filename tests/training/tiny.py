"""A model and data small enough that a step takes a millisecond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import diffusion_fast as df
from diffusion_fast.training import Batches, Checkpoints, ImportanceSampler, MinSNR, Trainer

SCHEDULE = df.DiffusionSchedule(timesteps=50, beta_start=1e-3, beta_end=0.3)  # ends at noise


class Points(nn.Module):
    """Denoises points of a plane, given a class or not; has a buffer and dropout to be restored."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.classes = nn.Embedding(4, 2, dtype=dtype)
        self.net = nn.Sequential(
            nn.Linear(5, 16, dtype=dtype),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(16, 2, dtype=dtype),
        )
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        if self.training:
            self.calls += 1
        label = torch.full_like(t, 3) if context is None else context
        inputs = (x, (t / 50).to(x.dtype)[:, None], self.classes(label).to(x.dtype))
        return self.net(torch.cat(inputs, dim=1))


def points(n: int = 24) -> TensorDataset:
    """Points [n, 2] around three centres, and which one it is."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[2.0, -1.0], [-1.0, 0.5], [0.0, 2.0]])
    return TensorDataset(centres[labels] + 0.1 * torch.randn(n, 2, generator=generator), labels)


def batches(batch_size: int = 8, n: int = 24, seed: int = 3) -> Batches:
    return Batches(points(n), batch_size, seed=seed)


STEPS = 20


def full_trainer(
    folder: Path | None, batch_size: int = 24, dropout: float = 0.3, **changes: Any
) -> Trainer:
    """A run of STEPS steps with everything on that has a state; saves every five steps."""
    torch.manual_seed(11)
    options = {
        "null_context": torch.tensor([3]),
        "condition_dropout": 0.2,
        "timestep_sampler": ImportanceSampler(50, history=1),
        "loss_weighting": MinSNR(),
        "validation": batches(6),
        "warmup_steps": 4,
        "decay": "cosine",
        "gradient_clip": 1.0,
        "ema_decay": 0.9,
        "learning_rate": 0.01,
        "read_every": 3,
        "seed": 2,
    }
    if folder is not None:
        options["checkpoints"] = Checkpoints(folder, every=5, keep=2)
    data = Batches(points(60), batch_size, seed=3, flip=True)
    return Trainer(Points(dropout), data, SCHEDULE, **options | changes)
