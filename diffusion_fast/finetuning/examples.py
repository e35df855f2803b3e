"""Pictures and captions as a trainer reads them: latents and text states, from a cache on the disk
where nothing random changes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..models.autoencoder import Autoencoder
from ..models.text import TextEncoders
from ..training.distributed import Processes
from ..training.tensor_store import Tensors, fingerprint, place, read, write
from .buckets import Fit
from .captions import Captions, Word, chunks_of, token_ids
from .pictures import Picture, report

OnMade = Callable[[int, int], object]  # done, all


@dataclass(frozen=True)
class Example:
    """A picture, the shape that it is trained in, and the number of chunks of its caption."""

    picture: Picture
    fit: Fit
    chunks: int = 1

    def latents_file(self, folder: Path, encoder: str, flipped: bool) -> Path:
        """Where its latents are kept: under all that makes them what they are."""
        file = self.picture.file
        found = file.stat()
        made_of: list[object] = [
            encoder,
            "upright, Lanczos, middle, [-1, 1]",
            self.fit.scaled,
            self.fit.shape,
        ]
        made_of += [flipped, str(file.absolute()), found.st_size, found.st_mtime_ns]
        return place(folder / "latents", made_of)


class Examples(Dataset[Any]):
    """Items (x_0, context), or (x_0, context, weight) where weights differ.

    x_0 is latents [C, h, w], or pixels [3, H, W] where crops are random. The context is a dict:
    ``context`` (and ``text_embeds``) for cached captions, else ``tokens``; and SDXL's ``time_ids``.
    An item draws its flip, caption and crop from the global generator of :mod:`random`, which
    :class:`~diffusion_fast.training.Batches` seeds for each.

    Args:
        examples: the pictures; each is there as often as it repeats.
        captions: how captions are drawn.
        tokenizers: those of the text encoders.
        latents: files of cached latents by number of the example and flip; None to read pixels.
        states: files of cached text states by text; None to give tokens.
        sizes: whether the model takes ``time_ids``.
        flip: mirror half of the pictures.
        weights: factor of the loss of instance and of class images; None for 1.
        grain: pixels of an image for one of its masks, which then belong to the weights; None for
            no masks.
        hints: give a ControlNet's ``hint`` too.
        word: a word of its own in captions; None for none.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        captions: Captions,
        tokenizers: Sequence[Any],
        *,
        latents: Mapping[tuple[int, bool], Path] | None = None,
        states: Mapping[str, Path] | None = None,
        sizes: bool = False,
        flip: bool = False,
        weights: tuple[float, float] | None = None,
        grain: int | None = None,
        hints: bool = False,
        word: Word | None = None,
    ) -> None:
        self.examples, self.captions, self.tokenizers = list(examples), captions, list(tokenizers)
        self.latents, self.states, self.sizes = latents, states, sizes
        self.flip, self.weights, self.grain = flip, weights, grain
        self.hints, self.word = hints, word
        self.order = [i for i, e in enumerate(self.examples) for _ in range(e.picture.repeats)]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        number = self.order[index]
        picture, how = self.examples[number].picture, self.examples[number].fit
        flipped = self.flip and random.random() < 0.5
        text = self.captions.draw(picture.caption)
        corner = how.corner(at_random=self.latents is None)
        if self.latents is None:
            x_0 = picture.pixels(how, corner, flipped)
        else:
            x_0 = read(self.latents[number, flipped], "latents")["latents"].float()
        if self.states is None:
            chunks = self.examples[number].chunks
            context: Tensors = {"tokens": token_ids(self.tokenizers, text, self.word, chunks)}
        else:
            context = self._states(self.states, text, self.examples[number].chunks)
        if self.sizes:
            top, left = corner
            if flipped:  # of the mirrored picture
                left = how.scaled[1] - how.shape[1] - left
            context["time_ids"] = torch.tensor(
                [*picture.size, top, left, *how.shape], dtype=torch.float32
            )
        if picture.hint is not None and self.hints:
            context["hint"] = picture.hint_pixels(how, corner, flipped)
        if self.weights is None and self.grain is None:
            return x_0, context
        weight = torch.tensor(
            1.0 if self.weights is None else self.weights[picture.prior], dtype=torch.float32
        )
        if self.grain is not None:
            weight = weight * picture.weights(how, corner, flipped, self.grain)
        return x_0, context, weight

    def _states(self, files: Mapping[str, Path], text: str, chunks: int) -> Tensors:
        """Cached states, filled up with those of empty chunks."""
        context = {n: one.float() for n, one in read(files[text], "context").items()}
        if chunks > 1 and not text:  # dropped; others have as many as they need
            context["context"] = context["context"].repeat(chunks, 1)
        return context


def cache_latents(
    folder: Path,
    vae: Autoencoder,
    examples: Sequence[Example],
    *,
    flip: bool,
    skip_broken: bool = False,
    batch_size: int = 4,
    on_made: OnMade | None = None,
) -> tuple[list[Example], dict[tuple[int, bool], Path]]:
    """Compute the latents that are missing in a folder: the most likely ones, scaled.

    Under torchrun each process makes its share and waits for the others.

    Args:
        folder: place of the cache, which several runs can share.
        vae: the encoder.
        examples: what to encode.
        flip: the mirrored pictures as well.
        skip_broken: leave out, with a warning, what can't be read.
        batch_size: pictures of one shape to encode at once.
        on_made: called as ``on_made(done, all)`` while this process computes.

    Returns:
        Those that could be read, and by number and flip the files of their latents.

    Raises:
        ValueError: a picture can't be read; names it.
        OSError: a file can't be written; none is left half-written.
    """
    encoder = fingerprint({"vae": vae})
    kinds = (False, True) if flip else (False,)
    jobs = [(e.latents_file(folder, encoder, kind), e, kind) for kind in kinds for e in examples]
    processes = Processes.join(next(vae.parameters()).device)
    missing = list({job[0]: job for job in jobs}.values())[processes.rank :: processes.count]
    missing = sorted((j for j in missing if not j[0].exists()), key=lambda job: job[1].fit.shape)
    parameter = next(vae.parameters())
    made = 0
    while made < len(missing):
        shape = missing[made][1].fit.shape
        batch = [j for j in missing[made : made + batch_size] if j[1].fit.shape == shape]
        made += len(batch)
        pixels, files = [], []
        for file, example, flipped in batch:
            try:
                pixels.append(example.picture.pixels(example.fit, example.fit.corner(), flipped))
                files.append(file)
            except ValueError as error:
                report(str(error), skip_broken)
        if pixels:
            for file, latents in zip(
                files, _encoded(vae, torch.stack(pixels).to(parameter)), strict=True
            ):
                write(file, {"latents": latents})
        if on_made is not None:
            on_made(made, len(missing))
    processes.wait()
    there = [e for e in examples if e.latents_file(folder, encoder, False).exists()]
    files_of = {
        (i, kind): e.latents_file(folder, encoder, kind)
        for i, e in enumerate(there)
        for kind in kinds
    }
    return there, files_of


def cache_states(
    folder: Path,
    text: TextEncoders,
    texts: Iterable[str],
    *,
    clip_skip: int = 0,
    batch_size: int = 8,
    on_made: OnMade | None = None,
) -> dict[str, Path]:
    """Compute the text states that are missing in a folder; their files by text.

    Args:
        folder: place of the cache, which several runs can share.
        text: the encoders.
        texts: captions, and the empty one where captions are dropped.
        clip_skip: layers to leave out at the encoders' ends.
        batch_size: texts to encode at once.
        on_made: called as ``on_made(done, all)`` while this process computes.

    Raises:
        OSError: a file can't be written; none is left half-written.
    """
    vocabularies = [tokenizer.get_vocab() for tokenizer in text.tokenizers]
    encoder = fingerprint(text.modules(), vocabularies)
    chunks = {one: chunks_of(text.tokenizers, one) for one in texts}
    files = {
        one: place(folder / "text", [encoder, "plain", clip_skip, one, *([n] if n > 1 else [])])
        for one, n in chunks.items()
    }
    processes = Processes.join(next(text.encoders[0].parameters()).device)
    mine = list(files.items())[processes.rank :: processes.count]
    missing = [(one, file) for one, file in mine if not file.exists()]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        most = max(chunks[one] for one, _ in batch)
        rows = [token_ids(text.tokenizers, one, chunks=most) for one, _ in batch]
        states = text_states(text, torch.stack(rows), clip_skip)
        length = states["context"].shape[1] // most
        for i, (one, file) in enumerate(batch):
            found = {name: value[i] for name, value in states.items()}
            write(file, found | {"context": found["context"][: chunks[one] * length]})
        if on_made is not None:
            on_made(start + len(batch), len(missing))
    processes.wait()
    return files


@torch.no_grad()
def text_states(text: TextEncoders, tokens: Tensor, clip_skip: int) -> Tensors:
    """What the U-Net is told of tokens [B, E, L]: ``context``, and for SDXL ``text_embeds``."""
    states = text.states(tokens.unbind(1), clip_skip)
    found = {"context": states.context}
    return found if states.pooled is None else found | {"text_embeds": states.pooled}


@torch.no_grad()
def _encoded(vae: Autoencoder, pixels: Tensor) -> Tensor:
    return vae.scale(vae.encode(pixels).mode())


@dataclass(frozen=True)
class Encoding:
    """What is left to compute of a batch: latents of pixels, states of tokens.

    Attributes:
        vae: encoder of pixels; None where batches hold latents.
        text: encoders of tokens; None where they hold states, or the encoders are trained.
        clip_skip: layers to leave out at the text encoders' ends.
    """

    vae: Autoencoder | None
    text: TextEncoders | None
    clip_skip: int = 0

    def __call__(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        x_0, context, *weight = batch
        if self.vae is not None:
            x_0 = _encoded(self.vae, x_0.to(next(self.vae.parameters()))).float()
        if self.text is not None:
            context = dict(context)
            states = text_states(self.text, context.pop("tokens"), self.clip_skip)
            context |= {name: one.float() for name, one in states.items()}
        return x_0, context, *weight
