"""Text states against diffusers' ``encode_prompt``: tiny encoders of the real kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from numerics import error
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_fast.models import CheckpointError
from diffusion_fast.models.text import TextEncoders
from diffusion_fast.pipelines import make_tiny

TOLERANCE = 1e-4
KINDS = ("sd15", "sd21", "sdxl")
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made = {kind: make_tiny(tmp_path_factory.mktemp("text") / kind, kind) for kind in KINDS}
    return made.__getitem__


def expected(folder: Path, prompt: str, clip_skip: int | None = None) -> tuple[Tensor, ...]:
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, unet=None, vae=None)
    pipe.unet = torch.nn.Identity()
    # Newer versions of transformers have no text_model, which diffusers asks for to skip layers.
    vars(pipe.text_encoder).setdefault("text_model", pipe.text_encoder)
    with torch.no_grad():
        states = pipe.encode_prompt(
            prompt,
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=clip_skip,
        )
    return states[::2]  # without the negative ones


@pytest.mark.parametrize("prompt", ["", "A Photo of a cat, at sea!", "a " * 75, "naïve 猫 \\("])
@pytest.mark.parametrize("kind", KINDS)
def test_states(folder: Folder, kind: str, prompt: str) -> None:
    states = TextEncoders.from_pretrained(folder(kind)).encode([prompt])
    context, *pooled = expected(folder(kind), prompt.replace("\\(", "("))
    assert states.context.shape == (1, 77, 64 if kind == "sdxl" else 32)
    assert error(states.context, context) < TOLERANCE
    if kind == "sdxl":
        assert states.pooled is not None
        assert error(states.pooled, pooled[0]) < TOLERANCE
    else:
        assert states.pooled is None


@pytest.mark.parametrize("kind", KINDS)
def test_clip_skip(folder: Folder, kind: str) -> None:
    encoders = TextEncoders.from_pretrained(folder(kind))
    states = encoders.encode(["a cat"], clip_skip=1)
    assert error(states.context, expected(folder(kind), "a cat", clip_skip=1)[0]) < TOLERANCE
    assert error(states.context, encoders.encode(["a cat"]).context) > 0.01
    with pytest.raises(ValueError, match="clip_skip: expected an integer in"):
        encoders.encode(["a cat"], clip_skip=3)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_long_prompts_are_chunks_in_a_row(folder: Folder, kind: str) -> None:
    encoders = TextEncoders.from_pretrained(folder(kind))
    long = encoders.encode(["a " * 75 + "red cat", "dog"])
    parts = encoders.encode(["a " * 75, "red cat", "dog", ""])
    first, second = long.context.split(77, dim=1)
    assert error(first, parts.context[[0, 2]]) < TOLERANCE
    assert error(second, parts.context[[1, 3]]) < TOLERANCE
    if kind == "sdxl":
        assert long.pooled is not None
        assert parts.pooled is not None
        assert error(long.pooled, parts.pooled[[0, 2]]) < TOLERANCE


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_weights_multiply_states_and_keep_their_mean(folder: Folder, kind: str) -> None:
    encoders = TextEncoders.from_pretrained(folder(kind))
    for encoder in encoders.encoders:
        torch.nn.init.normal_(getattr(encoder, "text_model", encoder).final_layer_norm.bias, 0.1)
    plain, weighted = encoders.encode(["a red cat", "a (red:1.5) cat"]).context.double()
    factor = torch.ones(77, 1, dtype=torch.float64)
    factor[2] = 1.5  # after start and "a"
    for half in range(0, plain.shape[-1], 32):  # each encoder's states
        ours, states = weighted[:, half : half + 32], plain[:, half : half + 32]
        truth = states * factor
        truth *= states.mean() / truth.mean()
        assert error(ours, truth) < TOLERANCE
        assert abs(ours.mean() - states.mean()) < 1e-6
        assert error(ours, states) > 0.01


def test_a_mean_of_nearly_zero_is_left_alone(folder: Folder) -> None:
    """Its rounding would decide the scale. A fresh layer norm has no bias, and so no mean."""
    encoders = TextEncoders.from_pretrained(folder("sd15"))
    plain, weighted = encoders.encode(["a red cat", "a (red:1.5) cat"]).context
    assert error(weighted[2], 1.5 * plain[2]) < 1e-6
    assert torch.equal(weighted[3], plain[3])


def test_a_prompt_does_not_depend_on_its_neighbours(folder: Folder) -> None:
    encoders = TextEncoders.from_pretrained(folder("sd15"))
    together = encoders.encode(["a (cat:1.2)", "a dog", "a [bird]"])
    for i, prompt in enumerate(["a (cat:1.2)", "a dog", "a [bird]"]):
        assert error(together.context[i : i + 1], encoders.encode([prompt]).context) < 1e-6


def rewritten(folder: Path, copy: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(folder, copy)
    file = copy / "text_encoder" / "model.safetensors"
    states = load_file(file)
    change(states)
    save_file(states, file)
    return copy


def test_old_and_new_names(folder: Folder, tmp_path: Path) -> None:
    def newer(states: dict[str, Tensor]) -> None:
        for name in list(states):
            states[name.removeprefix("text_model.")] = states.pop(name)

    def older(states: dict[str, Tensor]) -> None:
        states["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    truth = TextEncoders.from_pretrained(folder("sd15")).encode(["a cat"]).context
    for name, change in (("newer", newer), ("older", older)):
        copy = rewritten(folder("sd15"), tmp_path / name, change)
        assert torch.equal(TextEncoders.from_pretrained(copy).encode(["a cat"]).context, truth)


def test_tensors_that_do_not_fit_are_listed(folder: Folder, tmp_path: Path) -> None:
    def change(states: dict[str, Tensor]) -> None:
        del states["text_model.final_layer_norm.bias"]
        states["text_model.more"] = torch.zeros(3)
        states["text_model.final_layer_norm.weight"] = torch.zeros(5)

    copy = rewritten(folder("sd15"), tmp_path / "copy", change)
    with pytest.raises(CheckpointError) as raised:
        TextEncoders.from_pretrained(copy)
    lines = str(raised.value).splitlines()
    assert "3 of its tensors" in lines[0]
    assert lines[1:] == [
        "  extra: more [3]",
        "  misshapen: final_layer_norm.weight expected [32], got [5]",
        "  missing: final_layer_norm.bias [32]",
    ]


def test_half_precision_and_saving(folder: Folder, tmp_path: Path) -> None:
    encoders = TextEncoders.from_pretrained(folder("sdxl"), dtype=torch.float16)
    states = encoders.encode(["a (cat:1.2)"])
    assert states.context.dtype == torch.float16
    encoders.save_pretrained(tmp_path)
    again = TextEncoders.from_pretrained(tmp_path).encode(["a (cat:1.2)"])
    assert torch.equal(again.context, states.context)
    truth = TextEncoders.from_pretrained(folder("sdxl")).encode(["a (cat:1.2)"])
    assert error(states.context, truth.context) < 0.01


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("text_encoder/config.json", '{"model_type": "t5"}', "clip_text_model.*got 't5'"),
        ("text_encoder/config.json", "{", "config.json: can't be read as JSON"),
        ("text_encoder/model.safetensors", "x", "truncated, or not a safetensors file"),
        ("tokenizer/vocab.json", "{", "not a CLIP tokenizer"),
    ],
)
def test_damaged_files(folder: Folder, tmp_path: Path, file: str, text: str, message: str) -> None:
    copy = shutil.copytree(folder("sd15"), tmp_path / "copy")
    (copy / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        TextEncoders.from_pretrained(copy)


def test_a_tokenizer_of_another_model(folder: Folder, tmp_path: Path) -> None:
    copy = shutil.copytree(folder("sd15"), tmp_path / "copy")
    vocabulary = json.loads((copy / "tokenizer" / "vocab.json").read_text())
    vocabulary["more"] = len(vocabulary)
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="tokenizer: expected at most the encoder's"):
        TextEncoders.from_pretrained(copy)


@pytest.mark.parametrize("prompts", [[None], [3], ["a", b"b"]])
def test_prompts_are_strings(folder: Folder, prompts: list[Any]) -> None:
    with pytest.raises(TypeError, match="prompt: expected a string"):
        TextEncoders.from_pretrained(folder("sd15")).encode(prompts)
