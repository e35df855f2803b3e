"""The U-Net computes what diffusers' UNet2DConditionModel computes."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import error
from small_unets import (
    ATTENTION_IN_THE_MIDDLE_ONLY,
    LIKE_SDXL,
    ONE_LEVEL,
    SMALL,
    TEXT_TIME,
    THREE_LEVELS,
    configs,
    small_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from unet_parity import ask_diffusers, difference, inputs, twins

from diffusion_fast.models import UNet2DCondition, UNetConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "small": {},
    "one_level": ONE_LEVEL,
    "attention_in_the_middle_only": ATTENTION_IN_THE_MIDDLE_ONLY,
    "attention_only_down": {"up_block_types": ("UpBlock2D",) * 2},
    "attention_everywhere": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
    "three_levels": THREE_LEVELS,
    "like_sdxl": LIKE_SDXL,
    "layers_per_level": {**THREE_LEVELS, "layers_per_block": (1, 3, 2)},
    "narrower_below": {**THREE_LEVELS, "block_out_channels": (48, 16, 32)},
    "four_levels": {
        "block_out_channels": (8, 16, 24, 24),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
    },
    "one_head": {"attention_head_dim": 1},
    "heads_per_level": {"attention_head_dim": (4, 8)},
    "linear_projection": {"use_linear_projection": True},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "text_time": TEXT_TIME,
    "sine_first_shifted": {"flip_sin_to_cos": False, "freq_shift": 1},
    "time_dim": {"time_embedding_dim": 40},
    "padded_at_the_end": {"downsample_padding": 0},
    "kernels_and_channels": {
        "conv_in_kernel": 1,
        "conv_out_kernel": 5,
        "in_channels": 9,
        "out_channels": 3,
    },
    "norms": {"norm_num_groups": 8, "norm_eps": 1e-3},
}


@pytest.mark.parametrize("size", [(8, 8), (7, 10)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_diffusers(variant: str, size: tuple[int, int]) -> None:
    config = small_config(**VARIANTS[variant])
    assert difference(*twins(config), inputs(config, size)) <= 1e-5


@pytest.mark.parametrize("size", [(8, 8), (7, 10)], ids=str)
@pytest.mark.parametrize("variant", ["like_sdxl", "scale_shift", "padded_at_the_end"])
def test_equals_diffusers_in_channels_last(variant: str, size: tuple[int, int]) -> None:
    config = small_config(**VARIANTS[variant])
    ours, theirs = twins(config)
    arguments = inputs(config, size)
    arguments["x"] = arguments["x"].to(memory_format=torch.channels_last)
    assert difference(ours, theirs, arguments) <= 1e-5  # weights contiguous
    ours.to(memory_format=torch.channels_last)
    assert difference(ours, theirs, arguments) <= 1e-5
    assert ours(**arguments).is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=40, deadline=None)
@given(
    config=configs(TEXT_TIME),
    size=st.tuples(st.integers(4, 13), st.integers(4, 13)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
)
def test_equals_diffusers_for_any_config(
    config: UNetConfig, size: tuple[int, int], batch: int, tokens: int
) -> None:
    # In float64: norms over a handful of pixels would magnify float32's rounding.
    arguments = inputs(config, size, batch, tokens, torch.float64)
    assert difference(*twins(config, torch.float64), arguments) <= 1e-9


def test_equals_diffusers_at_the_size_of_sd15() -> None:
    config = UNetConfig.preset("sd15")
    ours, theirs = twins(config, std=0.02)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    assert difference(ours, theirs, inputs(config, (16, 16), batch=1, tokens=77)) <= 1e-5


@pytest.mark.parametrize("name", ["sd15", "sd15_inpainting", "sd21", "sdxl"])
def test_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    config = UNetConfig.preset(name)
    with torch.device("meta"):
        ours = UNet2DCondition(config)
        theirs = diffusers.UNet2DConditionModel.from_config(config.to_dict())
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


@pytest.mark.parametrize("variant", ["small", "like_sdxl", "scale_shift"])
def test_gradients_equal_those_of_diffusers(variant: str) -> None:
    config = small_config(**VARIANTS[variant])
    ours, theirs = twins(config, torch.float64)
    arguments = inputs(config, (7, 8), dtype=torch.float64)
    arguments["x"].requires_grad_()
    arguments["context"].requires_grad_()
    out = ours(**arguments)
    weights = torch.randn_like(out)

    names = [name for name, _ in ours.named_parameters()]
    leaves = [arguments["x"], arguments["context"]]
    result = torch.autograd.grad((out * weights).sum(), [*ours.parameters(), *leaves])
    expected = torch.autograd.grad(
        (ask_diffusers(theirs, arguments) * weights).sum(),
        [*(theirs.get_parameter(name) for name in names), *leaves],
    )
    for name, grad, truth in zip([*names, "x", "context"], result, expected, strict=True):
        assert truth.abs().max() > 0, name
        assert error(grad, truth) <= 1e-9, name


def test_gradients_in_channels_last() -> None:
    config = small_config(**THREE_LEVELS)
    ours, _ = twins(config, torch.float64)
    arguments = inputs(config, (7, 8), dtype=torch.float64)
    expected = torch.autograd.grad(ours(**arguments).square().sum(), list(ours.parameters()))
    ours.to(memory_format=torch.channels_last)
    arguments["x"] = arguments["x"].to(memory_format=torch.channels_last)
    result = torch.autograd.grad(ours(**arguments).square().sum(), list(ours.parameters()))
    assert max(map(error, result, expected)) <= 1e-10


def test_context_lengths_equal_a_padding_mask() -> None:
    config = small_config(**THREE_LEVELS)
    ours, theirs = twins(config)
    arguments = inputs(config)
    full = ours(**arguments)
    arguments["context_lengths"] = torch.tensor([3, 7])
    assert difference(ours, theirs, arguments) <= 1e-5
    assert error(ours(**arguments)[0], full[0]) > 1e-3  # the mask does something


@pytest.mark.parametrize("t", [7, 999], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64], ids=str)
def test_a_scalar_timestep_serves_the_batch(t: int, dtype: torch.dtype) -> None:
    config = small_config()
    ours, theirs = twins(config)
    arguments = inputs(config)
    arguments["t"] = torch.tensor(t, dtype=dtype)
    assert difference(ours, theirs, arguments) <= 1e-5
    each = ours(**{**arguments, "t": torch.full((2,), t)})
    assert torch.equal(ours(**arguments), each)


def test_one_prompt_is_shared_by_the_batch() -> None:
    config = small_config(**THREE_LEVELS)
    ours, _ = twins(config)
    arguments = inputs(config)
    one = arguments["context"][:1]
    shared = ours(**{**arguments, "context": one})
    assert error(shared, ours(**{**arguments, "context": one.expand(2, -1, -1)})) <= 1e-6


def test_half_precision_keeps_its_dtype_and_tells_timesteps_apart() -> None:
    config = small_config()
    ours, _ = twins(config, torch.bfloat16)
    arguments = inputs(config, dtype=torch.bfloat16)
    first = ours(**{**arguments, "t": torch.tensor([998, 998])})
    second = ours(**{**arguments, "t": torch.tensor([999, 999])})  # the same number in bfloat16
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)


def test_dropout_is_active_in_training_only() -> None:
    config = small_config(dropout=0.5)
    ours, theirs = twins(config)
    arguments = inputs(config)
    assert difference(ours, theirs, arguments) <= 1e-5
    ours.train()
    assert not torch.equal(ours(**arguments), ours(**arguments))


class _Copies(TorchDispatchMode):
    """Notes every operation that copies more than a number for each image and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = any(word in str(func) for word in ("clone", "copy", "contiguous"))
        statistics = 2 * 2 * max(THREE_LEVELS["block_out_channels"])  # of two sources
        if "_local_scalar" in str(func) or (copies and args[0].numel() > statistics):
            self.seen.append(f"{func} {list(args[0].shape)}")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["three_levels", "like_sdxl", "scale_shift"])
def test_channels_last_needs_no_copies_and_no_host_reads(variant: str) -> None:
    config = small_config(**VARIANTS[variant])
    ours, _ = twins(config)
    ours.to(memory_format=torch.channels_last)
    arguments = inputs(config)
    arguments["x"] = arguments["x"].to(memory_format=torch.channels_last)
    for name in ("t", "time_ids"):  # no conversion to float needed
        if name in arguments:
            arguments[name] = arguments[name].float()
    with _Copies() as copies:
        ours(**arguments)
    assert copies.seen == []


def test_parts_are_separate() -> None:
    """What depends on the step, on the prompt and on the image can be computed apart."""
    config = small_config(**THREE_LEVELS, **TEXT_TIME)
    ours, _ = twins(config)
    a = inputs(config)
    time = ours.project_time(ours.embed_time(a["t"], a["text_embeds"], a["time_ids"]))
    kv = ours.project_context(ours.embed_context(a["context"]))
    assert [len(block) for block in time] == [1, 1, 1, 2, 2, 2, 2]
    assert [len(block) for block in kv] == [0, 1, 1, 1, 2, 2, 0]
    assert torch.equal(ours.denoise(a["x"], time, kv), ours(**a))


def test_the_way_down_and_the_middle_run_alone() -> None:
    """As a ControlNet needs it, whose residuals join what the way down leaves and the middle."""
    config = small_config(**THREE_LEVELS)
    ours, theirs = twins(config)
    a = inputs(config)
    time = ours.project_time(ours.embed_time(a["t"]))
    kv = ours.project_context(a["context"])
    with torch.no_grad():
        x, skips = ours.down(a["x"], time, kv)
        assert torch.equal(skips[-1], x)
        x = ours.mid(x, time, kv)
        added, middle = [torch.randn_like(skip) for skip in skips], torch.randn_like(x)
        joined = [skip + residual for skip, residual in zip(skips, added, strict=True)]
        result = ours.up(x + middle, joined, time, kv)
        expected = theirs(
            a["x"],
            a["t"],
            a["context"],
            down_block_additional_residuals=tuple(added),
            mid_block_additional_residual=middle,
        ).sample
    assert error(result, expected) <= 1e-5


def test_classes_are_one_token_each() -> None:
    classes = UNet2DCondition(small_config(num_classes=5)).eval()
    text = UNet2DCondition(UNetConfig(**SMALL)).eval()
    state = classes.state_dict()
    token = state.pop("class_token.weight")
    assert token.shape == (6, 24)
    assert classes.null_class == 5
    text.load_state_dict(state, strict=True)  # nothing else is new
    x, t, labels = torch.randn(3, 4, 8, 8), torch.tensor(10), torch.tensor([0, 4, 5])
    assert torch.equal(classes(x, t, labels), text(x, t, token[labels][:, None]))
    classes(x, t, labels).sum().backward()
    rows = classes.class_token.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [True, False, False, False, True, True]


def test_compiles_into_one_graph() -> None:
    config = small_config(**TEXT_TIME)
    ours, _ = twins(config)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    arguments = inputs(config, (9, 7))
    arguments["context_lengths"] = torch.tensor([3, 7])
    expected = ours(**arguments)
    assert error(compiled(**arguments), expected) <= 1e-6
    grads = torch.autograd.grad(expected.sum(), list(ours.parameters()))
    compiled_grads = torch.autograd.grad(compiled(**arguments).sum(), list(ours.parameters()))
    assert max(map(error, compiled_grads, grads)) <= 1e-5


def test_exports_with_any_batch() -> None:
    config = small_config(num_classes=5)
    ours = UNet2DCondition(config).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 5])
    program = torch.export.export(
        ours,
        (x, t, labels),
        dynamic_shapes={"x": {0: batch}, "t": {0: batch}, "context": {0: batch}},
    )
    x, t, labels = torch.randn(5, 4, 8, 8), torch.arange(5), torch.arange(5)
    with torch.no_grad():  # where a gradient is recorded, calls may go other ways than in a program
        assert error(program.module()(x, t, labels), ours(x, t, labels)) <= 1e-6
