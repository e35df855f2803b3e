"""Layers whose calls are ops, and what stands between them: sums, views, halves of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks

# What another network adds to a result [B, C, H, W]: a tensor that broadcasts to it, and a factor
# of each image, [B or 1, 1, 1, 1], or None for 1.
Residual = tuple[Tensor, Tensor | None]


def hooked(*modules: nn.Module) -> list[nn.Module]:
    """Those of the modules whose call does more, or something else, than their class says."""
    return [
        module
        for module in modules
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    ]


class Linear(nn.Linear):
    """A linear layer with its neighbours in one op, see :func:`diffusion_fast.ops.linear`."""

    @property
    def joins(self) -> bool:
        """Whether the op may be one with what follows: hooks must see the layer alone."""
        return not hooked(self)

    def forward(self, x: Tensor, residual: Tensor | None = None, geglu: bool = False) -> Tensor:
        return ops.linear(x, self.weight, self.bias, residual=residual, geglu=geglu)


class Conv2d(nn.Conv2d):
    """A convolution with its neighbours in one op, see :func:`diffusion_fast.ops.conv2d`.

    Args:
        padding: as nn.Conv2d's, or four numbers: left, right, top, bottom.
        others: nn.Conv2d's, of which groups, dilation and padding_mode can only be its defaults.

    Attributes:
        pads: the padding as :func:`diffusion_fast.ops.conv2d` takes it.

    Raises:
        ValueError: those with other values, or strides that differ.
    """

    @property
    def joins(self) -> bool:
        """Whether the op may be one with what follows: hooks must see the layer alone."""
        return not hooked(self)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] = 0,
        **others: Any,
    ) -> None:
        uneven = isinstance(padding, tuple) and len(padding) == 4
        even = cast("tuple[int, int]", (0, 0) if uneven else padding)
        super().__init__(in_channels, out_channels, kernel_size, stride, even, **others)
        if uneven:  # also for what is made after this layer, such as a LoRA's first convolution
            self.padding = cast("tuple[int, ...]", padding)
        plain = (self.groups, self.dilation, self.padding_mode) == (1, (1, 1), "zeros")
        if not plain or isinstance(self.padding, str) or self.stride[0] != self.stride[1]:
            expected = "one group, no dilation, zeros in numbers as padding, and equal strides"
            checks.fail("Conv2d", expected, self.extra_repr())
        rows, *_, columns = self.padding
        four = self.padding if uneven else (columns, columns, rows, rows)
        self.pads: Any = rows if len(set(four)) == 1 else four

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.conv2d(
            x,
            self.weight,
            self.bias,
            stride=self.stride[0],
            padding=self.pads,
            residual=residual,
        )


def followed(layer: nn.Module, x: Tensor, **what: Any) -> Tensor:
    """layer(x), gated with ``geglu=True``, plus ``residual``: in one op where the layer is ours.

    A replaced or hooked layer (a LoRA) is called with its input alone.
    """
    if getattr(layer, "joins", False):
        return layer(x, **what)
    y = ops.geglu(layer(x)) if what.get("geglu") else layer(x)
    return y if what.get("residual") is None else y + what["residual"]


class GroupNorm(nn.GroupNorm):
    """Group norm with its neighbours in one op, see :func:`diffusion_fast.ops.group_norm_silu`."""

    def forward(
        self,
        x: Tensor,
        x2: Tensor | None = None,
        *,
        silu: bool = True,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        row: Tensor | None = None,
    ) -> Tensor:
        # Under autocast x is narrower than the parameters; elsewhere .to() does nothing.
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return ops.group_norm_silu(
            x, self.num_groups, weight, bias, self.eps, silu, add, scale, shift, x2, row
        )


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels, see :func:`diffusion_fast.ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)  # as above
        return ops.layer_norm(x, weight, bias, self.eps)


def project(layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """layer(x) + residual for [B, S, C] and a linear layer, or a 1x1 convolution as one."""
    if cast("Tensor", layer.weight).dim() == 2:
        return followed(layer, x, residual=residual)
    if type(layer) is Conv2d and layer.joins:
        return ops.linear(x, layer.weight.flatten(1), layer.bias, residual=residual)
    y = layer(x.mT[..., None])[..., 0].mT.contiguous()
    return y if residual is None else y + residual


def project_onto(x: Tensor, layer: nn.Module, h: Tensor) -> Tensor:
    """x + layer(h) for an image [B, C, H, W] and pixels [B, HW, C]; one op in channels_last."""
    tokens = x.permute(0, 2, 3, 1)
    if tokens.is_contiguous():
        return image(project(layer, h, residual=tokens.flatten(1, 2)), x.shape[2:])
    return x + image(project(layer, h), x.shape[2:])


def widened(x: Tensor, batch: int, image: Tensor | None = None) -> Tensor:
    """Both halves of guidance [batch, ...] of the one that served for both so far.

    A tensor of that batch, or of a larger one, stays as it is. With ``image``, int64 [batch], row r
    of the result is that of image ``image[r]``, of images with one half and images with two.
    """
    if image is not None:
        return x.index_select(0, image)
    # Not len(), which would make an exported batch a constant.
    return x if x.shape[0] >= batch else torch.cat([x] * (batch // x.shape[0]))


def added(x: Tensor, residuals: Sequence[Residual]) -> Tensor:
    """x + sum_i s_i r_i, a pass for each term; of the largest batch, see :func:`widened`."""
    for residual, scale in residuals:
        batch = max(len(x), len(residual), 1 if scale is None else len(scale))
        x, residual = widened(x, batch), widened(residual, batch)
        if scale is None:
            x = x + residual
        else:
            scale = scale if len(scale) == 1 else widened(scale, batch)
            x = torch.addcmul(x, residual, scale)
    return x


def pixels(x: Tensor) -> Tensor:
    """An image [B, C, H, W] as [B, HW, C]: a view if it is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def image(x: Tensor, size: torch.Size) -> Tensor:
    """Pixels [B, HW, C] as an image [B, C, H, W] in channels_last: a view."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)
