"""LoRA files: the pairs of low-rank matrices they hold, in the names of any of the usual tools."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import AnyPath, CheckpointError
from .compvis_unet import unet_name
from .config import UNetConfig
from .tensors import read, stored

METADATA = "lora_adapter_metadata"  # diffusers' key for PEFT's settings
KOHYA = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}

# What follows a layer's name: PEFT's, diffusers' older ones, kohya's.
_PARTS = (
    (re.compile(r"\.lora_A(?:\.default)?\.weight"), "down"),
    (re.compile(r"\.lora_B(?:\.default)?\.weight"), "up"),
    (re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight"), "down"),
    (re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight"), "up"),
    (re.compile(r"\.lora_down\.weight"), "down"),
    (re.compile(r"\.lora_up\.weight"), "up"),
    (re.compile(r"\.alpha"), "alpha"),
)


@dataclass(frozen=True)
class LoRALayer:
    """A change of a weight, W + scale (alpha / r) B A (Hu et al. 2021, arXiv:2106.09685, sec. 4.1).

    Attributes:
        down: A, [r, in] or [r, in, kh, kw].
        up: B, [out, r] or [out, r, 1, 1].
        alpha: r where a file says nothing.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in * kh * kw] of the weight, as a matrix."""
        return self.up.shape[0], self.down[0].numel()

    def delta(self) -> Tensor:
        """(alpha / r) B A in float32, [out, in * kh * kw]."""
        down, up = self.down.float().flatten(1), self.up.float().flatten(1)
        return (up @ down) * (self.alpha / len(down))


def read_lora(
    path: AnyPath, components: Mapping[str, nn.Module]
) -> dict[str, dict[str, LoRALayer]]:
    """The layers of a LoRA file, for the layers of a model that they change.

    Args:
        path: a file of diffusers, PEFT or kohya-ss, or a folder that holds one such file.
        components: the networks it may change: ``unet``, ``text_encoder``, ``text_encoder_2``.

    Returns:
        For each component with changes: its layers' names to what changes them.

    Raises:
        CheckpointError: a damaged file, another kind of adapter, layers that the model doesn't have
            or of other shapes (listed by name).
    """
    file = _file(Path(path))
    halves = _halves(file)
    targets = _targets(components)
    found: dict[str, dict[str, LoRALayer]] = {}
    problems, settings = [], _settings(file)
    for stem, parts in sorted(halves.items()):
        if stem not in targets:
            problems.append(f"extra: {stem}")
            continue
        component, name, weight = targets[stem]
        if "down" not in parts or "up" not in parts:
            problems.append(f"missing: one of the two matrices of {stem}")
            continue
        down, up = parts["down"], parts["up"]
        if "alpha" in parts:
            alpha = float(parts["alpha"])
        else:
            alpha = _alpha(settings, component, name, len(down))
        layer = LoRALayer(down, up, alpha)
        wanted = (weight.shape[0], weight[0].numel())
        if len(down) != up.shape[1] or layer.shape != wanted:
            shapes = f"{list(up.shape)} and {list(down.shape)}"
            problems.append(f"misshapen: {stem} is for a weight {list(weight.shape)}, got {shapes}")
            continue
        found.setdefault(component, {})[name] = layer
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(
            f"{file}: a LoRA for another model, {len(problems)} of its {len(halves)} layers:{lines}"
        )
    return found


def _file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"{path}: expected one .safetensors file in the folder, found {names}"
        )
    return files[0]


def _halves(file: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by the layer's name in the file."""
    tensors = read(stored([file]))
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        for pattern, part in _PARTS:
            match = pattern.search(name)
            if match and match.end() == len(name):
                layers.setdefault(_plain(name[: match.start()]), {})[part] = tensor
                break
        else:
            unknown.append(name)
    if unknown or not layers:
        some = ", ".join(sorted(unknown)[:3]) or "no tensors"
        raise CheckpointError(
            f"{file}: expected the pairs of matrices of a LoRA (diffusers, PEFT or kohya), got"
            f" {some}{' and others' if len(unknown) > 3 else ''}"
        )
    return layers


def _plain(stem: str) -> str:
    """A layer's name without what older files put around it."""
    stem = stem.removeprefix("base_model.model.").replace(".processor.", ".")
    return re.sub(r"\.to_out$", ".to_out.0", stem)


def _targets(components: Mapping[str, nn.Module]) -> dict[str, tuple[str, str, Tensor]]:
    """Every layer by every name that a file may give it: its component, name and weight there."""
    targets = {}
    for component, module in components.items():
        for name, layer in module.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            for stem in _stems(component, name, getattr(module, "config", None)):
                targets[stem] = (component, name, layer.weight)
    return targets


def _stems(component: str, name: str, config: Any) -> list[str]:
    dotted = [name]
    if component == "unet":
        # Files of the first diffusers versions hold the U-Net alone, without a prefix.
        stems = [name, f"unet.{name}"]
        if isinstance(config, UNetConfig):
            dotted.append(unet_name(f"{name}.weight", config).removesuffix(".weight"))
    else:
        if not name.startswith("text_model."):  # newer versions of transformers
            dotted.append(f"text_model.{name}")
        stems = [f"{component}.{one}" for one in dotted]
    prefixes = KOHYA[component]
    return stems + [f"{p}_{one.replace('.', '_')}" for p in prefixes for one in dotted]


def _settings(file: Path) -> dict[str, Any]:
    """PEFT's settings, with a component's name before each, where the file carries them."""
    try:
        with safe_open(file, framework="pt") as handle:
            text = (handle.metadata() or {}).get(METADATA, "{}")
        settings = json.loads(text)
    except (SafetensorError, OSError, ValueError):  # a pickle, or no JSON: nothing is said
        return {}
    return settings if isinstance(settings, dict) else {}


def _alpha(settings: Mapping[str, Any], component: str, name: str, rank: int) -> float:
    """The layer's alpha by PEFT's settings; the rank where they say nothing."""
    alpha = settings.get(f"{component}.lora_alpha", rank)
    for pattern, value in (settings.get(f"{component}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            alpha = value
            break
    # With use_rslora the scale is alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
    return alpha * math.sqrt(rank) if settings.get(f"{component}.use_rslora") else float(alpha)
