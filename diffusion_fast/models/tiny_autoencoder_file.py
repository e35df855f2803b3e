"""Where a tiny autoencoder's weights are: a diffusers folder, or files of one half each.

In both every layer of a half is known by its place among all, in diffusers' files as
``decoder.layers.3.conv.0.weight``. A file of TAESD's own repository is the state of one half,
``4.conv.0.weight``, where the decoder's first place is the clamp of its latents.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from ..files import AnyPath, CheckpointError, read_json
from . import hub
from .checkpoints import CONFIG, STEM, weight_files
from .pretrained import find_pretrained
from .tensors import Source, Stored, stored
from .tiny_autoencoder_config import KIND, TinyAutoencoderConfig

_HALVES = ("decoder", "encoder")
_PLACE = re.compile(r"\d+(\.conv\.[024])?\.(weight|bias)")  # of a file of one half
_CLAMP = 1  # a layer without weights before the first of such a decoder
_OURS = re.compile(r"(encoder|decoder)\.(conv_in|conv_out|levels\.(\d+)\.(.+))\.(weight|bias)")


def is_tiny(path: Path) -> bool:
    """Whether a path leads to a tiny autoencoder, and not to one of another kind.

    Raises:
        CheckpointError: a file that can't be read.
    """
    for folder in (path, path / "vae", path.parent):
        if (folder / CONFIG).is_file() and (path.is_dir() or folder == path.parent):
            return bool(read_json(folder / CONFIG).get("_class_name") == KIND)
    names = stored([path]) if path.is_file() else {}
    return bool(names) and (_of_one_half(names) or _in_diffusers_names(names))


def find_tiny(path: AnyPath, variant: str | None = None) -> Source[TinyAutoencoderConfig]:
    """A tiny autoencoder's config and the names and shapes of its tensors; no tensor is read.

    Args:
        path: as :meth:`AutoencoderTiny.from_pretrained
            <.tiny_autoencoder.AutoencoderTiny.from_pretrained>`.
        variant: which weights of a folder to read, such as ``"fp16"``.

    Raises:
        CheckpointError: a missing or damaged file, another kind of model, or an unsupported config.
    """
    path = hub.resolve(path, models={"vae": STEM, "": STEM}, variant=variant, others=())
    if path.is_file() and path.name != CONFIG:
        tensors = stored(weight_files(path, path.parent, variant))
        if _of_one_half(tensors):
            return _source(path, _with_other_half(path, tensors))
        if not (path.parent / CONFIG).is_file():
            if not _in_diffusers_names(tensors):
                some = ", ".join(sorted(tensors)[:3]) or "nothing"
                raise CheckpointError(f"{path}: expected a tiny autoencoder (TAESD), got {some}")
            return _source(path, tensors)
    found = find_pretrained(path, "vae", TinyAutoencoderConfig.from_dict, variant)
    name = partial(layer_name, config=found.config)
    return Source(found.path, found.config, found.tensors, name)


def _of_one_half(names: Iterable[str]) -> bool:
    return all(_PLACE.fullmatch(name) for name in names)


def _in_diffusers_names(names: Iterable[str]) -> bool:
    return any(name.startswith("decoder.layers.") for name in names)


def _with_other_half(path: Path, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of both halves in diffusers' names, or of the decoder alone."""
    half = _HALVES["0.weight" in tensors]
    found = {half: tensors}
    other = _HALVES[half == "decoder"]
    head, word, tail = path.name.rpartition(half)
    beside = path.with_name(f"{head}{other}{tail}")
    if word and beside.is_file():
        found[other] = stored([beside])
    if "decoder" not in found:
        raise CheckpointError(f"{path}: an encoder alone; expected {beside.name or 'a decoder'}")
    return {
        f"{half}.layers.{_moved(name, -_CLAMP * (half == 'decoder'))}": tensor
        for half, own in found.items()
        for name, tensor in own.items()
    }


def _moved(name: str, by: int) -> str:
    place, _, rest = name.partition(".")
    return f"{int(place) + by}.{rest}"


def _source(path: Path, tensors: dict[str, Stored]) -> Source[TinyAutoencoderConfig]:
    """A model whose config is in its tensors' shapes."""
    try:
        width, blocks, latents, out = _shape("decoder", tensors)
        # Without an encoder its fields say no more than how many levels there are.
        reads = any(name.startswith("encoder.") for name in tensors)
        own = _shape("encoder", tensors) if reads else (width, blocks[::-1], out, latents)
        made = TinyAutoencoderConfig(
            in_channels=own[2],
            out_channels=out,
            encoder_block_out_channels=(own[0],) * len(own[1]),
            decoder_block_out_channels=(width,) * len(blocks),
            latent_channels=latents,
            num_encoder_blocks=own[1],
            num_decoder_blocks=blocks,
        )
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: unusual shapes: {error}") from error
    return Source(path, made, tensors, partial(layer_name, config=made))


def _shape(half: str, tensors: Mapping[str, Stored]) -> tuple[int, tuple[int, ...], int, int]:
    """Width, numbers of blocks of each level, channels in and out."""
    prefix = f"{half}.layers."
    own = {n.removeprefix(prefix): t.shape for n, t in tensors.items() if n.startswith(prefix)}
    places = sorted({int(name.partition(".")[0]) for name in own})
    between = [place for place in places if f"{place}.weight" in own]  # convolutions, no blocks
    first, *_, last = (own[f"{place}.weight"] for place in between)
    pairs = itertools.pairwise(between)
    blocks = tuple(sum(before < place < after for place in places) for before, after in pairs)
    return first[0], blocks, first[1], last[0]


def layer_name(name: str, config: TinyAutoencoderConfig) -> str:
    """The name in diffusers' files of a parameter of our model."""
    match = _OURS.fullmatch(name)
    assert match is not None  # one of ours
    half, stem, level, rest, kind = match.groups()
    decoder = half == "decoder"
    blocks = config.num_decoder_blocks if decoder else config.num_encoder_blocks
    # A decoder has an activation behind its first convolution, and a layer that enlarges before
    # that of each further level.
    starts = [1 + decoder]
    for count in blocks:
        starts.append(starts[-1] + count + 1 + decoder)
    if stem == "conv_in":
        place = "0"
    elif stem == "conv_out":
        place = str(starts[-1] - 1 - decoder)
    elif rest == "resize.conv":
        place = str(starts[int(level)] - 1)
    else:
        _, block, conv = rest.split(".")
        place = f"{starts[int(level)] + int(block)}.conv.{2 * (int(conv[-1]) - 1)}"
    return f"{half}.layers.{place}.{kind}"
