"""UNetConfig reads and writes diffusers' config.json and refuses what it can't do."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import diffusers
import pytest
import torch
from small_unets import SMALL, small_config

from diffusion_fast.models import UNet2DCondition, UNetConfig
from diffusion_fast.models.config import FIXED, PRESETS

# As in the models' config.json, null values and all.
SDXL_JSON = """{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
  "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64,
  "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
  "block_out_channels": [320, 640, 1280], "center_input_sample": false, "class_embed_type": null,
  "class_embeddings_concat": false, "conv_in_kernel": 3, "conv_out_kernel": 3,
  "cross_attention_dim": 2048, "cross_attention_norm": null,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "downsample_padding": 1, "dual_cross_attention": false, "encoder_hid_dim": null,
  "encoder_hid_dim_type": null, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
  "layers_per_block": 2, "mid_block_only_cross_attention": null, "mid_block_scale_factor": 1,
  "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
  "num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false,
  "out_channels": 4, "projection_class_embeddings_input_dim": 2816,
  "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": false,
  "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": null,
  "time_embedding_act_fn": null, "time_embedding_dim": null, "time_embedding_type": "positional",
  "timestep_post_act": null, "transformer_layers_per_block": [1, 2, 10],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "upcast_attention": null, "use_linear_projection": true
}"""


def test_reads_a_real_config_json() -> None:
    assert UNetConfig.from_dict(json.loads(SDXL_JSON)) == UNetConfig.preset("sdxl")


def test_fields_and_defaults_are_those_of_diffusers() -> None:
    parameters = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    own = {field.name: field.default for field in dataclasses.fields(UNetConfig)}
    assert own.pop("num_classes") is None
    assert own.keys().isdisjoint(FIXED)
    assert {**own, **{name: known[0] for name, known in FIXED.items()}} == theirs


@pytest.mark.parametrize("name", PRESETS)
def test_a_dict_gives_the_config_back(name: str) -> None:
    config = UNetConfig.preset(name)
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ("num_classes" in config.to_dict()) == (name == "digits")
    assert isinstance(hash(config), int)


@pytest.mark.parametrize(
    ("name", "millions"), [("sd15", 859.5), ("sd21", 865.9), ("sdxl", 2567.5), ("digits", 1.0)]
)
def test_presets_have_the_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = UNet2DCondition(UNetConfig.preset(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.2)


def test_a_preset_can_be_changed() -> None:
    assert UNetConfig.preset("sd15", in_channels=9) == UNetConfig.preset("sd15_inpainting")
    with pytest.raises(ValueError, match=r"preset: expected one of sd15, .*digits, got 'sd3'"):
        UNetConfig.preset("sd3")


@pytest.mark.parametrize("value", [False, [False, False]], ids=str)
def test_inactive_values_are_accepted(value: Any) -> None:
    values = {**SMALL, "only_cross_attention": value, "act_fn": "swish", "_name_or_path": "x"}
    assert UNetConfig.from_dict(values) == small_config()


def test_equal_context_widths_per_level_are_one_width() -> None:
    assert small_config(cross_attention_dim=[24, 24]) == small_config()


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("class_embed_type", "projection", "only None"),
        ("only_cross_attention", [True, False], "only False"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn", "only 'UNetMidBlock2DCrossAttn'"),
        ("act_fn", "gelu", "only 'silu' or 'swish'"),
        ("encoder_hid_dim", 4096, "only None"),
        ("mid_block_scale_factor", 2, "only 1"),
    ],
)
def test_unsupported_options_are_named(field: str, value: Any, supported: str) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        UNetConfig.from_dict({**SMALL, field: value})
    assert str(caught.value) == f"{field}: {value!r} is not supported, {supported}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "expected UNet2DConditionModel, got 'Flux"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types: expected 2 names"),
        (
            {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]},
            "down_block_types: expected one of DownBlock2D, CrossAttnDownBlock2D, got 'AttnDown",
        ),
        ({"block_out_channels": []}, "block_out_channels: expected a sequence"),
        ({"block_out_channels": 32}, "block_out_channels: expected a sequence"),
        ({"block_out_channels": [16, 30]}, r"block_out_channels: expected multiples of .*\(4\)"),
        ({"block_out_channels": [16, -32]}, "block_out_channels: expected a positive integer"),
        ({"layers_per_block": [1, 2, 3]}, "layers_per_block: expected one value or 2"),
        ({"layers_per_block": 0}, "layers_per_block: expected a positive integer, got 0"),
        ({"transformer_layers_per_block": [[1], [2]]}, "transformer_layers_per_block: expected a"),
        ({"attention_head_dim": 3}, "attention_head_dim: .* divides the 16 channels of level 0"),
        ({"attention_head_dim": None}, "attention_head_dim: expected a positive integer"),
        ({"cross_attention_dim": [24, 32]}, "cross_attention_dim: expected a positive integer"),
        ({"norm_num_groups": None}, "norm_num_groups: expected a positive integer, got None"),
        ({"norm_eps": 0}, "norm_eps: expected a positive number"),
        ({"norm_eps": "small"}, "norm_eps: expected a finite number"),
        ({"in_channels": 0}, "in_channels: expected a positive integer"),
        ({"conv_in_kernel": 4}, "conv_in_kernel: expected an odd kernel size, got 4"),
        ({"downsample_padding": 2}, "downsample_padding: expected 0 or 1, got 2"),
        ({"freq_shift": 2}, "freq_shift: expected 0 or 1"),
        ({"dropout": 1}, r"dropout: expected a probability in \[0, 1\)"),
        ({"dropout": "no"}, "dropout: expected a finite number"),
        ({"use_linear_projection": "yes"}, "use_linear_projection: expected True or False"),
        ({"resnet_time_scale_shift": "spatial"}, "expected one of default, scale_shift"),
        ({"addition_embed_type": "image"}, "addition_embed_type: expected None or 'text_time'"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim: expected a positive"),
        ({"time_embedding_dim": 0}, "time_embedding_dim: expected a positive integer"),
        ({"num_classes": -1}, "num_classes: expected a positive integer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({**SMALL, **changes})
