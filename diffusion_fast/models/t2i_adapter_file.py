"""Where a T2I-Adapter's weights are: a diffusers folder, or a single file in TencentARC's names.

There the residual blocks of all levels stand in one list, ``body.3.block1.weight``; those of a
light adapter in a list for each level, ``body.1.body.0.block1.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

from ..files import AnyPath, CheckpointError
from . import hub
from .checkpoints import CONFIG, STEM, weight_files
from .pretrained import find_pretrained
from .t2i_adapter_config import T2IAdapterConfig
from .tensors import Source, Stored, stored

LEVELS = 4  # of every full adapter: its list doesn't tell where one ends
_PIXELS = {64: ("full_adapter", 8), 256: ("full_adapter_xl", 16)}  # by channels of a block's pixels
_LAYER = re.compile(
    r"adapter\.(?:(conv_in)|body\.(\d+)\.(?:(in_conv|out_conv)|resnets\.(\d+)\.(block\d)))"
    r"\.(weight|bias)"
)


def in_own_names(names: Iterable[str]) -> bool:
    """Whether these are the tensors of an adapter in TencentARC's names."""
    names = set(names)
    return "body.0.block1.weight" in names or "body.0.body.0.block1.weight" in names


def find_t2i_adapter(path: AnyPath, variant: str | None = None) -> Source[T2IAdapterConfig]:
    """An adapter's config and the names and shapes of its tensors; no tensor is read.

    Args:
        path: as :meth:`T2IAdapter.from_pretrained <.t2i_adapter.T2IAdapter.from_pretrained>`.
        variant: which weights of a folder to read, such as ``"fp16"``.

    Raises:
        CheckpointError: a missing or damaged file, another kind of model, or an unsupported config.
    """
    path = hub.resolve(path, models={"": STEM}, variant=variant, others=())
    if path.is_file() and path.name != CONFIG:
        tensors = stored(weight_files(path, path.parent, variant))
        if in_own_names(tensors):
            try:
                config = _config({name: tensor.shape for name, tensor in tensors.items()})
            except (KeyError, ValueError, IndexError) as error:
                raise CheckpointError(f"{path}: unusual shapes: {error}") from error
            return Source(path, config, _plain(tensors), partial(own_name, config=config))
    return find_pretrained(path, "adapter", T2IAdapterConfig.from_dict, variant)


def _plain(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors, without what nothing reads of a file that has been trained on."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("body", "conv"))}


def _config(shapes: Mapping[str, tuple[int, ...]]) -> T2IAdapterConfig:
    places = [
        int(match[1]) for match in (re.match(r"body\.(\d+)\.", name) for name in shapes) if match
    ]
    count = 1 + max(places)
    if "body.0.body.0.block1.weight" in shapes:
        inner = [re.match(r"body\.0\.body\.(\d+)\.", name) for name in shapes]
        return T2IAdapterConfig(
            in_channels=shapes["body.0.in_conv.weight"][1] // 64,
            channels=tuple(shapes[f"body.{i}.out_conv.weight"][0] for i in range(count - 1)),
            num_res_blocks=1 + max(int(match[1]) for match in inner if match),
            adapter_type="light_adapter",
        )
    if count % LEVELS:
        raise ValueError(f"expected a multiple of {LEVELS} blocks, got {count}")
    each, inside = count // LEVELS, shapes["conv_in.weight"][1]
    pixels = 256 if inside in (256, 768) else 64
    kind, factor = _PIXELS[pixels]
    return T2IAdapterConfig(
        in_channels=inside // pixels,
        channels=tuple(shapes[f"body.{i * each}.block1.weight"][0] for i in range(LEVELS)),
        num_res_blocks=each,
        downscale_factor=factor,
        adapter_type=kind,
    )


def own_name(name: str, config: T2IAdapterConfig) -> str:
    """The name in TencentARC's files of a parameter of our adapter."""
    match = _LAYER.fullmatch(name)
    assert match is not None  # one of ours
    first, level, conv, block, layer, kind = match.groups()
    if first:
        return f"conv_in.{kind}"
    if config.light:
        stem = f"body.{level}.{conv}" if conv else f"body.{level}.body.{block}.{layer}"
        return f"{stem}.{kind}"
    start = int(level) * config.num_res_blocks
    return f"body.{start}.{conv}.{kind}" if conv else f"body.{start + int(block)}.{layer}.{kind}"
