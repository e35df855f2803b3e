"""The first half of a U-Net, which ControlNets have too: blocks, the way down and the bottom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import checks
from .blocks import (
    Composite,
    Downsample,
    KeyValue,
    ResBlock,
    TimestepEmbedding,
    Transformer2D,
    timestep_embedding,
)
from .config import UNetConfig
from .layers import Conv2d, Residual, added, followed, widened

TimeProjections = list[list[Any]]  # per block, per residual block: [B, C] or [B, 2C]
ContextProjections = list[list[list[KeyValue]]]  # per block, per transformer, per layer
ImageProjections = list[list[KeyValue]]  # per cross-attention, per image
Residuals = Sequence[Sequence[Residual]]  # per place, of each network that adds something there


class Block(Composite):
    """Residual blocks of one resolution, with a transformer after each where there is attention."""

    def __init__(
        self, config: UNetConfig, level: int, widths: list[tuple[int, int]], transformers: int
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(
                in_channels,
                channels,
                config.time_dim,
                config.norm_num_groups,
                config.norm_eps,
                scale_shift=config.resnet_time_scale_shift == "scale_shift",
                dropout=config.dropout,
            )
            for in_channels, channels in widths
        )
        self.attentions = nn.ModuleList(
            Transformer2D(
                config.block_out_channels[level],
                config.cross_attention_dim,
                config.per_level("attention_head_dim")[level],
                config.per_level("transformer_layers_per_block")[level],
                config.norm_num_groups,
                config.use_linear_projection,
            )
            for _ in range(transformers)
        )

    def project_time(self, emb: Tensor) -> list[Tensor]:
        return [resnet.project_time(emb) for resnet in cast("list[ResBlock]", self.resnets)]

    def project_context(self, context: Tensor) -> list[list[KeyValue]]:
        attentions = cast("list[Transformer2D]", self.attentions)
        return [attention.project_context(context) for attention in attentions]

    def layer(
        self,
        i: int,
        x: Tensor,
        skip: Tensor | None,
        time: list[Any],
        kv: list[list[KeyValue]],
        key_lengths: Tensor | None,
        image: Tensor | None = None,
    ) -> Tensor:
        """Residual block i of x and what was kept for it, and the transformer behind it if any."""
        x = self.resnets[i](x, skip, time[i])
        return self.attentions[i](x, kv[i], key_lengths, image) if i < len(kv) else x


class DownBlock(Block):
    """One level on the way down. Keeps every result for the way up."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        channels = config.block_out_channels[level]
        layers = config.per_level("layers_per_block")[level]
        widths = [(config.block_out_channels[max(level - 1, 0)], channels)]
        widths += [(channels, channels)] * (layers - 1)
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        super().__init__(config, level, widths, layers if attends else 0)
        last = level == config.num_levels - 1
        self.downsamplers = nn.ModuleList(
            [] if last else [Downsample(channels, config.downsample_padding)]
        )

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: list[Any],
        kv: list[list[KeyValue]],
        key_lengths: Tensor | None,
        features: Sequence[Residual] = (),
        image: Tensor | None = None,
    ) -> Tensor:
        for i in range(len(time)):
            x = self.layer(i, x, None, time, kv, key_lengths, image)
            if image is not None:
                skips[:], image = [widened(skip, 0, image) for skip in skips], None
            skips.append(x)
        if len(self.attentions):  # a T2I-Adapter knows this place
            x = skips[-1] = added(x, features)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        if not len(self.attentions):
            x = skips[-1] = added(x, features)
        return x


class MidBlock(Block):
    """The bottom of the U: residual block, transformer, residual block; or the first of them."""

    def __init__(self, config: UNetConfig, attends: bool = True) -> None:
        channels, level = config.block_out_channels[-1], config.num_levels - 1
        super().__init__(config, level, [(channels, channels)] * (1 + attends), int(attends))

    def forward(
        self, x: Tensor, time: list[Any], kv: list[list[KeyValue]], key_lengths: Tensor | None
    ) -> Tensor:
        for i in range(len(time)):
            x = self.layer(i, x, None, time, kv, key_lengths)
        return x


class UNetEncoder(Composite):
    """The first half of a U-Net: the way down and the bottom, with what they are conditioned on.

    Args:
        config: the shape of the whole.
        mid_attends: whether there is a transformer at the bottom.
    """

    def __init__(self, config: UNetConfig, mid_attends: bool = True) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels

        self.conv_in = same_size_conv(config.in_channels, channels[0], config.conv_in_kernel)
        self.time_embedding = TimestepEmbedding(
            channels[0], config.time_dim, config.time_cond_proj_dim
        )
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None  # checked by the config
            self.add_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, config.time_dim
            )
        if config.num_classes is not None:
            self.class_token = nn.Embedding(config.num_classes + 1, config.cross_attention_dim)
        levels = range(config.num_levels)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config, mid_attends)

    def embed_time(
        self,
        t: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """The activated time embedding [B, T] of timesteps [B], with SDXL's additions or LCM's."""
        config, dtype = self.config, self.conv_in.weight.dtype
        order = config.flip_sin_to_cos, config.freq_shift
        sinusoids = timestep_embedding(t, config.block_out_channels[0], *order)
        emb = self.time_embedding(sinusoids.to(dtype), timestep_cond)
        if text_embeds is not None and time_ids is not None:
            assert config.addition_time_embed_dim is not None
            sizes = timestep_embedding(time_ids.flatten(), config.addition_time_embed_dim, *order)
            sizes = sizes.view(time_ids.shape[0], -1).to(dtype)  # [B, N * D]
            emb = emb + self.add_embedding(torch.cat((text_embeds, sizes), dim=1))
        return F.silu(emb)  # every residual block begins with it

    def embed_context(self, context: Tensor | None) -> Tensor:
        """The tokens to attend to, [B, L, C]: text states as they are, one token of a label."""
        assert context is not None
        return context if self.config.num_classes is None else self.class_token(context)[:, None]

    def blocks(self) -> list[Block]:
        """All blocks in the order of the computation."""
        return [*self.down_blocks, self.mid_block]

    @property
    def first_attention(self) -> int:
        """Number among :meth:`blocks` of the first one that attends to the context."""
        blocks = self.blocks()
        return next((i for i, block in enumerate(blocks) if len(block.attentions)), len(blocks))

    def project_time(self, emb: Tensor) -> TimeProjections:
        """What each residual block takes from :meth:`embed_time`'s result."""
        return [block.project_time(emb) for block in self.blocks()]

    def project_context(self, context: Tensor) -> ContextProjections:
        """Keys and values of each cross-attention for tokens [B, L, C]."""
        return [block.project_context(context) for block in self.blocks()]

    def down(
        self,
        x: Tensor,
        time: TimeProjections,
        kv: ContextProjections,
        context_lengths: Tensor | None = None,
        features: Residuals = (),
        hint: Tensor | None = None,
        image: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The way down; also what each of its layers leaves for the way up, the last one last.

        Args:
            x, time, kv, context_lengths, image: as :meth:`UNet2DCondition.denoise` takes them.
            features: what joins each level's result, see there.
            hint: what joins the first convolution's result, [B, C, H, W].
        """
        x = followed(self.conv_in, x, residual=hint)  # [B, C, H, W]
        skips, first = [x], self.first_attention
        for i, block in enumerate(self.down_blocks):
            here, to_rows = features[i] if i < len(features) else (), image if i == first else None
            x = block(x, skips, time[i], kv[i], context_lengths, here, to_rows)
        return x, skips

    def mid(
        self,
        x: Tensor,
        time: TimeProjections,
        kv: ContextProjections,
        context_lengths: Tensor | None = None,
    ) -> Tensor:
        """The bottom of the U."""
        bottom = len(self.down_blocks)
        return self.mid_block(x, time[bottom], kv[bottom], context_lengths)

    def check_image(self, x: Any) -> None:
        """Raises ValueError unless x can be the first argument of a call."""
        checks.floating("x", x)
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            checks.fail("x", f"shape [B, {self.config.in_channels}, H, W]", list(x.shape))
        weight = self.conv_in.weight
        if x.dtype != weight.dtype:
            checks.fail("x", f"the dtype of the model ({weight.dtype})", x.dtype)
        checks.same_device("x", x, "the model", weight)

    def check_inputs(
        self,
        x: Any,
        t: Any,
        context: Any,
        text_embeds: Any,
        time_ids: Any,
        timestep_cond: Any,
        context_lengths: Any,
    ) -> None:
        """Raises ValueError unless these can be the arguments of a call."""
        config = self.config
        self.check_image(x)
        batch = x.shape[0]

        checks.tensor("t", t)
        if t.dim() != 0 and t.shape != (batch,):
            checks.fail("t", f"shape [B] = [{batch}], or a 0-dim tensor", list(t.shape))
        checks.same_device("t", t, "x", x)

        if context is None:
            checks.fail("context", "class labels" if config.num_classes else "text states", None)
        checks.tensor("context", context)
        checks.same_device("context", context, "x", x)
        if config.num_classes is not None:
            checks.timesteps("context", context, batch, config.num_classes + 1)
            if context_lengths is not None:
                checks.fail("context_lengths", "None for a model with classes", "a tensor")
        else:
            width = config.cross_attention_dim
            if (
                context.dim() != 3
                or context.shape[0] not in (1, batch)
                or context.shape[2] != width
            ):
                checks.fail(
                    "context",
                    f"shape [B or 1, L, cross_attention_dim] = [{batch} or 1, L, {width}]",
                    list(context.shape),
                )
            if context.shape[1] == 0:
                checks.fail("context", "at least one token", list(context.shape))
            checks.same_dtype("context", context, "x", x)
            if context_lengths is not None:
                checks.tensor("context_lengths", context_lengths)
                checks.shape("context_lengths", context_lengths, (batch,), "[B]")

        if timestep_cond is not None:
            checks.tensor("timestep_cond", timestep_cond)
            if config.time_cond_proj_dim is None:
                expected = "None: the model has no time_cond_proj_dim"
                checks.fail("timestep_cond", expected, "a tensor")
            wanted = batch, config.time_cond_proj_dim
            checks.shape("timestep_cond", timestep_cond, wanted, "[B, time_cond_proj_dim]")
            checks.same_dtype("timestep_cond", timestep_cond, "x", x)
            checks.same_device("timestep_cond", timestep_cond, "x", x)

        additions = (("text_embeds", text_embeds), ("time_ids", time_ids))
        if config.addition_embed_type is None:
            for name, value in additions:
                if value is not None:
                    checks.fail(name, "None: the model has no addition_embed_type", "a tensor")
            return
        for name, value in additions:
            checks.tensor(name, value)
            if value.dim() != 2 or value.shape[0] != batch:
                checks.fail(name, f"shape [B, ...] with B = {batch}", list(value.shape))
            checks.same_device(name, value, "x", x)
        checks.same_dtype("text_embeds", text_embeds, "x", x)
        features = text_embeds.shape[1] + time_ids.shape[1] * config.addition_time_embed_dim
        if features != config.projection_class_embeddings_input_dim:
            checks.fail(
                "text_embeds, time_ids",
                f"{config.projection_class_embeddings_input_dim} features, pooled text and"
                f" {config.addition_time_embed_dim} for each of time_ids",
                f"{list(text_embeds.shape)} and {list(time_ids.shape)}",
            )


def same_size_conv(in_channels: int, channels: int, kernel: int) -> Conv2d:
    """A convolution that keeps height and width, for an odd window."""
    return Conv2d(in_channels, channels, kernel, padding=kernel // 2)
