"""Our U-Net and diffusers', with the same random weights."""

from __future__ import annotations

import diffusers
import torch
from numerics import error
from small_unets import pooled_text
from torch import Tensor

from diffusion_fast.models import UNet2DCondition, UNetConfig


def random_weights(model: torch.nn.Module, std: float | None = None) -> dict[str, Tensor]:
    """Weights for a model on the meta device, every element of every tensor random.

    They are views of one small pool of numbers, at different places: models of any size cost little
    time and memory, and tensors that took each other's place would still be noticed.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    pool = torch.randn(max(shape.numel() for shape in shapes.values()) + 10_000)
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if len(shape) > 1:
            start = i * 61 % 10_000
            value = pool[start : start + shape.numel()].view(shape)
            weights[name] = value if std is not None else value * shape[1:].numel() ** -0.5
        else:
            value = 0.2 * torch.randn(shape)
            weights[name] = value + 1 if "norm" in name and name.endswith("weight") else value
    if std is not None:
        pool.mul_(std)
    return weights


def twins(
    config: UNetConfig, dtype: torch.dtype = torch.float32, std: float | None = None
) -> tuple[UNet2DCondition, diffusers.UNet2DConditionModel]:
    """Our model and diffusers', sharing their weights, in eval mode."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(config.to_dict())
        ours = UNet2DCondition(config)
    weights = {n: v.to(dtype) for n, v in random_weights(theirs, std).items()}
    theirs.load_state_dict(weights, strict=True, assign=True)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs.eval()


def inputs(
    config: UNetConfig,
    size: tuple[int, int] = (8, 8),
    batch: int = 2,
    tokens: int = 7,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random arguments for :meth:`UNet2DCondition.forward`."""
    return {
        "x": torch.randn(batch, config.in_channels, *size, dtype=dtype),
        "t": torch.randint(0, 1000, (batch,)),
        "context": torch.randn(batch, tokens, config.cross_attention_dim, dtype=dtype),
        **pooled_text(config, batch, dtype),
    }


def ask_diffusers(theirs: diffusers.UNet2DConditionModel, arguments: dict[str, Tensor]) -> Tensor:
    rest = dict(arguments)
    x, t, context = rest.pop("x"), rest.pop("t"), rest.pop("context")
    lengths = rest.pop("context_lengths", None)
    mask = None if lengths is None else torch.arange(context.shape[1]) < lengths[:, None]
    return theirs(
        x, t, context, added_cond_kwargs=rest, encoder_attention_mask=mask, return_dict=False
    )[0]


@torch.no_grad()
def difference(
    ours: UNet2DCondition, theirs: diffusers.UNet2DConditionModel, arguments: dict[str, Tensor]
) -> float:
    """max|ours - theirs| / max|theirs|."""
    result, expected = ours(**arguments), ask_diffusers(theirs, arguments)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert torch.isfinite(expected).all()
    return error(result, expected)
