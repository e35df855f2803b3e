"""Adapter files: LoRAs and those of LyCORIS, in the names of any of the usual tools."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files import AnyPath, CheckpointError, read_json
from . import contents
from .adapters import Adapter, rank
from .compvis_unet import unet_name
from .config import UNetConfig
from .tensors import metadata, read, stored

METADATA = "lora_adapter_metadata"  # diffusers' key for PEFT's settings
SETTINGS = "adapter_config.json"  # PEFT's own
PEFT = "base_model.model."  # what PEFT puts before all names
KOHYA = {
    "unet": ("lora_unet", "lycoris"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
COMFYUI = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}

# What follows a layer's name, and the part of an adapter that it is: PEFT's, diffusers' older ones,
# kohya's, LyCORIS' (both name a part as we do).
_PARTS = tuple(
    (re.compile(pattern + r"$"), part)
    for pattern, part in (
        (r"\.lora_A(?:\.[\w-]+)?\.weight", "lora_down"),
        (r"\.lora_B(?:\.[\w-]+)?\.weight", "lora_up"),
        (r"\.lora_(?:B(?:\.[\w-]+)?|up)\.bias", "up_bias"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.(down|up)\.weight", r"lora_\1"),
        (r"\.(lora_down|lora_up|lora_mid)\.weight", r"\1"),
        (r"\.lora_magnitude_vector(?:\.[\w-]+)*", "magnitude"),
        (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.[\w-]+)?", r"\1"),
        (r"\.(alpha|scalar|dora_scale|diff|diff_b)", r"\1"),
        (r"\.w_norm", "diff"),
        (r"\.b_norm", "diff_b"),
    )
)
# Adapters by other formulas, by a part that only they have.
_OTHERS = {
    "an OFT or BOFT": r"\.(oft_(blocks|diag|[rR])|boft_[rRsS])\b",
    "an IA3": r"\.(on_input|ia3_l)\b",
    "a GLoRA": r"\.[ab][12]\.weight$|\.bm\.weight$",
    "a T-LoRA": r"\.(lambda_layer|[pq]_layer\.weight)$",
    "a VeRA": r"vera_(lambda|[AB])",
    "a LoRA of token embeddings": r"\.lora_embedding_[AB]\b",
    "an HRA": r"\.hra_u\b",
}
# PEFT's settings that change what an adapter means, with the values that we know.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", "LOHA", "LOKR"),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "layer_replication": (),
    "use_qalora": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "target_parameters": ([],),
    "trainable_token_indices": ([],),
}


def read_lora(path: AnyPath, components: Mapping[str, nn.Module]) -> dict[str, dict[str, Adapter]]:
    """The adapters in a file, for the parameters of a model that they change.

    What stands beside them (embeddings, layers that the model lacks, unknown names) is left out
    with one warning.

    Args:
        path: a file of diffusers, PEFT, kohya-ss, LyCORIS, OneTrainer or ComfyUI, or a folder that
            holds one such file. PEFT's ``adapter_config.json`` beside it is read too.
        components: the networks it may change: ``unet``, ``text_encoder``, ``text_encoder_2``.

    Returns:
        For each component with changes: its parameters' names to what changes them.

    Raises:
        CheckpointError: a damaged file, one that is no adapter or for another model (named where
            it shows), adapters or settings of a kind without a formula here, layers of other shapes
            (listed by name).
    """
    file = _file(Path(path))
    layers, unknown = _layers(file)
    targets = _targets(components)
    settings = _settings(file, layers)
    found: dict[str, dict[str, Adapter]] = {}
    problems: list[str] = []
    known = {stem: parts for stem, parts in sorted(layers.items()) if stem in targets}
    for stem, parts in known.items():
        for part, value in parts.items():
            if value.is_floating_point() and not value.float().isfinite().all():
                told = "expected finite numbers, got infinity or NaN"
                raise CheckpointError(f"{file}: {stem}.{part}: {told}")
            if part == "alpha" and value.numel() != 1:
                shape = list(value.shape)
                raise CheckpointError(f"{file}: {stem}.alpha: expected one number, got {shape}")
    for stem, parts in known.items():
        component, name, layer = targets[stem]
        for kind, adapter in _adapters(parts, settings, component, name):
            parameter = getattr(layer, kind, None)
            if parameter is None and not adapter.parts["diff"].any():
                continue
            if problem := _misfit(adapter, parameter):
                problems.append(problem.format(stem=stem, kind=kind))
                continue
            found.setdefault(component, {})[f"{name}.{kind}"] = adapter
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(
            f"{file}: a LoRA for another model, {len(problems)} of its {len(layers)} layers:{lines}"
        )
    if not found:
        model = contents.network(layers)
        whose = f"for {model}" if model else "for another model"
        some = ", ".join(sorted(layers)[:3])
        raise CheckpointError(f"{file}: a LoRA {whose}, the model has none of its layers: {some}")
    if beside := sorted([*unknown, *(layers.keys() - known.keys())]):
        some = ", ".join(beside[:5]) + (" and others" if len(beside) > 5 else "")
        message = f"{file}: {len(beside)} names that this model has no layer for, left out: {some}"
        warnings.warn(message, stacklevel=3)
    return found


def _misfit(adapter: Adapter, parameter: Tensor | None) -> str | None:
    """What is wrong with an adapter of a parameter, with places for their names."""
    parts = {name: part.to("meta") for name, part in adapter.parts.items()}
    shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
    if parameter is None:
        return "extra: {kind} of {stem}, which has none"
    try:
        Adapter(parts).delta(parameter.detach().float().to("meta"))
    except KeyError as error:
        pairs = (("lora_down", "lora_up"), ("lora_up", "lora_down"))
        lacking = next((other for one, other in pairs if one in parts), error.args[0])
        return f"missing: one of the matrices of {{stem}} ({lacking}), got {shapes}"
    except (RuntimeError, ValueError, IndexError):
        wanted = list(parameter.shape)
        return f"misshapen: {{stem}} is for a {{kind}} {wanted}, got {shapes}"
    return None


def _adapters(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], component: str, name: str
) -> Iterator[tuple[str, Adapter]]:
    """What a layer's parts change: its weight, its bias, or both."""
    inner = {n: p for n, p in parts.items() if n not in ("alpha", "up_bias", "diff_b", "magnitude")}
    if "magnitude" in parts:  # PEFT's is one number for each row, whatever its shape
        inner["dora_scale"] = parts["magnitude"].flatten()
    r, scale = rank(parts), 1.0
    if "alpha" in parts and r is not None:
        scale = float(parts["alpha"]) / r
    elif "alpha" not in parts and "diff" not in parts:
        scale = _scale(settings, component, name, r)
    if inner:
        yield "weight", Adapter(inner, scale)
    for bias, factor in (("diff_b", 1.0), ("up_bias", scale)):
        if bias in parts:
            yield "bias", Adapter({"diff": parts[bias]}, factor)


def _file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        return path
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    usual = [f for f in files if f.stem in ("adapter_model", "pytorch_lora_weights")]
    if len(usual or files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"{path}: expected one .safetensors file in the folder, found {names}"
        )
    return (usual or files)[0]


def _layers(file: Path) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The parts of each layer by the layer's name in the file, and names of anything else."""
    names = stored([file])
    for kind, pattern in _OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            raise CheckpointError(f"{file}: {kind} is not supported, only LoRA, LoHa, LoKr, DoRA")
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in read(names).items():
        matches = ((pattern.search(name), part) for pattern, part in _PARTS)
        match, part = next(((m, part) for m, part in matches if m), (None, ""))
        if match is None:
            unknown.append(name)
        else:
            layers.setdefault(_plain(name[: match.start()]), {})[match.expand(part)] = tensor
    if not layers:
        kind = contents.by_names(names) or f"others: {', '.join(sorted(unknown)[:3]) or 'none'}"
        raise CheckpointError(f"{file}: expected the matrices of a LoRA, got {kind}")
    return layers, unknown


def _plain(stem: str) -> str:
    """A layer's name without what some writers put around it."""
    stem = stem.removeprefix(PEFT).removeprefix("model.").replace(".processor.", ".")
    stem = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", stem)
    return re.sub(r"\.to_out$", ".to_out.0", stem)


def _targets(components: Mapping[str, nn.Module]) -> dict[str, tuple[str, str, nn.Module]]:
    """Every layer with a weight by every name a file may give it: its component, its name there."""
    targets: dict[str, tuple[str, str, nn.Module]] = {}
    for component, module in components.items():
        for name, layer in module.named_modules():
            if isinstance(getattr(layer, "weight", None), nn.Parameter):
                for stem in _stems(component, name, getattr(module, "config", None)):
                    targets.setdefault(stem, (component, name, layer))
    return targets


def _stems(component: str, name: str, config: Any) -> list[str]:
    dotted = [name]
    if component == "unet":
        # Files of the first diffusers versions hold the U-Net alone, without a prefix.
        stems = [name, f"unet.{name}"]
        if isinstance(config, UNetConfig):
            dotted.append(unet_name(f"{name}.weight", config).removesuffix(".weight"))
        stems += [f"diffusion_model.{one}" for one in dotted]
    else:
        if not name.startswith("text_model."):  # newer versions of transformers
            dotted.append(f"text_model.{name}")
        places = [f"text_encoders.{one}.transformer" for one in COMFYUI[component]]
        stems = [f"{place}.{one}" for place in (component, *places) for one in dotted]
        stems += dotted  # PEFT's files of a text encoder alone
    prefixes = KOHYA[component]
    return stems + [f"{p}_{one.replace('.', '_')}" for p in prefixes for one in dotted]


def _settings(file: Path, layers: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings, of each component or of all; empty where nothing is said.

    Raises:
        CheckpointError: a setting that changes what the adapter means and isn't known here.
    """
    try:
        settings = json.loads(metadata(file).get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {METADATA} in its header is no JSON: {error}") from error
    beside = file.parent / SETTINGS
    if not settings and file.stem == "adapter_model" and beside.is_file():
        file, settings = beside, read_json(beside)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: expected PEFT's settings as a JSON object")
    for key, value in settings.items():
        known = _KNOWN.get(key.rpartition(".")[2])
        if known is not None and value is not None and value not in known:
            raise CheckpointError(f"{file}: {key}={value!r} is not supported")
    return settings


def _scale(settings: Mapping[str, Any], component: str, name: str, r: int | None) -> float:
    """alpha / r by PEFT's settings; 1 where they say nothing."""

    def setting(key: str, usual: Any = None) -> Any:
        return settings.get(f"{component}.{key}", settings.get(key, usual))

    def by_pattern(key: str, usual: Any) -> Any:
        for pattern, value in (setting(key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return value
        return usual

    r = r or by_pattern("rank_pattern", setting("r", 1))
    alpha = by_pattern("alpha_pattern", setting("lora_alpha", setting("alpha", r)))
    # With use_rslora the scale is alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
    return float(alpha / (math.sqrt(r) if setting("use_rslora") else r))
