"""What a run would do, in lines, before it does it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..training.options import autocast
from .buckets import Size
from .run import Finetuning

_MOMENTS = {"adamw": 8, "adam": 8, "adafactor": 0, "adamw8bit": 2, "prodigy": 16}  # bytes
_GIB = 2**30


def plan(run: Finetuning) -> list[str]:
    """The base, what is trained, the data, steps, memory, and the files that come out."""
    settings, data = run.settings, run.data
    trained = sum(parameter.numel() for parameter in run.network.parameters())
    groups = data.shapes()
    batches = sum(-(-count // settings.batch_size) for count in groups.values())
    shapes: Counter[Size] = Counter()
    for (shape, _), count in groups.items():
        shapes[shape] += count
    listed = [f"{w} x {h}: {n}" for (h, w), n in sorted(shapes.items())]
    lines = [
        f"base: {settings.model} ({run.kind}, predicts {run.prediction_type})",
        f"method: {settings.method}, {trained:,} parameters to train",
        f"images: {len(data.examples)}, {sum(groups.values())} read in a pass of {batches} batches",
        f"shapes: {', '.join(listed)}",
        f"steps: {settings.steps} of {settings.batch_size} images,"
        f" {settings.steps / batches:.1f} passes",
        _memory(run, trained),
    ]
    if settings.class_prompt is not None:
        there = sum(example.picture.prior for example in data.examples)
        missing = max(0, settings.class_images - there)
        lines.append(f"class images: {there}, {missing} more to be drawn")
    lines += data.notes(run.method)
    lines.append(f"writes: {', '.join(map(str, run.files()))}")
    return lines


def _memory(run: Finetuning, trained: int) -> str:
    settings = run.settings
    networks: list[Any] = [run.parts.unet, run.parts.vae, *run.parts.text.encoders]
    if run.method.control is not None:
        networks.append(run.method.control)
    weights = sum(p.numel() * p.element_size() for one in networks for p in one.parameters())
    per_weight = 4 + _MOMENTS[settings.optimizer] + (4 if settings.ema_decay is not None else 0)
    kept = activations(run)
    total = weights + trained * per_weight + kept
    return (
        f"memory: about {total / _GIB:.2f} GiB, {weights / _GIB:.2f} of weights,"
        f" {trained * per_weight / _GIB:.2f} of gradients, moments and averages, and"
        f" {kept / _GIB:.2f} of activations; and what a layer takes while it computes"
    )


def activations(run: Finetuning) -> int:
    """Bytes that a step's forward pass keeps for the backward pass, of the largest batch.

    The pass runs on shapes alone: nothing is computed, and no memory is taken.
    """
    settings, parts = run.settings, run.parts
    (height, width), chunks = max(run.data.shapes(), key=lambda one: (one[0][0] * one[0][1], one))
    count, grain = -(-settings.batch_size // settings.accumulate), parts.vae.downsampling
    kept: dict[int, int] = {}
    alive: list[Any] = []  # so that no two storages have one number

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        alive.append(storage)
        if isinstance(value, FakeTensor) and storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return value

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    networks = [module for module in run.network.modules() if module is not run.network]
    own = [p for one in networks for p in (*one.parameters(False), *one.buffers(False))]
    alive += [fake.from_tensor(p).untyped_storage() for p in own]  # what the pass makes of them
    weights = {storage._cdata for storage in alive}
    with fake, torch.device(run.device):
        x = torch.zeros(count, parts.unet.config.out_channels, height // grain, width // grain)
        context = _context(run, count, chunks)
        if run.method.control is not None:
            context["hint"] = torch.zeros(count, 3, height, width)
        t = torch.zeros(count, dtype=torch.int64)
        with autocast(run.device, settings.precision), saved_tensors_hooks(keep, lambda one: one):
            run.network(x, t, **context)
    return sum(kept.values())


def _context(run: Finetuning, count: int, chunks: int) -> dict[str, Tensor]:
    """What the network is told of a batch, all zeros."""
    config, text = run.parts.unet.config, run.parts.text
    length = chunks * text.tokenizers[0].model_max_length
    found: dict[str, Tensor] = {}
    if config.addition_embed_type is not None:
        found["time_ids"] = torch.zeros(count, 6)
    if run.method.text:
        tokens = torch.zeros(count, len(text.encoders), length, dtype=torch.int64)
        return found | {"tokens": tokens}
    found["context"] = torch.zeros(count, length, config.cross_attention_dim)
    if config.addition_embed_type is not None:
        encoder: Any = text.encoders[-1]
        found["text_embeds"] = torch.zeros(count, encoder.config.projection_dim)
    return found
