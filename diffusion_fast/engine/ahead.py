"""The Triton launches of a whole model, found on the meta device, to be compiled before a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..models import UNet2DCondition, UNetConfig
from ..models.vae import AutoencoderKL
from ..models.vae_config import VAEConfig
from ..ops.dispatch.backend import known_ops
from ..samplers import SamplerOptions
from ..samplers.registry import table_of
from ..schedule import DiffusionSchedule
from .buffers import Layout
from .loop import Loop
from .predictor import predictor_for
from .rewrites.cost import Calls
from .rewrites.decoder import PreparedDecoder

META = torch.device("meta")
TOKENS = 77


@torch.no_grad()
def calls(
    unet: UNetConfig,
    vae: VAEConfig | None,
    dtype: torch.dtype,
    *,
    batch: int,
    size: tuple[int, int],
    steps: int,
    halves: int = 2,
    max_rows: int = 100,
) -> list[tuple[str, tuple[Any, ...]]]:
    """The op calls of an image: what depends on the prompt, a captured step, the decoder.

    Args:
        unet, vae: configs; without ``vae`` nothing is decoded.
        dtype: of the networks.
        batch: images at once.
        size: height and width of the latents.
        steps: of the sampler's table, whose length the time table's kernels see.
        halves: of guidance, 1 or 2.
        max_rows: the most rows of the engine's tables.
    """
    table = table_of(SamplerOptions().replace(sampler="ddim", steps=steps), DiffusionSchedule())
    shape = (batch, unet.out_channels, *size)
    extra = unet.in_channels - unet.out_channels
    with META:
        model = UNet2DCondition(unet).to(dtype).eval()
        decoder = PreparedDecoder(AutoencoderKL(vae).to(dtype).eval()) if vae is not None else None
        context = _context(unet, dtype, batch * halves)
        more = torch.empty(batch, extra, *size) if extra else None
        latents = torch.empty(shape, dtype=dtype)
    predictor = predictor_for(model, "all", batch=batch, halves=halves, max_rows=max_rows)
    loop = Loop(Layout(shape, extra, halves, max_rows, torch.float32, dtype, META), predictor)
    with Calls() as recorded:
        prepared = loop.prepare(table, context, more)
        prepared.capturable(masked=False).step("row")
        if decoder is not None:
            decoder(latents)
    return recorded.found


def _context(config: UNetConfig, dtype: torch.dtype, batch: int) -> dict[str, Tensor]:
    if config.num_classes is not None:
        return {"context": torch.empty(batch, dtype=torch.int64)}
    given = {"context": torch.empty(batch, TOKENS, config.cross_attention_dim, dtype=dtype)}
    if config.addition_embed_type is not None:
        sizes = 6
        pooled = (config.projection_class_embeddings_input_dim or 0) - sizes * (
            config.addition_time_embed_dim or 0
        )
        given["text_embeds"] = torch.empty(batch, pooled, dtype=dtype)
        given["time_ids"] = torch.empty(batch, sizes)
    return given


def launches(found: list[tuple[str, tuple[Any, ...]]], arch: int) -> list[Any]:
    """What the Triton kernels of these calls launch, every candidate of a measurement included.

    Args:
        found: of :func:`calls`.
        arch: the architecture that is launched for, 90 for sm_90.
    """
    from ..kernels import ahead

    with ahead.recording(arch) as recorded:
        for name, args in found:
            for backend in known_ops[name].backends:
                if backend.name == "triton":
                    backend.run(*_as_on_cuda(name, args))
    return recorded


def _as_on_cuda(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The weights of a convolution as they are packed there."""
    if name != "conv2d" or args[1].shape[2:] == (1, 1):
        return args
    return (*args[:-1], (args[1].contiguous(memory_format=torch.channels_last),))


def head_dims(found: list[tuple[str, tuple[Any, ...]]]) -> Iterator[int]:
    """Those of the attention calls, each once."""
    yield from sorted({args[0].shape[-1] for name, args in found if name == "attention"})
