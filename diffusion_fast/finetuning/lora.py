"""LoRA (Hu et al. 2021, arXiv:2106.09685) on the networks of Stable Diffusion, by ``peft``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models import UNet2DCondition
from ..ops import checks
from .settings import Settings

Layers = dict[tuple[str, str], dict[str, Tensor]]  # by component and layer

ADAPTER = "default"  # peft's name of the only one
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(networks: Mapping[str, nn.Module], settings: Settings) -> dict[str, Any]:
    """Put adapters around layers, in place; all other parameters are frozen.

    The matrices are float32, whatever the layers are.

    Args:
        networks: what to adapt, by the names of components.
        settings: rank, alpha, targets and so on.

    Returns:
        peft's ``LoraConfig`` of each network.

    Raises:
        ModuleNotFoundError: peft is not installed; names the command.
        ValueError: a target that is the name of no layer; gives the closest.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LoRA is trained by peft: pip install peft") from error
    chosen = _chosen(networks, settings.targets)
    if settings.train_text and not any(chosen[name] for name in networks if name != "unet"):
        wanted = "layers of the text encoders too, because of train_text"
        checks.fail("targets", wanted, ", ".join(settings.targets))
    every = [networks[part].get_submodule(name) for part in networks for name in chosen[part]]
    given = {"conv_rank": settings.conv_rank, "conv_alpha": settings.conv_alpha}
    for name, value in given.items():
        if value is not None and not any(map(_is_large, every)):
            checks.fail(name, "none, because targets are no convolutions larger than 1 x 1", value)
    configs = {}
    for component, network in networks.items():
        names = chosen[component]
        if not names:
            continue
        layers = {name: network.get_submodule(name) for name in names}
        large = [re.escape(name) for name, layer in layers.items() if _is_large(layer)]
        rank, alpha = settings.rank_and_alpha()
        conv_rank, conv_alpha = settings.rank_and_alpha(large=True)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # it divides by the rank
            target_modules=names,
            lora_dropout=settings.lora_dropout,
            use_dora=settings.dora,
            rank_pattern=dict.fromkeys(large, conv_rank) if conv_rank != rank else {},
            alpha_pattern=dict.fromkeys(large, conv_alpha) if conv_alpha != alpha else {},
        )
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        configs[component] = config
    return configs


def _chosen(networks: Mapping[str, nn.Module], targets: Sequence[str]) -> dict[str, list[str]]:
    """Names of the layers to adapt in each network."""
    layers = {
        component: {
            name: layer
            for name, layer in network.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
        }
        for component, network in networks.items()
    }
    chosen = {
        component: [
            name
            for name, layer in found.items()
            if any(_is_target(name, layer, target, networks[component]) for target in targets)
        ]
        for component, found in layers.items()
    }
    for target in targets:
        if not any(
            _is_target(name, layer, target, networks[component])
            for component, found in layers.items()
            for name, layer in found.items()
        ):
            ends = {end for found in layers.values() for name in found for end in _ends(name)}
            close = difflib.get_close_matches(target, sorted(ends), 3, 0.3)
            wanted = f"the name of a layer, such as {', '.join(close or sorted(ends)[:3])}"
            checks.fail("targets", wanted, repr(target))
    return chosen


def _is_target(name: str, layer: nn.Module, target: str, network: nn.Module) -> bool:
    if target == "all":
        return True
    if target == "attention":
        return name.endswith(tuple(f".{end}" for end in _ATTENTION))
    if target == "transformer":
        inner = not isinstance(network, UNet2DCondition) or ".attentions." in name
        return inner and not _is_large(layer)
    return name == target or name.endswith(f".{target}")


def _ends(name: str) -> list[str]:
    """A layer's name by its last part, or two where that is a number."""
    parts = name.split(".")
    return [".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]]


def _is_large(layer: nn.Module) -> bool:
    """Whether it is a convolution larger than 1 x 1."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def parts(weights: Mapping[str, Tensor]) -> Layers:
    """The matrices of each layer by kohya's names, of a trainer's weights by peft's.

    Returns:
        By component and layer: ``lora_down``, ``lora_up`` and with DoRA ``dora_scale``.
    """
    kinds = {"lora_A": "lora_down", "lora_B": "lora_up", "lora_magnitude_vector": "dora_scale"}
    found: Layers = {}
    for name, value in weights.items():
        component, _, rest = name.partition(".")
        match = re.fullmatch(rf"(.+)\.({'|'.join(kinds)})\.{ADAPTER}\.weight", rest)
        if match is not None:
            value = value.detach().to("cpu", torch.float32)
            found.setdefault((component, match[1]), {})[kinds[match[2]]] = value
    return found
