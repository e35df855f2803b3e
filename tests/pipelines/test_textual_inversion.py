"""Embeddings in a pipeline: latents as diffusers draws them with ``load_textual_inversion``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_pipelines import arguments, theirs
from numerics import error
from safetensors.torch import save_file

from diffusion_fast.pipelines import StableDiffusion

TOLERANCE = 1e-4  # of max|latents|, as in test_pipeline_parity


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_latents(tiny_folder: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """A word of two vectors, in both prompts."""
    generator = torch.Generator().manual_seed(0)
    names = ("emb_params",) if kind == "sd15" else ("clip_l", "clip_g")
    vectors = {name: torch.randn(2, 32, generator=generator) for name in names}
    save_file(vectors, tmp_path / "toy.safetensors")
    pipe = StableDiffusion.from_pretrained(tiny_folder(kind))
    judge: Any = theirs(tiny_folder(kind), "ddim")
    asked = {"sampler": "ddim", "timestep_spacing": "trailing", "guidance_scale": 5.0}
    asked |= {"batch": 2, "seed": 3, "size": 64, "output": "latent"}
    prompts = "a <toy> cat", "dark <toy>"
    before = pipe(*prompts, steps=4, **asked).latents
    pipe.embeddings.load(tmp_path / "toy.safetensors", "<toy>")
    for end, tensor in zip(("", "_2"), vectors.values(), strict=False):
        judge.load_textual_inversion(
            {"<toy>": tensor},
            token="<toy>",
            text_encoder=getattr(judge, f"text_encoder{end}"),
            tokenizer=getattr(judge, f"tokenizer{end}"),
        )
    config = {**judge.scheduler.config, "timestep_spacing": "trailing"}
    judge.scheduler = type(judge.scheduler).from_config(config)
    given = {"prompt": prompts[0], "negative_prompt": prompts[1], "height": 64, "width": 64}
    for steps in (1, 4, 20):
        result = pipe(*prompts, steps=steps, **asked).latents
        drawing = arguments([3, 4], num_inference_steps=steps, output_type="latent", **given)
        assert error(result, judge(**drawing).images) < TOLERANCE
        if steps == 4:
            assert error(result, before) > 0.01
