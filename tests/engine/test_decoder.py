"""A prepared decoder draws what the autoencoder draws."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from conv_model import train_fused
from numerics import assert_close, error
from prepared import LEVELS, randomize
from torch import Tensor, nn

from diffusion_fast.engine.rewrites.decoder import DECODER_REWRITES, FreshDecoder, PreparedDecoder
from diffusion_fast.engine.rewrites.leaves import Leaf
from diffusion_fast.models.layers import Conv2d
from diffusion_fast.models.vae import AutoencoderKL
from diffusion_fast.models.vae_config import VAEConfig
from diffusion_fast.ops.cpu import contest

SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "force_upcast": False,
}
CHOICES: dict[str, str | Iterable[str]] = {
    **{name: [name] for name in DECODER_REWRITES},
    "all": "all",
    "none": "none",
}


def autoencoder(dtype: torch.dtype = torch.float32, **changes: Any) -> AutoencoderKL:
    model = AutoencoderKL(VAEConfig(**{**SMALL, **changes})).eval()
    randomize(model)
    return model.to(dtype)


@torch.no_grad()
def check(model: AutoencoderKL, decode: PreparedDecoder, size: tuple[int, int] = (5, 6)) -> None:
    latents = torch.randn(2, 4, *size).to(model.decoder.conv_in.weight.dtype)
    result, expected = decode(latents), model.decode(latents)
    assert result.dtype == expected.dtype
    if latents.dtype in LEVELS:
        assert error(result, expected) <= LEVELS[latents.dtype]
    else:
        truth = copy.deepcopy(model).double().decode(latents.double())
        assert_close(result, truth, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
def test_each_rewrite_alone_and_all_together(choice: str, dtype: torch.dtype) -> None:
    model = autoencoder(dtype)
    check(model, PreparedDecoder(model, CHOICES[choice]))


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_add_attention": False},
        {"use_post_quant_conv": False},
        {"layers_per_block": 2},
        {
            "block_out_channels": (8,),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
        },
    ],
    ids=str,
)
def test_any_config(changes: dict[str, Any]) -> None:
    model = autoencoder(torch.float64, **changes)
    check(model, PreparedDecoder(model), (3, 3))


def test_a_float16_model_that_overflows_computes_in_float32() -> None:
    model = autoencoder(torch.float16, force_upcast=True)
    decode = PreparedDecoder(model)
    check(model, decode)
    randomize(model)
    decode.refresh()
    check(model, decode)


def test_refresh_keeps_the_addresses() -> None:
    model = autoencoder(torch.float64)
    decode = PreparedDecoder(model)
    check(model, decode)
    leaves = [leaf for leaf in decode.network.modules() if isinstance(leaf, Leaf)]
    places = [leaf.weight.data_ptr() for leaf in leaves]
    randomize(model)
    decode.refresh()
    check(model, decode)
    assert [leaf.weight.data_ptr() for leaf in leaves] == places


EDITS: dict[str, Callable[[AutoencoderKL], object]] = {
    "none": lambda model: None,
    "weights": randomize,
    "fused optimizer": lambda model: train_fused(model),
    "through data": lambda model: model.decoder.conv_in.weight.data.mul_(2),
    "float64": lambda model: model.double(),
    "a new layer": lambda model: setattr(
        model.decoder, "conv_out", Conv2d(8, 3, 3, padding=1, dtype=torch.float32)
    ),
    "a hook on a layer": lambda model: model.decoder.conv_out.register_forward_hook(halved),
    "a hook on a block": lambda model: model.decoder.mid_block.register_forward_hook(halved),
}


def halved(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output / 2


@pytest.mark.parametrize("rewrites", ["all", "none", "folded_upsample", ["shared_prefix"]], ids=str)
@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_a_fresh_decoder_follows_every_edit(edit: str, rewrites: Any) -> None:
    model = autoencoder()
    decode = FreshDecoder(model, rewrites)
    latents = torch.randn(2, 4, 5, 6)
    assert error(decode(latents), model.decode(latents)) <= 1e-5
    EDITS[edit](model)
    latents = latents.to(model.decoder.conv_in.weight.dtype)
    assert error(decode(latents), model.decode(latents)) <= 1e-5


def test_a_fresh_decoder_uses_its_rewrites_and_keeps_what_it_derived() -> None:
    model = autoencoder()
    decode = FreshDecoder(model)
    latents = torch.randn(1, 4, 5, 6)
    seen = []
    for _ in range(2):
        decode(latents)
        assert decode._prepared is not None
        seen.append(decode._prepared)
    assert seen[0] is seen[1]
    assert seen[0].on == set(DECODER_REWRITES)
    model.config = dataclasses.replace(model.config, force_upcast=not model.config.force_upcast)
    decode(latents)
    assert decode._prepared is not seen[0]  # the config decides on a float32 copy


def test_bad_input() -> None:
    model = autoencoder()
    with pytest.raises(ValueError, match="rewrites: expected one of folded_upsample"):
        PreparedDecoder(model, ["time_table"])
    decode = PreparedDecoder(model)
    with pytest.raises(ValueError, match="latents: expected shape"):
        decode(torch.randn(1, 3, 4, 4))
    model.to(torch.float64)
    with pytest.raises(ValueError, match=r"vae: expected a model of torch.float32 on cpu"):
        decode.refresh()


def test_its_shapes_are_measured_before_its_first_call_of_a_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[Any]] = []
    monkeypatch.setattr(contest, "prepare", lambda work: asked.append(list(work.calls())))
    model = autoencoder()
    decode = PreparedDecoder(model)
    for size, times in (((5, 6), 1), ((5, 6), 1), ((4, 4), 2)):
        check(model, decode, size)
        assert len(asked) == times
    images = {args[0].shape for name, args in asked[0] if name == "conv2d"}
    assert (2, 24, 5, 6) in images
    assert (2, 8, 20, 24) in images
    assert all(args[0].is_meta for _, args in asked[0])
