"""Prompts that change with the steps: what the U-Net reads at each of its calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from diffusion_fast import StableDiffusion

Folder = Callable[[str], Path]
PROMPT = "a [cat:dog:2] on [grass|(sand:1.2)]"
SAID = [
    "a cat on grass",
    "a cat on (sand:1.2)",
    "a dog on grass",
    "a dog on (sand:1.2)",
]
NEGATIVE = ["ugly", "ugly", "", ""]
OPTIONS: dict[str, Any] = {"steps": 4, "size": 64, "output": "latent", "sampler": "heun"}


def load(folder: Path, **options: Any) -> StableDiffusion:
    return StableDiffusion.from_pretrained(folder, dtype=torch.float64, **options)


def told(pipe: StableDiffusion, prompt: Any, *negative: Any, **options: Any) -> list[Tensor]:
    """The context of each call of the U-Net."""
    seen: list[Tensor] = []

    def look(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((named["context"] if "context" in named else args[2]).clone())

    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    pipe(prompt, *negative, **OPTIONS | options)
    hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_both_prompts_at_each_step(tiny_folder: Folder, kind: str) -> None:
    """Heun's two calls of a step are told the same."""
    pipe = load(tiny_folder(kind), rewrites="none", graph="off")
    seen = told(pipe, [PROMPT, "a house"], "[ugly::0.5]")
    steps = [0, 0, 1, 1, 2, 2, 3]
    assert len(seen) == len(steps)
    for context, step in zip(seen, steps, strict=True):
        texts = [NEGATIVE[step], NEGATIVE[step], SAID[step], "a house"]
        assert_close(context, pipe.text.encode(texts).context)


def test_what_is_asked_for_without_guidance(tiny_folder: Folder) -> None:
    pipe = load(tiny_folder("sd15"), rewrites="none", graph="off")
    seen = told(pipe, PROMPT, "[ugly::0.5", guidance_scale=1, sampler="euler")
    for context, text in zip(seen, SAID, strict=True):
        assert_close(context, pipe.text.encode([text]).context)


def test_parts_are_of_the_steps_that_are_run(tiny_folder: Folder) -> None:
    pipe = load(tiny_folder("sd15"), rewrites="none", graph="off")
    image = torch.zeros(3, 64, 64)
    options = {"steps": 8, "strength": 0.5, "sampler": "euler", "guidance_scale": 1}
    seen = told(pipe, "a [cat:dog:0.5]", image=image, size=None, **options)
    for context, text in zip(seen, ["a cat", "a cat", "a dog", "a dog"], strict=True):
        assert_close(context, pipe.text.encode([text]).context)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_rewritten_network_is_told_the_same(tiny_folder: Folder, kind: str) -> None:
    plain, fast = load(tiny_folder(kind), rewrites="none", graph="off"), load(tiny_folder(kind))
    drawn = [pipe(PROMPT, "[ugly::0.5]", **OPTIONS).latents for pipe in (fast, plain)]
    assert_close(*drawn)
    same = fast("a cat on grass", "ugly", **OPTIONS).latents
    assert (drawn[0] - same).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("prompt", "negative", "message"),
    [
        ("[a:b:c:3]", None, r"prompt: expected \[a:b:0.5\] .* got '\[a:b:c:3\]'"),
        ("a", "x | [y:2]", r"negative_prompt: expected no \|"),
        ("[(a:1e9):2]", None, "prompt: expected weights of at most 1000"),
        ("[a:b AND c:2]", None, "prompt: expected none of other"),
    ],
)
def test_what_is_not_read_is_named(
    pipe: StableDiffusion, prompt: str, negative: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(prompt, negative, **OPTIONS)
