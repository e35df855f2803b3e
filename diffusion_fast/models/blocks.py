"""What the U-Net is made of. Parameters have diffusers' names, so its weights load as they are.

Each block that needs the timestep or the context says what it computes from them in a method of its
own (``project_time``, ``project_kv``): neither depends on the image, so a sampling loop can do that
work once instead of once per step.

A sampling loop runs the same blocks with other leaves, see :mod:`diffusion_fast.engine.rewrites`.
All that the blocks know of it: a residual block may read two sources (``reads_two``), an attention
two kinds of contexts in one call (``joins_contexts``), a leaf may stand for several layers
(``ResBlock.timed``, ``Attention.to_qkv``), and what was computed for one half of guidance is
:func:`.layers.widened` to both where the first full batch meets it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .layers import (
    Conv2d,
    GroupNorm,
    LayerNorm,
    Linear,
    followed,
    pixels,
    project,
    project_onto,
    widened,
)


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
    exponent = torch.log(torch.tensor(10000.0, dtype=torch.float32)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -exponent).to(scale.device)
    angle = ((scale - 1).float() * 1000)[:, None] * frequencies  # [N, dim / 2]
    return F.pad(torch.cat((angle.sin(), angle.cos()), dim=1), (0, dim % 2))


class Composite(nn.Module):
    """A block: a module of ours that only calls others."""


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
            image: see :func:`.layers.widened`.
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


def _projection(channels: int, linear: bool) -> nn.Module:
    return Linear(channels, channels) if linear else Conv2d(channels, channels, 1)


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
