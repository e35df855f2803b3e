"""Encoding and decoding in parts when memory runs out: image by image, then tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import checks
from .autoencoder import Autoencoder, LatentDistribution

HOW = ("auto", "whole", "sliced", "tiled")

# Height and width of a tile and of the overlap of two neighbours, in latent pixels: 512 and 128
# pixels of a Stable Diffusion image. A tile has its own statistics in the norms and its own pixels
# to attend to, so tiles should not be small; where they overlap, one fades into the other.
TILE = 64
OVERLAP = 16

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Decoded:
    """Images [B, C, H, W], and how they were computed: whole, sliced or tiled."""

    images: Tensor
    how: str


@dataclass(frozen=True)
class Encoded:
    """The distribution of latents, and how it was computed: whole, sliced or tiled."""

    latents: LatentDistribution
    how: str


def decode(vae: Autoencoder, latents: Tensor, how: str = "auto", run: Run | None = None) -> Decoded:
    """Images of latents, in parts where memory is short. Keeps nothing for gradients.

    ``"whole"`` decodes the batch at once and ``"sliced"`` one image at a time: the same images to
    rounding. ``"tiled"`` decodes overlapping tiles of one image at a time and fades each into the
    next: an image like the whole one, not the same. ``"auto"`` takes the first of the three that
    does not run out of memory; the result names it. (On a CPU, Linux may end a process that asks
    for too much instead of refusing it; nothing can be retried then.)

    Args:
        vae: the model.
        latents: [B, C', h, w] of the model's dtype, not scaled.
        how: ``"auto"``, ``"whole"``, ``"sliced"`` or ``"tiled"``.
        run: what decodes the whole or a part; ``vae.decode`` by default.

    Raises:
        ValueError: another ``how``, or what :meth:`Autoencoder.decode` refuses.
        RuntimeError: out of memory, even so.
    """
    vae.check_latents(latents)
    images, ran = _run(run or vae.decode, latents, how, 1, vae.downsampling)
    return Decoded(images, ran)


def encode(vae: Autoencoder, images: Tensor, how: str = "auto") -> Encoded:
    """The distribution of the latents of images, in parts where memory is short.

    Args:
        vae: the model.
        images: [B, C, H, W] in [-1, 1] of the model's dtype.
        how: as in :func:`decode`.

    Raises:
        ValueError: another ``how``, or what :meth:`Autoencoder.encode` refuses.
        RuntimeError: out of memory, even so.
    """

    count = 0  # 2 with log variances

    def moments(part: Tensor) -> Tensor:
        nonlocal count
        found = vae.encode(part)
        known = [one for one in (found.mean, found.log_variance) if one is not None]
        count = len(known)
        return torch.cat(known, dim=1)

    vae.check_images(images)
    both, ran = _run(moments, images, how, vae.downsampling, 1)
    mean, *log_variance = both.chunk(count, dim=1)
    return Encoded(LatentDistribution(mean, *log_variance or (None,)), ran)


class Autoencoding:
    """A VAE, run in parts where memory is short, that remembers how.

    Args:
        vae: the autoencoder.
        run: decodes latents in its place, such as
            :class:`~diffusion_fast.engine.rewrites.decoder.FreshDecoder`.
    """

    def __init__(self, vae: Autoencoder, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self.vae, self._run = vae, run
        self._ways: list[str] = []

    @property
    def how(self) -> str | None:
        """The way with the smallest parts: whole, sliced or tiled; None before the first run."""
        return max(self._ways, key=HOW.index, default=None)

    def encode(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents [N, C, h, w], float32, for N generators of N images [N, 3, H, W], or of one."""
        encoded = encode(self.vae, images.to(self.vae.weight))
        self._ways.append(encoded.how)
        mean, log_variance = encoded.latents.mean, encoded.latents.log_variance
        shape = len(generators), *mean.shape[1:]
        spread = None if log_variance is None else log_variance.expand(shape)
        drawn = LatentDistribution(mean.expand(shape), spread)
        return self.vae.scale(drawn.sample(generators)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1], float32."""
        unscaled = self.vae.unscale(latents).to(self.vae.weight)
        decoded = decode(self.vae, unscaled, run=self._run)
        self._ways.append(decoded.how)
        return decoded.images.float().clamp(-1, 1)


@torch.no_grad()
def _run(run: Run, x: Tensor, how: str, grain: int, out_grain: int) -> tuple[Tensor, str]:
    """``run(x)`` and how it was done; a latent pixel is ``grain`` pixels of x."""
    checks.one_of("how", how, HOW)
    ways: dict[str, Callable[[], Tensor]] = {
        "whole": lambda: run(x),
        "sliced": lambda: torch.cat([run(image) for image in x.split(1)]),
        "tiled": lambda: torch.cat([_tiled(run, image, grain, out_grain) for image in x.split(1)]),
    }
    if how != "auto":
        return ways[how](), how
    for name in ("whole", "sliced") if len(x) > 1 else ("whole",):
        try:
            return ways[name](), name
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        # Only here is the error gone, and with it what the failed attempt had allocated.
    return ways["tiled"](), "tiled"


def _out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised it; PyTorch's for the CPU has no class of its own for that."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)


def _tiled(run: Run, image: Tensor, grain: int, out_grain: int) -> Tensor:
    """``run`` on tiles of one image [1, C, H, W], faded into each other."""
    height, width = image.shape[2] // grain, image.shape[3] // grain
    dtype = torch.promote_types(image.dtype, torch.float32)  # sums of parts
    out = torch.zeros((), dtype=dtype, device=image.device)
    for top, fade_y in _tiles(height, out_grain):
        for left, fade_x in _tiles(width, out_grain):
            tile = image[:, :, _span(top, height, grain), _span(left, width, grain)]
            part = run(tile).to(dtype)
            part *= fade_y.to(part)[:, None] * fade_x.to(part)
            if not out.dim():
                out = part.new_zeros(1, part.shape[1], height * out_grain, width * out_grain)
            out[:, :, _span(top, height, out_grain), _span(left, width, out_grain)] += part
    return out.to(image.dtype)


def _span(start: int, length: int, grain: int) -> slice:
    """The pixels of a tile that begins at latent pixel ``start``."""
    return slice(start * grain, (start + min(TILE, length)) * grain)


def _tiles(length: int, grain: int) -> list[tuple[int, Tensor]]:
    """Where the tiles of a row begin, and how much each of their pixels counts.

    Args:
        length: length of the row, in latent pixels.
        grain: pixels per latent pixel.

    Returns:
        For each tile its first latent pixel, and weights [pixels]: they rise and fall over the
        overlap, and those of all tiles at a pixel add up to 1.
    """
    size = min(TILE, length)
    count = max(1, math.ceil((length - OVERLAP) / (TILE - OVERLAP)))
    starts = [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
    pixel = torch.arange(size * grain, dtype=torch.float64)
    nearest = torch.minimum(pixel, size * grain - 1 - pixel) + 0.5  # distance to an edge
    fade = (nearest / (OVERLAP * grain)).clamp(max=1)
    total = torch.zeros(length * grain, dtype=torch.float64)
    for start in starts:
        total[start * grain : (start + size) * grain] += fade
    return [(start, fade / total[start * grain : (start + size) * grain]) for start in starts]
