"""What the U-Net is made of. Parameters have diffusers' names, so its weights load as they are.

Each block that needs the timestep or the context says what it computes from them in a method of its
own (``project_time``, ``project_kv``): neither depends on the image, so a sampling loop can do that
work once instead of once per step.

A sampling loop runs the same blocks with other leaves, see :mod:`diffusion_fast.engine.rewrites`.
All that the blocks know of it: a residual block may read two sources (``reads_two``), an attention
two kinds of contexts in one call (``joins_contexts``), a leaf may stand for several layers
(``ResBlock.timed``, ``Attention.to_qkv``), and what was computed for one half of guidance is
:func:`widened` to both where the first full batch meets it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops import checks


class WithImages(NamedTuple):
    """Keys and values of a text and of n images beside it (an IP-Adapter).

    Attributes:
        k, v: [B, L, H, D]: those of the text, then of each image.
        tokens: how many of L are of the text, and of each image.
        weights: how much each image counts, [B or 1, n].
        mask: what counts of it at each query, [B or 1, n, S]; None for all.
    """

    k: Tensor
    v: Tensor
    tokens: tuple[int, ...]
    weights: Tensor
    mask: Tensor | None


KeyValue = tuple[Tensor, Tensor] | WithImages  # [B, L, H, D] each
# What another network adds to a result [B, C, H, W]: a tensor that broadcasts to it, and a factor
# of each image, [B or 1, 1, 1, 1], or None for 1.
Residual = tuple[Tensor, Tensor | None]


def beside_text(
    text: KeyValue, images: Sequence[KeyValue], weights: Tensor, mask: Tensor | None
) -> WithImages:
    """Images beside a text, see :class:`WithImages`; a batch of 1 serves all."""
    every = [(kv[0], kv[1]) for kv in (text, *images)]
    batch = max(len(k) for k, _ in every)
    k = torch.cat([k.expand(batch, -1, -1, -1) for k, _ in every], dim=1)
    v = torch.cat([v.expand(batch, -1, -1, -1) for _, v in every], dim=1)
    return WithImages(k, v, tuple(k.shape[1] for k, _ in every), weights, mask)


def timestep_embedding(t: Tensor, dim: int, cosine_first: bool, freq_shift: int) -> Tensor:
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B).

    Args:
        t: [N], int64 or floating.
        dim: how many sinusoids, half of them sines.
        cosine_first: order of the two halves.
        freq_shift: 0 or 1; frequencies are 10000^(-i / (dim / 2 - freq_shift)).

    Returns:
        [N, dim], float32: half precision can't tell large timesteps apart.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(exponent / (half - freq_shift))
    angle = t.float()[:, None] * frequencies  # [N, dim / 2]
    sine, cosine = angle.sin(), angle.cos()
    out = torch.cat((cosine, sine) if cosine_first else (sine, cosine), dim=-1)
    return F.pad(out, (0, 1)) if dim % 2 else out


def guidance_embedding(scale: Tensor, dim: int) -> Tensor:
    """Sinusoids of guidance scales, as LCM is distilled with them (Luo et al. 2023, section 4.2).

    Args:
        scale: the scales w, [N]; 1 is the plain conditional model.
        dim: how many sinusoids, the first half of them sines.

    Returns:
        [N, dim], float32: of 1000 (w - 1) at the frequencies 10000^(-i / (dim / 2 - 1)).
    """
    half = dim // 2
    exponent = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -exponent).to(scale.device)
    angle = ((scale - 1).float() * 1000)[:, None] * frequencies  # [N, dim / 2]
    return F.pad(torch.cat((angle.sin(), angle.cos()), dim=1), (0, dim % 2))


class Composite(nn.Module):
    """A block: a module of ours that only calls others."""


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


class TimestepEmbedding(Composite):
    """Two linear layers with a SiLU between them.

    Args:
        in_features, features: channels in and out.
        condition: channels of a condition that is projected onto the input; None for none.
    """

    def __init__(self, in_features: int, features: int, condition: int | None = None) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, features)
        self.cond_proj = None if condition is None else Linear(condition, in_features, bias=False)
        self.linear_2 = Linear(features, features)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and self.cond_proj is not None:
            x = self.cond_proj(condition) + x
        return self.linear_2(F.silu(self.linear_1(x)))


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


class ResBlock(Composite):
    """The residual block of Ho et al. (2020): x + conv(silu(norm(conv(silu(norm(x))) + time))).

    With ``scale_shift`` the time embedding scales and shifts the second norm instead (Dhariwal &
    Nichol 2021, section 3.1). ``time_dim=None`` makes a block without time (an autoencoder's).

    Attributes:
        timed: a leaf for ``conv1``, the time and ``norm2`` at once, or None.
        reads_two: whether ``norm1`` and ``conv_shortcut`` read two sources where they lie; else
            they are concatenated.
    """

    reads_two = False

    def __init__(
        self,
        in_channels: int,
        channels: int,
        time_dim: int | None,
        groups: int,
        eps: float,
        scale_shift: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = Linear(time_dim, 2 * channels if scale_shift else channels)
        self.norm2 = GroupNorm(groups, channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, channels, 1) if in_channels != channels else None
        self.timed: nn.Module | None = None

    @property
    def time_width(self) -> int:
        """How many numbers the block takes from the time embedding of an image."""
        return self.norm2.num_channels * (2 if self.scale_shift else 1)

    def project_time(self, emb: Tensor) -> Tensor:
        """What the block takes from the time embedding [B, T]: [B, C], or [B, 2C]."""
        return self.time_emb_proj(emb)

    def forward(self, x: Tensor, skip: Tensor | None = None, time: Any = None) -> Tensor:
        """[B, C, H, W] to [B, C', H, W].

        Args:
            x: the input, or its first channels.
            skip: its other channels [B, C2, H, W].
            time: what :meth:`project_time` gave, or what the leaf ``timed`` takes.
        """
        if skip is not None and not self.reads_two:
            x, skip = torch.cat((x, skip), dim=1), None
        h = self.norm1(x, skip)
        h = self._timed(h, time) if self.timed is None else self.timed(h, time)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x) if skip is None else self.conv_shortcut(x, x2=skip)
        return followed(self.conv2, self.dropout(h), residual=x)

    def _timed(self, h: Tensor, time: Tensor | None) -> Tensor:
        h = self.conv1(h)  # [B, C, H, W]
        if not self.scale_shift or time is None:
            return self.norm2(h, add=time)
        scale, shift = time.chunk(2, dim=1)
        return self.norm2(h, scale=scale, shift=shift)


class MultiHead(Composite):
    """The projections of multi-head attention (Vaswani et al. 2017, section 3.2).

    Attributes:
        to_qkv: a leaf that gives q, k and v of the same input side by side, [B, S, 3C], or None.
        joins_contexts: whether text and images are attended to in one call.
    """

    joins_contexts = False

    def __init__(self, channels: int, context_dim: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias)
        self.to_k = Linear(context_dim, channels, bias)
        self.to_v = Linear(context_dim, channels, bias)
        self.to_out = nn.ModuleList([Linear(channels, channels)])
        self.to_qkv: nn.Module | None = None

    def split_heads(self, x: Tensor, parts: int = 1) -> Tensor:
        """[B, S, C], or several side by side, as [B, S, H, D]: a view."""
        heads = parts * self.heads
        return x.view(x.shape[0], x.shape[1], heads, x.shape[2] // heads)

    def project_kv(self, context: Tensor) -> KeyValue:
        """Keys and values [B, L, H, D] of what is attended to, [B, L, C]."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def attend(
        self,
        x: Tensor,
        kv: KeyValue | None = None,
        key_lengths: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """What ``to_out`` projects, [B, S, C], of x [B, S, C]; for the arguments see Attention."""
        if kv is not None:
            q = widened(self.split_heads(self.to_q(x)), kv[0].shape[0], image)  # [B, S, H, D]
            if isinstance(kv, WithImages):
                return self._attend_to_images(q, kv, key_lengths).flatten(2)
            k, v = kv[0], kv[1]
        elif self.to_qkv is not None:
            q, k, v = self.split_heads(self.to_qkv(x), 3).chunk(3, dim=2)
        else:
            own = self.project_kv(x)
            q, k, v = self.split_heads(self.to_q(x)), own[0], own[1]
        return ops.attention(q, k, v, key_lengths=key_lengths).flatten(2)

    def _attend_to_images(self, q: Tensor, kv: WithImages, key_lengths: Tensor | None) -> Tensor:
        """attention(q, text) + sum_i w_i attention(q, image i), each with a softmax of its own."""
        weights = kv.weights[..., None]  # [B or 1, n, 1]
        if kv.mask is not None:
            weights = weights * kv.mask  # [B or 1, n, S]
        if self.joins_contexts:
            return ops.decoupled_attention(
                q, kv.k, kv.v, kv.tokens, weights, key_lengths=key_lengths
            )
        (k, *keys), (v, *values) = kv.k.split(kv.tokens, 1), kv.v.split(kv.tokens, 1)
        out = ops.attention(q, k, v, key_lengths=key_lengths)
        for i, (k, v) in enumerate(zip(keys, values, strict=True)):
            out = torch.addcmul(out, ops.attention(q, k, v), weights[:, i, :, None, None])
        return out


class Attention(MultiHead):
    """Attention of [B, S, C] to itself or to keys and values made elsewhere."""

    def forward(
        self,
        x: Tensor,
        kv: KeyValue | None = None,
        key_lengths: Tensor | None = None,
        residual: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """attention(x) + residual, [B, S, C].

        Args:
            x: [B, S, C], or what the leaf in the place of a norm hands to the projections.
            kv: the result of :meth:`project_kv`; None for that of x itself.
            key_lengths: int64 [B], how many of the keys each item sees; None for all.
            residual: [B, S, C], or None.
            image: see :func:`widened`.
        """
        h = self.attend(x, kv, key_lengths, image)
        residual = residual if residual is None else widened(residual, h.shape[0], image)
        return followed(self.to_out[0], h, residual=residual)


class GEGLU(Composite):
    """A linear layer to twice the width, gated (Shazeer 2020)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(channels, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return followed(self.proj, x, geglu=True)


class FeedForward(Composite):
    """The gated feed-forward layer of a transformer, four channels wide for each of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = 4 * channels
        # The names are net.0.proj and net.2; net.1 is a dropout elsewhere.
        self.net = nn.ModuleList([GEGLU(channels, width), nn.Identity(), Linear(width, channels)])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return followed(self.net[2], self.net[0](x), residual=residual)


class TransformerBlock(Composite):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and residual."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(
        self,
        x: Tensor,
        kv: KeyValue,
        key_lengths: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        x = self.attn1(self.norm1(x), residual=x)  # [B, S, C]
        x = self.attn2(self.norm2(x), kv, key_lengths, residual=x, image=image)
        return self.ff(self.norm3(x), residual=x)


class Transformer2D(Composite):
    """Transformer blocks over the pixels of an image (Rombach et al. 2022, appendix E.2.1)."""

    def __init__(
        self,
        channels: int,
        context_dim: int,
        heads: int,
        layers: int,
        groups: int,
        linear_projection: bool,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = _projection(channels, linear_projection)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, heads) for _ in range(layers)
        )
        self.proj_out = _projection(channels, linear_projection)

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Keys and values of the context [B, L, C] for each transformer block."""
        blocks = cast("list[TransformerBlock]", self.transformer_blocks)
        return [block.attn2.project_kv(context) for block in blocks]

    def forward(
        self,
        x: Tensor,
        kv: list[KeyValue],
        key_lengths: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        h = project(self.proj_in, pixels(self.norm(x, silu=False)))  # [B, HW, C]
        to_rows = image  # of the first block, behind which h has a row for each
        for block, block_kv in zip(self.transformer_blocks, kv, strict=True):
            h = block(h, block_kv, key_lengths, to_rows)
            to_rows = None
        return project_onto(widened(x, h.shape[0], image), self.proj_out, h)


def _projection(channels: int, linear: bool) -> nn.Module:
    return Linear(channels, channels) if linear else Conv2d(channels, channels, 1)


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


class Downsample(Composite):
    """Half the height and width by a strided convolution."""

    def __init__(self, channels: int, padding: int, bias: bool = True) -> None:
        super().__init__()
        # Without padding the window would not reach the last row and column of an even size.
        self.pads = padding or (0, 1, 0, 1)
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=self.pads, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(Composite):
    """Nearest neighbours up to a size of about twice the input's, then a convolution."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
