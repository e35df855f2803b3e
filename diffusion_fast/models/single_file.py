"""Whole Stable Diffusion models in one CompVis (LDM) file: ``.safetensors`` or ``.ckpt``.

What the file holds is known from its tensors' names and shapes. It doesn't say what the U-Net
predicts: SD 2.x exists with epsilon (512 x 512) and with v (768 x 768) in the same shapes, so users
of such a file pass ``prediction_type=``. EMA copies (``model_ema.``) are left alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..files import AnyPath, CheckpointError
from .compvis_text import clip_tensors, open_clip_tensors, text_config
from .compvis_unet import unet_config, unet_name
from .compvis_vae import vae_config, vae_name
from .config import UNetConfig
from .tensors import Source, Stored, read, stored
from .vae_config import VAEConfig

SUPPORTED = "SD 1.x, SD 2.x and SDXL base"

_UNET = "model.diffusion_model."
_VAES = ("first_stage_model.", "vae.", "")  # the last: a file of nothing but an autoencoder
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_CLIPS = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
_OPEN_CLIPS = ("cond_stage_model.model.", "conditioner.embedders.1.model.")

# Models that look like ours at first sight, by a prefix that gives them away.
_OTHERS = {
    "Stable Diffusion 3": (_UNET + "joint_blocks.", "joint_blocks."),
    "Flux": (_UNET + "double_blocks.", "double_blocks."),
    "a ControlNet": ("control_model.",),
    "the SDXL refiner": ("conditioner.embedders.0.model.",),
    "the Stable Diffusion upscaler": (_UNET + "label_emb.weight",),
    "Stable Cascade": ("clip_txt_mapper.", "down_blocks.1.0.channelwise."),
}


class _Family(NamedTuple):
    unet: dict[str, Any]  # fields of its config that shapes can't tell
    image_size: int
    scaling_factor: float


_FAMILIES = {
    "sd1": _Family({"sample_size": 64}, 512, 0.18215),
    "sd2": _Family({"sample_size": 96, "upcast_attention": True}, 512, 0.18215),
    "sdxl": _Family({"sample_size": 128}, 1024, 0.13025),
}


def scaling_factor(name: str) -> float:
    """Of the latents of ``"sd1"``, ``"sd2"`` or ``"sdxl"``."""
    return _FAMILIES[name].scaling_factor


class TextState(NamedTuple):
    """A text encoder: the contents of its ``config.json``, and a function that reads its tensors.

    The tensors have the names of a transformers checkpoint, with ``text_model.`` in front.
    """

    config: dict[str, Any]
    load: Callable[..., dict[str, Tensor]]  # of dtype=None, device="cpu"


@dataclass(frozen=True)
class Kind:
    """What a single file holds; nothing but its header has been read.

    Attributes:
        name: ``"sd1"``, ``"sd2"``, ``"sdxl"``, or ``"vae"`` for an autoencoder alone.
        unet, vae: their configs and tensors, None where the file has none.
        text: ``"text_encoder"`` and for SDXL ``"text_encoder_2"``.
    """

    name: str
    unet: Source[UNetConfig] | None = None
    vae: Source[VAEConfig] | None = None
    text: dict[str, TextState] = field(default_factory=dict)

    @property
    def inpainting(self) -> bool:
        """The U-Net also reads a mask and a masked image."""
        return self.unet is not None and self.unet.config.in_channels == 9


def is_single_file(names: Mapping[str, Any]) -> bool:
    """Whether these are names of tensors in a CompVis file."""
    others = [prefix for prefixes in _OTHERS.values() for prefix in prefixes]
    marks = (_UNET, *_VAES[:2], "encoder.down.", *_CLIPS, *_OPEN_CLIPS, *others)
    return any(name.startswith(marks) for name in names)


def identify(path: AnyPath, scaling: float | None = None) -> Kind:
    """What a single file holds.

    Args:
        path: the file.
        scaling: the scaling factor of an autoencoder alone, which doesn't tell it; None for that
            of SD 1.x and 2.x, with a warning.

    Raises:
        CheckpointError: a file that can't be read, that is no CompVis file, of an unsupported kind
            (named), or without tensors that every model of its kind has.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    return identify_tensors(file, stored([file]), scaling)


def identify_tensors(
    file: Path, tensors: Mapping[str, Stored], scaling: float | None = None
) -> Kind:
    """:func:`identify` of a file whose header has been read."""
    _refuse_others(file, tensors)
    unet = _under(tensors, _UNET)
    name = _family(unet) if unet else "vae"
    if name == "sdxl" and _under(tensors, "cond_stage_model."):
        raise CheckpointError(f"{file}: SD 2.x unCLIP is not supported, only {SUPPORTED}")
    try:
        return Kind(
            name,
            _unet_source(file, unet, name) if unet else None,
            _vae_source(file, tensors, name, scaling),
            _text_states(tensors),
        )
    except KeyError as error:
        raise CheckpointError(f"{file}: missing: {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: unusual shapes: {error}") from error


def text_states(path: AnyPath) -> dict[str, TextState]:
    """The text encoders in a single file, ``"text_encoder"`` and for SDXL ``"text_encoder_2"``.

    Raises:
        CheckpointError: as :func:`identify`, or the file has none.
    """
    found = identify(path).text
    if not found:
        raise CheckpointError(f"{path}: has no text encoder")
    return found


def _refuse_others(file: Path, tensors: Mapping[str, Stored]) -> None:
    for other, prefixes in _OTHERS.items():
        if any(name.startswith(prefixes) for name in tensors):
            raise CheckpointError(f"{file}: {other} is not supported, only {SUPPORTED}")
    if not _under(tensors, _UNET) and not _vae_tensors(tensors):
        some = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise CheckpointError(
            f"{file}: neither a U-Net ({_UNET}...) nor an autoencoder of {SUPPORTED} in it;"
            f" it holds {some}" + (" ..." if len(tensors) > 3 else "")
        )


def _under(tensors: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """The tensors whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _shapes(tensors: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _family(unet: Mapping[str, Stored]) -> str:
    if "label_emb.0.0.weight" in unet:
        return "sdxl"
    projection = unet.get("middle_block.1.proj_in.weight")
    return "sd2" if projection and len(projection.shape) == 2 else "sd1"


def _unet_source(file: Path, tensors: dict[str, Stored], name: str) -> Source[UNetConfig]:
    config = unet_config(_shapes(tensors), **_FAMILIES[name].unet)
    return Source(file, config, tensors, partial(unet_name, config=config))


def _vae_tensors(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    for prefix in _VAES:
        found = {n: t for n, t in _under(tensors, prefix).items() if n.startswith(_VAE_PARTS)}
        if "encoder.down.0.block.0.conv1.weight" in found:
            return found
    return {}


def _vae_source(
    file: Path, tensors: Mapping[str, Stored], name: str, scaling: float | None
) -> Source[VAEConfig] | None:
    found = _vae_tensors(tensors)
    if not found:
        return None
    family = _FAMILIES["sd1" if name == "vae" else name]
    if name != "vae":
        scaling = family.scaling_factor
    elif scaling is None:
        scaling = family.scaling_factor
        warnings.warn(
            f"{file}: an autoencoder alone doesn't tell its scaling factor: {scaling} is taken,"
            f" that of SD 1.x and 2.x; pass scaling_factor= for another (SDXL's is"
            f" {_FAMILIES['sdxl'].scaling_factor})",
            stacklevel=2,
        )
    config = vae_config(_shapes(found), family.image_size, scaling)
    return Source(file, config, found, partial(vae_name, config=config))


def _text_states(tensors: Mapping[str, Stored]) -> dict[str, TextState]:
    found = {}
    for prefix in _CLIPS:
        if clip := clip_tensors(_under(tensors, prefix)):
            found["text_encoder"] = TextState(text_config(clip, False), partial(read, clip))
    for prefix, encoder in zip(_OPEN_CLIPS, ("text_encoder", "text_encoder_2"), strict=True):
        projected = encoder == "text_encoder_2"
        if clip := open_clip_tensors(_under(tensors, prefix), projected):
            found[encoder] = TextState(text_config(clip, True), partial(read, clip))
    return found
