"""Runs of fine-tuning that take a second: tiny models, five images of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_fast.finetuning import Settings
from diffusion_fast.finetuning.run import Finetuning

SIZES = ((64, 64), (96, 48), (48, 96), (64, 64), (130, 90))  # width, height
SMALL: dict[str, Any] = {"bucket_step": 16, "batch_size": 2, "seed": 3}


def write_images(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a cat, red, number {i}\n")
    return folder


def run(model: Path | str, data: Any, out: Path, **changes: Any) -> Finetuning:
    values = {"model": model, "data": data, "out": out, **SMALL, **changes}
    if values.get("method", "lora") == "lora":
        values.setdefault("rank", 2)
    return Finetuning(Settings.of(values))


def randomize(network: torch.nn.Module, seed: int = 0) -> None:
    """Weights at which no gradient is zero, as LoRA's are at the start, or nearly so.

    Activations keep their size. Small ones would make scores of attention nearly equal, and the
    gradients of queries and keys rounding for the greater part.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(drawn * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * drawn + float("norm" in name and name.endswith("weight")))


def gradients(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
