"""ControlNets and T2I-Adapters: diffusers' numbers, and every kind of file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from control_parity import ADAPTERS, NETS, adapter, controlnet, randomized, saved, small_controlnet
from numerics import error
from safetensors.torch import load_file, save_file
from small_unets import LIKE_SDXL, SMALL, pooled_text, small_config
from torch import Tensor

from diffusion_fast.files import CheckpointError
from diffusion_fast.models import UNet2DCondition, UNetConfig
from diffusion_fast.models.controlled import ControlledUNet, check_base
from diffusion_fast.models.controlnet import ControlNet
from diffusion_fast.models.controlnet_config import ControlNetConfig
from diffusion_fast.models.controlnet_file import compvis_name
from diffusion_fast.models.t2i_adapter import T2IAdapter
from diffusion_fast.models.t2i_adapter_config import T2IAdapterConfig

CLOSE = 1e-5  # of max |out|, float32


def inputs(config: UNetConfig, batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "x": torch.randn(batch, config.in_channels, 8, 9),
        "t": torch.tensor(500),
        "context": torch.randn(batch, 5, config.cross_attention_dim),
        "hint": torch.rand(batch, 3, 64, 72),
        **pooled_text(config, batch, torch.float32),
    }


@torch.no_grad()
def theirs(model: Any, given: dict[str, Any], guess_mode: bool) -> list[Tensor]:
    added = {n: given[n] for n in ("text_embeds", "time_ids") if n in given}
    down, mid = model(
        given["x"],
        given["t"],
        encoder_hidden_states=given["context"],
        controlnet_cond=given["hint"],
        added_cond_kwargs=added,
        guess_mode=guess_mode,
        return_dict=False,
    )
    return [*down, mid]


@torch.no_grad()
@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_controlnets(kind: str, guess_mode: bool, tmp_path: Path) -> None:
    judge = small_controlnet(kind)
    model = ControlNet.from_pretrained(saved(judge, tmp_path))
    given = inputs(model.config)
    expected = theirs(judge, given, guess_mode)
    result = model(**given, guess_mode=guess_mode)
    assert len(result) == len(expected)
    for one, other in zip(result, expected, strict=True):
        assert one.abs().max() > 1e-3
        assert error(one, other) < CLOSE
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert error(type(judge).from_pretrained(again).conv_in.weight, judge.conv_in.weight) == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ADAPTERS)
def test_t2i_adapters(kind: str, tmp_path: Path) -> None:
    judge = adapter(ADAPTERS[kind])
    model = T2IAdapter.from_pretrained(saved(judge, tmp_path))
    hint = torch.rand(2, 3, 64, 96)
    expected = judge(hint[:, : judge.config.in_channels])
    for one, other in zip(model(hint), expected, strict=True):
        assert error(one, other) < CLOSE


def wide_controlnet(kind: str) -> Any:
    """Heads and groups as in files that don't tell their number."""
    shape: dict[str, Any] = {"block_out_channels": (64, 128), "norm_num_groups": 32}
    if kind == "sd15":
        return controlnet({**SMALL, **shape, "attention_head_dim": 8})
    changes = {**LIKE_SDXL, "layers_per_block": 2} if kind == "sdxl" else {}
    if kind == "sdxl":
        shape = {"block_out_channels": (64, 128, 64), "norm_num_groups": 32}
        shape |= {"addition_time_embed_dim": 256, "transformer_layers_per_block": (1, 2, 2)}
        shape |= {"projection_class_embeddings_input_dim": 20 + 6 * 256}
        shape |= {"attention_head_dim": (1, 2, 1)}
    else:
        shape |= {"attention_head_dim": (1, 2), "use_linear_projection": True}
    return controlnet({**SMALL, **changes, **shape})


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_single_files(kind: str, prefix: str, tmp_path: Path) -> None:
    """In lllyasviel's names, with the rest of a Stable Diffusion beside it or not."""
    folder = saved(wide_controlnet(kind), tmp_path / "folder")
    whole = ControlNet.from_pretrained(folder)
    state = {
        prefix + compvis_name(name, whole.control_config): value.clone()
        for name, value in whole.state_dict().items()
    }
    names = {re.sub(r"^control_model\.", "", name) for name in state}
    assert {"input_hint_block.0.weight", "input_hint_block.12.bias", "zero_convs.2.0.bias"} <= names
    assert {"middle_block_out.0.weight", "input_blocks.1.0.in_layers.0.weight"} <= names
    if prefix:
        state["model.diffusion_model.input_blocks.0.0.bias"] = torch.zeros(4)
    save_file(state, tmp_path / "control.safetensors")
    model = ControlNet.from_pretrained(tmp_path / "control.safetensors")
    given = inputs(whole.config)
    for one, other in zip(model(**given), whole(**given), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_file_of_diffusers_without_its_config(kind: str, tmp_path: Path) -> None:
    whole = ControlNet.from_pretrained(saved(wide_controlnet(kind), tmp_path / "folder"))
    file = tmp_path / "alone.safetensors"
    save_file(whole.state_dict(), file)
    model, given = ControlNet.from_pretrained(file), inputs(whole.config)
    for one, other in zip(model(**given), whole(**given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("lora_controlnet", "control-LoRA is not supported"),
        ("task_embedding", "ControlNet-Union is not supported"),
        ("difference", "differences"),
        ("model.diffusion_model.input_blocks.0.0.weight", "expected a ControlNet, got"),
    ],
)
def test_other_files_are_refused_by_name(tensor: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({tensor: torch.zeros(4, 4, 3, 3)}, file)
    with pytest.raises(CheckpointError, match=kind):
        ControlNet.from_pretrained(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "ControlNet-Union"),
        ({"conditioning_channels": 1}, "conditioning_channels: 1 is not supported"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "channel_order"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
    ],
)
def test_other_configs_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(small_controlnet("sd15"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        ControlNet.from_pretrained(folder)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = saved(small_controlnet("sd15"), tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["controlnet_mid_block.bias"]
    save_file(state, file)
    with pytest.raises(CheckpointError, match="controlnet_mid_block"):
        ControlNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (16, 16)}, "block_out_channels"),
        ({"cross_attention_dim": 8}, "cross_attention_dim 8"),
        ({"layers_per_block": 2}, "layers_per_block"),
    ],
)
def test_a_network_for_another_base(changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        unet = UNet2DCondition(small_config(**changes))
        control = ControlNet(ControlNetConfig(small_config()))
    with pytest.raises(ValueError, match=f"control: expected a ControlNet for .*{message}"):
        ControlledUNet(unet, [control])


def test_an_adapter_for_another_base() -> None:
    """By its channels; and by its sizes, as those of SD 1.5 and SDXL have the same channels."""
    sdxl = T2IAdapterConfig(downscale_factor=16, adapter_type="full_adapter_xl")
    light = T2IAdapterConfig(channels=(320, 640, 1280), adapter_type="light_adapter")
    fitting = {"sd15": (T2IAdapterConfig(), light), "sdxl": (sdxl,)}
    with torch.device("meta"):
        unet = UNet2DCondition(small_config())
        other = T2IAdapter(T2IAdapterConfig(channels=(16, 64)))
        unets = {name: UNet2DCondition(UNetConfig.preset(name)) for name in fitting}
        adapters = {name: [T2IAdapter(one) for one in own] for name, own in fitting.items()}
    expected = r"control: expected a T2I-Adapter .*16 at 1/1, 32 at 1/2.* got .*64"
    with pytest.raises(ValueError, match=expected):
        check_base(other, unet)
    for name, model in unets.items():
        for base, own in adapters.items():
            for one in own:
                if base == name:
                    check_base(one, model)
                    continue
                expected = "control: expected a T2I-Adapter for this U-Net .*320 at 1/[12], .* got"
                with pytest.raises(ValueError, match=expected):
                    check_base(one, model)


@torch.no_grad()
def test_where_adapters_and_residuals_join(tmp_path: Path) -> None:
    """Of SDXL: behind the first downsampling, at both other levels, and at the bottom."""
    config = {**SMALL, **LIKE_SDXL, "layers_per_block": 2}
    judge = randomized(diffusers.UNet2DConditionModel(**config))
    net = controlnet({**config, **NETS["sdxl"]}, 1)
    tool = adapter(ADAPTERS["xl"], 2)
    folders = [saved(one, tmp_path / str(i)) for i, one in enumerate((judge, net, tool))]
    readers = UNet2DCondition, ControlNet, T2IAdapter
    unet, *controls = (
        cls.from_pretrained(folder) for cls, folder in zip(readers, folders, strict=True)
    )
    given = inputs(unet.config)
    given["x"], given["hint"] = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64)
    residuals = theirs(net, given, False)
    features = tool(given["hint"])
    assert len(features) == 4
    added = {n: given[n] for n in ("text_embeds", "time_ids")}
    expected = judge(
        given["x"],
        given["t"],
        given["context"],
        added_cond_kwargs=added,
        down_block_additional_residuals=[0.7 * one for one in residuals[:-1]],
        mid_block_additional_residual=0.7 * residuals[-1],
        down_intrablock_additional_residuals=[0.4 * one for one in features],
    ).sample
    hint = given.pop("hint")
    bare = unet(**given)
    result = ControlledUNet(unet, controls)(
        **given,
        hints=torch.stack((hint, hint), dim=1),
        scales=torch.tensor([[0.7, 0.4]] * 2),
        windows=torch.tensor([[[0.0, 999.0]] * 2] * 2),
    )
    assert error(result, expected) < CLOSE
    assert error(bare, expected) > 0.01
