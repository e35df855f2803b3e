"""Settings as other programs read them, and no folders of this machine."""

from __future__ import annotations

import pytest

from diffusion_fast import __version__
from diffusion_fast.pipelines.infotext import infotext

SETTINGS = {
    "size": [64, 72],
    "sampler": "euler_ancestral",
    "timestep_spacing": "karras",
    "steps": 20,
    "guidance_scale": 7.5,
    "strength": None,
    "clip_skip": 0,
}


def test_a_prompt_alone() -> None:
    assert infotext(SETTINGS, 3, "a cat,\nred") == (
        "a cat,\nred\nSteps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 3,"
        f" Size: 72x64, Version: diffusion_fast {__version__}"
    )


def test_everything() -> None:
    settings = SETTINGS | {
        "strength": 0.6,
        "clip_skip": 1,
        "sampler": "ddpm",
        "guidance_scale": 1.0,
    }
    text = infotext(
        settings,
        3,
        "a cat",
        "blurry",
        model="/home/me/models/v1.5.safetensors",
        loras={"/home/me/a: b.safetensors": 0.8, "c.pt": 1.0},
    )
    prompt, negative, facts = text.splitlines()
    assert (prompt, negative) == ("a cat", "Negative prompt: blurry")
    assert "Sampler: ddpm" in facts
    assert "CFG scale: 1, " in facts
    assert "Model: v1.5, Denoising strength: 0.6, Clip skip: 2, " in facts
    assert 'LoRAs: "a: b: 0.8, c: 1"' in facts
    assert "home" not in text


@pytest.mark.parametrize(
    ("sampler", "spacing", "expected"),
    [
        ("ddim", "leading", "Sampler: ddim, CFG"),  # theirs of that name has another grid
        ("ddim_a1111", "linspace", "Sampler: DDIM, CFG"),
        ("dpmpp_3m", "trailing", "Sampler: dpmpp_3m, CFG"),
        ("dpmpp_2m_sde", "sgm_uniform", "Sampler: DPM++ 2M SDE, Schedule type: SGM Uniform, CFG"),
    ],
)
def test_only_what_the_others_have_goes_by_their_names(
    sampler: str, spacing: str, expected: str
) -> None:
    settings = SETTINGS | {"sampler": sampler, "timestep_spacing": spacing}
    assert expected in infotext(settings, 3, "a cat")
