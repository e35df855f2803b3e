"""Writing a whole model as one CompVis (LDM) file, which most other programs load."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..files import AnyPath, save_tensors, whole
from ..models import AutoencoderKL, UNet2DCondition
from ..models.autoencoder import Autoencoder
from ..models.compvis_text import OPEN_CLIP, OPEN_CLIP_LAYER
from ..models.compvis_unet import unet_name
from ..models.compvis_vae import vae_name
from ..ops import checks
from .parts import Parts

_OPEN_NAMES = {new: old for old, new in OPEN_CLIP.items()}
_OPEN_LAYERS = {new: old for old, new in OPEN_CLIP_LAYER.items()}
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def save_single_file(parts: Parts, path: AnyPath, about: Mapping[str, str] | None = None) -> None:
    """Write all networks into one safetensors file; a file holds no tokenizer.

    Args:
        parts: the model.
        path: the file.
        about: texts for its header.

    Raises:
        OSError: it can't be written; what was there before still is.
    """
    config = parts.scheduler.config
    header = {"modelspec.prediction_type": str(config["prediction_type"]), **(about or {})}
    states = compvis_states(parts.unet, parts.vae, parts.text.modules())
    if parts.unet.config.addition_embed_type and config["prediction_type"] == "v_prediction":
        states["v_pred"] = torch.zeros(0)
    if config.get("rescale_betas_zero_snr"):
        states["ztsnr"] = torch.zeros(0)
    with whole(path) as (temporary,):
        save_tensors(states, temporary, header)


def compvis_states(
    unet: UNet2DCondition, vae: Autoencoder, encoders: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The tensors of the networks by their names in a CompVis file.

    Args:
        unet: that of SD 1.x, 2.x or SDXL, which is told by its layers.
        vae: the autoencoder.
        encoders: the text encoders, ``text_encoder`` and for SDXL ``text_encoder_2``.

    Raises:
        ValueError: an autoencoder of another kind.
    """
    found = {
        f"model.diffusion_model.{unet_name(name, unet.config)}": value
        for name, value in unet.state_dict().items()
    }
    if not isinstance(vae, AutoencoderKL):
        checks.fail("vae", "an AutoencoderKL, which such files have", type(vae).__name__)
    for name, value in vae.state_dict().items():
        name = vae_name(name, vae.config)
        # There the attention's projections are 1x1 convolutions.
        kernel = ".attn_1." in name and value.dim() == 2
        found[f"first_stage_model.{name}"] = value[..., None, None] if kernel else value
    sdxl = unet.config.addition_embed_type is not None
    open_clip = {"text_encoder_2"} if sdxl else {"text_encoder"}
    if not unet.config.use_linear_projection:
        open_clip = set()
    for component, encoder in encoders.items():
        number = list(encoders).index(component)
        place = f"conditioner.embedders.{number}" if sdxl else "cond_stage_model"
        states = _older_names(encoder)
        if component in open_clip:
            states = {f"{place}.model.{n}": v for n, v in _open_clip(states).items()}
        else:
            states = {f"{place}.transformer.{n}": v for n, v in states.items()}
        found |= states
    return found


def _older_names(encoder: Any) -> dict[str, Tensor]:
    """A text encoder's tensors as older versions of transformers name them."""
    return {
        name if name.startswith("text_projection.") else f"text_model.{name}": value
        for name, value in (
            (name.removeprefix("text_model."), value)
            for name, value in encoder.state_dict().items()
        )
    }


def _open_clip(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a text encoder in the names of OpenCLIP, query, key and value as one."""
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, value in states.items():
        match = _LAYER.fullmatch(name)
        if match is not None:
            block = f"transformer.resblocks.{match[1]}."
            part = re.fullmatch(r"self_attn\.([qkv])_proj", match[2])
            if part is not None:
                joined.setdefault(f"{block}attn.in_proj_{match[3]}", {})[part[1]] = value
            else:
                found[f"{block}{_OPEN_LAYERS.get(match[2], match[2])}.{match[3]}"] = value
        elif name == "text_projection.weight":
            found["text_projection"] = value.t()
        else:
            found[_OPEN_NAMES[name]] = value
    return found | {
        name: torch.cat([three[one] for one in "qkv"]) for name, three in joined.items()
    }
