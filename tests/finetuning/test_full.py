"""Whole networks: one step beside diffusers' arithmetic, and the files that come out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from numerics import assert_close
from safetensors import safe_open
from small_runs import gradients, run
from theirs import assert_equal_pictures, epsilon_loss, networks_of
from torch import Tensor

import diffusion_fast as df
from diffusion_fast.models import AutoencoderKL, UNet2DCondition, text
from diffusion_fast.models.single_file import identify
from diffusion_fast.models.text import TextEncoders
from diffusion_fast.pipelines.single_file import compvis_states

sys.path.append(str(Path(__file__).parents[1] / "models"))  # for compvis_files

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_loss_and_gradients(kind: str, tiny_folder: Tiny, images: Path, tmp_path: Path) -> None:
    """train_text_to_image.py (or _sdxl.py), the text encoders as train_dreambooth.py has them."""
    folder = tiny_folder(kind)
    ours = run(folder, images, tmp_path / "out", method="full", train_text=True)
    trainer = ours.trainer()
    batch = next(trainer.dataloader.starting_at(0))
    loss = trainer.objective.backward(batch)

    def theirs(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        networks = networks_of(folder)
        for network in networks.values():
            network.to(dtype)
        value = epsilon_loss(networks, folder, batch, ours.settings.seed, dtype)
        value.backward()
        return value.detach(), {
            f"{component}.{name}": p.grad
            for component, network in networks.items()
            for name, p in network.named_parameters()
            if p.grad is not None
        }

    (truth, exact), (plain, rounded) = theirs(torch.float64), theirs(torch.float32)
    own = gradients(ours.network)
    assert_close(loss, truth, plain)
    assert own.keys() == exact.keys()
    scale = {name: value.abs().max().clamp(min=1e-30) for name, value in exact.items()}
    joined = [
        torch.cat([(grads[n] / one.to(grads[n])).flatten() for n, one in scale.items()])
        for grads in (own, exact, rounded)
    ]
    assert_close(*joined)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_averages_come_out_as_a_folder_and_a_file(
    kind: str, tiny_folder: Tiny, images: Path, tmp_path: Path
) -> None:
    options = {"method": "full", "ema_decay": 0.9, "steps": 3, "learning_rate": 1e-3}
    made = run(tiny_folder(kind), images, tmp_path / "out", **options, train_text=kind == "sdxl")
    trainer = made.trainer()
    trainer.fit(3)
    averages = {name: value.clone() for name, value in trainer.weights().items()}
    made.write(averages)
    live = dict(made.network.named_parameters())
    assert sum(torch.equal(value, live[name]) for name, value in averages.items()) < 20
    assert set(averages) == {name for name, _ in made.network.named_parameters()}
    pipe = df.StableDiffusion.from_pretrained(tmp_path / "out")
    loaded = {"unet": pipe.unet, **pipe.text.modules()}
    for name, value in averages.items():
        component, _, rest = name.partition(".")
        assert torch.equal(loaded[component].get_parameter(rest), value)
    kinds = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
    theirs = kinds[kind].from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.unet.conv_in.weight, averages["unet.conv_in.weight"])
    assert_equal_pictures(pipe, theirs, "a red cat")
    with safe_open(tmp_path / "out" / "out.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
        found = file.get_tensor("model.diffusion_model.input_blocks.0.0.weight")
    assert torch.equal(found, averages["unet.conv_in.weight"])


class _Tokenizer:
    def __len__(self) -> int:
        return 50


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_single_file_is_written_as_it_was_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compvis_files import write_file

    monkeypatch.setattr(text, "load_tokenizers", lambda _, names: [_Tokenizer()] * len(names))
    path, states = write_file(kind, tmp_path)
    found = identify(path)
    assert found.unet is not None
    assert found.vae is not None
    encoders = TextEncoders.from_single_file(path, found.text, tmp_path)
    written = compvis_states(
        found.unet.build(UNet2DCondition), found.vae.build(AutoencoderKL), encoders.modules()
    )
    beside = ("model_ema.", "alphas_cumprod", "betas")
    unread = ("position_ids", "logit_scale")
    wanted = {n for n in states if not n.startswith(beside) and not n.endswith(unread)}
    if kind == "sd2":  # the last layer and the projection are not read
        unread = ("resblocks.23.", "model.text_projection")
        wanted = {n for n in wanted if not any(one in n for one in unread)}
    assert written.keys() == wanted
    for name, value in written.items():
        assert torch.equal(value.reshape(states[name].shape), states[name]), name
        assert value.shape == states[name].shape, name
