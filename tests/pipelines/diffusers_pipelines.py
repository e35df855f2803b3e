"""diffusers' pipelines of the folders that ours read, and what both are asked to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

diffusers.utils.logging.disable_progress_bar()

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
}
PROMPT, NEGATIVE, GUIDANCE, STEPS = "a photo of a (black cat", "dark", 5.0, 5


def theirs(folder: Path, sampler: str, task: str = "") -> Any:
    """A pipeline of diffusers: ``task`` is ``""``, ``"Img2Img"`` or ``"Inpaint"``."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    name, changes = SCHEDULERS[sampler]
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "final_sigmas_type"}
    config = {"clip_sample": False, "set_alpha_to_one": True} | config
    pipe.scheduler = getattr(diffusers, name).from_config(config, **changes)
    xl = "XL" if hasattr(pipe, "text_encoder_2") else ""
    options = {} if xl else {"requires_safety_checker": False}
    pipe = getattr(diffusers, f"StableDiffusion{xl}{task}Pipeline")(**pipe.components, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(seeds: list[int], **changes: Any) -> dict[str, Any]:
    """What diffusers' pipelines are called with."""
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "guidance_scale": GUIDANCE,
        "num_inference_steps": STEPS,
        "num_images_per_prompt": len(seeds),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        **changes,
    }


def picture(height: int = 64, width: int = 80) -> Image.Image:
    rows, columns = np.mgrid[:height, :width] / 16
    channels = [np.sin(rows), np.cos(columns), np.sin(rows + 2 * columns)]
    return Image.fromarray((np.stack(channels, -1) * 127 + 128).astype(np.uint8))


def mask(height: int = 64, width: int = 80) -> Image.Image:
    """Whole latent pixels, which diffusers takes by their first pixel alone."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[8:48, 16:80] = 100  # dark, so to be kept
    pixels[24:48, 32:72] = 255
    pixels[48:, :16] = 140  # bright, so to be drawn
    return Image.fromarray(pixels)


def minus_one_to_one(images: Any) -> Tensor:
    return images * 2 - 1
