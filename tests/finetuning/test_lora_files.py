"""LoRA files out of a run, read by this library, by diffusers, and by kohya's names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from numerics import error
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import randomize, run
from theirs import assert_equal_pictures
from torch import Tensor

import diffusion_fast as df
from diffusion_fast.finetuning.run import Finetuning
from diffusion_fast.pipelines.parts import Parts

OPTIONS: dict[str, dict[str, Any]] = {
    "sd15": {"targets": ("all",), "conv_rank": 3, "conv_alpha": 6.0, "train_text": True},
    "sdxl": {"targets": ("transformer",), "alpha": 1.0, "train_text": True},
}
PIPELINES = {
    "sd15": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}


@pytest.fixture(scope="module", params=OPTIONS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def written(
    kind: str,
    tiny_folder: Callable[[str], Path],
    images: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finetuning:
    out = tmp_path_factory.mktemp("out") / "style"
    made = run(tiny_folder(kind), images, out, **OPTIONS[kind])
    randomize(made.network)
    made.write({name: value.detach() for name, value in made.network.named_parameters()})
    return made


def latents(parts: Parts | df.StableDiffusion, **more: Any) -> Tensor:
    pipe = df.StableDiffusion(parts) if isinstance(parts, Parts) else parts
    drawn = pipe("a red cat", steps=2, output="latent", sampler="ddim", **more).images
    assert isinstance(drawn, Tensor)
    return drawn


def test_our_pipeline_draws_what_was_trained(
    written: Finetuning, kind: str, tiny_folder: Callable[[str], Path]
) -> None:
    trained = latents(written.parts)
    for file in written.files():
        pipe = df.StableDiffusion.from_pretrained(tiny_folder(kind))
        plain = latents(pipe)
        pipe.loras.load(file, "style")
        drawn = latents(pipe)
        assert error(drawn, trained) < 1e-4 < error(plain, trained)


def test_diffusers_has_the_same_adapters(
    written: Finetuning, kind: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Bit for bit, with the same scale; what it saves again, and kohya's names, as well."""
    pipe = PIPELINES[kind].from_pretrained(tiny_folder(kind))
    pipe.load_lora_weights(written.files()[0], adapter_name="default")
    own = dict(written.network.named_parameters())
    found = (
        {
            f"{component}.{name}": value
            for component in ("unet", "text_encoder", "text_encoder_2")
            for name, value in getattr(getattr(pipe, component, None), "named_parameters", dict)()
            if "lora_" in name
        }
        if kind == "sdxl"
        else {
            f"{component}.{name}": value
            for component in ("unet", "text_encoder")
            for name, value in getattr(pipe, component).named_parameters()
            if "lora_" in name
        }
    )
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
    for component, network in written.network.named_children():
        theirs = dict(getattr(pipe, component).named_modules())
        for name, layer in network.named_modules():
            if hasattr(layer, "scaling"):
                assert layer.scaling == theirs[name].scaling, name


def test_diffusers_draws_the_same_pictures(
    written: Finetuning, kind: str, tiny_folder: Callable[[str], Path]
) -> None:
    for file in written.files():
        pipe = df.StableDiffusion.from_pretrained(tiny_folder(kind))
        pipe.loras.load(file, "style")
        theirs = PIPELINES[kind].from_pretrained(tiny_folder(kind))
        theirs.load_lora_weights(file.parent, weight_name=file.name)
        assert_equal_pictures(pipe, theirs, "a red cat")


def test_kohyas_names(written: Finetuning, kind: str) -> None:
    """As diffusers' own converter has them for SD 1.x; SDXL's U-Net has those of CompVis."""
    tensors = load_file(written.files()[1])
    if kind == "sdxl":
        stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
        assert f"{stem}.lora_down.weight" not in tensors  # a tiny model has fewer levels
        stems = {name.split(".")[0] for name in tensors}
        assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k" in stems
        assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in stems
        assert "lora_te2_text_model_encoder_layers_0_mlp_fc1" in stems
        assert "lora_te2_text_projection" in stems
        return
    unet = written.parts.unet
    state = {f"unet.{n}": v for n, v in get_peft_model_state_dict(unet).items()}
    wanted = convert_state_dict_to_kohya(state)
    found = {name: value for name, value in tensors.items() if name.startswith("lora_unet_")}
    assert found.keys() == wanted.keys()
    assert found
    assert all(torch.equal(found[n], v) for n, v in wanted.items() if "alpha" not in n)
    alphas = {value.item() for name, value in found.items() if name.endswith(".alpha")}
    assert alphas == {2.0, 6.0}


def test_what_a_file_says_of_itself(written: Finetuning, kind: str) -> None:
    with safe_open(written.files()[1], framework="pt") as file:
        said = file.metadata()
    assert said["ss_network_dim"] == "2"
    assert said["ss_network_module"] == "networks.lora"
    assert said["ss_base_model_version"] == {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}[kind]
    assert said["diffusion_fast.base"] == written.base
    (words,) = json.loads(said["ss_tag_frequency"]).values()
    assert words["a cat"] == 5
    assert words["number 3"] == 1


def test_a_full_disk_leaves_what_was_there(
    written: Finetuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in written.files()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusion_fast.finetuning.lora_export.save_kohya", full)
    with pytest.raises(OSError, match=r"can't be written: .*No space left"):
        written.write({n: 2 * v.detach() for n, v in written.network.named_parameters()})
    assert {file: file.read_bytes() for file in written.settings.out.iterdir()} == before


def test_dora(tiny_folder: Callable[[str], Path], images: Path, tmp_path: Path) -> None:
    made = run(tiny_folder("sd15"), images, tmp_path / "out", dora=True, targets=("all",))
    randomize(made.network)
    made.write(dict(made.network.named_parameters()))
    trained = latents(made.parts)
    for file in made.files():
        pipe = df.StableDiffusion.from_pretrained(tiny_folder("sd15"))
        pipe.loras.load(file, "style")
        assert error(latents(pipe), trained) < 1e-4
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder("sd15"))
    theirs.load_lora_weights(made.files()[0], adapter_name="default")
    found = {f"unet.{n}": v for n, v in theirs.unet.named_parameters() if "lora_" in n}
    own = dict(made.network.named_parameters())
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
