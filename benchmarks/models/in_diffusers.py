"""The same networks in diffusers, sharing their weights: what this project is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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


def compiled_unet(networks: Networks) -> Any:
    """The lean one compiled as its users are advised to: channels_last, max-autotune."""
    # Otherwise, after some shapes of one model, torch.compile leaves it as it is.
    torch._dynamo.reset()
    model = lean_unet(networks).to(memory_format=torch.channels_last)
    return torch.compile(model, mode="max-autotune", dynamic=False)


def without_no_ops(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name in ("output_scale_factor", "rescale_output_factor"):
            if getattr(module, name, None) == 1:
                setattr(module, name, _One())
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())
    return model


def pipeline(networks: Networks, unet: Any, whole: bool) -> Any:
    """diffusers' pipeline around one of the U-Nets above; without ``whole``, its loop only."""
    import diffusers

    parts: dict[str, Any] = {"unet": unet, "vae": None, "text_encoder": None, "tokenizer": None}
    if whole:
        parts["vae"] = _shared(networks.vae, "AutoencoderKL")
        parts |= networks.text.modules()
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

    with torch.device("meta"):
        theirs = getattr(diffusers, kind).from_config(ours.config.to_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return theirs.eval().requires_grad_(False)
