"""LoRA files: in the names of diffusers and peft, and in those of kohya-ss, which most read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import save_tensors
from ..models import UNetConfig
from ..models.compvis_unet import unet_name
from ..models.lora_file import KOHYA, METADATA
from .lora import Layers
from .pictures import Picture
from .settings import Settings

PEFT_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
_PARTS = {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight"}
_PARTS["dora_scale"] = "lora_magnitude_vector"
_FAMILIES = {  # kohya's name, and that of the modelspec
    "sd1": ("sd_v1", "stable-diffusion-v1"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512"),
    "sd2-v": ("sd_v2_v", "stable-diffusion-v2-768-v"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def family(config: UNetConfig, prediction_type: str) -> str:
    """Which Stable Diffusion a U-Net is of: ``"sd1"``, ``"sd2"``, ``"sd2-v"`` or ``"sdxl"``."""
    if config.addition_embed_type is not None:
        return "sdxl"
    if not config.use_linear_projection:
        return "sd1"
    return "sd2-v" if prediction_type == "v_prediction" else "sd2"


def save_peft(
    layers: Layers, configs: Mapping[str, Any], path: Path, about: Mapping[str, str]
) -> None:
    """Write a file in the names of diffusers, with peft's settings in its header.

    Args:
        layers: the matrices.
        configs: peft's ``LoraConfig`` by component.
        path: the file.
        about: texts for the header.
    """
    tensors = {
        f"{component}.{_full(component, layer)}.{_PARTS[part]}": value
        for (component, layer), parts in layers.items()
        for part, value in parts.items()
    }
    settings = {
        f"{component}.{name}": _plain(value)
        for component, config in configs.items()
        for name, value in config.to_dict().items()
    }
    header = {METADATA: json.dumps(settings, sort_keys=True)}
    save_tensors(tensors, path, {**about, **header})


def save_kohya(
    layers: Layers,
    alphas: Mapping[tuple[str, str], float],
    path: Path,
    config: UNetConfig,
    about: Mapping[str, str],
) -> None:
    """Write a file in the names of kohya-ss: a U-Net's of SDXL are those of CompVis.

    Args:
        layers: the matrices.
        alphas: alpha of each layer.
        path: the file.
        config: that of the U-Net.
        about: texts for the header.
    """
    sdxl = config.addition_embed_type is not None
    tensors: dict[str, Tensor] = {}
    for (component, layer), parts in layers.items():
        prefix, name = KOHYA[component][0], _full(component, layer)
        if component == "text_encoder" and sdxl:
            prefix = KOHYA[component][1]
        if component == "unet" and sdxl:
            name = unet_name(f"{layer}.weight", config).removesuffix(".weight")
        stem = f"{prefix}_{name.replace('.', '_')}"
        for part, value in parts.items():
            if part == "dora_scale":  # one number for each row of the weight
                value = value.reshape(-1, *(1,) * (parts["lora_down"].dim() - 1))
            tensors[stem + (f".{part}" if part == "dora_scale" else f".{part}.weight")] = value
        tensors[f"{stem}.alpha"] = torch.tensor(alphas[component, layer], dtype=torch.float32)
    save_tensors(tensors, path, about)


def header(
    settings: Settings, kind: str, base: str, steps: int, pictures: Iterable[Picture]
) -> dict[str, str]:
    """What a file says of itself, in the keys of kohya-ss and of the Stability AI modelspec.

    Args:
        settings: those of the run.
        kind: what :func:`family` says of the base.
        base: hash of the base's weights.
        steps: number of steps that were trained.
        pictures: what was trained on.
    """
    pictures = list(pictures)
    trained = [picture for picture in pictures if not picture.prior]
    words: dict[str, Counter[str]] = {}
    for picture in trained:
        parts = [part.strip() for part in picture.caption.split(",") if part.strip()]
        words.setdefault(picture.file.parent.name, Counter()).update(parts)
    rank, alpha = settings.rank_and_alpha()
    arguments = dict(zip(("conv_dim", "conv_alpha"), settings.rank_and_alpha(True), strict=True))
    kohya, architecture = _FAMILIES[kind]
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[settings.precision]
    values: dict[str, Any] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
        "ss_base_model_version": kohya,
        "ss_v2": kind.startswith("sd2"),
        "ss_sd_model_name": Path(settings.model).name,
        "ss_steps": steps,
        "ss_num_train_images": sum(picture.repeats for picture in trained),
        "ss_num_reg_images": sum(p.repeats for p in pictures if p.prior),
        "ss_batch_size_per_device": settings.batch_size,
        "ss_learning_rate": settings.rate,
        "ss_optimizer": settings.optimizer,
        "ss_seed": settings.seed,
        "ss_mixed_precision": precision,
        "ss_clip_skip": settings.clip_skip + 1 if settings.clip_skip else None,
        "ss_noise_offset": settings.noise_offset or None,
        "ss_tag_frequency": json.dumps({name: dict(one) for name, one in words.items()}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": settings.out.name,
        "diffusion_fast.base": base,
    }
    return {name: str(value) for name, value in values.items()}


def alphas(layers: Layers, settings: Settings) -> dict[tuple[str, str], float]:
    """Alpha of each layer."""
    found = {}
    for place, parts in layers.items():
        large = parts["lora_down"].dim() == 4 and parts["lora_down"].shape[2:] != (1, 1)
        found[place] = settings.rank_and_alpha(large)[1]
    return found


def _full(component: str, layer: str) -> str:
    """A layer's name, of text encoders as older versions of transformers have it."""
    if component == "unet" or layer.startswith("text_projection"):  # which is beside that model
        return layer
    return "text_model." + layer.removeprefix("text_model.")


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (set, list, tuple)):
        return sorted(map(_plain, value)) if isinstance(value, set) else list(map(_plain, value))
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
