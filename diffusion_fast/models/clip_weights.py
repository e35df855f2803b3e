"""CLIP networks of ``transformers``, filled from files of any age.

Older and newer versions of transformers name the same tensors differently (with and without
``text_model.`` or ``vision_model.``), so names are compared without these parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import write_json
from .checkpoints import CONFIG, has_weights, weight_files
from .tensors import compare, read, stored

_OPTIONAL = re.compile(r"(^|\.)(text_model|vision_model)(?=\.)")
_UNUSED = ("position_ids", "logit_scale")  # of older files, and of whole CLIP models
_BESIDE = ("text_projection.", "visual_projection.")  # the transformer
_VISION = ("vision_model.", "visual_projection.")


def read_states(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> dict[str, Tensor]:
    """The tensors of a ``transformers`` folder; on the CPU mapped from its files.

    Args:
        folder: holds ``config.json`` and the weights.
        dtype: dtype of the tensors that are returned; None for that of the files.
        device: where they are put.
        variant: such as ``"fp16"``; where the folder lacks it, its plain files are read.

    Raises:
        CheckpointError: no file with weights, or a damaged one.
    """
    variant = variant if has_weights(folder, variant, "model") else None
    names = stored(weight_files(folder, folder, variant, stem="model"), _used)
    if any(name.startswith("text_model.") for name in names):  # a whole CLIP: its text half
        names = {n: tensor for n, tensor in names.items() if not n.startswith(_VISION)}
    return read(names, dtype, device)


def assemble(
    build: Callable[[], nn.Module], states: Mapping[str, Tensor], source: Path | str
) -> nn.Module:
    """A network in eval mode with these tensors as its parameters.

    Args:
        build: makes the network; called on the meta device.
        states: its tensors, in an older or newer layout of names.
        source: what error messages name.

    Raises:
        CheckpointError: tensors that are missing or misshapen (listed by name). Of tensors that
            the network doesn't have a warning tells.
    """
    with torch.device("meta"):
        model = build()
    own = {_plain(name): (name, tuple(value.shape)) for name, value in model.state_dict().items()}
    found = {_plain(name): value for name, value in states.items() if _used(name)}
    needed = {n: v for n, v in found.items() if n in own or not n.startswith(_BESIDE)}
    shapes = {name: tuple(value.shape) for name, value in needed.items()}
    compare(Path(source), {n: shape for n, (_, shape) in own.items()}, shapes, further_layers=True)
    state = {name: found[plain].reshape(shape) for plain, (name, shape) in own.items()}
    model.load_state_dict(state, assign=True)
    device = next(model.parameters()).device
    for module in model.modules():  # not in the files: 0, 1, 2 ...
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            module.position_ids = torch.arange(ids.shape[-1], device=device)[None]
    return model.eval()


def save(model: Any, folder: Path, prefix: str = "text_model.") -> None:
    """Write ``config.json`` and ``model.safetensors`` in the older layout, which all versions load.

    Args:
        prefix: what goes before the names of all tensors of the transformer itself.

    Raises:
        OSError: the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, value in model.state_dict().items():
        plain = _plain(name)
        beside = "." not in plain or plain.startswith(_BESIDE)
        state[plain if beside else prefix + plain] = value.detach().contiguous()
    dtype = next(model.parameters()).dtype
    kind = {"architectures": [type(model).__name__], "torch_dtype": str(dtype).split(".")[-1]}
    write_json(model.config.to_dict() | kind, folder / CONFIG)
    try:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"{folder}: can't be written: {error}") from error


def _plain(name: str) -> str:
    return _OPTIONAL.sub("", name).lstrip(".")


def _used(name: str) -> str | None:
    return None if name.rpartition(".")[2] in _UNUSED else name
