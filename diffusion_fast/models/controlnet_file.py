"""Where a ControlNet's weights are: a diffusers folder, or a single file in either naming."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ..files import AnyPath, CheckpointError
from . import hub
from .checkpoints import CONFIG, STEM, find_model, read_config, weight_files
from .compvis_unet import Shapes, diffusers_unet_config, unet_config, unet_name
from .contents import by_names
from .controlnet_config import ControlNetConfig
from .tensors import Source, Stored, stored

_PREFIXES = ("control_model.", "")
_HINT = "input_hint_block.0.weight"  # of every ControlNet in CompVis' names
_DIFFUSERS_HINT = "controlnet_cond_embedding.conv_in.weight"
_UNSUPPORTED = (
    ("control-LoRA", lambda name: name == "lora_controlnet"),
    ("ControlNet-Union", lambda name: name.startswith(("task_embedding", "control_add_embedding"))),
    ("a ControlNet of differences (diff_control)", lambda name: name == "difference"),
    ("ControlNet-XS", lambda name: name.startswith(("ctrl_to_base", "enc_zero_convs_in"))),
)


def find_controlnet(path: AnyPath, variant: str | None = None) -> Source[ControlNetConfig]:
    """A ControlNet's config and the names and shapes of its tensors; no tensor is read.

    Args:
        path: as :meth:`ControlNet.from_pretrained <.controlnet.ControlNet.from_pretrained>`.
        variant: which weights of a folder to read, such as ``"fp16"``.

    Raises:
        CheckpointError: a missing or damaged file, another kind of model (named), or an unsupported
            config.
    """
    path = hub.resolve(path, models={"": STEM}, variant=variant, others=())
    if path.is_file() and path.name != CONFIG:
        tensors = stored(weight_files(path, path.parent, variant))
        if source := _single(path, tensors):
            return source
    folder = find_model(path, "controlnet")
    config = read_config(folder, ControlNetConfig.from_dict)
    files = weight_files(path, folder, variant)
    return Source(files[0], config, stored(files))


def _single(file: Path, tensors: Mapping[str, Stored]) -> Source[ControlNetConfig] | None:
    """A file whose config is in its tensors' shapes; None where one beside it tells."""
    for kind, shows in _UNSUPPORTED:
        if any(map(shows, tensors)):
            raise CheckpointError(f"{file}: {kind} is not supported, only ControlNets")
    for prefix in _PREFIXES:
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if _HINT in found:
            return _source(file, found, unet_config, compvis_name)
    if (file.parent / CONFIG).is_file():
        return None
    if _DIFFUSERS_HINT in tensors:
        return _source(file, dict(tensors), diffusers_unet_config, None)
    kind = by_names(tensors) or ", ".join(sorted(tensors)[:3]) or "nothing"
    raise CheckpointError(f"{file}: expected a ControlNet, got {kind}")


def _source(
    file: Path,
    tensors: dict[str, Stored],
    unet: Callable[..., object],
    name: Callable[..., str] | None,
) -> Source[ControlNetConfig]:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        hint = _hint_widths(shapes, compvis=name is not None)
        latent = shapes["conv_in.weight" if name is None else "input_blocks.0.0.weight"][1]
        config = ControlNetConfig(
            unet(shapes, out_channels=latent),  # type: ignore[arg-type]
            conditioning_embedding_out_channels=hint,
        )
    except KeyError as error:
        raise CheckpointError(f"{file}: missing: {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: unusual shapes: {error}") from error
    if name is None:
        return Source(file, config, tensors)
    return Source(file, config, tensors, partial(name, config=config))


def _hint_widths(shapes: Shapes, compvis: bool) -> tuple[int, ...]:
    """Channels of the hint's layers at each size."""
    if compvis:
        widths = [shapes[_HINT][0]]
        while (name := f"input_hint_block.{4 * len(widths)}.weight") in shapes:
            widths.append(shapes[name][0])
        return tuple(widths)
    widths = [shapes[_DIFFUSERS_HINT][0]]
    while (name := f"controlnet_cond_embedding.blocks.{2 * len(widths) - 1}.weight") in shapes:
        widths.append(shapes[name][0])
    return tuple(widths)


def compvis_name(name: str, config: ControlNetConfig) -> str:
    """The name in a CompVis checkpoint, without its prefix, of a parameter of our ControlNet."""
    part, _, rest = name.partition(".")
    if part == "controlnet_cond_embedding":  # SiLUs stand between the convolutions
        stem, _, kind = rest.rpartition(".")
        last = 2 * len(config.conditioning_embedding_out_channels) - 1
        place = {"conv_in": 0, "conv_out": last}.get(stem)
        place = 1 + int(stem.rpartition(".")[2]) if place is None else place
        return f"input_hint_block.{2 * place}.{kind}"
    if part == "controlnet_down_blocks":
        index, _, kind = rest.partition(".")
        return f"zero_convs.{index}.0.{kind}"
    if part == "controlnet_mid_block":
        return f"middle_block_out.0.{rest}"
    return unet_name(name, config.unet)
