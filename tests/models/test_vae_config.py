"""VAEConfig reads and writes diffusers' config.json and refuses what it can't do."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import diffusers
import pytest
import torch

from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.models.vae_config import FIXED, PRESETS, VAEConfig

# As in the models' config.json.
SD_JSON = """{
  "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D",
    "DownEncoderBlock2D"],
  "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
  "out_channels": 3, "sample_size": 512,
  "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D",
    "UpDecoderBlock2D"]
}"""
SDXL_CHANGES = {
    "_name_or_path": "../sdxl-vae/",
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}


def test_reads_real_config_jsons() -> None:
    values = json.loads(SD_JSON)
    assert VAEConfig.from_dict(values) == VAEConfig.preset("sd")
    assert VAEConfig.from_dict({**values, **SDXL_CHANGES}) == VAEConfig.preset("sdxl")


def test_fields_and_defaults_are_those_of_diffusers() -> None:
    parameters = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    own = {field.name: field.default for field in dataclasses.fields(VAEConfig)}
    assert own.keys().isdisjoint(FIXED)
    assert {**own, **{name: known[0] for name, known in FIXED.items()}} == theirs


@pytest.mark.parametrize("name", PRESETS)
def test_a_dict_gives_the_config_back(name: str) -> None:
    config = VAEConfig.preset(name, sample_size=(64, 48), shift_factor=0.1)
    assert VAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert isinstance(hash(config), int)


@pytest.mark.parametrize(
    ("name", "count"), [("sd", 83_653_863), ("sdxl", 83_653_863), ("tiny", 67_231)]
)
def test_presets_have_the_published_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        model = AutoencoderKL(VAEConfig.preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.downsampling == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "VQModel"}, "_class_name: expected AutoencoderKL, got 'VQModel'"),
        ({"act_fn": "gelu"}, "act_fn: 'gelu' is not supported, only 'silu' or 'swish'"),
        ({"latents_mean": [0.1]}, r"latents_mean: \[0.1\] is not supported, only None"),
        (
            {"down_block_types": ["AttnDownEncoderBlock2D"] * 4},
            "down_block_types: expected one of DownEncoderBlock2D, got 'AttnDownEncoderBlock2D'",
        ),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types: expected 4 names"),
        ({"up_block_types": "UpDecoderBlock2D"}, "up_block_types: expected 4 names"),
        ({"block_out_channels": 128}, "block_out_channels: expected a sequence"),
        ({"block_out_channels": []}, "block_out_channels: expected a sequence"),
        (
            {"block_out_channels": [128, 256, 512, 500]},
            r"block_out_channels: expected multiples of norm_num_groups \(32\)",
        ),
        ({"block_out_channels": [128, 256, 512, "512"]}, "block_out_channels: expected a positive"),
        ({"layers_per_block": 0}, "layers_per_block: expected a positive integer, got 0"),
        ({"latent_channels": 4.0}, "latent_channels: expected a positive integer, got 4.0"),
        ({"in_channels": True}, "in_channels: expected a positive integer, got True"),
        ({"norm_num_groups": None}, "norm_num_groups: expected a positive integer, got None"),
        ({"scaling_factor": 0}, "scaling_factor: expected a positive number, got 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor: expected a finite number"),
        ({"shift_factor": "0"}, "shift_factor: expected a finite number"),
        ({"force_upcast": None}, "force_upcast: expected True or False, got None"),
        ({"use_quant_conv": 1}, "use_quant_conv: expected True or False, got 1"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict({**json.loads(SD_JSON), **changes})


def test_a_preset_can_be_changed() -> None:
    assert VAEConfig.preset("sd", latent_channels=16).latent_channels == 16
    with pytest.raises(ValueError, match="preset: expected one of sd, sdxl, tiny, got 'sd3'"):
        VAEConfig.preset("sd3")
