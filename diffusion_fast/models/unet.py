"""The conditional U-Net of latent diffusion models (Ronneberger 2015; Rombach et al. 2022)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..files import AnyPath
from ..ops import checks
from .blocks import (
    Attention,
    KeyValue,
    Transformer2D,
    TransformerBlock,
    Upsample,
    beside_text,
)
from .checkpoints import save_model
from .config import UNetConfig
from .ip_adapter import IPAdapter
from .layers import GroupNorm, added, widened
from .pretrained import find_pretrained
from .unet_encoder import (
    Block,
    ContextProjections,
    ImageProjections,
    Residuals,
    TimeProjections,
    UNetEncoder,
    same_size_conv,
)


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
        self.conv_out = same_size_conv(channels[0], config.out_channels, config.conv_out_kernel)

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
