"""Messages name the options of the command line, whatever Python's arguments are called."""

from __future__ import annotations

import pytest
import typer

from diffusion_fast.cli import app
from diffusion_fast.cli.common import in_options, options_of


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("steps: expected 1, got 0", "--steps: expected 1, got 0"),
        ("guidance_scale: expected x", "--guidance: expected x"),
        ("prompt: expected x", "PROMPT: expected x"),
        ("a: steps: expected x", "a: steps: expected x"),
        ("use safety_checker=False to do", "use --no-safety-checker to do"),
        ("use zero_terminal_snr=True, or", "use --zero-snr, or"),
        ("pass prediction_type='v_prediction', that", "pass --prediction-type v_prediction, that"),
        ("(or size=, to scale it)", "(or --size, to scale it)"),
        ("pass tokenizer= with the folder", "pass --tokenizer with the folder"),
        ("folder/size=/x steps=1000.pt", "folder/size=/x steps=1000.pt"),
        ("(pipe.loras.load(file, name, scale))", "(--lora FILE=SCALE)"),
        ("unknown: expected x", "unknown: expected x"),
    ],
)
def test_options(message: str, expected: str) -> None:
    options = options_of(typer.main.get_command(app), ["sample", "a cat", "--steps", "3"])
    assert in_options(message, options) == expected


def test_of_another_command() -> None:
    options = options_of(typer.main.get_command(app), ["vae-check", "--size", "3"])
    assert in_options("images: expected x", options) == "IMAGES: expected x"
    assert in_options("steps: expected x", options) == "steps: expected x"
    assert options_of(typer.main.get_command(app), []).keys() == {"debug"}
