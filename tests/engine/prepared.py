"""Small U-Nets with random weights, and a prepared one asked beside the plain one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from numerics import assert_close, error
from small_unets import LIKE_SDXL as LIKE_SDXL
from small_unets import TEXT_TIME as TEXT_TIME
from small_unets import pooled_text, small_config
from torch import Tensor, nn

from diffusion_fast.engine.buffers import Clock
from diffusion_fast.engine.rewrites.controlled import prepare
from diffusion_fast.engine.rewrites.prepare import PreparedUNet
from diffusion_fast.models import UNet2DCondition, UNetConfig

LEVELS = {torch.float64: 1e-9, torch.float32: 1e-5}
GRID = torch.tensor([951, 400, 17])


def randomize(module: nn.Module) -> None:
    """Every element of every parameter random, at scales that keep activations near 1."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.dim() > 1:
                value.normal_(std=value[0].numel() ** -0.5)
            else:
                value.normal_(std=0.2)
                if "norm" in name and name.endswith("weight"):
                    value.add_(1)


def unet(dtype: torch.dtype = torch.float32, **changes: Any) -> UNet2DCondition:
    """A small U-Net in eval mode."""
    return of_config(small_config(**changes), dtype)


def of_config(config: UNetConfig, dtype: torch.dtype = torch.float32) -> UNet2DCondition:
    with torch.device("meta"):
        model = UNet2DCondition(config)
    model.to_empty(device="cpu")
    randomize(model)
    return model.to(dtype).eval()


def conditions(model: UNet2DCondition, batch: int, tokens: int = 5) -> dict[str, Tensor]:
    """What a run of the model takes beside the image, for ``batch`` items."""
    config, dtype = model.config, model.conv_in.weight.dtype
    if config.num_classes is not None:
        return {"context": torch.randint(0, config.num_classes + 1, (batch,))}
    given = {"context": torch.randn(batch, tokens, config.cross_attention_dim).to(dtype)}
    return given | pooled_text(config, batch, dtype)


def images(
    model: UNet2DCondition, batch: int, halves: int, size: tuple[int, int] = (8, 8)
) -> Tensor:
    """The model's input: equal halves."""
    x = torch.randn(batch, model.config.in_channels, *size).to(model.conv_in.weight.dtype)
    return torch.cat([x] * halves)


def at(row: int) -> Clock:
    clock = Clock(torch.device("cpu"))
    for _ in range(row):
        clock.advance()
    return clock


@torch.no_grad()
def plain(model: UNet2DCondition, x: Tensor, row: int, given: dict[str, Tensor]) -> Tensor:
    return model(x, GRID[row], **given)


def prepared(
    model: UNet2DCondition,
    given: dict[str, Tensor],
    rewrites: str | Iterable[str] = "all",
    *,
    batch: int = 2,
    halves: int = 2,
) -> PreparedUNet:
    network = prepare(model, batch=batch, halves=halves, max_rows=5, rewrites=rewrites)
    network.prepare(given, GRID)
    return network


def check(
    model: UNet2DCondition,
    rewrites: str | Iterable[str],
    *,
    batch: int = 2,
    halves: int = 2,
    size: tuple[int, int] = (8, 8),
    tokens: int = 5,
    lengths: bool = False,
) -> None:
    """The prepared network computes what the plain one does, at each row of the grid."""
    given = conditions(model, batch * halves, tokens)
    if lengths:
        given["context_lengths"] = torch.randint(1, tokens + 1, (batch * halves,))
    network = prepared(model, given, rewrites, batch=batch, halves=halves)
    x = images(model, batch, halves, size)
    for row in (2, 0):
        result, expected = network(x, at(row)), plain(model, x, row, given)
        assert result.dtype == expected.dtype
        if x.dtype in LEVELS:
            assert result.shape == expected.shape
            assert error(result, expected) <= LEVELS[x.dtype]
            continue
        exact = copy.deepcopy(model).double()
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        assert_close(result, plain(exact, x.double(), row, wide), expected)
