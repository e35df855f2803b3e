"""A Stable Diffusion or SDXL pipeline of diffusers with our U-Net and VAE decoder inside.

The pipeline keeps its own modules, and only ``forward`` of the U-Net and of the VAE's decoder is
replaced by ours, which reads the same parameters (see :mod:`.twin`). So everything that is done
with those modules goes on working: LoRA of every kind, before and after, with scales, fused or not;
``.to()``; edits of weights in place; offloading of whole models; VAE slicing and tiling.

The ControlNets of a pipeline run by ours as well, and the U-Net takes their residuals and the
features of T2I-Adapters. An IP-Adapter's layers are called where they are, with the images beside
the text.

A call that asks for something our models don't have (FreeU, a patched module, ...) runs diffusers'
own forward instead. It warns once for each reason, and :func:`explain` counts them.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models import attention_processor as processors
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from ...models.blocks import KeyValue, beside_text
from ...models.config import UNetConfig
from ...models.controlnet import ControlNet
from ...models.controlnet_config import ControlNetConfig
from ...models.unet import ContextProjections, UNet2DCondition
from ...models.vae import Decoder
from ...models.vae_config import VAEConfig
from ...ops import checks
from ..twin import Unlike
from .attention_processor import AttentionProcessor
from .twin import DiffusersTwin

SUPPORTED = (
    "a Stable Diffusion or SDXL pipeline, with a UNet2DConditionModel as `unet` and an"
    " AutoencoderKL as `vae`"
)

# They all compute softmax(Q K^T / sqrt(D)) V, in different amounts of memory.
_PROCESSORS = {
    AttentionProcessor,
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
}

_FREEU = ("s1", "s2", "b1", "b2")
_MODES = {"processor", "_chunk_size", "gradient_checkpointing", *_FREEU}


class Replacement:
    """A module of a pipeline, and what its ``forward`` is replaced by.

    Attributes:
        theirs, ours: diffusers' module, and ours over its layers.
        calls: how many calls ours has run.
        others: how many diffusers' own forward has run, by reason.
    """

    theirs: Any
    ours: Any
    forward: Callable[..., Any]

    def __init__(self, name: str, theirs: Any, ours: Any) -> None:
        self.name = name
        self.theirs, self.ours = theirs, ours
        self.twin = DiffusersTwin(theirs, ours)
        self.calls = 0
        self.others: Counter[str] = Counter()
        self._blocks: list[nn.Module] = []
        self._attributes: list[dict[str, Any]] = []

    def problem(self) -> str | None:
        """Why the next call could not be ours, whatever its arguments; None if it can."""
        if problem := self.twin.problem():
            return problem
        for attributes in self._modes():
            if mode := _mode(attributes):
                return mode
        return None

    def _modes(self) -> list[dict[str, Any]]:
        """The attributes of blocks that have one of those that matter; new ones come by linking."""
        if self._blocks is not self.twin.blocks:
            self._blocks = self.twin.blocks
            every = [module.__dict__ for module in (self.theirs, *self._blocks)]
            self._attributes = [attributes for attributes in every if _MODES & attributes.keys()]
        return self._attributes

    def run(self, reason: str | None, ours: Callable[[], Any], arguments: dict[str, Any]) -> Any:
        """Ours if there is no ``reason`` against it, else diffusers' own forward."""
        reason = reason or self.problem()
        if reason is None:
            self.calls += 1
            return ours()
        if reason not in self.others:
            warnings.warn(
                f"diffusion_fast: the {self.name} runs diffusers' own forward: {reason}",
                stacklevel=2,
            )
        self.others[reason] += 1
        return type(self.theirs).forward(self.theirs, **arguments)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.calls} calls by diffusion_fast"]
        lines += [f"  {count} by diffusers: {why}" for why, count in self.others.items()]
        if problem := self.problem():
            lines.append(f"  the next one by diffusers: {problem}")
        return "\n".join(lines)


class UNetReplacement(Replacement):
    def __init__(self, theirs: Any) -> None:
        with torch.device("meta"):
            config = dict(theirs.config)
            if config.get("encoder_hid_dim_type") == "ip_image_proj":  # what loading one leaves
                config["encoder_hid_dim_type"] = None
            ours = UNet2DCondition(UNetConfig.from_dict(config))
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


class ControlNetReplacement(Replacement):
    def __init__(self, theirs: Any) -> None:
        with torch.device("meta"):
            ours = ControlNet(ControlNetConfig.from_dict(theirs.config))
        super().__init__("ControlNet", theirs, ours)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """As ``ControlNetModel.forward``."""
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        pooled = self.ours.config.addition_embed_type is not None
        added = (added_cond_kwargs or {}) if pooled else {}
        reason = next(
            (
                f"the argument {name}"
                for name in ("class_labels", "timestep_cond", "attention_mask")
                if arguments[name] is not None
            ),
            "cross_attention_kwargs" if cross_attention_kwargs else None,
        )
        if pooled and set(added) != {"text_embeds", "time_ids"}:
            reason = reason or f"added_cond_kwargs {sorted(added)}"
        dtype = self.ours.conv_in.weight.dtype
        for name in ("sample", "encoder_hidden_states", "controlnet_cond"):
            if arguments[name].dtype != dtype:
                reason = reason or f"{name} of {arguments[name].dtype} for a model of {dtype}"

        def ours() -> Any:
            t = torch.as_tensor(timestep).to(sample.device).reshape(-1).expand(len(sample))
            conditions = dict(added)
            if conditions:
                conditions["text_embeds"] = conditions["text_embeds"].to(dtype)
            found = self.ours(
                *(sample, t, encoder_hidden_states, controlnet_cond),
                guess_mode=guess_mode,
                **conditions,
            )
            *down, mid = (one * conditioning_scale for one in found)
            if not return_dict:
                return down, mid
            parts: Any = tuple(down)  # of any number, other than its annotation says
            return ControlNetOutput(down_block_res_samples=parts, mid_block_res_sample=mid)

        return self.run(reason, ours, arguments)


class DecoderReplacement(Replacement):
    def __init__(self, vae: Any) -> None:
        with torch.device("meta"):
            ours = Decoder(VAEConfig.from_dict(vae.config))
        super().__init__("VAE decoder", vae.decoder, ours)

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """As ``Decoder.forward``."""
        arguments = {"sample": sample, "latent_embeds": latent_embeds}
        reason = None if latent_embeds is None else "the argument latent_embeds"
        return self.run(reason, lambda: self.ours(sample), arguments)


def _blocks(unet: Any) -> list[Any]:
    """In the order of the computation."""
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]


def _shown(sample: Tensor, mask: Tensor | None, queries: int) -> Tensor:
    """A mask [1, h, w] at a level with so many queries, [B, queries]."""
    if mask is None:
        return sample.new_zeros(1, queries)
    return IPAdapterMaskProcessor.downsample(mask, 1, queries, 1)[..., 0].to(sample)


def _mode(attributes: dict[str, Any]) -> str | None:
    """What a block was told to do that our model can't."""
    processor = attributes.get("processor")
    if processor is not None and type(processor) not in _PROCESSORS:
        return f"the attention processor {type(processor).__name__}"
    if any(attributes.get(name) is not None for name in _FREEU):
        return "FreeU"
    if attributes.get("_chunk_size"):
        return "chunked feed-forward layers"
    if attributes.get("gradient_checkpointing") and torch.is_grad_enabled():
        return "gradient checkpointing"
    return None


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


def accelerate(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Let a pipeline compute its U-Net and VAE decoder with ours; nothing is copied.

    Accelerating twice is accelerating once. Pipelines that share modules share the acceleration.

    Args:
        pipe: a Stable Diffusion or SDXL pipeline (text, image-to-image, inpainting, ...).

    Returns:
        ``pipe`` itself.

    Raises:
        ValueError: another kind of pipeline or model, or a config that our models don't cover; the
            message names it, and the pipeline is as before.
    """
    unet, vae = _models(pipe)
    todo: list[Replacement] = []
    kinds: tuple[tuple[str, Any, Callable[[], Replacement]], ...] = (
        ("unet", unet, lambda: UNetReplacement(unet)),
        ("vae", vae.decoder, lambda: DecoderReplacement(vae)),
        *(
            ("controlnet", net, functools.partial(ControlNetReplacement, net))
            for net in _controlnets(pipe)
        ),
    )
    for name, module, make in kinds:
        if replacement_of(module) is not None:
            continue
        forward = vars(module).get(_slot(module))
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            checks.fail(f"pipe.{name}", "a forward as diffusers wrote it", "a patched one")
        try:
            part = make()
        except (ValueError, Unlike) as error:
            raise ValueError(
                f"pipe.{name}: not a model that diffusion_fast has: {error}"
            ) from error
        todo.append(part)
    for part in todo:
        setattr(part.theirs, _slot(part.theirs), part.forward)
    return pipe


def restore(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Undo :func:`accelerate`; a pipeline that isn't accelerated stays as it is.

    Returns:
        ``pipe`` itself.

    Raises:
        ValueError: not a pipeline that can be accelerated.
    """
    unet, vae = _models(pipe)
    for module in (unet, vae.decoder, *_controlnets(pipe)):
        if replacement_of(module) is None:
            continue
        slot = _slot(module)
        if slot == "forward":
            del module.forward  # the class's comes to light
        else:
            setattr(module, slot, type(module).forward.__get__(module))
    return pipe


@dataclass(frozen=True)
class Explanation:
    """What runs an accelerated pipeline's modules; ``str()`` of it is readable.

    Attributes:
        unet, vae_decoder: None if it isn't accelerated.
        controlnets: the same of each ControlNet of the pipeline. Each part has ``calls``, how many
            ours has run, ``others``, how many diffusers' own forward has run, by reason, and
            ``problem()``, why the next one would be diffusers', or None.
    """

    unet: Replacement | None
    vae_decoder: Replacement | None
    controlnets: list[Replacement | None] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [("U-Net", self.unet), ("VAE decoder", self.vae_decoder)]
        parts += [("ControlNet", part) for part in self.controlnets]
        return "\n".join(str(part or f"{name}: not accelerated") for name, part in parts)


def explain(pipe: DiffusionPipeline) -> Explanation:
    """Which calls of a pipeline ran on our models since :func:`accelerate`, and why not the others.

    Raises:
        ValueError: not a pipeline that can be accelerated.
    """
    unet, vae = _models(pipe)
    controlnets = [replacement_of(net) for net in _controlnets(pipe)]
    return Explanation(replacement_of(unet), replacement_of(vae.decoder), controlnets)


def _controlnets(pipe: Any) -> list[Any]:
    """The ControlNets of a pipeline; of another kind (ControlNet-Union) none."""
    found: Any = getattr(pipe, "controlnet", None)
    nets = getattr(found, "nets", [found])  # of several in one
    return [net for net in nets if type(net) is ControlNetModel]


def replacement_of(module: nn.Module) -> Replacement | None:
    """What :func:`accelerate` put into a module."""
    owner = getattr(vars(module).get(_slot(module)), "__self__", None)
    return owner if isinstance(owner, Replacement) else None


def _slot(module: Any) -> str:
    """The name of the forward in effect: a hook of accelerate keeps it under another one."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _models(pipe: Any) -> tuple[Any, Any]:
    if not isinstance(pipe, DiffusionPipeline):
        checks.fail("pipe", SUPPORTED, type(pipe).__name__)
    for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        model = getattr(pipe, name, None)
        if type(model) is not cls:
            has = "none" if model is None else type(model).__name__
            got = f"a {type(pipe).__name__} whose {name} is {has}"
            checks.fail("pipe", SUPPORTED, got)
    parts: Any = pipe
    return parts.unet, parts.vae
