"""Defaults of a model's card: what a call takes that is not told."""

from __future__ import annotations

from pathlib import Path

import pytest

import diffusion_fast as df
from diffusion_fast.pipelines.card import CARD, Defaults, read_defaults

FRONT = """---
license: mit
inference:
  parameters:
    num_inference_steps: 3
    guidance_scale: 2
---
# A model
"""


def card(folder: Path, text: str) -> Path:
    (folder / CARD).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("text", [FRONT, FRONT.replace("\n", "\r\n")])
def test_reads_steps_and_guidance(tmp_path: Path, text: str) -> None:
    assert read_defaults(card(tmp_path, text)) == Defaults(3, 2.0)


@pytest.mark.parametrize(
    "text",
    ["", "# no front matter", "---\ninference: false\n---\n", "---\n- a list\n---\n", "---\n"],
)
def test_a_card_that_says_nothing_of_it(tmp_path: Path, text: str) -> None:
    assert read_defaults(card(tmp_path, text)) == Defaults()


@pytest.mark.parametrize(
    ("old", "new", "named", "left"),
    [
        (": 3", ": many", "num_inference_steps", Defaults(guidance_scale=2.0)),
        (": 3", ": 0", "num_inference_steps", Defaults(guidance_scale=2.0)),
        (": 2", ": .nan", "guidance_scale", Defaults(steps=3)),
        (": mit", ": [", "no YAML", Defaults()),
    ],
)
def test_what_cannot_be_is_named(
    tmp_path: Path, old: str, new: str, named: str, left: Defaults
) -> None:
    with pytest.warns(UserWarning, match=named):
        assert read_defaults(card(tmp_path, FRONT.replace(old, new))) == left


def test_a_pipeline_takes_and_keeps_them(tmp_path: Path) -> None:
    folder = df.pipelines.make_tiny(tmp_path / "tiny")
    card(folder, FRONT)
    pipe = df.StableDiffusion.from_pretrained(folder)
    settings = pipe("a cat", output="latent").settings
    assert (settings["steps"], settings["guidance_scale"]) == (3, 2.0)
    assert pipe("a cat", steps=1, guidance_scale=4, output="latent").settings["steps"] == 1
    pipe.save_pretrained(tmp_path / "saved")
    assert read_defaults(tmp_path / "saved") == Defaults(3, 2.0)
