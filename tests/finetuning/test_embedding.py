"""Textual inversion: gradients of a word's vectors, its files, and what draws with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from numerics import assert_close, error
from safetensors.torch import load_file
from small_runs import run, write_images
from theirs import epsilon_loss, networks_of
from torch import Tensor

import diffusion_fast as df

Tiny = Callable[[str], Path]
WORD = {"method": "embedding", "word": "<toy>", "init_word": "red cat", "vectors": 3}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without captions."""
    folder = write_images(tmp_path_factory.mktemp("bare"), ((64, 64), (64, 64)))
    for file in folder.glob("*.txt"):
        file.unlink()
    return folder


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_loss_and_gradients(kind: str, tiny_folder: Tiny, bare: Path, tmp_path: Path) -> None:
    """textual_inversion.py (or _sdxl.py, for both encoders): rows of the token table that
    placeholder tokens have."""
    folder = tiny_folder(kind)
    ours = run(folder, bare, tmp_path / "out", **WORD)
    vectors = list(ours.method.vectors)
    trainer = ours.trainer()
    batch = next(trainer.dataloader.starting_at(0))
    loss = trainer.objective.backward(batch)

    def theirs(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        networks = networks_of(folder)
        encoders = [one for name, one in networks.items() if name != "unet"]
        tables = []
        for own, encoder in zip(vectors, encoders, strict=True):
            count = encoder.get_input_embeddings().num_embeddings
            encoder.resize_token_embeddings(count + 3)
            with torch.no_grad():
                encoder.get_input_embeddings().weight[count:] = own
            tables.append((encoder, count))
        for network in networks.values():
            network.to(dtype)
        value = epsilon_loss(networks, folder, batch, ours.settings.seed, dtype)
        value.backward()
        grads = [one.get_input_embeddings().weight.grad[count:] for one, count in tables]
        return value.detach(), grads

    (truth, exact), (plain, rounded) = theirs(torch.float64), theirs(torch.float32)
    assert_close(loss, truth, plain)
    for own, *others in zip(vectors, exact, rounded, strict=True):
        assert own.grad.any()
        assert_close(own.grad, *others)
    names = [name for name, _ in ours.network.named_parameters()]
    assert names == [f"vectors.{i}" for i in range(len(vectors))]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_files(kind: str, tiny_folder: Tiny, bare: Path, tmp_path: Path) -> None:
    made = run(tiny_folder(kind), bare, tmp_path / "out", **WORD, steps=2, learning_rate=0.1)
    before = [one.detach().clone() for one in made.method.vectors]
    made.train()
    trained = [one.detach() for one in made.method.vectors]
    assert all(one.shape == (3, 32) for one in trained)
    assert not any(map(torch.equal, before, trained))
    made.parts.text.embeddings.put("<toy>", trained)

    def latents(pipe: df.StableDiffusion) -> Tensor:
        drawn = pipe("a <toy> house", steps=2, output="latent", sampler="ddim").images
        assert isinstance(drawn, Tensor)
        return drawn

    truth = latents(df.StableDiffusion(made.parts))
    pipe = df.StableDiffusion.from_pretrained(tiny_folder(kind))
    plain = latents(pipe)
    pipe.embeddings.load(made.files()[0], "<toy>")
    assert error(plain, truth) > 1e-5
    assert torch.equal(latents(pipe), truth)
    if kind == "sdxl":
        found = [load_file(file)["<toy>"] for file in made.files()[1:]]
        assert all(map(torch.equal, found, trained))
        return
    pipe.embeddings.unload("<toy>")
    assert pipe.embeddings.load(made.files()[1]) == "<toy>"
    assert torch.equal(latents(pipe), truth)
    for file, token in ((made.files()[0], "<toy>"), (made.files()[1], None)):
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(
            tiny_folder(kind), safety_checker=None
        )
        theirs.load_textual_inversion(file, token=token)
        names = ["<toy>", "<toy>_1", "<toy>_2"]
        ids = theirs.tokenizer.convert_tokens_to_ids(names)
        assert torch.equal(theirs.text_encoder.get_input_embeddings().weight[ids], trained[0])


def test_captions(tiny_folder: Tiny, bare: Path, images: Path, tmp_path: Path) -> None:
    """Templates where there are none; the word, or {} for it, in those that there are."""
    made = run(tiny_folder("sd15"), bare, tmp_path / "out", **WORD)
    first = made.parts.text.encoders[0].get_input_embeddings().num_embeddings
    for index in range(2):
        ids = made.trainer().dataloader.dataset[index][1]["tokens"][0].tolist()
        start = ids.index(first)
        assert ids[start : start + 3] == [first, first + 1, first + 2]
        assert len(ids) == 77
    with pytest.raises(ValueError, match=r"^data: expected the word <toy> \(or \{\}\) in each"):
        run(tiny_folder("sd15"), images, tmp_path / "out", **WORD)
    run(tiny_folder("sd15"), bare, tmp_path / "out", **WORD, prompt="my {} toy")
    for changes, match in (
        ({"word": None}, "^word: expected the word to train"),
        ({"vectors": 76}, "^vectors: expected at most 75, got 76$"),
        ({"train_text": True}, "^train_text: expected False, because only vectors are trained"),
    ):
        with pytest.raises(ValueError, match=match):
            run(tiny_folder("sd15"), bare, tmp_path / "out", **WORD | changes)
