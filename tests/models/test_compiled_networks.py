"""A compiled model serves every size with one graph, as PyTorch's own layers do.

Each compiles once, with all sizes dynamic and no code generated; for a whole model that is half a
minute of Python on a slow machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from numerics import error
from small_unets import small_config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from diffusion_fast import ops
from diffusion_fast.models import AutoencoderKL, UNet2DCondition
from diffusion_fast.models.vae_config import VAEConfig


def check(run: Callable[..., Tensor], calls: Iterable[tuple[Tensor, ...]]) -> None:
    """One graph serves all calls, with the values of eager PyTorch."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for arguments in calls:
            assert error(compiled(*arguments), run(*arguments)) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_unet_for_all_sizes_batches_and_lengths_of_text() -> None:
    model = UNet2DCondition(small_config()).eval()

    def call(batch: int, height: int, width: int, tokens: int) -> tuple[Tensor, ...]:
        x, context = torch.randn(batch, 4, height, width), torch.randn(batch, tokens, 24)
        return x, torch.arange(batch), context

    check(model, (call(*sizes) for sizes in [(2, 12, 20, 5), (3, 16, 28, 7), (5, 10, 36, 9)]))


SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


@pytest.mark.slow
def test_an_autoencoder_for_all_sizes_and_batches() -> None:
    model = AutoencoderKL(VAEConfig(**SMALL)).eval()
    sizes = [(2, 12, 20), (3, 16, 28), (5, 10, 36)]
    check(model.decode, ((torch.randn(b, 4, h, w),) for b, h, w in sizes))
    check(lambda x: model.encode(x).mean, ((torch.randn(b, 3, h, w),) for b, h, w in sizes))


def test_a_convolution_and_a_norm() -> None:
    weight, bias, kernel = torch.randn(4), torch.randn(4), torch.randn(4, 3, 3, 3)

    def run(x: Tensor, residual: Tensor) -> Tensor:
        y = ops.conv2d(x, kernel, padding=1, residual=residual)
        return ops.group_norm_silu(y, 2, weight, bias)

    sizes = [(2, 12, 20), (3, 16, 28), (5, 10, 36)]
    check(run, ((torch.randn(b, 3, h, w), torch.randn(b, 4, h, w)) for b, h, w in sizes))


def test_a_linear_layer_in_training() -> None:
    torch._dynamo.reset()
    weight = torch.randn(4, 8, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return ops.linear(x, weight).square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 5, 9):
        inputs = torch.randn(2, rows, 8, requires_grad=True), weight
        results = [torch.autograd.grad(f(inputs[0]), inputs) for f in (compiled, run)]
        assert max(map(error, *results)) <= 1e-5
    assert counter.frame_count == 1
