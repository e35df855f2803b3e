"""Latents of images and states of captions, computed once and kept on the disk.

Each image and each caption has a file of its own, named by a hash of all that made it: the
encoder's weights and configuration, the image's size, the file (its path, its length and when it
was changed) or the text. So what is there is right, a restart or another process makes what is
missing, and a new image recomputes nothing else. Files made of what has changed since are never
read again; remove the folder to be rid of them. Beside its tensors each file has their checksum
(CRC-32; files of older versions have none), so that a damaged one is named when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..conditioning import Context
from ..files import AnyPath
from ..ops import checks
from .distributed import Processes
from .image_folder import ImageFolder
from .tensor_store import Tensors, fingerprint, place, read, write

if TYPE_CHECKING:
    from ..models.autoencoder import Autoencoder
    from ..models.text import TextEncoders

_PIXELS = "upright, cover, Lanczos, middle, [-1, 1]"  # what ImageFolder does to a file


@dataclass(frozen=True)
class _Entry:
    """A file of the cache, and what to make it of."""

    path: Path
    subject: Any


class LatentData(Dataset[Any]):
    """Latents [C, h, w] in float32, scaled for the U-Net, alone or with a condition.

    The condition is a class number, the caption's states [L, C], or with pooled states (SDXL) a
    dict of ``context``, ``text_embeds`` and ``time_ids``. What :func:`cache_latents` returns.

    Attributes:
        null_context: the states of the empty prompt with a batch of 1, for the ``null_context`` of
            a :class:`~diffusion_fast.training.Trainer`; None without captions.
        flips: always false: mirrored latents are not the latents of a mirrored image, so
            :class:`~diffusion_fast.training.Batches` must not mirror them.
    """

    flips = False

    def __init__(
        self,
        latents: Sequence[Path],
        conditions: Sequence[Path | int] | None,
        null: Path | None,
        size: tuple[int, int],
    ) -> None:
        self._latents, self._conditions, self._size = latents, conditions, size
        self.null_context: Context = None
        if null is not None:
            states = self._states(null)
            if isinstance(states, dict):
                self.null_context = {name: value[None] for name, value in states.items()}
            else:
                self.null_context = states[None]

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> Any:
        latents = read(self._latents[index], "latents")["latents"].float()
        if self._conditions is None:
            return latents
        condition = self._conditions[index]
        return latents, self._states(condition) if isinstance(condition, Path) else condition

    def _states(self, path: Path) -> Tensor | Tensors:
        states = {name: value.float() for name, value in read(path, "context").items()}
        if "text_embeds" not in states:
            return states["context"]
        height, width = map(float, self._size)  # SDXL: as if images had been this large, and whole
        return states | {
            "time_ids": torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        }


def cache_latents(
    images: ImageFolder,
    folder: AnyPath,
    vae: Autoencoder,
    text: TextEncoders | None = None,
    *,
    flip: bool = False,
    batch_size: int = 8,
    on_made: Callable[[int, int], object] | None = None,
) -> LatentData:
    """Compute what is missing in a folder of latents and text states, and give the data.

    Latents are the most likely ones (the mode), scaled. A caption's states are cut to the length
    of one chunk (77 tokens), so that all are equally long. Under torchrun each process makes its
    share and waits for the others. The encoders are not needed after this.

    To train with 10 % empty prompts, give the trainer ``condition_dropout=0.1`` and the
    ``null_context`` of the result.

    Args:
        images: data with classes, captions, or neither; broken files are left out if it skips them.
        folder: place of the cache, which several data sets and encoders can share.
        vae: the encoder of images.
        text: the encoders of captions, needed with captions.
        flip: cache the mirrored images as well. The data is then twice as long: first all images,
            then all mirrored ones.
        batch_size: images or captions to encode at once.
        on_made: called as ``on_made(done, all)`` while this process computes.

    Raises:
        ValueError: captions without ``text``, or images that don't fit the VAE.
        CheckpointError: a file of the cache is damaged; names it.
        OSError: a file can't be written; none is left half-written.
    """
    checks.positive_int("batch_size", batch_size)
    if images.captions is not None and text is None:
        checks.fail("text", "text encoders, because the images have captions", None)
    processes = Processes.join(next(vae.parameters()).device)
    root = Path(folder)
    pictures = _pictures(images, root / "latents", fingerprint({"vae": vae}), flip)
    captions = images.captions or []
    prompts: dict[str, _Entry] = {}
    if text is not None and captions:
        prompts = _prompts(("", *captions), root / "text", text)

    batches = [
        (make, batch)
        for make, entries in (
            (lambda batch: _encode_images(vae, images, batch), pictures),
            (lambda batch: _encode_texts(text, batch), list(prompts.values())),
        )
        for batch in _batches(_missing(entries, processes), batch_size)
    ]
    for done, (make, batch) in enumerate(batches, 1):
        for entry, tensors in make(batch):
            write(entry.path, tensors)
        if on_made is not None:
            on_made(done, len(batches))
    processes.wait()

    there = [(i % len(images), entry.path) for i, entry in enumerate(pictures)]
    there = [(i, path) for i, path in there if path.exists()]  # but for broken images
    if not there:
        checks.fail("images", f"one that can be read in {images.root}", "none")
    conditions: list[Path | int] | None = None
    if captions:
        conditions = [prompts[captions[i]].path for i, _ in there]
    elif images.labels is not None:
        conditions = [images.labels[i] for i, _ in there]
    null = prompts[""].path if prompts else None
    return LatentData([path for _, path in there], conditions, null, images.size)


def _pictures(images: ImageFolder, folder: Path, encoder: str, flip: bool) -> list[_Entry]:
    entries = []
    for flipped in (False, True) if flip else (False,):
        for i, file in enumerate(images.files):
            found = file.stat()
            made_of = [encoder, _PIXELS, images.size, images.channels, flipped]
            made_of += [str(file.absolute()), found.st_size, found.st_mtime_ns]
            entries.append(_Entry(place(folder, made_of), (i, flipped)))
    return entries


def _prompts(texts: Iterable[str], folder: Path, encoders: TextEncoders) -> dict[str, _Entry]:
    vocabularies = [
        tokenizer.get_vocab() for tokenizer in getattr(encoders, "tokenizers", ())
    ]  # the same weights read other tokens otherwise
    encoder = fingerprint(encoders.modules(), vocabularies)
    return {text: _Entry(place(folder, [encoder, text]), text) for text in texts}


def _missing(entries: Iterable[_Entry], processes: Processes) -> list[_Entry]:
    """Those that this process has to make; shared out before looking what is there."""
    unique = list({entry.path: entry for entry in entries}.values())
    mine = unique[processes.rank :: processes.count]
    return [entry for entry in mine if not entry.path.exists()]


def _batches(entries: Sequence[_Entry], size: int) -> list[Sequence[_Entry]]:
    return [entries[i : i + size] for i in range(0, len(entries), size)]


@torch.no_grad()
def _encode_images(
    vae: Autoencoder, images: ImageFolder, entries: Sequence[_Entry]
) -> Iterator[tuple[_Entry, Tensors]]:
    kept, pixels = [], []
    for entry in entries:
        index, flipped = entry.subject
        image = images.pixels(index)
        if image is not None:
            kept.append(entry)
            pixels.append(image.flip(-1) if flipped else image)
    if kept:
        parameter = next(vae.parameters())
        latents = vae.scale(vae.encode(torch.stack(pixels).to(parameter)).mode())
        yield from zip(kept, ({"latents": one} for one in latents), strict=True)


@torch.no_grad()
def _encode_texts(
    encoders: TextEncoders | None, entries: Sequence[_Entry]
) -> Iterator[tuple[_Entry, Tensors]]:
    assert encoders is not None  # only captions make such entries
    # The empty prompt has one chunk, whatever the length of the others.
    length = encoders.encode([""]).context.shape[1]
    states = encoders.encode([entry.subject for entry in entries])
    for i, entry in enumerate(entries):
        tensors = {"context": states.context[i, :length]}
        if states.pooled is not None:
            tensors["text_embeds"] = states.pooled[i]
        yield entry, tensors
