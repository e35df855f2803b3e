"""Textual inversion against diffusers' ``load_textual_inversion``: every layout, tiny encoders."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from mutations import mutated, survives, write
from numerics import error
from safetensors.torch import save_file
from torch import Tensor

from diffusion_fast.models import CheckpointError
from diffusion_fast.models.text import TextEncoders
from diffusion_fast.pipelines import make_tiny

TOLERANCE = 1e-5
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    kinds = ("sd15", "sd21", "sdxl")
    made = {kind: make_tiny(tmp_path_factory.mktemp("words") / kind, kind) for kind in kinds}
    return made.__getitem__


def theirs(folder: Path, token: str, tensors: list[Tensor], prompt: str) -> Tensor:
    """States of diffusers."""
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, unet=None, vae=None)
    pipe.unet = torch.nn.Identity()
    for end, tensor in zip(("", "_2"), tensors, strict=False):
        pipe.load_textual_inversion(
            {token: tensor},
            token=token,
            text_encoder=getattr(pipe, f"text_encoder{end}"),
            tokenizer=getattr(pipe, f"tokenizer{end}"),
        )
    with torch.no_grad():
        return pipe.encode_prompt(
            prompt,
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )[0]


def web_ui(tensor: Tensor) -> dict[str, Any]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": "x", "step": 3}


def first_scripts(tensor: Tensor) -> dict[str, Any]:
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor)})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}


@pytest.mark.parametrize(
    ("kind", "name", "count", "contents"),
    [
        ("sd15", "style.pt", 1, web_ui),
        ("sd15", "style.pt", 3, first_scripts),
        ("sd15", "style.safetensors", 2, lambda x: {"emb_params": x}),
        ("sd21", "learned_embeds.bin", 1, lambda x: {"style": x[0]}),
        ("sd21", "learned_embeds.safetensors", 2, lambda x: {"style": x}),
        ("sd15", "style", 1, lambda x: x[0]),
    ],
)
def test_files(
    folder: Folder, tmp_path: Path, kind: str, name: str, count: int, contents: Any
) -> None:
    vectors = torch.randn(count, 32)
    (save_file if "safetensors" in name else torch.save)(contents(vectors), tmp_path / name)
    text = TextEncoders.from_pretrained(folder(kind))
    plain = text.encode(["a style of cat"]).context
    assert text.embeddings.load(tmp_path / name) == "style"
    context = text.encode(["a style of cat"]).context
    expected = theirs(folder(kind), "style", [vectors], "a style of cat")
    assert error(context, expected) < TOLERANCE
    assert error(context, plain) > 0.01
    text.embeddings.unload("style")
    assert torch.equal(text.encode(["a style of cat"]).context, plain)


def test_a_pair_for_sdxl(folder: Folder, tmp_path: Path) -> None:
    pair = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 32)}
    save_file(pair, tmp_path / "x.safetensors")
    text = TextEncoders.from_pretrained(folder("sdxl"))
    text.embeddings.load(tmp_path / "x.safetensors", "<toy>")
    context = text.encode(["a <toy> cat"]).context
    expected = theirs(folder("sdxl"), "<toy>", list(pair.values()), "a <toy> cat")
    assert error(context, expected) < TOLERANCE
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"2 tensors of width 32 and 32.* of width 32$"):
        text.embeddings.load(tmp_path / "y.safetensors")
    small = TextEncoders.from_pretrained(folder("sd15"))
    with pytest.raises(CheckpointError, match="got one of width 32 and 32"):
        small.embeddings.load(tmp_path / "x.safetensors")


@pytest.fixture
def text(folder: Folder, tmp_path: Path) -> TextEncoders:
    """With the words ``bad-hands`` of two vectors and ``Bad-hands-5`` of three."""
    encoders = TextEncoders.from_pretrained(folder("sd15"))
    for count, name in ((2, "bad-hands"), (3, "Bad-hands-5")):
        torch.save({"emb_params": torch.randn(count, 32)}, tmp_path / "x.pt")
        encoders.embeddings.load(tmp_path / "x.pt", name)
    return encoders


def test_words_in_prompts(text: TextEncoders) -> None:
    def states(prompt: str) -> Tensor:
        return text.encode([prompt]).context[0]

    plain, weighted = states("a bad-hands cat"), states("a (bad-hands:1.5) cat")
    assert error(weighted[2:4], 1.5 * plain[2:4]) < 1e-6
    assert torch.equal(weighted[4:], plain[4:])
    for same in (
        "a BAD-HANDS cat",
        "a embedding:bad-hands cat",
        "a (bad-hands:1) cat",
    ):
        assert torch.equal(states(same), plain)
    other = states("a bad-hands-5 cat")
    assert torch.equal(states("a (embedding:bad-hands-5:1.0) cat"), other)
    assert error(other, plain) > 0.01
    for words in ("a bad-hands-6 cat", "a xbad-hands cat"):
        assert error(states(words), plain) > 0.01
    with pytest.raises(ValueError, match=r"prompt: .*pipe.embeddings.load.* got 'embedding:good'"):
        states("embedding:good bad-hands")


def test_vectors_stay_together_at_the_end_of_a_chunk(text: TextEncoders) -> None:
    context = text.encode(["a " * 73 + "bad-hands-5 cat"]).context
    assert context.shape[1] == 154
    assert error(context[:, 77:], text.encode(["bad-hands-5 cat"]).context) < TOLERANCE


def test_threads_do_not_mix_their_vectors(text: TextEncoders) -> None:
    prompts = ["a bad-hands cat", "a dog", "(bad-hands-5:1.2)", "a red car"] * 4
    expected = [text.encode([prompt]).context for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: text.encode([prompt]).context, prompts))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a": torch.zeros(32), "b": torch.zeros(32)}, "expected an embedding: finite vectors"),
        (
            {"emb_params": torch.full((1, 32), float("nan"))},
            "expected an embedding: finite vectors",
        ),
        ({"emb_params": torch.zeros(76, 32)}, "1 to 75 of them"),
        ({"emb_params": torch.zeros(0, 32)}, "1 to 75 of them"),
        ({"emb_params": torch.zeros(1, 32, dtype=torch.int64)}, "expected an embedding"),
        ({"emb_params": torch.zeros(1, 48)}, "1 tensors of width 32.*, got one of width 48"),
        ({"string_to_param": {}}, "expected an embedding"),
        ({f"lora_te_{i}.lora_up.weight": torch.zeros(1) for i in range(2)}, "; got a LoRA"),
        ({"emb_params": Path}, "can't be read as an embedding"),
        (3, "expected an embedding"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
    ],
)
def test_other_files(text: TextEncoders, tmp_path: Path, contents: Any, message: str) -> None:
    if isinstance(contents, bytes):
        (tmp_path / "other.pt").write_bytes(contents)
    else:
        torch.save(contents, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=rf"other\.pt: .*{message}"):
        text.embeddings.load(tmp_path / "other.pt")
    assert text.embeddings.names == ["bad-hands", "Bad-hands-5"]


@pytest.mark.parametrize("name", ["BAD-hands", "", " ", 3])
def test_names(text: TextEncoders, tmp_path: Path, name: Any) -> None:
    torch.save(torch.zeros(32), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"^name: expected "):
        text.embeddings.load(tmp_path / "x.pt", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_damaged_files(text: TextEncoders, tmp_path: Path, name: str) -> None:
    save = save_file if "safetensors" in name else torch.save
    save({"emb_params": torch.randn(2, 32)}, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for seed in range(100):
        path = write(tmp_path / name, mutated(data, seed))
        if survives(
            lambda path=path: text.embeddings.load(path, "w"), (CheckpointError,), [path], seed
        ):
            assert text.encode(["a w"]).context.isfinite().all()
            text.embeddings.unload("w")
