"""CompVis files: ours give the tensors that diffusers' own converters give."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from compvis_files import (
    CLIP,
    KINDS,
    OPEN_CLIP,
    UNET,
    UNETS,
    VAES,
    clip_states,
    file_states,
    open_clip_states,
    unet_states,
    vae_states,
    write_file,
)
from diffusers.loaders import single_file_utils as theirs
from numerics import error
from safetensors.torch import save_file
from torch import Tensor

from diffusion_fast.models import (
    AutoencoderKL,
    CheckpointError,
    UNet2DCondition,
    UNetConfig,
    single_file,
)
from diffusion_fast.models.clip_weights import assemble
from diffusion_fast.models.compvis_unet import unet_config, unet_name
from diffusion_fast.models.compvis_vae import vae_config, vae_name
from diffusion_fast.models.tensors import read
from diffusion_fast.models.text import TextEncoders
from diffusion_fast.models.vae_config import VAEConfig
from diffusion_fast.pipelines import make_tiny

# Names in published files that diffusers' converter doesn't insist on.
PUBLISHED = {
    "sd": """input_blocks.0.0.weight input_blocks.3.0.op.weight output_blocks.2.1.conv.weight
        output_blocks.5.2.conv.weight output_blocks.8.2.conv.bias
        output_blocks.11.0.skip_connection.weight out.2.bias""",
    "sdxl": """label_emb.0.2.bias input_blocks.6.0.op.weight output_blocks.2.2.conv.weight
        output_blocks.5.2.conv.bias output_blocks.8.0.skip_connection.weight""",
}

File = tuple[Path, dict[str, Tensor]]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def file(kind: str, tmp_path_factory: pytest.TempPathFactory) -> File:
    torch.manual_seed(0)
    return write_file(kind, tmp_path_factory.mktemp(kind))


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def test_unet_is_diffusers(kind: str, file: File) -> None:
    path, state = file
    ours = UNet2DCondition.from_pretrained(path)
    assert ours.config == UNETS[kind]
    same(ours.state_dict(), theirs.convert_ldm_unet_checkpoint(state, UNETS[kind].to_dict()))


def test_unet_of_diffusers_own_loader(kind: str, file: File, tmp_path: Path) -> None:
    path, _ = file
    (tmp_path / "config.json").write_text(json.dumps(UNETS[kind].to_dict()))
    judge = diffusers.UNet2DConditionModel.from_single_file(str(path), config=str(tmp_path))
    same(UNet2DCondition.from_pretrained(path).state_dict(), judge.state_dict())


def test_vae_is_diffusers(kind: str, file: File) -> None:
    path, state = file
    ours = AutoencoderKL.from_pretrained(path)
    assert ours.config == VAES[kind]
    judge = diffusers.AutoencoderKL.from_config(ours.config.to_dict())
    converted = theirs.convert_ldm_vae_checkpoint(dict(state), VAES[kind].to_dict())
    judge.load_state_dict(converted, strict=True)
    same(ours.state_dict(), judge.state_dict())
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        images = ours.decode(latents)
        assert error(images, judge.decode(latents).sample) < TOLERANCE
        assert error(ours.encode(images).mean, judge.encode(images).latent_dist.mean) < TOLERANCE


def test_text_encoders_are_diffusers(kind: str, file: File, tmp_path: Path) -> None:
    path, state = file
    found = single_file.identify(path).text
    assert list(found) == ["text_encoder", "text_encoder_2"][: 2 if kind == "sdxl" else 1]
    for name, (config, load) in found.items():
        cls = getattr(transformers, config["architectures"][0])
        transformers.CLIPTextConfig.from_dict(config).save_pretrained(tmp_path / name)
        checkpoint = dict(state)
        if kind == "sdxl" and name == "text_encoder_2":  # theirs tells them apart by widths
            for key in [key for key in state if key.startswith(CLIP["sdxl"])]:
                del checkpoint[key]
        judge = theirs.create_diffusers_clip_model_from_ldm(
            cls, checkpoint, subfolder=name, config=str(tmp_path), local_files_only=True
        )
        expected = judge.state_dict()
        plain = {key.removeprefix("text_model."): value for key, value in load().items()}
        same(plain, {key.removeprefix("text_model."): value for key, value in expected.items()})
        assert config["hidden_act"] == (
            "quick_gelu" if kind != "sd2" and name == "text_encoder" else "gelu"
        )


def test_the_second_projection_is_transposed(file: File, kind: str) -> None:
    if kind != "sdxl":
        pytest.skip("SDXL only")
    path, state = file
    ours = single_file.identify(path).text["text_encoder_2"].load()["text_projection.weight"]
    assert torch.equal(ours, state[OPEN_CLIP["sdxl"] + "text_projection"].T)


def test_identify(kind: str, file: File) -> None:
    found = single_file.identify(file[0])
    assert found.name == kind
    assert not found.inpainting


@pytest.mark.parametrize("preset", ["sd15", "sd15_inpainting", "sd21", "sdxl"])
def test_full_size_names_and_shapes(preset: str) -> None:
    """On the meta device: the config is read back, and diffusers' converter takes the names."""
    config = UNetConfig.preset(preset)
    with torch.device("meta"):
        judge = diffusers.UNet2DConditionModel.from_config(config.to_dict()).state_dict()
    named = {unet_name(name, config): value for name, value in judge.items()}
    fixed = {"sample_size": config.sample_size, "upcast_attention": config.upcast_attention}
    assert unet_config({n: tuple(v.shape) for n, v in named.items()}, **fixed) == config
    back = theirs.convert_ldm_unet_checkpoint(
        {UNET + name: value for name, value in named.items()}, config.to_dict()
    )
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in judge.items()}
    assert len(named) == len(judge)
    known = PUBLISHED["sdxl" if preset == "sdxl" else "sd"]
    assert set(known.split()) <= named.keys()


@pytest.mark.parametrize("preset", ["sd", "sdxl"])
def test_full_size_vae(preset: str) -> None:
    config = VAEConfig.preset(preset)
    with torch.device("meta"):
        judge = diffusers.AutoencoderKL.from_config(config.to_dict()).state_dict()
    named = {vae_name(name, config): value for name, value in judge.items()}
    shapes = {name: tuple(value.shape) for name, value in named.items()}
    assert isinstance(config.sample_size, int)
    assert vae_config(shapes, config.sample_size, config.scaling_factor) == config
    checkpoint = {"first_stage_model." + name: value for name, value in named.items()}
    back = theirs.convert_ldm_vae_checkpoint(checkpoint, config.to_dict())
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in judge.items()}


EMPTY = torch.zeros(0)
SAYS: list[tuple[dict[str, Tensor], dict[str, str], str | None, bool]] = [
    ({}, {}, None, False),
    ({"v_pred": EMPTY}, {}, "v_prediction", False),
    ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}, "v_prediction", True),
    ({"ztsnr": EMPTY}, {"modelspec.prediction_type": "v"}, "v_prediction", True),
    ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", False),
    ({}, {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None, False),
]


@pytest.mark.parametrize(("tensors", "header", "prediction", "zero"), SAYS)
def test_what_a_file_says_that_it_predicts(
    tensors: dict[str, Tensor],
    header: dict[str, str],
    prediction: str | None,
    zero: bool,
    file: File,
    tmp_path: Path,
) -> None:
    save_file(file[1] | tensors, tmp_path / "model.safetensors", metadata=header)
    found = single_file.identify(tmp_path / "model.safetensors")
    assert (found.prediction_type, found.zero_terminal_snr) == (prediction, zero)


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        (["edm_mean", "edm_std"], {}, r"Playground v2\.5"),
        (["edm_vpred.sigma_max"], {}, "CosXL"),
        ([], {"modelspec.prediction_type": "flow"}, "modelspec.prediction_type 'flow' is not"),
    ],
)
def test_formulas_that_are_not_supported_are_named(
    tensors: list[str], header: dict[str, str], message: str, tmp_path: Path
) -> None:
    state = file_states("sdxl") | dict.fromkeys(tensors, torch.ones(1))
    save_file({n: v.clone() for n, v in state.items()}, tmp_path / "m.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=message):
        single_file.identify(tmp_path / "m.safetensors")


@pytest.mark.parametrize("layers", [24, 23])
def test_sd2_reads_the_first_23_layers_whatever_the_file_has(layers: int, tmp_path: Path) -> None:
    state = open_clip_states(OPEN_CLIP["sd2"], layers=layers) | unet_states(UNETS["sd2"])
    save_file(state, tmp_path / "model.safetensors")
    config, load = single_file.identify(tmp_path / "model.safetensors").text["text_encoder"]
    assert config["num_hidden_layers"] == 23
    assert "text_model.encoder.layers.22.mlp.fc1.weight" in load()


def without_layer(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: value for n, value in state.items() if name not in n}


def test_sdxl_reads_the_first_11_layers_of_its_first_encoder(tmp_path: Path) -> None:
    """Whether the file has the 12th or not; states are counted from the end of all 12."""
    state = unet_states(UNETS["sdxl"]) | clip_states(CLIP["sdxl"], layers=12)
    ids, states = torch.arange(50)[None], []
    for layers in (12, 11):
        file = tmp_path / f"{layers}.safetensors"
        save_file(state if layers == 12 else without_layer(state, ".layers.11."), file)
        config, load = single_file.identify(file).text["text_encoder"]
        shape = transformers.CLIPTextConfig.from_dict(config)
        model = assemble(lambda shape=shape: transformers.CLIPTextModel(shape), load(), file)
        with torch.no_grad():
            states.append(model(ids, output_hidden_states=True).hidden_states)
    whole, short = states
    assert len(whole) == len(short) == 13
    assert all(torch.equal(*pair) for pair in zip(whole[:-1], short[:-1], strict=True))


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("sd1", {"text_encoder": 11}),
        ("sd2", {"text_encoder": 22}),
        ("sdxl", {"text_encoder": 10, "text_encoder_2": 31}),
    ],
)
def test_layers_that_an_encoder_of_published_width_lacks_are_named(
    kind: str, missing: dict[str, int], tmp_path: Path
) -> None:
    state = unet_states(UNETS[kind])
    if kind in CLIP:
        state |= clip_states(CLIP[kind], width=768, layers=1)
    if kind in OPEN_CLIP:
        width = 1280 if kind == "sdxl" else 1024
        state |= open_clip_states(OPEN_CLIP[kind], width=width, layers=1)
    save_file(state, tmp_path / "model.safetensors")
    tokenizer = make_tiny(tmp_path / "tiny", "sdxl")
    found = single_file.identify(tmp_path / "model.safetensors").text
    assert found.keys() == missing.keys()
    for name, layer in missing.items():
        with pytest.raises(CheckpointError, match=rf"missing: \S*layers\.{layer}\."):
            TextEncoders.from_single_file("model.safetensors", {name: found[name]}, tokenizer)


def test_sd2_reads_23_layers_of_an_encoder_in_transformers_names(tmp_path: Path) -> None:
    state = clip_states(CLIP["sd1"], width=1024, layers=1) | unet_states(UNETS["sd2"])
    one = CLIP["sd1"] + "text_model.encoder.layers.0.mlp.fc1.bias"
    state[one.replace(".0.", ".23.")] = state[one].clone()
    save_file(state, tmp_path / "model.safetensors")
    config, _ = single_file.identify(tmp_path / "model.safetensors").text["text_encoder"]
    assert config["num_hidden_layers"] == 23


@pytest.mark.parametrize(("width", "activation"), [(64, "quick_gelu"), (1024, "gelu")])
def test_the_activation_of_a_text_encoder_in_transformers_names(
    width: int, activation: str, tmp_path: Path
) -> None:
    state = clip_states(CLIP["sd1"], width=width, layers=1) | unet_states(UNETS["sd1"])
    save_file(state, tmp_path / "model.safetensors")
    config, _ = single_file.identify(tmp_path / "model.safetensors").text["text_encoder"]
    assert config["hidden_act"] == activation


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_unet_alone(prefix: str, tmp_path: Path) -> None:
    state = unet_states(UNETS["sd1"])
    alone = {n.replace(UNET, prefix): v for n, v in state.items()}
    save_file(alone, tmp_path / "unet.safetensors")
    model = UNet2DCondition.from_pretrained(tmp_path / "unet.safetensors")
    assert model.config == UNETS["sd1"]
    same(model.state_dict(), theirs.convert_ldm_unet_checkpoint(state, UNETS["sd1"].to_dict()))


def test_inpainting(tmp_path: Path) -> None:
    path, _ = write_file("sd1", tmp_path, in_channels=9)
    assert single_file.identify(path).inpainting
    assert UNet2DCondition.from_pretrained(path).config.in_channels == 9


def test_a_pickle_is_the_same(file: File, tmp_path: Path) -> None:
    path, state = file
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    expected = UNet2DCondition.from_pretrained(path).state_dict()
    same(UNet2DCondition.from_pretrained(tmp_path / "model.ckpt").state_dict(), expected)
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    same(UNet2DCondition.from_pretrained(tmp_path / "old.ckpt").state_dict(), expected)


def test_a_dtype_and_a_file_name_of_no_meaning(file: File, tmp_path: Path) -> None:
    path, _ = file
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    link = tmp_path / "diffusion_pytorch_model.safetensors"
    link.symlink_to(path)
    model = UNet2DCondition.from_pretrained(link, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["text_model", "flat"])
def test_both_clip_layouts(layout: str, tmp_path: Path) -> None:
    state = file_states("sd1")
    prefix = CLIP["sd1"] + "text_model."
    if layout == "flat":  # transformers from 5.6
        state = {n.replace(prefix, CLIP["sd1"]): v for n, v in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    config, load = single_file.identify(tmp_path / "model.safetensors").text["text_encoder"]
    assert config["hidden_size"] == 64
    assert config["num_hidden_layers"] == 2
    assert all(name.startswith("text_model.") for name in load())
    assert not any("position_ids" in name for name in load())


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", ""])
def test_an_autoencoder_alone(prefix: str, tmp_path: Path) -> None:
    state = vae_states(VAES["sd1"], prefix) | {"loss.discriminator.weight": torch.ones(2)}
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.warns(UserWarning, match=r"scaling factor: 0\.18215 .*SDXL's is 0\.13025"):
        found = single_file.identify(tmp_path / "vae.safetensors")
    assert (found.name, found.unet, found.text) == ("vae", None, {})
    assert found.vae is not None
    assert found.vae.config == VAES["sd1"]
    with pytest.warns(UserWarning, match="pass scaling_factor="):
        usual = AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors")
    assert usual.config == VAES["sd1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors", scaling_factor=0.5)
    assert told.config == dataclasses.replace(VAES["sd1"], scaling_factor=0.5)
    same(told.state_dict(), usual.state_dict())
    with (
        pytest.warns(UserWarning, match="scaling factor"),
        pytest.raises(CheckpointError, match="has no unet"),
    ):
        UNet2DCondition.from_pretrained(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([UNET + "joint_blocks.0.x"], "Stable Diffusion 3 is not supported, only SD 1.x, SD 2.x"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "Flux is not supported"),
        (["control_model.time_embed.0.weight"], "a ControlNet is not supported"),
        ([UNET + "label_emb.weight"], "upscaler is not supported"),
        ([UNET + "label_emb.0.0.weight", "cond_stage_model.model.x"], "unCLIP is not supported"),
        ([UNET + "input_blocks.0.0.weight"], r"missing: \S*out\.2\.weight"),
        (["cond_stage_model.transformer.x", "b", "c", "d"], r"neither a U-Net .* it holds b, c, "),
    ],
)
def test_other_files_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(1) for name in names}, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        UNet2DCondition.from_pretrained(path)
    assert str(path) in str(caught.value)


def test_wrong_tensors_are_listed_in_the_files_names(tmp_path: Path) -> None:
    state = file_states("sd1")
    del state[UNET + "time_embed.2.bias"]
    state[UNET + "lora.up"] = torch.ones(1)
    state[UNET + "output_blocks.3.0.in_layers.0.bias"] = torch.ones(7)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        UNet2DCondition.from_pretrained(tmp_path / "model.safetensors")
    assert str(caught.value).splitlines()[1:] == [
        "  extra: lora.up [1]",
        "  misshapen: output_blocks.3.0.in_layers.0.bias expected [128], got [7]",
        "  missing: time_embed.2.bias [128]",
    ]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input_blocks.1.0.out_layers.3.weight", ()),
        ("input_blocks.0.0.weight", (2**40, 0, 3, 3)),
        ("input_blocks.1.0.out_layers.3.weight", (2**62, 0, 0, 0)),
        ("time_embed.0.weight", (2**62, 0)),
        ("input_blocks.999999999999.0.x", (1,)),
    ],
)
def test_absurd_shapes(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    state = file_states("sd1") | {UNET + name: torch.empty(shape)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        UNet2DCondition.from_pretrained(tmp_path / "model.safetensors")


def test_views_are_read_lazily(file: File) -> None:
    """A third of a fused projection is a view of the mapped file."""
    path, _ = file
    found = single_file.identify(path)
    assert found.unet is not None
    tensor = found.unet.tensors["time_embed.0.weight"]
    half = tensor.through(lambda x: x[:3])
    assert half.shape == (3, *tensor.shape[1:])
    assert torch.equal(read({"a": half})["a"], read({"a": tensor})["a"][:3])


def test_changed_configs_are_told_apart() -> None:
    """What a small U-Net of each kind looks like doesn't depend on the tests' sizes."""
    names = {
        kind: {unet_name(name, UNETS[kind]) for name in _parameter_names(UNETS[kind])}
        for kind in KINDS
    }
    assert names["sd1"] == names["sd2"] != names["sdxl"]


def _parameter_names(config: UNetConfig, **changes: Any) -> list[str]:
    with torch.device("meta"):
        return list(UNet2DCondition(dataclasses.replace(config, **changes)).state_dict())
