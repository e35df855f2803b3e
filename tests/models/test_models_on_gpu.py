"""Whole models on a GPU: our kernels in them against float64, beside plain PyTorch there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_close
from small_unets import LIKE_SDXL, pooled_text, small_config
from torch import Tensor, nn

from diffusion_fast import ops
from diffusion_fast.models import AutoencoderKL, UNet2DCondition, VAEConfig

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Head dims that the attention kernels have: 32 and 64.
KINDS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (64, 128), "cross_attention_dim": 48, "norm_num_groups": 16},
    "sdxl": {**LIKE_SDXL, "block_out_channels": (64, 128, 192), "cross_attention_dim": 48},
}
Run = Callable[[nn.Module, torch.dtype], list[Tensor]]


def check(model: nn.Module, dtype: torch.dtype, run: Run) -> None:
    """The tolerance rule, with gradients' factor: a whole model, and not one op."""
    model = model.to(DEVICE, dtype)
    results = run(model, dtype)
    assert "triton" in {choice.last_ran for choice in ops.explain()}
    with ops.use_backend("reference"):
        plains = run(model, dtype)
        truths = run(copy.deepcopy(model).double(), torch.float64)
    for result, truth, plain in zip(results, truths, plains, strict=True):
        assert result.device.type == DEVICE
        assert_close(result, truth, plain, factor=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_unet(kind: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    config = small_config(**KINDS[kind])
    model = UNet2DCondition(config).to(memory_format=layout)
    x = torch.randn(2, config.in_channels, 24, 16).to(dtype)
    context = torch.randn(2, 77, config.cross_attention_dim).to(dtype)
    more = pooled_text(config, 2, dtype)
    t = torch.tensor([1, 900])

    def run(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        def here(value: Tensor) -> Tensor:
            return value.to(DEVICE, dtype if value.is_floating_point() else None)

        leaf = here(x).contiguous(memory_format=layout).requires_grad_()
        given = {name: here(value) for name, value in more.items()}
        y = model(leaf, t.to(DEVICE), here(context), **given)
        first = next(model.parameters())
        return [y.detach(), *torch.autograd.grad(y.square().mean(), (leaf, first))]

    check(model, dtype, run)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_vae(dtype: torch.dtype) -> None:
    model = AutoencoderKL(VAEConfig.preset("tiny")).eval()
    image = torch.rand(2, 3, 64, 48).to(dtype) * 2 - 1
    latents = torch.randn(2, 4, 8, 6).to(dtype)

    @torch.no_grad()
    def run(model: Any, dtype: torch.dtype) -> list[Tensor]:
        seen = image.to(DEVICE, dtype), latents.to(DEVICE, dtype)
        return [model.encode(seen[0]).mean, model.decode(seen[1])]

    check(model, dtype, run)
