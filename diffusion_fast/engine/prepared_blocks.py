"""The blocks of :mod:`diffusion_fast.models.blocks` as the loop runs them.

Each holds the model's block, whose parameters it shares, and the names of the rewrites that are on.
A block's input may hold one half of guidance only, as long as both are equal: the first
cross-attention widens it to both.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import blocks as plain
from ..models.blocks import KeyValue
from ..ops.op import Site
from . import folding
from .folding import Rows, Weights
from .layers import Conv2d, Layer, Linear, is_plain

On = Collection[str]


def widened(x: Tensor, batch: int) -> Tensor:
    """[B, ...] as [batch, ...]: one half of guidance as both."""
    return x if len(x) == batch else torch.cat([x] * (batch // len(x)))


def time_width(block: plain.ResBlock) -> int:
    """Numbers that a block takes from the time embedding of an image."""
    return block.norm2.num_channels * (2 if block.scale_shift else 1)


def joins_norm(device: torch.device) -> bool:
    """Whether the time joins a block's second norm, or already the convolution before it.

    On a GPU the norm's kernel reads the table's row by the device's counter and adds it in passing,
    with the convolution's bias, which would be a pass of its own behind cuDNN. On a CPU the time
    takes the place of that bias, which the convolution adds in passing.
    """
    return device.type != "cpu"


class Time(NamedTuple):
    """What a residual block takes from the time embedding: for [B] images or for all, [1].

    Attributes:
        value: [B or 1, C], or with a row a table of them, [R, B or 1, C].
        row: of the table, int64 [1] on the device.
    """

    value: Tensor
    row: Tensor | None = None

    def picked(self) -> Tensor:
        """[B or 1, C]."""
        return self.value if self.row is None else self.value.index_select(0, self.row)[0]


class GroupNorm:
    """Group norm, SiLU and what joins them, see :func:`diffusion_fast.ops.group_norm_silu`."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self._op = Site("group_norm_silu")

    def __call__(
        self,
        x: Tensor,
        silu: bool = True,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        x2: Tensor | None = None,
        row: Tensor | None = None,
    ) -> Tensor:
        norm = self.norm
        weight, bias = cast("tuple[Tensor, Tensor]", (norm.weight, norm.bias))
        if weight.dtype != x.dtype:  # under autocast x is narrower than the rest
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            add, scale, shift = (v if v is None else v.to(x.dtype) for v in (add, scale, shift))
        tables = add, scale, shift
        return self._op(x, norm.num_groups, weight, bias, norm.eps, silu, *tables, x2, row)


class LayerNorm:
    """A layer norm, applied or (``folded_layer_norm``) left to the products behind it."""

    def __init__(self, norm: plain.LayerNorm, on: On, *behind: nn.Module) -> None:
        self.norm = norm
        self.folded = "folded_layer_norm" in on and all(map(is_plain, behind))
        self._op = Site("row_statistics" if self.folded else "layer_norm")

    def __call__(self, x: Tensor) -> tuple[Tensor, Rows | None]:
        """The product's input, and the statistics of its rows where it must apply them."""
        if self.folded:
            return x, self._op(x, self.norm.eps)
        weight, bias = cast("tuple[Tensor, Tensor]", (self.norm.weight, self.norm.bias))
        if weight.dtype != x.dtype:  # as above
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return self._op(x, weight, bias, self.norm.eps), None

    def before(self, *layers: nn.Linear, on: On, geglu: bool = False) -> Linear:
        """The product, of one or several layers, that reads this norm's result."""

        def source() -> Weights:
            weights = folding.of(layers[0]) if len(layers) == 1 else folding.fused(*layers)
            return folding.with_layer_norm(weights, self.norm) if self.folded else weights

        derived = self.folded or len(layers) > 1
        return Linear(source, on, derived, opaque=layers[0], geglu=geglu)


class ResBlock:
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), where x may come in two parts."""

    def __init__(self, block: plain.ResBlock, on: On) -> None:
        self.block = block
        self.norm1, self.norm2 = GroupNorm(block.norm1), GroupNorm(block.norm2)
        # The time has the first convolution's bias in it where that can run without.
        timed = hasattr(block, "time_emb_proj") and not block.scale_shift
        self.carries_bias = timed and "epilogues" in on and is_plain(block.conv1)
        self.conv1 = same_conv(block.conv1, on, bias=not self.carries_bias)
        self.conv2 = same_conv(block.conv2, on)
        self.split = "split_skips" in on
        self.shortcut: Linear | Conv2d | None = None
        if block.conv_shortcut is not None:
            # Of one source in channels_last it is a product, which has less to set up.
            as_product = "packed_weights" in on and not self.split
            self.shortcut = (_linear if as_product else same_conv)(block.conv_shortcut, on)
        self.drops = "removed_no_ops" not in on
        self.shifts = self.carries_bias and not joins_norm(block.conv1.weight.device)
        self.layers: list[Layer] = [self.conv1, self.conv2]
        self.layers += [self.shortcut] if self.shortcut else []

    def project_time(self, emb: Tensor) -> Tensor:
        """What the block takes from the time embedding: [N, C], or [N, 2C]."""
        time = self.block.project_time(emb)
        return time + cast("Tensor", self.block.conv1.bias) if self.carries_bias else time

    def __call__(self, x: Tensor, skip: Tensor | None, time: Time | None) -> Tensor:
        """[B, C, H, W] to [B, C', H, W].

        Args:
            x: the block's input, or the first channels of it.
            skip: the rest, [B, C2, H, W].
            time: made of :meth:`project_time`; None for a block without.
        """
        if skip is not None and not self.split:
            x, skip = torch.cat((x, skip), dim=1), None
        h = self.norm1(x, x2=skip)
        if time is None:
            h = self.norm2(self.conv1(h))
        elif self.shifts:
            h = self.norm2(self.conv1(h, shift=time.picked()))
        else:
            h = self._joined(self.conv1(h), time)
        if self.drops:
            h = self.block.dropout(h)
        if isinstance(self.shortcut, Linear):
            x = image(self.shortcut(pixels(x)), x.shape[2:])
        elif self.shortcut is not None:
            x = self.shortcut(x, x2=skip)
        return self.conv2(h, residual=x)

    def _joined(self, h: Tensor, time: Time) -> Tensor:
        """The second norm, of what the time joins."""
        value, row = time
        if row is not None and value.dtype != h.dtype:  # under autocast: cast the row alone
            value, row = time.picked(), None
        if row is None:
            value = value.expand(len(h), -1)
        if not self.block.scale_shift:
            return self.norm2(h, add=value, row=row)
        scale, shift = value.chunk(2, dim=-1)
        return self.norm2(h, scale=scale, shift=shift, row=row)


def attend(op: Site, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    """Attention of q [B, S, H, D] to k and v, as [B, S, H D]."""
    out, _ = op(q, k, v, 1 / math.sqrt(q.shape[-1]), None, key_lengths, False)
    return out.flatten(2)


class SelfAttention:
    """Attention of the pixels to each other; with ``fused_qkv`` q, k and v are one product."""

    def __init__(self, attention: plain.Attention, norm: LayerNorm, on: On) -> None:
        self.attention, self._op = attention, Site("attention")
        layers = [attention.to_q, attention.to_k, attention.to_v]
        if "fused_qkv" in on and all(map(is_plain, layers)):
            self.to_qkv = [norm.before(*layers, on=on)]
        else:
            self.to_qkv = [norm.before(layer, on=on) for layer in layers]
        self.to_out = _linear(attention.to_out[0], on)
        self.layers = [*self.to_qkv, self.to_out]

    def __call__(self, x: Tensor, rows: Rows | None, residual: Tensor) -> Tensor:
        made = [layer(x, rows) for layer in self.to_qkv]
        q, k, v = made if len(made) == 3 else made[0].chunk(3, dim=-1)  # [B, S, C]
        heads = self.attention.heads
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))  # [B, S, H, D]
        return self.to_out(attend(self._op, q, k, v), residual=residual)


class CrossAttention:
    """Attention of the pixels to the context: here both halves of guidance part."""

    def __init__(self, attention: plain.Attention, norm: LayerNorm, on: On) -> None:
        self.attention, self._op = attention, Site("attention")
        self.to_q = norm.before(attention.to_q, on=on)
        self.to_out = _linear(attention.to_out[0], on)
        self.layers = [self.to_q, self.to_out]

    def __call__(
        self,
        x: Tensor,
        rows: Rows | None,
        kv: KeyValue,
        key_lengths: Tensor | None,
        residual: Tensor,
    ) -> Tensor:
        batch = len(kv[0])
        q = widened(self.attention.split_heads(self.to_q(x, rows)), batch)  # [B, S, H, D]
        out = attend(self._op, q, *kv, key_lengths)
        return self.to_out(out, residual=widened(residual, batch))


class TransformerBlock:
    """Self-attention, cross-attention and feed-forward, each after a layer norm and residual."""

    def __init__(self, block: plain.TransformerBlock, on: On) -> None:
        gate = cast("plain.GEGLU", block.ff.net[0]).proj
        attn1 = block.attn1
        self.norm1 = LayerNorm(block.norm1, on, attn1.to_q, attn1.to_k, attn1.to_v)
        self.norm2 = LayerNorm(block.norm2, on, block.attn2.to_q)
        self.norm3 = LayerNorm(block.norm3, on, gate)
        self.attn1 = SelfAttention(attn1, self.norm1, on)
        self.attn2 = CrossAttention(block.attn2, self.norm2, on)
        self.ff_in = self.norm3.before(gate, on=on, geglu=True)
        self.ff_out = _linear(block.ff.net[2], on)
        self.layers = [*self.attn1.layers, *self.attn2.layers, self.ff_in, self.ff_out]

    def __call__(self, x: Tensor, kv: KeyValue, key_lengths: Tensor | None) -> Tensor:
        h, rows = self.norm1(x)  # [B, S, C]
        x = self.attn1(h, rows, residual=x)
        h, rows = self.norm2(x)
        x = self.attn2(h, rows, kv, key_lengths, residual=x)
        h, rows = self.norm3(x)
        return self.ff_out(self.ff_in(h, rows), residual=x)


class Transformer2D:
    """Transformer blocks over the pixels of an image."""

    def __init__(self, block: plain.Transformer2D, on: On) -> None:
        self.norm = GroupNorm(block.norm)
        self.proj_in, self.proj_out = _linear(block.proj_in, on), _linear(block.proj_out, on)
        self.blocks = [
            TransformerBlock(one, on)
            for one in cast("list[plain.TransformerBlock]", block.transformer_blocks)
        ]
        inner = [layer for one in self.blocks for layer in one.layers]
        self.layers = [self.proj_in, *inner, self.proj_out]

    def __call__(self, x: Tensor, kv: list[KeyValue], key_lengths: Tensor | None) -> Tensor:
        size = x.shape[2:]
        h = self.proj_in(pixels(self.norm(x, silu=False)))  # [B, HW, C]
        for block, block_kv in zip(self.blocks, kv, strict=True):
            h = block(h, block_kv, key_lengths)
        return image(self.proj_out(h, residual=pixels(widened(x, len(h)))), size)


class Downsample:
    """A strided convolution; ``removed_no_ops`` leaves uneven padding to the convolution."""

    def __init__(self, block: plain.Downsample, on: On) -> None:
        conv, pads = block.conv, block.pads
        itself = "removed_no_ops" not in on and is_plain(conv)
        self.pads = pads if isinstance(pads, tuple) and itself else None
        padding = 0 if self.pads else pads
        self.conv = Conv2d(lambda: folding.of(conv), on, opaque=conv, stride=2, padding=padding)
        self.layers = [self.conv]

    def __call__(self, x: Tensor) -> Tensor:
        return self.conv(x if self.pads is None else F.pad(x, self.pads))


class Upsample:
    """Nearest neighbours, then a convolution: with ``folded_upsample`` four small convolutions.

    The folded form doubles. Where an odd size must be met the last row or column has a neighbour
    less than in the doubled image, and the convolution runs on the enlarged image as it is.
    """

    def __init__(self, block: plain.Upsample, on: On) -> None:
        self.direct = same_conv(block.conv, on)
        self.folded: Conv2d | None = None
        if "folded_upsample" in on and is_plain(block.conv):
            self.folded = Conv2d(
                lambda: folding.with_upsample(block.conv), on, derived=True, padding=1
            )
        self.layers = [self.direct] + ([self.folded] if self.folded else [])

    def __call__(self, x: Tensor, size: torch.Size) -> Tensor:
        if self.folded is not None and size == (2 * x.shape[2], 2 * x.shape[3]):
            return folding.interleaved(self.folded(x))
        return self.direct(F.interpolate(x, size=size, mode="nearest"))


def pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, HW, C]: a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def image(x: Tensor, size: torch.Size) -> Tensor:
    """[B, HW, C] as [B, C, H, W] in channels_last."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def same_conv(conv: nn.Conv2d, on: On, bias: bool = True) -> Conv2d:
    """A convolution with stride 1 that keeps the size, with its bias or without."""
    padding = conv.weight.shape[2] // 2

    def source() -> Weights:
        return folding.of(conv) if bias else Weights(conv.weight)

    return Conv2d(source, on, opaque=conv, padding=padding)


def _linear(layer: nn.Module, on: On) -> Linear:
    """A linear layer, or a 1x1 convolution as one."""
    return Linear(lambda: folding.as_linear(cast("nn.Linear", layer)), on, opaque=layer)
