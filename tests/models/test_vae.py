"""The autoencoder computes what diffusers' AutoencoderKL computes, and travels to it and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close, error
from safetensors.torch import load_file, save_file
from vae_parity import differences, moments, pictures, twins

from diffusion_fast.models import CheckpointError
from diffusion_fast.models.autoencoder import LatentDistribution
from diffusion_fast.models.checkpoints import CONFIG, INDEX, WEIGHTS
from diffusion_fast.models.vae import AutoencoderKL, renamed
from diffusion_fast.models.vae_config import VAEConfig

TINY = VAEConfig.preset("tiny")
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "one_level": {
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
    "narrower_below": {"block_out_channels": (16, 8, 24, 8), "layers_per_block": 2},
    "reduced_sd": {
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 2,
        "norm_num_groups": 8,
    },
    "no_quant_convs": {"use_quant_conv": False, "use_post_quant_conv": False},
    "no_attention": {"mid_block_add_attention": False},
    "channels": {"in_channels": 1, "out_channels": 2, "latent_channels": 16},
}
SIZES = [(64, 64), (8, 8), (40, 24)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_diffusers(variant: str, size: tuple[int, int]) -> None:
    config = VAEConfig.preset("tiny", **VARIANTS[variant])
    found = differences(*twins(config), pictures(config, size))
    assert max(found.values()) <= 1e-4, found


@st.composite
def configs(draw: st.DrawFn) -> VAEConfig:
    levels = draw(st.integers(1, 4))
    return VAEConfig(
        in_channels=draw(st.integers(1, 4)),
        out_channels=draw(st.integers(1, 4)),
        latent_channels=draw(st.integers(1, 5)),
        block_out_channels=tuple(draw(st.sampled_from([8, 16, 24])) for _ in range(levels)),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=draw(st.integers(1, 3)),
        norm_num_groups=draw(st.sampled_from([1, 2, 4, 8])),
        use_quant_conv=draw(st.booleans()),
        use_post_quant_conv=draw(st.booleans()),
        mid_block_add_attention=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None)
@given(
    config=configs(), size=st.tuples(st.integers(1, 4), st.integers(1, 4)), batch=st.integers(1, 3)
)
def test_equals_diffusers_for_any_config(
    config: VAEConfig, size: tuple[int, int], batch: int
) -> None:
    # In float64: norms over a handful of pixels would magnify float32's rounding.
    ours, theirs = twins(config, torch.float64)
    height, width = (length * ours.downsampling for length in size)
    found = differences(ours, theirs, pictures(config, (height, width), batch, torch.float64))
    assert max(found.values()) <= 1e-9, found


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    config = VAEConfig.preset(name)
    with torch.device("meta"):
        ours = AutoencoderKL(config)
        theirs = diffusers.AutoencoderKL.from_config(config.to_dict())
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


def test_equals_diffusers_at_the_size_of_stable_diffusion() -> None:
    config = VAEConfig.preset("sd")
    found = differences(*twins(config), pictures(config, (64, 40), batch=1))
    assert max(found.values()) <= 1e-4, found


@torch.no_grad()
def test_channels_last_gives_the_same() -> None:
    config = VAEConfig.preset("tiny", **VARIANTS["narrower_below"])
    ours, theirs = twins(config)
    ours.to(memory_format=torch.channels_last)
    images = pictures(config, (40, 24)).to(memory_format=torch.channels_last)
    found = differences(ours, theirs, images)
    assert max(found.values()) <= 1e-4, found
    latents = ours.encode(images).mode()
    assert ours.decode(latents).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_bfloat16_is_as_good_as_plain_pytorch() -> None:
    config = VAEConfig.preset("tiny", **VARIANTS["reduced_sd"])
    ours, theirs = twins(config, torch.bfloat16)
    images = pictures(config, (40, 24), dtype=torch.bfloat16)
    latents = torch.randn(2, 4, 5, 3).bfloat16()
    exact = AutoencoderKL(config).double()
    exact.load_state_dict(ours.state_dict())
    for truth, result, plain in zip(
        moments(exact, images.double()), moments(ours, images), moments(theirs, images), strict=True
    ):
        assert_close(result, truth, plain)
    assert_close(
        ours.decode(latents), exact.decode(latents.double()), theirs.decode(latents).sample
    )


def test_gradients_equal_those_of_diffusers() -> None:
    ours, theirs = twins(TINY, torch.float64)
    images = pictures(TINY, (16, 24), dtype=torch.float64)
    names = [name for name, _ in ours.named_parameters()]
    result = torch.autograd.grad(ours(images).square().sum(), list(ours.parameters()))
    expected = torch.autograd.grad(
        theirs(images).sample.square().sum(), [theirs.get_parameter(name) for name in names]
    )
    for name, grad, truth in zip(names, result, expected, strict=True):
        if name.endswith("to_k.bias"):  # adds the same to all scores of a query: softmax ignores it
            assert grad.abs().max() <= 1e-9
        else:
            assert error(grad, truth) <= 1e-9, name


def _overflowing(config: VAEConfig) -> tuple[AutoencoderKL, AutoencoderKL]:
    """A model whose insides pass 65504 at both ends, in float16 and in float32."""
    wide, _ = twins(config)
    for half in (wide.encoder, wide.decoder):
        half.conv_in.weight.data *= 1e6
        half.conv_in.bias.data *= 1e6
    narrow = AutoencoderKL(config).half().eval()
    with torch.no_grad():
        for mine, its in zip(narrow.parameters(), wide.parameters(), strict=True):
            mine.copy_(its.clamp(-6e4, 6e4))
            its.copy_(mine)
    return narrow, wide


@torch.no_grad()
@pytest.mark.parametrize("force_upcast", [True, False])
def test_float16_is_computed_in_float32_where_it_overflows(force_upcast: bool) -> None:
    config = VAEConfig.preset("tiny", force_upcast=force_upcast)
    narrow, wide = _overflowing(config)
    images, latents = pictures(config, (32, 32)).half(), torch.randn(2, 4, 4, 4).half()
    mean, decoded = narrow.encode(images).mode(), narrow.decode(latents)
    assert mean.dtype == decoded.dtype == torch.float16
    assert all(p.dtype == torch.float16 for p in narrow.parameters())
    if not force_upcast:
        assert not mean.isfinite().any()
        assert not decoded.isfinite().any()
        return
    assert error(mean, wide.encode(images.float()).mode()) <= 2e-3  # one rounding, or two
    assert error(decoded, wide.decode(latents.float())) <= 2e-3


@pytest.mark.parametrize("generators", [1, 3], ids=["one", "one_each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_equal_those_of_diffusers(dtype: torch.dtype, generators: int) -> None:
    parameters = torch.randn(3, 8, 5, 4, dtype=dtype) * 15  # log variances that are clamped too

    def seeded() -> Any:
        many = [torch.Generator().manual_seed(i) for i in range(generators)]
        return many[0] if generators == 1 else many

    theirs = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(parameters)
    ours = LatentDistribution(theirs.mean, theirs.logvar)
    assert torch.equal(ours.sample(seeded()), theirs.sample(seeded()))
    assert torch.equal(ours.mode(), theirs.mode())


def test_encoding_samples_like_diffusers() -> None:
    ours, theirs = twins(TINY)
    with torch.no_grad():
        ours.encoder.conv_out.bias[4:] += 100  # clamped
        images = pictures(TINY, (32, 16))
        result = ours.encode(images).sample(torch.Generator().manual_seed(1))
        expected = theirs.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
    assert error(result, expected) <= 1e-5


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    many = LatentDistribution(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))
    one = LatentDistribution(many.mean[1:], many.log_variance[1:])
    both = many.sample([torch.Generator().manual_seed(seed) for seed in (5, 6)])
    assert torch.equal(both[1:], one.sample(torch.Generator().manual_seed(6)))
    with pytest.raises(ValueError, match="generator: expected one, or 2, got 1"):
        many.sample([torch.Generator()])


@pytest.mark.parametrize("shift", [None, 0.1159])
def test_scale_and_unscale(shift: float | None) -> None:
    vae = AutoencoderKL(VAEConfig.preset("tiny", scaling_factor=0.3611, shift_factor=shift))
    latents = torch.randn(1, 4, 8, 8)
    assert torch.allclose(vae.scale(latents), (latents - (shift or 0)) * 0.3611)
    assert torch.allclose(vae.unscale(vae.scale(latents)), latents, atol=1e-6)


@torch.no_grad()
def test_compiles_into_one_graph() -> None:
    ours, _ = twins(TINY)
    images = pictures(TINY, (16, 24))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert error(compiled(images), ours(images)) <= 1e-5


def test_bad_arguments_are_named() -> None:
    vae = AutoencoderKL(TINY)
    for images, message in (
        (torch.zeros(1, 3, 60, 64), r"images: expected height and width to be multiples of 8"),
        (torch.zeros(1, 3, 64, 65), r"images: .* multiples of 8, got \[1, 3, 64, 65\]"),
        (torch.zeros(1, 4, 64, 64), r"images: expected shape \[B, 3, height, width\], got \[1, 4"),
        (torch.zeros(3, 64, 64), r"images: expected shape .* got \[3, 64, 64\]"),
        (torch.zeros(1, 3, 0, 64), r"images: expected shape .* got \[1, 3, 0, 64\]"),
        (torch.zeros(1, 3, 64, 64).byte(), "images: expected a floating point dtype"),
        (torch.zeros(1, 3, 64, 64).double(), "images: expected the dtype of the model"),
        (torch.zeros(1, 3, 64, 64, device="meta"), "images: expected the device of the model"),
        ("a.png", "images: expected a tensor, got str"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            vae.encode(images)
    for latents, message in (
        (torch.zeros(1, 3, 8, 8), r"latents: expected shape \[B, 4, height, width\], got \[1, 3"),
        (torch.zeros(1, 4, 8, 0), r"latents: expected shape .* got \[1, 4, 8, 0\]"),
        (torch.zeros(1, 4, 8, 8).half(), "latents: expected the dtype of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            vae.decode(latents)


# Checkpoints.


def _same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    expected = second.state_dict()
    assert first.state_dict().keys() == expected.keys()
    for name, value in first.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def saved(tmp_path: Path) -> tuple[AutoencoderKL, Path]:
    """A small model and the folder that it was saved to."""
    model, _ = twins(TINY)
    model.save_pretrained(tmp_path / "vae")
    return model, tmp_path / "vae"


@pytest.mark.parametrize("shard_size", ["10GB", "100KB"])
def test_loads_what_diffusers_saved(shard_size: str, tmp_path: Path) -> None:
    _, theirs = twins(TINY)
    theirs.save_pretrained(tmp_path / "vae", max_shard_size=shard_size)
    assert (tmp_path / "vae" / INDEX).exists() == (shard_size == "100KB")
    ours = AutoencoderKL.from_pretrained(tmp_path)  # as a pipeline's folder
    assert ours.config == TINY
    assert not ours.training
    _same_weights(ours, theirs)


def test_loads_a_variant_in_another_dtype(tmp_path: Path) -> None:
    _, theirs = twins(TINY)
    theirs.half().save_pretrained(tmp_path, variant="fp16")
    _same_weights(AutoencoderKL.from_pretrained(tmp_path, variant="fp16"), theirs)
    wide = AutoencoderKL.from_pretrained(tmp_path, variant="fp16", dtype=torch.float32)
    _same_weights(wide, theirs.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_diffusers_loads_what_we_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    config = VAEConfig.preset("tiny", shift_factor=0.5, scaling_factor=0.25, force_upcast=False)
    ours = AutoencoderKL(config).to(dtype)
    ours.save_pretrained(tmp_path / "new" / "folder")
    theirs, report = diffusers.AutoencoderKL.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True, torch_dtype=dtype
    )
    assert not any(report.values())
    assert VAEConfig.from_dict(theirs.config) == config
    _same_weights(ours, theirs)
    _same_weights(AutoencoderKL.from_pretrained(tmp_path / "new" / "folder"), ours)


@pytest.mark.parametrize("convolutions", [False, True], ids=["linear", "1x1"])
def test_loads_the_attention_of_older_files(
    saved: tuple[AutoencoderKL, Path], convolutions: bool
) -> None:
    model, folder = saved
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(folder / WEIGHTS).items():
        old = name
        if ".attentions.0.to_" in name:
            layer = name.split("attentions.0.")[1].rpartition(".")[0]
            old = name.replace(layer, old_names[layer])
            if convolutions and value.dim() == 2:
                value = value[:, :, None, None]
        state[old] = value.contiguous()
    assert len(state.keys() - model.state_dict().keys()) == 16
    save_file(state, folder / WEIGHTS)
    again = AutoencoderKL.from_pretrained(folder)
    _same_weights(again, model)
    if not convolutions:
        _same_weights(again, diffusers.AutoencoderKL.from_pretrained(folder))


def test_only_the_attention_is_renamed() -> None:
    assert renamed("decoder.mid_block.attentions.0.key.bias") == (
        "decoder.mid_block.attentions.0.to_k.bias"
    )
    for name in (
        "key.weight",
        "encoder.mid_block.attentions.0.group_norm.weight",
        "quant_conv.bias",
    ):
        assert renamed(name) == name


@pytest.mark.parametrize("kept", [0, 7, 100, 20_000, 250_000])
def test_a_truncated_file_is_named(saved: tuple[AutoencoderKL, Path], kept: int) -> None:
    _, folder = saved
    content = (folder / WEIGHTS).read_bytes()
    assert kept < len(content)
    (folder / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: truncated, or not a safetensors file"):
        AutoencoderKL.from_pretrained(folder)


def test_other_weights_are_listed_by_name(saved: tuple[AutoencoderKL, Path]) -> None:
    _, folder = saved
    state = load_file(folder / WEIGHTS)
    del state["quant_conv.bias"]
    state["decoder.conv_in.weight"] = torch.zeros(16, 5, 3, 3)
    state["decoder.extra"] = torch.zeros(1)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        AutoencoderKL.from_pretrained(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  extra: decoder.extra [1]",
        "  misshapen: decoder.conv_in.weight expected [16, 4, 3, 3], got [16, 5, 3, 3]",
        "  missing: quant_conv.bias [8]",
    ]


def test_another_model_or_config_is_refused(saved: tuple[AutoencoderKL, Path]) -> None:
    _, folder = saved
    values = json.loads((folder / CONFIG).read_text())
    for changes, message in (
        ({"_class_name": "AutoencoderTiny"}, "expected AutoencoderKL, got 'AutoencoderTiny'"),
        ({"act_fn": "relu"}, "act_fn: 'relu' is not supported"),
        ({"block_out_channels": [8, 8, 16]}, "down_block_types: expected 3 names"),
    ):
        (folder / CONFIG).write_text(json.dumps({**values, **changes}))
        with pytest.raises(CheckpointError, match=f"{CONFIG}: .*{message}"):
            AutoencoderKL.from_pretrained(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(CheckpointError, match="not a diffusers model"):
        AutoencoderKL.from_pretrained(folder)
