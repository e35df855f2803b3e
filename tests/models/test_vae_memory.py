"""Encoding and decoding in parts gives what the whole gives, and starts when memory runs out."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import error
from torch import Tensor
from torch.nn import functional as F
from vae_parity import pictures, twins

from diffusion_fast.models import vae_memory
from diffusion_fast.models.autoencoder import LatentDistribution
from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.models.vae_config import VAEConfig
from diffusion_fast.models.vae_memory import OVERLAP, TILE

TINY = VAEConfig.preset("tiny")


class Local(AutoencoderKL):
    """Every pixel of its results depends on one latent pixel only, so tiles change nothing."""

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3], scale_factor=8, mode="nearest")

    def encode(self, images: Tensor) -> LatentDistribution:
        mean = F.avg_pool2d(images, 8)
        return LatentDistribution(mean, mean.square())


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 4 * TILE), st.integers(1, 4 * TILE)),
    batch=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_tiles_fit_together(size: tuple[int, int], batch: int, dtype: torch.dtype) -> None:
    vae = Local(TINY).to(dtype)
    latents = torch.randn(batch, 4, *size, dtype=dtype)
    found = vae_memory.decode(vae, latents, "tiled")
    assert found.how == "tiled"
    assert found.images.dtype == dtype
    images = vae.decode(latents)
    assert error(found.images, images) <= 1e-6
    encoded = vae_memory.encode(vae, images, "tiled").latents
    assert error(encoded.mean, vae.encode(images).mean) <= 1e-6
    assert error(encoded.log_variance, vae.encode(images).log_variance) <= 1e-6


@pytest.mark.parametrize("length", [1, TILE, TILE + 1, 2 * TILE - OVERLAP, 2 * TILE, 333])
def test_tiles_are_not_larger_or_more_than_said(length: int) -> None:
    starts = [start for start, _ in vae_memory._tiles(length, 1)]
    size = min(TILE, length)
    assert starts[0] == 0
    assert starts[-1] == length - size
    overlaps = [start + size - after for start, after in itertools.pairwise(starts)]
    assert all(overlap >= OVERLAP for overlap in overlaps)
    assert (len(starts) - 2) * (TILE - OVERLAP) + TILE < length or len(starts) == 1


@pytest.mark.parametrize("how", ["whole", "sliced", "tiled"])
def test_small_images_are_the_same_whatever_the_way(how: str) -> None:
    vae, _ = twins(TINY)
    images, latents = pictures(TINY, (40, 64), batch=3), torch.randn(3, 4, 5, 8)
    decoded = vae_memory.decode(vae, latents, how)
    encoded = vae_memory.encode(vae, images, how)
    assert decoded.how == encoded.how == how
    assert error(decoded.images, vae.decode(latents)) <= 1e-5
    assert error(encoded.latents.mean, vae.encode(images).mean) <= 1e-5
    assert error(encoded.latents.log_variance, vae.encode(images).log_variance) <= 1e-5
    assert not decoded.images.requires_grad


def _cpu() -> RuntimeError:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate")


def _cuda() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Limited(AutoencoderKL):
    """Runs out of memory above some numbers of the input."""

    def __init__(self, limit: int, refusal: Callable[[], BaseException]) -> None:
        super().__init__(TINY)
        self.limit, self.refusal = limit, refusal
        self.sizes: list[list[int]] = []
        self.failed: list[weakref.ref[Tensor]] = []

    def _run(self, half: torch.nn.Module, x: Tensor) -> Tensor:
        assert all(tensor() is None for tensor in self.failed), "a failed attempt keeps its memory"
        self.sizes.append(list(x.shape))
        if x.numel() > self.limit:
            allocated = torch.zeros(10)
            self.failed.append(weakref.ref(allocated))
            raise self.refusal()
        return super()._run(half, x)


LATENTS = (2, 4, 70, 10)
TILES = [[1, 4, 64, 10]] * 4


@pytest.mark.parametrize("refusal", [_cpu, _cuda, MemoryError])
@pytest.mark.parametrize(
    ("limit", "how", "sizes"),
    [
        (5600, "whole", [[2, 4, 70, 10]]),
        (2800, "sliced", [[2, 4, 70, 10], [1, 4, 70, 10], [1, 4, 70, 10]]),
        (2560, "tiled", [[2, 4, 70, 10], [1, 4, 70, 10], *TILES]),
    ],
)
def test_memory_that_runs_out_is_met_by_smaller_parts(
    limit: int, how: str, sizes: list[list[int]], refusal: Callable[[], BaseException]
) -> None:
    vae = Limited(limit, refusal).eval()
    latents = torch.randn(LATENTS)
    found = vae_memory.decode(vae, latents)
    assert found.how == how
    assert vae.sizes == sizes
    vae.limit = 10**9
    assert torch.equal(found.images, vae_memory.decode(vae, latents, how).images)


def test_encoding_too() -> None:
    vae = Limited(3 * 512 * 16, _cuda).eval()
    images = pictures(TINY, (560, 16), batch=1)
    found = vae_memory.encode(vae, images)
    assert found.how == "tiled"
    assert vae.sizes == [[1, 3, 560, 16], [1, 3, 512, 16], [1, 3, 512, 16]]  # nothing to slice
    assert found.latents.mean.shape == (1, 4, 70, 2)


@pytest.mark.parametrize(
    ("limit", "refusal", "tries"),
    [(100, _cuda, 3), (100, lambda: RuntimeError("a bug"), 1), (100, lambda: ValueError("x"), 1)],
    ids=["tiles too large", "another error", "bad value"],
)
def test_other_errors_are_not_hidden(
    limit: int, refusal: Callable[[], BaseException], tries: int
) -> None:
    vae = Limited(limit, refusal).eval()
    with pytest.raises(type(refusal()), match=str(refusal())):
        vae_memory.decode(vae, torch.randn(LATENTS))
    assert len(vae.sizes) == tries
    with pytest.raises(type(refusal())):  # asked for, so nothing else is tried
        vae_memory.decode(vae, torch.randn(LATENTS), "whole")
    assert len(vae.sizes) == tries + 1


def test_bad_arguments_are_named() -> None:
    vae = AutoencoderKL(TINY)
    with pytest.raises(
        ValueError, match="how: expected one of auto, whole, sliced, tiled, got 'x'"
    ):
        vae_memory.decode(vae, torch.zeros(1, 4, 8, 8), "x")
    for how in vae_memory.HOW:
        with pytest.raises(ValueError, match=r"latents: expected shape \[B, 4, height, width\]"):
            vae_memory.decode(vae, torch.zeros(4, 8, 8), how)
        with pytest.raises(ValueError, match=r"images: .* multiples of 8"):
            vae_memory.encode(vae, torch.zeros(1, 3, 8, 9), how)


REAL = """
import resource, sys, torch
torch.set_num_threads(1)
from diffusion_fast.models import vae_memory
from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.models.vae_config import VAEConfig
torch.manual_seed(0)
vae = AutoencoderKL(VAEConfig.preset("tiny")).eval()
latents = torch.randn(1, 4, 48, 256)
vae_memory.decode(vae, latents[..., :64])  # what the first call allocates for good
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize"))
limit = (used * 1024) + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(vae_memory.decode(vae, latents).how)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize(("mebibytes", "how"), [(2000, "whole"), (120, "tiled")])
def test_memory_that_really_runs_out(mebibytes: int, how: str) -> None:
    command = [sys.executable, "-c", REAL, str(mebibytes)]
    # What was freed goes back at once: it would serve the call that is to run out of it.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(2**17)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == how, done.stderr


def _smooth(shape: tuple[int, ...]) -> Tensor:
    """Latents that vary like those of a photograph: over several pixels, in every channel."""
    coarse = torch.randn(*shape[:2], shape[2] // 8, shape[3] // 8)
    return F.interpolate(coarse, size=shape[2:], mode="bicubic")


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_seams_do_not_show(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles without overlap leave edges where they meet, with it the image is as smooth as whole.

    What remains is a smooth difference: each tile has its own statistics in the norms, which
    matter more to random weights than to trained ones.
    """
    torch.manual_seed(seed)
    vae, _ = twins(TINY)
    latents = _smooth((1, 4, 64, 160))
    whole = vae.decode(latents)

    def edges(images: Tensor) -> float:
        """The steepest column of pixels beside that of the whole, without the image's own edge."""
        steps, expected = (x.diff(dim=3).abs().mean((0, 1, 2))[16:-16] for x in (images, whole))
        return (steps / expected).max().item()

    tiled = vae_memory.decode(vae, latents, "tiled").images
    assert edges(tiled) <= 2
    psnr = 10 * torch.log10((whole.max() - whole.min()).square() / (tiled - whole).square().mean())
    assert psnr >= 30
    monkeypatch.setattr(vae_memory, "OVERLAP", 0)
    assert edges(vae_memory.decode(vae, latents, "tiled").images) >= 4
