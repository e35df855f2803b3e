"""The conditional U-Net of latent diffusion models (Ronneberger 2015; Rombach et al. 2022)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import AnyPath
from ..ops import checks
from .blocks import (
    Attention,
    Composite,
    Conv2d,
    Downsample,
    GroupNorm,
    KeyValue,
    ResBlock,
    Residual,
    TimestepEmbedding,
    Transformer2D,
    TransformerBlock,
    Upsample,
    added,
    beside_text,
    followed,
    timestep_embedding,
    widened,
)
from .checkpoints import save_model
from .config import UNetConfig
from .ip_adapter import IPAdapter
from .pretrained import find_pretrained

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


class UpBlock(Block):
    """One level on the way up. Each residual block also reads what was kept on the way down."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        channels = config.block_out_channels
        layers = config.per_level("layers_per_block")[level] + 1
        # What comes up from the level below, and what was kept: this level's results, and last of
        # all the one that this level began with.
        below = channels[min(level + 1, config.num_levels - 1)]
        inputs = [below] + [channels[level]] * (layers - 1)
        kept = [channels[level]] * (layers - 1) + [channels[max(level - 1, 0)]]
        widths = [(x + skip, channels[level]) for x, skip in zip(inputs, kept, strict=True)]
        attends = config.up_block_types[-1 - level] == "CrossAttnUpBlock2D"
        super().__init__(config, level, widths, layers if attends else 0)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(channels[level])])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: list[Any],
        kv: list[list[KeyValue]],
        key_lengths: Tensor | None,
        residuals: Residuals = (),
    ) -> Tensor:
        for i in range(len(time)):
            skip = skips.pop()
            if residuals:
                skip = added(skip, residuals[len(skips)])
            x = self.layer(i, x, widened(skip, x.shape[0]), time, kv, key_lengths)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])  # odd sizes don't just double
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

        self.conv_in = _conv(config.in_channels, channels[0], config.conv_in_kernel)
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


class UNet2DCondition(UNetEncoder):
    """Predicts the noise (or v, or x_0) in an image, given the timestep and a context.

    Parameters have the names and shapes of diffusers' ``UNet2DConditionModel`` of the same config.
    The context is text states, or with ``config.num_classes`` a class label for each image.

    Args:
        config: the shape, see :class:`UNetConfig`.

    Examples:
        >>> model = df.UNet2DCondition(df.UNetConfig.preset("digits"))
        >>> x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([10, 500]), torch.tensor([3, 7])
        >>> model(x, t, labels).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, levels = config.block_out_channels, range(config.num_levels)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.ip_adapters = nn.ModuleList()  # not of the checkpoint; the pipeline puts them here
        self.conv_out = _conv(channels[0], config.out_channels, config.conv_out_kernel)

    @classmethod
    def from_pretrained(
        cls,
        path: AnyPath,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> UNet2DCondition:
        """A model with the weights of a checkpoint, in eval mode.

        Args:
            path: the folder with ``config.json`` and safetensors files, a pipeline's folder with
                such a folder ``unet``, one file of weights beside its ``config.json``, a single
                CompVis file (``.safetensors`` or ``.ckpt``), or a hub id ``owner/name``.
            variant: which files of a folder to read, such as ``"fp16"``.
            dtype: dtype of the parameters; None for that of the files.
            device: device of the parameters.

        Raises:
            CheckpointError: a missing or damaged file, an unsupported config, or tensors that are
                missing, extra or misshapen (listed by name).
        """
        source = find_pretrained(path, "unet", UNetConfig.from_dict, variant)
        return source.build(cls, dtype, device)

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write a folder that :meth:`from_pretrained` and diffusers load.

        Raises:
            OSError: it can't be written, for example because the disk is full. What the folder held
                before is still there then.
        """
        plain = copy.copy(self)  # without what was added to it
        plain._modules = {n: m for n, m in self._modules.items() if n != "ip_adapters"}
        save_model(plain, {"_class_name": "UNet2DConditionModel", **self.config.to_dict()}, folder)

    @property
    def null_class(self) -> int:
        """The label that means "no class", for classifier-free guidance."""
        if self.config.num_classes is None:
            raise ValueError("null_class: expected a model with num_classes, got one without")
        return self.config.num_classes

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        context_lengths: Tensor | None = None,
        residuals: Residuals = (),
        features: Residuals = (),
        image_tokens: Sequence[Tensor] = (),
        image_weights: Tensor | None = None,
        image_masks: Sequence[Tensor] = (),
    ) -> Tensor:
        """The model's output for noisy images.

        Args:
            x: noisy images or latents, [B, C, H, W], of the model's dtype; contiguous or
                channels_last. Any height and width.
            t: timesteps, int64 or floating, [B] or a 0-dim tensor.
            context: text states [B, L, cross_attention_dim] of the model's dtype, or [1, L, ...]
                for one prompt shared by the batch. For a model with classes: int64 labels [B],
                where ``null_class`` means none.
            text_embeds: pooled text [B, P] (``addition_embed_type="text_time"`` only).
            time_ids: numbers beside it, such as SDXL's six sizes and crops, [B, N].
            timestep_cond: sinusoids of the guidance scale, [B, time_cond_proj_dim], see
                :func:`~.blocks.guidance_embedding`. A model that has them and is given none takes
                no part of them.
            context_lengths: int64 [B], how many of the tokens each item sees; all by default.
            residuals, features: what other networks add, see :meth:`denoise`.
            image_tokens: of each of its IP-Adapters those of its images, [B or 1, n, L, C].
            image_weights: how much they count at each cross-attention, in the order of the
                computation, [B or 1, attentions, images of all adapters].
            image_masks: where they count, at each level's resolution: [B or 1, images, h w],
                finest first; none for everywhere.

        Returns:
            [B, out_channels, H, W]; channels_last if ``x`` is or the parameters are.

        Raises:
            ValueError: an argument that is missing, not expected, or of the wrong shape or dtype.
        """
        self.check_inputs(x, t, context, text_embeds, time_ids, timestep_cond, context_lengths)
        emb = self.embed_time(t.expand(x.shape[0]), text_embeds, time_ids, timestep_cond)
        kv = self.project_context(self.embed_context(context))
        if len(self.ip_adapters) or len(image_tokens):
            self.check_images(x.shape[0], image_tokens, image_weights, image_masks)
            assert image_weights is not None  # checked
            kv = self.with_images(kv, self.project_images(image_tokens), image_weights, image_masks)
        time = self.project_time(emb)
        return self.denoise(x, time, kv, context_lengths, residuals, features)

    def blocks(self) -> list[Block]:
        return [*super().blocks(), *self.up_blocks]

    def shared_blocks(self) -> list[list[bool]]:
        """Whether each residual block, as :meth:`project_time` lists them, is before the first
        attention to the context, so that what it computes is the same for any context."""
        first, down = self.first_attention, len(self.down_blocks)
        return [
            [i < first or (i == first < down and j == 0) for j in range(len(block.resnets))]
            for i, block in enumerate(self.blocks())
        ]

    def check_images(self, batch: int, tokens: Any, weights: Any, masks: Any) -> None:
        """Raises ValueError unless a call with a batch can have these images."""
        count, width = len(self.ip_adapters), self.config.cross_attention_dim
        if len(tokens) != count:
            checks.fail("image_tokens", f"one for each of {count} IP-Adapters", len(tokens))
        for one in tokens:
            checks.floating("image_tokens", one)
            fits = one.dim() == 4 and len(one) in (1, batch) and one.shape[3] == width
            if not fits or not one.numel():
                expected = f"shape [B or 1, n, L, {width}] with B = {batch}"
                checks.fail("image_tokens", expected, list(one.shape))
            checks.same_dtype("image_tokens", one, "the model", self.conv_in.weight)
            checks.same_device("image_tokens", one, "the model", self.conv_in.weight)
        images, places = sum(one.shape[1] for one in tokens), len(self.cross_attentions())
        checks.floating("image_weights", weights)
        if weights.shape[1:] != (places, images) or len(weights) not in (1, batch):
            expected = f"shape [B or 1, {places}, {images}] with B = {batch}"
            checks.fail("image_weights", expected, list(weights.shape))
        if len(masks) not in (0, self.config.num_levels):
            levels = self.config.num_levels
            checks.fail("image_masks", f"none, or one for each of {levels} levels", len(masks))
        for mask in masks:
            checks.floating("image_masks", mask)
            if mask.dim() != 3 or mask.shape[1] != images or len(mask) not in (1, batch):
                expected = f"shape [B or 1, {images}, h w] with B = {batch}"
                checks.fail("image_masks", expected, list(mask.shape))

    def cross_attentions(self) -> list[tuple[int, Attention]]:
        """All of them in the order of the computation, each with its level."""
        last, found = self.config.num_levels - 1, []
        for i, block in enumerate(self.blocks()):
            level = min(i, last, 2 * last + 2 - i)
            for attention in cast("list[Transformer2D]", block.attentions):
                layers = cast("list[TransformerBlock]", attention.transformer_blocks)
                found += [(level, layer.attn2) for layer in layers]
        return found

    def level_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width at each level, finest first, for an input of some height and width."""
        lost = 1 if self.config.downsample_padding else 0
        sizes = [size]
        for _ in range(self.config.num_levels - 1):
            height, width = sizes[-1]
            sizes.append(((height + lost) // 2, (width + lost) // 2))
        return sizes

    def project_images(self, tokens: Sequence[Tensor]) -> ImageProjections:
        """Keys and values at each cross-attention of the IP-Adapters' tokens [B or 1, n, L, C]."""
        adapters = list(zip(cast("list[IPAdapter]", self.ip_adapters), tokens, strict=True))
        return [
            [kv for adapter, own in adapters for kv in adapter.project_kv(i, attention, own)]
            for i, (_, attention) in enumerate(self.cross_attentions())
        ]

    def with_images(
        self,
        kv: ContextProjections,
        images: ImageProjections,
        weights: Tensor,
        masks: Sequence[Tensor],
    ) -> ContextProjections:
        """The keys and values of a context with those of images beside them.

        Args:
            kv: the result of :meth:`project_context`.
            images: the result of :meth:`project_images`.
            weights, masks: as :meth:`forward` takes them.
        """
        levels = (level for level, _ in self.cross_attentions())
        places = iter(zip(images, weights.unbind(1), levels, strict=True))

        def joined(text: KeyValue) -> KeyValue:
            own, weight, level = next(places)
            return beside_text(text, own, weight, masks[level] if len(masks) else None)

        return [[[joined(text) for text in layers] for layers in block] for block in kv]

    def denoise(
        self,
        x: Tensor,
        time: TimeProjections,
        kv: ContextProjections,
        context_lengths: Tensor | None = None,
        residuals: Residuals = (),
        features: Residuals = (),
        image: Tensor | None = None,
    ) -> Tensor:
        """The U itself, top to bottom and up again: the part that depends on the image.

        Args:
            x: as :meth:`forward` takes it.
            time: the result of :meth:`project_time`.
            kv: the result of :meth:`project_context`.
            context_lengths: as :meth:`forward` takes it.
            residuals: what a ControlNet adds to each skip where it is read, and last of all to the
                result of the bottom; none at all, or something for each.
            features: what a T2I-Adapter adds to the first levels' results on the way down, and
                behind those of all levels to that of the bottom.
            image: int64 [R], where the context has R rows, the image of each. ``x`` then has a row
                for each image, and so has ``time`` in :meth:`shared_blocks`.
        """
        x, skips = self.down(x, time, kv, context_lengths, features, image=image)
        if image is not None and self.first_attention == len(self.down_blocks):
            x, skips = widened(x, 0, image), [widened(skip, 0, image) for skip in skips]
        x = self.mid(x, time, kv, context_lengths)
        for joining in (features[len(self.down_blocks) :], residuals[len(skips) :]):
            for terms in joining:
                x = added(x, terms)
        return self.up(x, skips, time, kv, context_lengths, residuals)

    def up(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: TimeProjections,
        kv: ContextProjections,
        context_lengths: Tensor | None = None,
        residuals: Residuals = (),
    ) -> Tensor:
        """The way up; takes all that the way down left out of ``skips``."""
        for i, block in enumerate(self.up_blocks, len(self.down_blocks) + 1):
            x = block(x, skips, time[i], kv[i], context_lengths, residuals)
        return self.conv_out(self.conv_norm_out(x))


def _conv(in_channels: int, channels: int, kernel: int) -> Conv2d:
    return Conv2d(in_channels, channels, kernel, padding=kernel // 2)
