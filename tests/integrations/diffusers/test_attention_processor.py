"""Our attention in diffusers' modules, against AttnProcessor2_0."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers.models import attention_processor as processors
from numerics import error

from diffusion_fast import ops
from diffusion_fast.integrations.diffusers import AttentionProcessor

CLOSE = 1e-5  # of max |out|, float32

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning:peft")


def layer(**options: Any) -> processors.Attention:
    module = processors.Attention(**{"query_dim": 24, "heads": 3, "dim_head": 8, **options})
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean="norm" in name, std=0.3)
    return module.eval().requires_grad_(False)


def both(module: processors.Attention, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    results = []
    for processor in (AttentionProcessor(), processors.AttnProcessor2_0()):
        module.set_processor(processor)
        results.append(module(*args, **kwargs))
    return results[0], results[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "out_bias": False},
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7},
        {"qk_norm": "layer_norm"},
        {"kv_heads": None, "dropout": 0.3},
    ],
)
def test_self_attention(options: dict[str, Any]) -> None:
    result, expected = both(layer(**options), torch.randn(2, 10, 24))
    assert error(result, expected) <= CLOSE


def test_unscaled_scores() -> None:
    module = layer(scale_qk=False)
    x = torch.randn(2, 10, 24)
    module.set_processor(AttentionProcessor())
    result = module(x)
    module.set_processor(processors.AttnProcessor())
    assert error(result, module(x)) <= CLOSE


@pytest.mark.parametrize("norm", [None, "layer_norm", "group_norm"])
def test_cross_attention(norm: str | None) -> None:
    module = layer(
        cross_attention_dim=20, cross_attention_norm=norm, cross_attention_norm_num_groups=4
    )
    x, context = torch.randn(2, 10, 24), torch.randn(2, 7, 20)
    result, expected = both(module, x, encoder_hidden_states=context)
    assert error(result, expected) <= CLOSE


@pytest.mark.parametrize("shape", [(2, 1, 7), (6, 1, 7), (6, 10, 7)])
def test_masks(shape: tuple[int, ...]) -> None:
    x, context = torch.randn(2, 10, 24), torch.randn(2, 7, 20)
    mask = torch.where(torch.rand(shape) < 0.5, -10000.0, 0.0)
    mask[..., 0] = 0
    module = layer(cross_attention_dim=20)
    result, expected = both(module, x, encoder_hidden_states=context, attention_mask=mask)
    assert error(result, expected) <= CLOSE
    assert error(result, both(module, x, encoder_hidden_states=context)[0]) > 0.01


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_images(format: torch.memory_format) -> None:
    """[B, C, H, W], as an autoencoder's attention gets it."""
    module = layer(norm_num_groups=4, residual_connection=True, bias=True)
    x = torch.randn(2, 24, 4, 5).contiguous(memory_format=format)
    result, expected = both(module, x)
    assert result.shape == x.shape
    assert error(result, expected) <= CLOSE


def test_spatial_norm() -> None:
    module = layer(spatial_norm_dim=4, residual_connection=True, query_dim=32)
    x, z = torch.randn(2, 32, 4, 4), torch.randn(2, 4, 2, 2)
    result, expected = both(module, x, temb=z)
    assert error(result, expected) <= CLOSE


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_unets(kind: str) -> None:
    model = tiny.unet(kind)
    inputs = tiny.unet_inputs(model)
    mask = torch.arange(7)[None].expand(2, -1) < 4
    for options in ({}, {"encoder_attention_mask": mask}):
        model.set_attn_processor(processors.AttnProcessor2_0())
        with torch.no_grad():
            expected = model(**inputs, **options).sample
            model.set_attn_processor(AttentionProcessor())
            assert error(model(**inputs, **options).sample, expected) <= CLOSE
    assert ops.explain("attention").last_ran


def test_vae() -> None:
    model = tiny.vae()
    latents = torch.randn(2, 4, 6, 5)
    expected = model.decode(latents).sample
    model.set_attn_processor(AttentionProcessor())
    assert error(model.decode(latents).sample, expected) <= CLOSE


def test_lora(tmp_path: Path) -> None:
    folder, file = tiny.lora_file(tmp_path, "sd", "some", r".*(to_q|to_k|to_v|to_out\.0)")
    plain = tiny.pipeline()
    fast = copy.deepcopy(plain)
    fast.unet.set_attn_processor(AttentionProcessor())
    original = tiny.predict(plain)
    for pipe in (plain, fast):
        pipe.load_lora_weights(folder, weight_name=file)
    for options in ({}, {"cross_attention_kwargs": {"scale": 0.3}}):
        expected = tiny.predict(plain, **options)
        assert error(expected, original) > 1e-4
        assert error(tiny.predict(fast, **options), expected) <= CLOSE


def test_gradients() -> None:
    module = layer(cross_attention_dim=20).requires_grad_(True)
    x, context = torch.randn(2, 10, 24), torch.randn(2, 7, 20)
    gradients = []
    for processor in (AttentionProcessor(), processors.AttnProcessor2_0()):
        module.set_processor(processor)
        module.zero_grad()
        module(x, encoder_hidden_states=context).square().mean().backward()
        gradients.append(module.to_k.weight.grad)
    assert error(*gradients) <= CLOSE


def test_added_keys_and_values_are_refused() -> None:
    module = layer(added_kv_proj_dim=20, norm_num_groups=4)
    module.set_processor(AttentionProcessor())
    with pytest.raises(ValueError, match="attn: expected a layer without added keys and values"):
        module(torch.randn(2, 10, 24), encoder_hidden_states=torch.randn(2, 7, 20))
