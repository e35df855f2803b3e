"""The same networks in diffusers, sharing their weights: what this project is held against."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..peers import Compute, Peer
from .networks import SCHEDULER, Networks


class _One:
    """A scale of 1: x / one is x itself, where x / 1.0 reads and writes all of x."""

    def __rtruediv__(self, x: Tensor) -> Tensor:
        return x


def unet(networks: Networks) -> Any:
    """diffusers' U-Net. Raises ImportError without diffusers."""
    return _shared(networks.unet, "UNet2DConditionModel")


def lean_unet(networks: Networks) -> Any:
    """The same without work that changes nothing: divisions by 1.0, and dropout."""
    return without_no_ops(unet(networks))


def unet_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of diffusers' U-Net, as its pipelines give them, of our U-Net's ``given``."""
    added = {name: value for name, value in given.items() if name != "context"}
    return {
        "encoder_hidden_states": given["context"],
        "added_cond_kwargs": added or None,
        "return_dict": False,
    }


def controlnet(networks: Networks) -> Any:
    """diffusers' ControlNet."""
    return _shared(networks.controlnet, "ControlNetModel")


def unet_with_ip_adapter(networks: Networks, scale: float) -> Any:
    """diffusers' U-Net with the IP-Adapter, of which it takes a copy as its files have it."""
    theirs, adapter = unet(networks), networks.ip_adapter
    places = {id(module): name for name, module in networks.unet.named_modules()}
    own = [places[id(one)] for _, one in networks.unet.cross_attentions()]
    names = [name.removesuffix(".processor") for name in theirs.attn_processors]
    tensors = {
        f"{2 * n + 1}.to_{x}_ip.weight": getattr(adapter, f"to_{x}")[own.index(name)].weight
        for n, name in enumerate(name for name in names if name in own)
        for x in "kv"
    }
    projection = dict(adapter.projection.state_dict())
    theirs._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": tensors}])
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    return theirs


class UNetStep(nn.Module):
    """diffusers' U-Net from tensors to a tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(x, t, context, added_cond_kwargs=added, return_dict=False)[0]


class Decoding(nn.Module):
    """The decoder of diffusers' autoencoder from latents to images."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


class TextStates(nn.Module):
    """The text encoder of diffusers' pipelines from token ids to the states that they read."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(ids)[0]


class Served:
    """A module from tensors to a tensor, computed by a peer that is built at the first call."""

    def __init__(self, module: nn.Module, peer: Peer) -> None:
        self.module, self.peer = module, peer
        self._compute: Compute | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._compute is None:
            with warnings.catch_warnings():
                # Tracing takes diffusers' checks of shapes as fixed.
                warnings.simplefilter("ignore")
                self._compute = self.peer(self.module, inputs)
        return self._compute(*inputs)


class ServedUNet:
    """The lean U-Net with a peer behind it; what isn't a call is asked of the U-Net itself."""

    def __init__(self, networks: Networks, peer: Peer) -> None:
        self.peer, self._unet = peer, lean_unet(networks)
        self._step = Served(UNetStep(self._unet), peer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        added = added_cond_kwargs or {}
        more = (added[name] for name in ("text_embeds", "time_ids") if name in added)
        return (self._step(sample, timestep, encoder_hidden_states, *more),)


def without_no_ops(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name in ("output_scale_factor", "rescale_output_factor"):
            if getattr(module, name, None) == 1:
                setattr(module, name, _One())
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())
    return model


class ServedDecoder:
    """The autoencoder with a peer that decodes; all else is asked of the autoencoder itself."""

    def __init__(self, networks: Networks, peer: Peer) -> None:
        self._vae = autoencoder(networks)
        self._decode = Served(Decoding(self._vae), peer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (self._decode(latents),)


class ServedText:
    """The text encoder with a peer that computes it; all else is asked of the encoder itself."""

    def __init__(self, encoder: nn.Module, peer: Peer) -> None:
        self._encoder, self._states = encoder, Served(TextStates(encoder), peer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (self._states(ids),)


def autoencoder(networks: Networks) -> Any:
    """diffusers' autoencoder. Raises ImportError without diffusers."""
    return _shared(networks.vae, "AutoencoderKL")


def pipeline(networks: Networks, unet: Any, whole: bool) -> Any:
    """diffusers' pipeline around one of the U-Nets above; without ``whole``, its loop only.

    What computes the U-Net decodes too, and computes the text encoder where there is one. SDXL's
    two stay PyTorch's: the pipeline reads several results of each, and a peer gives one.
    """
    import diffusers

    parts: dict[str, Any] = {"unet": unet, "vae": None, "text_encoder": None, "tokenizer": None}
    if whole:
        parts |= networks.text.modules()
        parts["vae"] = autoencoder(networks)
        if isinstance(unet, ServedUNet):
            parts["vae"] = ServedDecoder(networks, unet.peer)
            if len(networks.text.encoders) == 1:
                parts["text_encoder"] = ServedText(parts["text_encoder"], unet.peer)
        names = ("tokenizer", "tokenizer_2")
        parts |= dict(zip(names, networks.text.tokenizers, strict=False))
    pipe: Any
    parts["scheduler"] = diffusers.DDIMScheduler.from_config(SCHEDULER)
    if networks.kind.unet.addition_embed_type is not None:
        parts = {"text_encoder_2": None, "tokenizer_2": None, **parts}
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        checker = {"safety_checker": None, "feature_extractor": None}
        pipe = diffusers.StableDiffusionPipeline(**parts, **checker, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _shared(ours: Any, kind: str) -> Any:
    import diffusers

    config = getattr(ours, "control_config", ours.config)
    with torch.device("meta"):
        theirs = getattr(diffusers, kind).from_config(config.to_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return theirs.eval().requires_grad_(False)
