"""Whole Stable Diffusion models in one CompVis (LDM) file: ``.safetensors`` or ``.ckpt``.

What the file holds is known from its tensors' names and shapes. What the U-Net predicts is not in
the shapes: it is read from the empty tensors ``v_pred`` and ``ztsnr`` (zero terminal SNR), or from
the header (``modelspec.prediction_type``, ``modelspec.architecture``). SD 2.x exists with epsilon
(512 x 512) and with v (768 x 768), and most of its files say nothing, so users pass
``prediction_type=``. EMA copies (``model_ema.``) are left alone.
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
from . import contents
from .compvis_text import clip_tensors, open_clip_tensors, text_config
from .compvis_unet import unet_config, unet_name
from .compvis_vae import in_compvis_names, vae_config, vae_name
from .config import UNetConfig
from .tensors import Source, Stored, metadata, read, stored
from .vae_config import VAEConfig

SUPPORTED = "SD 1.x, SD 2.x and SDXL"

_UNETS = ("model.diffusion_model.", "diffusion_model.", "")  # the last: nothing but a U-Net
_VAES = ("first_stage_model.", "vae.", "")  # the last: nothing but an autoencoder
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_CLIPS = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
_OPEN_CLIPS = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner's only one
}
_FIRST = "input_blocks.0.0.weight"  # of every U-Net
_PREDICTIONS = {
    **dict.fromkeys(("v", "v_pred", "vpred", "v_prediction", "v-prediction"), "v_prediction"),
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
_ARCHITECTURES = {
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
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
        text: ``"text_encoder"`` and for SDXL ``"text_encoder_2"``; the refiner's is the latter.
        prediction_type: what the file says that its U-Net predicts, None where it says nothing.
        zero_terminal_snr: the file says that the last step of its schedule is pure noise.
    """

    name: str
    unet: Source[UNetConfig] | None = None
    vae: Source[VAEConfig] | None = None
    text: dict[str, TextState] = field(default_factory=dict)
    prediction_type: str | None = None
    zero_terminal_snr: bool = False

    @property
    def inpainting(self) -> bool:
        """The U-Net also reads a mask and a masked image."""
        return self.unet is not None and self.unet.config.in_channels == 9


def is_single_file(names: Mapping[str, Any]) -> bool:
    """Whether these are names of tensors in a CompVis file, or in one of no use to us."""
    marks = (*_UNETS[:2], *_VAES[:2], "encoder.down.", *_CLIPS, *_OPEN_CLIPS)
    found = _FIRST in names or any(name.startswith(marks) for name in names)
    return found or contents.by_names(names) is not None


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
    unet = _unet_tensors(tensors)
    _refuse_others(file, tensors, unet)
    name = _family(unet) if unet else "vae"
    if name == "sdxl" and _under(tensors, "cond_stage_model."):
        raise CheckpointError(f"{file}: SD 2.x unCLIP is not supported, only {SUPPORTED}")
    try:
        return Kind(
            name,
            _unet_source(file, unet, name) if unet else None,
            _vae_source(file, tensors, name, scaling),
            _text_states(tensors),
            _prediction(file, tensors),
            "ztsnr" in tensors,
        )
    except KeyError as error:
        raise CheckpointError(f"{file}: missing: {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: unusual shapes: {error}") from error


def _refuse_others(file: Path, tensors: Mapping[str, Stored], unet: Mapping[str, Stored]) -> None:
    if kind := contents.by_names(tensors):
        raise CheckpointError(f"{file}: {kind} is not supported, only {SUPPORTED}")
    if not unet and not _vae_tensors(tensors):
        some = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise CheckpointError(
            f"{file}: neither a U-Net ({_UNETS[0]}...) nor an autoencoder of {SUPPORTED} in it;"
            f" it holds {some}" + (" ..." if len(tensors) > 3 else "")
        )


def _prediction(file: Path, tensors: Mapping[str, Stored]) -> str | None:
    """What the file says that its U-Net predicts."""
    if "v_pred" in tensors:
        return "v_prediction"
    said = metadata(file)
    if value := said.get("modelspec.prediction_type"):
        if value.lower() not in _PREDICTIONS:
            raise CheckpointError(f"{file}: modelspec.prediction_type {value!r} is not supported")
        return _PREDICTIONS[value.lower()]
    return _ARCHITECTURES.get(said.get("modelspec.architecture", ""))


def _unet_tensors(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    found = _under(tensors, _UNETS[0])
    if found:
        return found
    return next((f for f in (_under(tensors, p) for p in _UNETS[1:]) if _FIRST in f), {})


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
    """The autoencoder's tensors, in CompVis' names."""
    for prefix in _VAES:
        found = {n: t for n, t in _under(tensors, prefix).items() if n.startswith(_VAE_PARTS)}
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in found:
            found = in_compvis_names(found)
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
    for prefix, penultimate in zip(_CLIPS, (False, True), strict=True):
        if clip := clip_tensors(_under(tensors, prefix), penultimate):
            found["text_encoder"] = TextState(text_config(clip, False), partial(read, clip))
    for prefix, encoder in _OPEN_CLIPS.items():
        projected = encoder == "text_encoder_2"
        if clip := open_clip_tensors(_under(tensors, prefix), projected):
            found[encoder] = TextState(text_config(clip, True), partial(read, clip))
    return found
