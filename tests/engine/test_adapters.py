"""Layers that are more than their weights: LoRA by peft, hooks, a forward of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import error
from prepared import LIKE_SDXL, TEXT_TIME, at, check, conditions, images, plain, prepared, unet
from torch import Tensor, nn

from diffusion_fast.engine.rewrites.plan import REWRITES
from diffusion_fast.models import UNet2DCondition
from diffusion_fast.models.layers import Conv2d

PER_LAYER = ["time_table", "cached_context"]  # others than those that derive weights
CONFIGS: dict[str, dict[str, Any]] = {
    "convolutions around transformers, uneven padding": {"downsample_padding": 0},
    "linear layers around transformers": {**LIKE_SDXL, "layers_per_block": 1},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
}


def with_lora(model: UNet2DCondition, **options: Any) -> UNet2DCondition:
    """A random LoRA on all linear layers and convolutions."""
    peft = pytest.importorskip("peft")
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    config = peft.LoraConfig(
        r=2, lora_alpha=1, target_modules=names, init_lora_weights=False, **options
    )
    return peft.inject_adapter_in_model(config, model).to(torch.float64).eval()


def merged(model: UNet2DCondition) -> UNet2DCondition:
    """A plain model with the weights of an adapted one, adapters and all."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for adapter in adapters:
        adapter.merge()
    weights = {
        name.replace("base_layer.", ""): value.clone()
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }
    for adapter in adapters:
        adapter.unmerge()
    twin = UNet2DCondition(model.config).double().eval()
    twin.load_state_dict(weights)
    return twin


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("config", CONFIGS)
def test_lora_on_every_layer_is_a_model_with_merged_weights(config: str, dora: bool) -> None:
    model = with_lora(unet(torch.float64, **CONFIGS[config]), use_dora=dora)
    given, x = conditions(model, 4), images(model, 2, 2)
    expected = plain(merged(model), x, 0, given)
    assert error(plain(model, x, 0, given), expected) < 1e-9
    for rewrites in ("all", REWRITES, PER_LAYER):
        assert error(prepared(model, given, rewrites)(x, at(0)), expected) < 1e-9


def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 1.5 * output


@pytest.mark.parametrize("rewrites", ["all", PER_LAYER], ids=["all", "few"])
@pytest.mark.parametrize("own_forward", [False, True], ids=["hook", "forward"])
def test_hooks_see_each_layer_alone(own_forward: bool, rewrites: Any) -> None:
    """So that a hook that scales gives the same as scaled weights, in both ways to run."""
    model = unet(torch.float64, downsample_padding=0, **TEXT_TIME)
    expected_of = UNet2DCondition(model.config).double().eval()
    expected_of.load_state_dict(model.state_dict())
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        if own_forward:
            before = layer.forward
            layer.forward = lambda x, before=before: 1.5 * before(x)
        else:
            layer.register_forward_hook(scaled)
    with torch.no_grad():
        for module in expected_of.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                for value in module.parameters():
                    value.mul_(1.5)
    check(model, rewrites)
    given, x = conditions(model, 4), images(model, 2, 2)
    expected = plain(expected_of, x, 0, given)
    assert error(plain(model, x, 0, given), expected) < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"padding": "same"},
        {"stride": (1, 2)},
    ],
    ids=str,
)
def test_a_convolution_that_the_op_has_not_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Conv2d: expected one group"):
        Conv2d(4, 4, 3, **options)


@pytest.mark.parametrize(
    ("padding", "sides"),
    [(1, (1, 1, 1, 1)), ((1, 2), (2, 2, 1, 1)), ((0, 1, 0, 1), (0, 1, 0, 1))],
    ids=str,
)
def test_a_convolution_takes_what_torch_takes(padding: Any, sides: tuple[int, ...]) -> None:
    conv = Conv2d(3, 4, (3, 3), (2, 2), padding, bias=False, dtype=torch.float64)
    assert conv.bias is None
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    expected = nn.functional.conv2d(nn.functional.pad(x, sides), conv.weight, stride=2)
    assert error(conv(x), expected) < 1e-12
