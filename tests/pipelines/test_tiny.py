"""Tiny models: the real layout, random weights, and saying so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from diffusion_fast.pipelines import StableDiffusion, make_tiny
from diffusion_fast.pipelines.tiny import KINDS
from diffusion_fast.pipelines.tiny_tokenizer import WORDS, vocabulary

Folder = Callable[[str], Path]


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout(tiny_folder: Folder, kind: str) -> None:
    folder = tiny_folder(kind)
    names = {path.name for path in folder.iterdir()}
    first, second = {"text_encoder", "tokenizer"}, {"text_encoder_2", "tokenizer_2"}
    text = {"sdxl": first | second, "refiner": second}.get(kind, first)
    assert names == {"unet", "vae", "scheduler", "model_index.json"} | text
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 8e6


def test_made_twice_it_is_the_same(tiny_folder: Folder, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    folder = make_tiny(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), state)
    first = tiny_folder("sd15")
    names = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    for name in names:
        assert (first / name).read_bytes() == (folder / name).read_bytes(), name
    other = make_tiny(tmp_path / "other", seed=1) / "vae" / "diffusion_pytorch_model.safetensors"
    assert other.read_bytes() != (first / "vae" / other.name).read_bytes()


@pytest.mark.parametrize(("name", "kind"), [("tiny", "sd15"), ("tiny-inpainting", "inpainting")])
def test_by_name(tiny_folder: Folder, name: str, kind: str) -> None:
    named = StableDiffusion.from_pretrained(name)
    folder = StableDiffusion.from_pretrained(tiny_folder(kind))
    assert named.random_weights
    assert folder.random_weights
    states = named.unet.state_dict()
    assert all(torch.equal(v, states[n]) for n, v in folder.unet.state_dict().items())
    assert named.inpainting == (kind == "inpainting")


def test_results_say_that_the_weights_are_random(pipe: StableDiffusion) -> None:
    assert pipe("a cat", steps=1, output="latent").random_weights


def test_the_tokenizer_knows_words_and_all_bytes(tiny_folder: Folder) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder("sd15") / "tokenizer")
    ids, _ = vocabulary()
    assert sorted(ids.values()) == list(range(len(ids)))
    assert len(tokenizer) == len(ids)
    assert len(set(ids)) == len(ids)
    words = WORDS.split()
    assert [len(tokenizer(word, add_special_tokens=False).input_ids) for word in words] == [1] * 49
    for text in ("zebra 7!", "naïve 猫 🐈", "A PHOTO"):
        found = tokenizer(text).input_ids
        assert (found[0], found[-1]) == (ids["<|startoftext|>"], ids["<|endoftext|>"])
        assert ids["<|endoftext|>"] not in found[1:-1]  # nothing is unknown
        assert tokenizer.decode(found[1:-1]).replace(" ", "") == text.lower().replace(" ", "")


def test_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind: expected one of sd15, sd21, sdxl, refiner"):
        make_tiny(tmp_path / "x", "sd3")
    assert not list(tmp_path.iterdir())
