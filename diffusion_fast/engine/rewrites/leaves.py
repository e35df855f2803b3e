"""Leaves of a prepared network, each with its formula, and the swaps that put them into its blocks.

A swap takes a network whose blocks are copies that share a model's layers (see :mod:`.prepare`). A
layer that is more than its weight and bias (a LoRA in its place, hooks) has no leaf: it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...models import blocks, layers
from ...models.layers import hooked, image, pixels
from ...models.unet import UpBlock
from ...models.vae import PixelAttention
from ...ops.onednn import Packed
from ...ops.rows import picked_row
from . import folding
from .folding import Weights

Source = Callable[[], tuple[Any, ...]]  # Weights, or the first of them, as the model has them now
Compute = tuple[Callable[..., Any], Callable[..., Any]]
Kind = TypeVar("Kind", bound=nn.Module)
LAYERS = (nn.Linear, layers.Linear, layers.Conv2d)  # all in their weight and bias
NO_WEIGHTS = Weights(torch.empty(0))


def made_by(make: Callable[[Weights], Weights], source: Source) -> Source:
    """The source of what ``make`` makes of another source's weights."""
    return lambda: make(Weights(*source()))


def without_bias(source: Source) -> tuple[Tensor]:
    """The weight alone of a source's weights."""
    return source()[:1]


class Leaf(nn.Module):
    """A product or a convolution: its weights, and whether they are packed.

    Args:
        source: gives the weights.
        derived: whether ``source`` computes them. They keep their addresses then; else they are the
            model's own.
        window: a convolution's stride and padding, as :func:`diffusion_fast.ops.conv2d` takes them.

    Attributes:
        joins: whether a residual or a gate is part of the op.
        packs: whether the next call lays the weight out anew, for inputs of its size.
        compute: what is computed in the place of the op, and what packs a weight for it.
    """

    compute: Compute | None = None

    def __init__(self, source: Source, derived: bool = False, **window: Any) -> None:
        super().__init__()
        self.source, self.derived, self.window = source, derived, window
        self.joins = self.packs = False
        self.weights: Weights = NO_WEIGHTS
        self._packed: Packed | None = None
        self._pack: Callable[[Tensor], Any] | None = None

    @property
    def weight(self) -> Tensor:
        return self.weights.weight

    def refresh(self) -> None:
        """Read the model's weights again; what is derived or packed keeps its address."""
        new = Weights(*self.source())
        kept = self.derived and self.weights is not NO_WEIGHTS
        self.weights = Weights(*_rewritten(self.weights, new)) if kept else new
        if self._pack is not None and self._packed is not None:
            packed = self._pack(self.weights[0])
            alike = packed is not None and _forms(packed) == _forms(self._packed)
            self._packed = _rewritten(self._packed, packed) if alike else packed


def _forms(packed: Packed) -> list[Any]:
    """What a weight is packed as: another way may have been measured faster since."""
    return [(one.layout, one.shape) for one in packed]


def _rewritten(kept: Iterable[Any], new: Iterable[Any]) -> tuple[Any, ...]:
    """New tensors at the addresses of the kept; nobody keeps those of oneDNN's opaque tensors."""
    pairs = zip(kept, new, strict=True)
    return tuple(b if a is None or a.is_mkldnn else a.copy_(b) for a, b in pairs)


class Product(Leaf):
    r"""y = x W^T + b, with a residual added or gated.

    Where a layer norm is folded in, its input is (x, mean, r) of :class:`RowStatistics`, and
    y = r (x W'^T - mean s) + b', see :func:`.folding.with_layer_norm`.
    """

    folds = False  # a layer norm

    def forward(self, x: Any, residual: Tensor | None = None, geglu: bool = False) -> Any:
        weight, bias, sums = self.weights
        run, packer = self.compute or (ops.linear, ops.pack_linear)
        norm = None
        if isinstance(x, tuple):
            x, mean, rstd = x
            norm = mean, rstd, cast("Tensor", sums)
        if self.packs:
            rows = math.prod(x.shape[:-1])
            pack = partial(packer, rows=rows, geglu=geglu)
            self.packs, self._pack, self._packed = False, pack, pack(weight)
        return run(x, weight, bias, residual=residual, geglu=geglu, norm=norm, packed=self._packed)

    def fold(self, norm: layers.LayerNorm) -> None:
        """Apply a layer norm too, to what :class:`RowStatistics` hands over."""
        self.source = made_by(lambda own: folding.with_layer_norm(own, norm), self.source)
        self.derived = self.folds = True


class Convolution(Leaf):
    """conv(cat(x, x2)) + b, with a number for each image and channel and a residual added."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        x2: Tensor | None = None,
        bias: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        weight, own, _ = self.weights
        run, packer = self.compute or (ops.conv2d, ops.pack_conv2d)
        if self.packs:
            size = (x.shape[0], weight.shape[1], *x.shape[2:])
            pack: Any = partial(packer, size=size, **self.window)
            self.packs, self._pack, self._packed = False, pack, pack(weight)
        return run(
            x,
            weight,
            own if bias is None else bias,
            **self.window,
            x2=x2,
            add=add,
            residual=residual,
            packed=self._packed,
        )


def modules(network: nn.Module, *kinds: type[Kind]) -> list[Kind]:
    """The modules of some kinds; their leaves may be swapped meanwhile."""
    return [module for module in network.modules() if isinstance(module, kinds)]


def plain_leaves(network: nn.Module) -> None:
    """A leaf for each layer that reads the image and is all in its weight and bias.

    They compute what the layers do, before any rewrite: nothing is joined, and uneven padding is a
    pass of its own.
    """
    as_they_are = set(hooked(*network.modules()))
    for embedding in modules(network, blocks.TimestepEmbedding):
        as_they_are |= {*embedding.children()}
    for transformer in modules(network, blocks.TransformerBlock):
        as_they_are |= {transformer.attn2.to_k, transformer.attn2.to_v}
    timed = [
        block for block in modules(network, blocks.ResBlock) if hasattr(block, "time_emb_proj")
    ]
    as_they_are |= {block.time_emb_proj for block in timed}
    for block in modules(network, blocks.Composite, nn.ModuleList):
        for name, layer in list(block.named_children()):
            if type(layer) not in LAYERS or layer in as_they_are:
                continue
            weights = partial(attrgetter("weight", "bias"), layer)
            if isinstance(block, blocks.Transformer2D):
                leaf: nn.Module = Product(made_by(folding.as_linear, weights))
            elif not isinstance(layer, layers.Conv2d):
                leaf = Product(weights)
            elif isinstance(pads := layer.pads, int):
                leaf = Convolution(weights, stride=layer.stride[0], padding=pads)
            else:
                leaf = Padded(Convolution(weights, stride=layer.stride[0]), pads)
            block._modules[name] = leaf
    for resnet in timed:
        resnet.timed = TimeInNorm(resnet)


class Padded(nn.Module):
    """conv(pad(x))."""

    def __init__(self, conv: Convolution, pads: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv, self.pads = conv, pads

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pads))


def removed_no_ops(network: nn.Module) -> None:
    """No dropout, and uneven padding left to the convolution."""
    for block in modules(network, blocks.Composite):
        for name, layer in block._modules.items():
            if isinstance(layer, nn.Dropout):
                block._modules[name] = nn.Identity()
            elif isinstance(layer, Padded):
                layer.conv.window["padding"] = layer.pads
                block._modules[name] = layer.conv


def joins_norm(device: torch.device) -> bool:
    """Whether the time joins a block's second norm, or already the convolution before it.

    On a GPU the norm's kernel reads the table's row by the device's counter and adds it in passing,
    with the convolution's bias, which would be a pass of its own behind cuDNN. On a CPU the time
    takes the place of that bias, which the convolution adds in passing.
    """
    return device.type != "cpu"


def picked(time: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """A time [B or 1, C], or of a table [R, B or 1, C] and an int64 [1] the row that it names; of
    an int64 [B] each image's own."""
    return time if isinstance(time, Tensor) else picked_row(*time)


class TimeInNorm(nn.Module):
    """silu(GN(conv1(x) + time)), or with a time (scale, shift) the norm's scale and shift.

    The time is [B or 1, C], or a table and a row (see :func:`picked`) that the norm's kernel reads.
    """

    def __init__(self, block: blocks.ResBlock) -> None:
        super().__init__()
        self.conv, self.norm, self.scale_shift = block.conv1, block.norm2, block.scale_shift

    def forward(self, x: Tensor, time: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        h = self.conv(x)
        table, row = time if isinstance(time, tuple) else (time, None)
        if row is None or table.dtype != h.dtype:  # under autocast: cast the row alone
            table, row = picked(time).to(h.dtype).expand(len(h), -1), None
        if not self.scale_shift:
            return self.norm(h, add=table, row=row)
        scale, shift = table.chunk(2, dim=-1)
        return self.norm(h, scale=scale, shift=shift, row=row)


class TimeInBias(nn.Module):
    """silu(GN(conv1(x))) with the time, which carries the bias, in the place of conv1's bias."""

    def __init__(self, block: blocks.ResBlock) -> None:
        super().__init__()
        self.conv, self.norm = block.conv1, block.norm2

    def forward(self, x: Tensor, time: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        time = picked(time)
        return self.norm(self.conv(x, bias=time[0]) if len(time) == 1 else self.conv(x, add=time))


class WithBias(nn.Module):
    """W emb + b + c: a time that carries the bias c of the convolution that it joins."""

    def __init__(self, projection: nn.Module, conv: Source) -> None:
        super().__init__()
        self.projection, self.conv = projection, conv

    def forward(self, emb: Tensor) -> Tensor:
        time, (_, bias, *_) = self.projection(emb), self.conv()
        return time if bias is None else time + bias


def epilogues(network: nn.Module) -> None:
    """Residual and gate in the product or convolution before; conv1's bias in the time."""
    for leaf in modules(network, Leaf):
        leaf.joins = True
    for block in modules(network, blocks.ResBlock):
        conv = block.conv1
        if block.timed is not None and isinstance(conv, Leaf) and not block.scale_shift:
            block._modules["time_emb_proj"] = WithBias(block.time_emb_proj, conv.source)
            conv.source = partial(without_bias, conv.source)
            if not joins_norm(block.norm2.weight.device):
                block.timed = TimeInBias(block)


class Concatenated(nn.Module):
    """layer(cat(x, x2)), for a layer that is called as it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        return self.layer(torch.cat((x, x2), dim=1))


def split_skips(network: nn.Module) -> None:
    """Norm and shortcut read both sources where they lie."""
    for level in modules(network, UpBlock):
        for block in modules(level, blocks.ResBlock):
            block.reads_two = True
            if not isinstance(block.conv_shortcut, Leaf | None):
                block._modules["conv_shortcut"] = Concatenated(block.conv_shortcut)


class FoldedUpsample(nn.Module):
    """conv(nearest(x)) as four 2x2 convolutions of x, see :func:`.folding.with_upsample`.

    That doubles. Where an odd size must be met, the last row or column has a neighbour less than in
    the doubled image, and the convolution runs on the enlarged image as it is.
    """

    def __init__(self, upsample: blocks.Upsample) -> None:
        super().__init__()
        self.direct = upsample
        weights = made_by(folding.with_upsample, cast("Convolution", upsample.conv).source)
        self.folded = Convolution(weights, derived=True, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        if size == (2 * x.shape[2], 2 * x.shape[3]):
            return folding.interleaved(self.folded(x))
        return self.direct(x, size)


def folded_upsample(network: nn.Module) -> None:
    """Four small convolutions in the place of nearest neighbours and a large one."""
    for level in modules(network, nn.ModuleList):
        for name, block in level._modules.items():
            if isinstance(block, blocks.Upsample) and isinstance(block.conv, Leaf):
                level._modules[name] = FoldedUpsample(block)


class FusedQKV(Product):
    """[q, k, v] = x [A; B; C]^T, one product for three that read the same input."""

    def __init__(self, *layers: Product) -> None:
        super().__init__(
            lambda: folding.fused(*(Weights(*one.source()) for one in layers)), derived=True
        )


def fused_qkv(network: nn.Module) -> None:
    """q, k and v of self-attention as one product."""
    among = (block.attn1 for block in modules(network, blocks.TransformerBlock))
    for attention in (*among, *modules(network, PixelAttention)):
        layers = attention.to_q, attention.to_k, attention.to_v
        if all(isinstance(layer, Product) for layer in layers):
            attention.to_qkv = FusedQKV(*cast("tuple[Product, ...]", layers))
            for name in ("to_q", "to_k", "to_v"):
                del attention._modules[name]


def joined_contexts(network: nn.Module) -> None:
    """Text and images attended to in one call."""
    for block in modules(network, blocks.TransformerBlock):
        block.attn2.joins_contexts = True


class RowStatistics(nn.Module):
    """x, and mean and 1 / deviation of its rows for products that apply the layer norm."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (x, *ops.row_statistics(x, self.eps))


def folded_layer_norm(network: nn.Module) -> None:
    """The affine of a layer norm in the weights of the products behind it."""
    for block in modules(network, blocks.TransformerBlock):
        own, gate = block.attn1, cast("blocks.GEGLU", block.ff.net[0]).proj
        first = (own.to_q, own.to_k, own.to_v) if own.to_qkv is None else (own.to_qkv,)
        for name, behind in (("norm1", first), ("norm2", (block.attn2.to_q,)), ("norm3", (gate,))):
            if all(isinstance(layer, Product) for layer in behind):
                norm = cast("layers.LayerNorm", getattr(block, name))
                for layer in cast("tuple[Product, ...]", behind):
                    layer.fold(norm)
                setattr(block, name, RowStatistics(norm.eps))


class Pointwise(Product):
    """A 1x1 convolution as a product over the channels of each pixel, x [B, C, H, W]."""

    def forward(self, x: Tensor, residual: Tensor | None = None, geglu: bool = False) -> Tensor:
        return image(super().forward(pixels(x)), x.shape[2:])


def packed_weights(network: nn.Module) -> None:
    """Weights laid out as the products read them; shortcuts of one source as products."""
    for block in modules(network, blocks.ResBlock):
        if isinstance(block.conv_shortcut, Leaf) and not block.reads_two:
            weights = made_by(folding.as_linear, block.conv_shortcut.source)
            block._modules["conv_shortcut"] = Pointwise(weights)
    for leaf in modules(network, Leaf):
        leaf.packs = True
