"""The U-Net of a diffusers pipeline by ours, with what ControlNets and adapters add to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from ...engine.rewrites.leaves import joined_contexts
from ...models.blocks import KeyValue, beside_text
from ...models.config import UNetConfig
from ...models.unet import UNet2DCondition
from ...models.unet_encoder import ContextProjections
from .replacement import Replacement


class UNetReplacement(Replacement):
    def __init__(self, theirs: Any) -> None:
        with torch.device("meta"):
            config = dict(theirs.config)
            if config.get("encoder_hid_dim_type") == "ip_image_proj":  # what loading one leaves
                config["encoder_hid_dim_type"] = None
            ours = UNet2DCondition(UNetConfig.from_dict(config))
        joined_contexts(ours)
        super().__init__("U-Net", theirs, ours)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As ``UNet2DConditionModel.forward``."""
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        needs = self._needs()
        added = {k: v for k, v in (added_cond_kwargs or {}).items() if k in needs}
        residuals: list[Tensor] = []
        if down_block_additional_residuals and mid_block_additional_residual is not None:
            residuals = [*down_block_additional_residuals, mid_block_additional_residual]

        def ours() -> UNet2DConditionOutput | tuple[Tensor]:
            t = torch.as_tensor(timestep).to(sample.device).reshape(-1).expand(len(sample))
            conditions = dict(added)
            if "text_embeds" in conditions:
                conditions["text_embeds"] = conditions["text_embeds"].to(sample.dtype)
            images = conditions.pop("image_embeds", None)
            with lora_scale(self.theirs, scale):
                joined = {
                    "residuals": [[(one, None)] for one in residuals],
                    "features": [
                        [(one, None)] for one in down_intrablock_additional_residuals or ()
                    ],
                }
                if images is None:
                    out = self.ours(
                        sample,
                        t,
                        encoder_hidden_states,
                        timestep_cond=timestep_cond,
                        **joined,
                        **conditions,
                    )
                else:
                    masks = (cross_attention_kwargs or {}).get("ip_adapter_masks")
                    emb = self.ours.embed_time(t, timestep_cond=timestep_cond, **conditions)
                    kv = self._with_images(sample, encoder_hidden_states, images, masks)
                    out = self.ours.denoise(sample, self.ours.project_time(emb), kv, **joined)
            return UNet2DConditionOutput(sample=out) if return_dict else (out,)

        return self.run(self._reason(arguments), ours, arguments)

    def _needs(self) -> set[str]:
        """What the model takes of ``added_cond_kwargs``."""
        needs = {"text_embeds", "time_ids"} if self.ours.config.addition_embed_type else set()
        hidden = getattr(self.theirs, "encoder_hid_proj", None)
        return needs | ({"image_embeds"} if hidden is not None else set())

    def _with_images(
        self, sample: Tensor, text: Tensor, embeds: Any, masks: Any
    ) -> ContextProjections:
        """Keys and values of the text, and beside them those of the images of IP-Adapters.

        Args:
            sample: the noisy latents.
            text: the prompt's states.
            embeds: of each adapter what the image encoder says, [B, n, ...].
            masks: of each adapter [1, n, h, w], None for none of it; None for no masks.
        """
        tokens = self.theirs.encoder_hid_proj(embeds)  # of each adapter, [B, n, L, C]
        sizes = self.ours.level_sizes((sample.shape[2], sample.shape[3]))
        if masks is not None and not isinstance(masks, list):
            masks = list(masks.unsqueeze(1))

        def beside(block: int, i: int, j: int, text: KeyValue, level: int) -> KeyValue:
            attention = _blocks(self.theirs)[block].attentions[i].transformer_blocks[j].attn2
            processor, queries = attention.processor, sizes[level][0] * sizes[level][1]
            images, weights, shown = [], [], []
            for n, own in enumerate(tokens):
                scale, mask = processor.scale[n], None if masks is None else masks[n]
                one = own if mask is not None else own.flatten(1, 2)[:, None]
                for m in range(one.shape[1]):
                    kv = processor.to_k_ip[n](one[:, m]), processor.to_v_ip[n](one[:, m])
                    images.append(tuple(x.unflatten(2, (attention.heads, -1)) for x in kv))
                    weights.append(float(scale[m] if isinstance(scale, list) else scale))
                    if masks is not None:
                        shown.append(_shown(sample, None if mask is None else mask[:, m], queries))
            factors = sample.new_tensor([weights])
            return beside_text(text, images, factors, torch.stack(shown, 1) if shown else None)

        kv = self.ours.project_context(text)
        levels = iter(level for level, _ in self.ours.cross_attentions())
        return [
            [
                [beside(b, i, j, one, next(levels)) for j, one in enumerate(layers)]
                for i, layers in enumerate(block)
            ]
            for b, block in enumerate(kv)
        ]

    def _reason(self, arguments: dict[str, Any]) -> str | None:
        """What the arguments ask for that our model doesn't have."""
        for name in (
            "class_labels",
            "attention_mask",
            "encoder_attention_mask",
        ):
            if arguments[name] is not None:
                return f"the argument {name}"
        if reason := self._unlike_residuals(arguments):
            return reason
        needs = self._needs()
        pictured = {"ip_adapter_masks"} if "image_embeds" in needs else set()
        if others := set(arguments["cross_attention_kwargs"] or ()) - {"scale"} - pictured:
            return f"cross_attention_kwargs[{min(others)!r}]"
        added = arguments["added_cond_kwargs"] or {}
        if set(added) != needs:
            return f"added_cond_kwargs {sorted(added)}, not {sorted(needs)}"
        dtype = self.ours.conv_in.weight.dtype
        for name in ("sample", "encoder_hidden_states", "timestep_cond"):
            if arguments[name] is not None and arguments[name].dtype != dtype:
                return f"{name} of {arguments[name].dtype} for a model of {dtype}"
        return None

    def _unlike_residuals(self, arguments: dict[str, Any]) -> str | None:
        """What is odd about a ControlNet's or T2I-Adapter's tensors."""
        config = self.ours.config
        down = arguments["down_block_additional_residuals"]
        mid = arguments["mid_block_additional_residual"]
        if (down is None) != (mid is None):
            return "residuals of either the way down or the bottom alone"
        skips = sum(config.per_level("layers_per_block")) + config.num_levels
        if down is not None and len(down) != skips:
            return f"down_block_additional_residuals of {len(down)} tensors, not {skips}"
        features = arguments["down_intrablock_additional_residuals"]
        if features is not None and len(features) > config.num_levels:
            last = features[-1].shape[1:]
            before = features[config.num_levels - 1].shape[1:]
            if len(features) > config.num_levels + 1 or last != before:
                return "down_intrablock_additional_residuals behind the last level"
        return None


def _blocks(unet: Any) -> list[Any]:
    """In the order of the computation."""
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]


def _shown(sample: Tensor, mask: Tensor | None, queries: int) -> Tensor:
    """A mask [1, h, w] at a level with so many queries, [B, queries]."""
    if mask is None:
        return sample.new_zeros(1, queries)
    return IPAdapterMaskProcessor.downsample(mask, 1, queries, 1)[..., 0].to(sample)


@contextmanager
def lora_scale(model: nn.Module, scale: float) -> Iterator[None]:
    """All LoRA of a model times ``scale``, as ``cross_attention_kwargs`` asks for."""
    if scale == 1 or not USE_PEFT_BACKEND:
        yield
        return
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)
