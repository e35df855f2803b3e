"""A model of one convolution that every way to capture and edit can be tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numerics import error
from torch import Tensor, nn

import diffusion_fast as df

SHAPE = (3, 1, 4, 4)
SCHEDULE = df.DiffusionSchedule(timesteps=100)
CONTEXTS = {"context": torch.randn(3, 2, 5), "null_context": torch.randn(3, 2, 5)}


class Model(nn.Module):
    """Weights, a buffer, a flag, and a taste for its context."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1, dtype=dtype)
        self.register_buffer("offset", torch.full((1,), 0.25, dtype=dtype))
        self.adapter, self.scale, self.calls = "none", 1.0, 0

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        out = self.mix(x) * (1 + t.to(x.dtype).view(-1, 1, 1, 1) / 100) + self.offset
        if context is None:
            return out * self.scale
        amount = context.to(x.dtype).mean((1, 2)).view(-1, 1, 1, 1)
        return out * (1 + amount) * (self.scale if self.adapter == "none" else 2.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(model: nn.Module, shape: tuple[int, ...] = SHAPE, **options: Any) -> Tensor:
    """The loop on the host."""
    return df.sample(model, SCHEDULE, shape, **({"generator": seeded()} | options))


def same(a: Tensor, b: Tensor) -> bool:
    return error(a, b) < 1e-9


class Reads(Model):
    """The host needs a number that the device has."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x, t) * float(t[0])


class Draws(Model):
    """Random numbers at each call."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x, t) + torch.randn_like(x)


def in_place(model: Model) -> None:
    with torch.no_grad():
        model.mix.weight.mul_(0.5)


def set_bias(model: Model) -> None:
    model.mix.bias.data = torch.ones_like(model.mix.bias)


def train(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.zeros(1)).sum().backward()
    optimizer.step()


def train_fused(model: Model) -> None:
    """PyTorch does not count what such an optimizer writes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()


EDITS: dict[str, Callable[[Model], object]] = {
    "in place": in_place,
    "optimizer": train,
    "fused optimizer": train_fused,
    "through data": lambda m: m.mix.weight.data.mul_(0.5),
    "a buffer through data": lambda m: m.offset.data.add_(1),
    "a new parameter": lambda m: setattr(
        m.mix, "weight", nn.Parameter(torch.randn_like(m.mix.weight))
    ),
    "new data": set_bias,
    "a new module": lambda m: setattr(
        m, "mix", nn.Conv2d(1, 1, 3, padding=1, dtype=m.mix.weight.dtype)
    ),
    "load_state_dict": lambda m: m.load_state_dict(Model().state_dict()),
    "a buffer": lambda m: m.offset.add_(1),
    "another adapter": lambda m: setattr(m, "adapter", "lora"),
    "another scale": lambda m: setattr(m, "scale", 3.0),
    "a dtype": lambda m: m.float(),
    "a hook": lambda m: m.register_forward_hook(lambda module, args, out: 2 * out),
}
