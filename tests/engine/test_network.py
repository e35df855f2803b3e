"""A prepared U-Net computes what the plain one does, whatever rewrites are on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from compilers import needs_cpu_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close, error
from prepared import (
    GRID,
    LIKE_SDXL,
    TEXT_TIME,
    at,
    check,
    conditions,
    images,
    of_config,
    plain,
    prepared,
    randomize,
    unet,
)
from small_unets import ATTENTION_IN_THE_MIDDLE_ONLY, ONE_LEVEL, configs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion_fast as df
from diffusion_fast.engine.rewrites.controlled import prepare
from diffusion_fast.engine.rewrites.leaves import Leaf
from diffusion_fast.engine.rewrites.plan import CONTROL, REWRITES
from diffusion_fast.engine.rewrites.prepare import PreparedUNet
from diffusion_fast.models import UNet2DCondition, UNetConfig
from diffusion_fast.ops.cpu import library, winograd
from diffusion_fast.ops.cpu.contest import Contest, Kind
from diffusion_fast.ops.dispatch import known_ops

CHOICES: dict[str, str | Iterable[str]] = {
    **{name: [name] for name in REWRITES if name not in CONTROL},
    "all": "all",
    "none": "none",
    "every": REWRITES,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "small": {},
    "like_sdxl": LIKE_SDXL,
    "text_time": TEXT_TIME,
    "classes": {"num_classes": 10},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "padded_at_the_end": {"downsample_padding": 0},
    "inpainting": {"in_channels": 9, "conv_in_kernel": 1, "conv_out_kernel": 5},
    "linear_projection": {"use_linear_projection": True, "transformer_layers_per_block": 2},
    "one_level": ONE_LEVEL,
    "attention_in_the_middle_only": ATTENTION_IN_THE_MIDDLE_ONLY,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
def test_each_rewrite_alone_and_all_together(choice: str, dtype: torch.dtype) -> None:
    check(unet(dtype), CHOICES[choice])


@pytest.mark.parametrize("choice", CHOICES)
def test_each_rewrite_at_odd_sizes(choice: str) -> None:
    check(unet(torch.float64), CHOICES[choice], size=(7, 10))


@pytest.mark.parametrize("choice", ["all", "none", "every"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_kind_of_model(variant: str, choice: str) -> None:
    check(unet(torch.float64, **VARIANTS[variant]), CHOICES[choice])
    check(unet(torch.float32, **VARIANTS[variant]), CHOICES[choice], size=(9, 6))


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_batches_and_halves(batch: int, halves: int) -> None:
    check(unet(torch.float64), REWRITES, batch=batch, halves=halves)


@pytest.mark.parametrize("choice", ["all", "none", "cached_context", "shared_prefix"])
def test_lengths_of_contexts(choice: str) -> None:
    check(unet(torch.float64), CHOICES[choice], lengths=True)


@pytest.mark.parametrize("choice", ["all", "none"])
def test_weights_in_channels_last(choice: str) -> None:
    check(unet().to(memory_format=torch.channels_last), choice, size=(9, 6))


@settings(max_examples=40, deadline=None)
@given(
    config=configs({"num_classes": 3}, TEXT_TIME),
    rewrites=st.sets(st.sampled_from(list(REWRITES))),
    size=st.tuples(st.integers(4, 11), st.integers(4, 11)),
    batch=st.integers(1, 2),
    halves=st.integers(1, 2),
)
def test_any_config_and_any_combination(
    config: UNetConfig, rewrites: set[str], size: tuple[int, int], batch: int, halves: int
) -> None:
    model = of_config(config, torch.float64)
    check(model, rewrites, batch=batch, halves=halves, size=size)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["all", "none"])
def test_sd15_at_a_small_latent(choice: str) -> None:
    check(of_config(UNetConfig.preset("sd15")), choice, batch=1, size=(16, 16), tokens=77)


def addresses(network: PreparedUNet) -> list[int]:
    """Of all that a captured graph of the network reads beside its input."""
    leaves = [leaf.weights for leaf in network.network.modules() if isinstance(leaf, Leaf)]
    tables = None if network.times is None else network.times.tables
    kept = tree_leaves((leaves, tables, network.given))
    return [value.data_ptr() for value in kept if value is not None]


def test_refresh_follows_the_weights_and_keeps_the_addresses() -> None:
    model = unet(torch.float64)
    given = conditions(model, 4)
    network, x = prepared(model, given, REWRITES), images(model, 2, 2)
    before = network(x, at(1))
    places = addresses(network)
    randomize(model)
    network.refresh()
    network.prepare(given, GRID)
    expected = plain(model, x, 1, given)
    assert (network(x, at(1)) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert (before - expected).abs().max() > 0.1
    assert addresses(network) == places


def test_refresh_repacks_the_weights() -> None:
    """Wide enough for oneDNN, which then reads nothing but the packed weights."""
    model = unet(block_out_channels=(64, 128), cross_attention_dim=64)
    given = conditions(model, 4)
    network, x = prepared(model, given, ["packed_weights"]), images(model, 2, 2, (16, 16))
    network(x, at(0))
    randomize(model)
    network.refresh()
    network.prepare(given, GRID)
    expected = plain(model, x, 0, given)
    assert (network(x, at(0)) - expected).abs().max() <= 1e-5 * expected.abs().max()


@needs_cpu_kernels
@pytest.mark.parametrize("size", [(16, 16), (17, 13)], ids=str)
def test_winograds_convolutions_in_a_whole_step(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of 3x3 and stride 1 that a contest is about; a refresh transforms the new weights."""
    library.settle()

    def order(self: Contest, kind: Kind | None) -> list[str]:
        fits = self.op.name == "conv2d" and kind is not None and kind[5:8] == (3, 3, 1)
        return ["winograd"] if fits else []

    monkeypatch.setattr(Contest, "order", order)
    known_ops["conv2d"].forget()
    model = unet(block_out_channels=(64, 128), cross_attention_dim=64)
    given = conditions(model, 4)
    network, x = prepared(model, given, "all"), images(model, 2, 2, size)
    wide = {name: value.double() for name, value in given.items()}
    for row in range(2):
        truth = plain(copy.deepcopy(model).double(), x.double(), row, wide)
        assert_close(network(x, at(row)), truth, plain(model, x, row, given))
        leaves = [leaf for leaf in network.network.modules() if isinstance(leaf, Leaf)]
        packed = [leaf._packed for leaf in leaves if leaf._packed is not None]
        assert sum(winograd.is_packed(one) for one in packed) > 10
        randomize(model)
        network.refresh()
        network.prepare(given, GRID)
    known_ops["conv2d"].forget()


def test_weights_that_were_replaced_are_found_by_refresh() -> None:
    model = unet(torch.float64)
    given = conditions(model, 4)
    network, x = prepared(model, given), images(model, 2, 2)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight = nn.Parameter(module.weight * 1.1)
    network.refresh()
    network.prepare(given, GRID)
    expected = plain(model, x, 0, given)
    assert (network(x, at(0)) - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_refresh_refuses_a_model_that_was_cast() -> None:
    model = unet()
    network = prepared(model, conditions(model, 4))
    model.to(torch.float64)
    with pytest.raises(ValueError, match=r"model: expected .* as planned, got torch.float64"):
        network.refresh()


def test_another_prompt_and_grid_keep_the_addresses() -> None:
    model = unet(torch.float64)
    network, x = prepared(model, conditions(model, 4)), images(model, 2, 2)
    network(x, at(0))
    places = addresses(network)
    given = conditions(model, 4)
    network.prepare(given, GRID)
    assert addresses(network) == places
    expected = plain(model, x, 2, given)
    assert (network(x, at(2)) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("choice", ["all", "none"])
def test_contexts_of_another_length_leave_the_first_ones_be(choice: str) -> None:
    model = unet(torch.float64)
    first = conditions(model, 4, tokens=3)
    network = prepared(model, first, choice)
    tensors = [value for value in tree_leaves(network.given) if value is not None]
    kept = [value.clone() for value in tensors]
    network.prepare(conditions(model, 4, tokens=8), GRID)
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))
    network.prepare(first, GRID)
    again = [value for value in tree_leaves(network.given) if value is not None]
    assert all(a is b for a, b in zip(tensors, again, strict=True))


@pytest.mark.parametrize("choice", ["all", "none"])
def test_a_prompt_for_all(choice: str) -> None:
    model = unet(torch.float64)
    shared = conditions(model, 1)["context"]
    network, x = prepared(model, {"context": shared}, choice), images(model, 2, 2)
    network.prepare(shared, GRID)  # as a tensor
    expected = plain(model, x, 0, {"context": shared})
    assert (network(x, at(0)) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("choice", ["all", "none"])
def test_the_device_may_count(choice: str) -> None:
    model = unet(torch.float64)
    network, x = prepared(model, conditions(model, 4), choice), images(model, 2, 2)
    clock = at(1)
    with clock.on_device():
        clock.advance()
        assert torch.equal(network(x, clock), network(x, at(1)))


class Reads(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert "_local_scalar_dense" not in str(func), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("choice", ["all", "none", "every"])
def test_a_call_reads_nothing_on_the_host(choice: str) -> None:
    model = unet(**LIKE_SDXL)
    network, x = prepared(model, conditions(model, 4), CHOICES[choice]), images(model, 2, 2)
    network(x, at(0))
    with Reads():
        network(x, at(1))


def test_a_call_leaves_its_input_and_the_parameters_alone() -> None:
    model = unet()
    network, x = prepared(model, conditions(model, 4)), images(model, 2, 2)
    versions = [p._version for p in model.parameters()]
    kept = x.clone()
    network(x, at(0))
    assert torch.equal(x, kept)
    assert [p._version for p in model.parameters()] == versions


def test_parameters_are_shared() -> None:
    model = unet()
    own = {p.data_ptr() for p in model.parameters()}
    network = prepare(model, batch=1, halves=2, max_rows=2, rewrites="none")
    leaves = [leaf for leaf in network.network.modules() if isinstance(leaf, Leaf)]
    assert leaves
    assert all(leaf.weight.data_ptr() in own for leaf in leaves)


class LowRank(nn.Module):
    """A layer with an adapter, as adapter libraries put one in a layer's place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.3 * x[..., : self.weight.shape[0]].flip(-1).sum(-1, keepdim=True)


@pytest.mark.parametrize("choice", ["all", "every"])
def test_adapters_in_the_place_of_layers_are_called(choice: str) -> None:
    model = unet(torch.float64)
    without = unet(torch.float64)
    without.load_state_dict(model.state_dict())
    for block in model.modules():
        for name in ("to_q", "to_k", "to_v", "time_emb_proj"):
            if hasattr(block, name):
                setattr(block, name, LowRank(getattr(block, name)))
        if hasattr(block, "to_out"):
            block.to_out[0] = LowRank(block.to_out[0])
    given = conditions(model, 4)

    def forward(attention: Any) -> None:  # the plain block hands its residual to its own layers
        to_out, split = attention.to_out[0], attention.split_heads

        def run(
            x: Tensor,
            kv: Any = None,
            key_lengths: Any = None,
            residual: Any = None,
            image: Any = None,
        ) -> Tensor:
            from diffusion_fast import ops

            assert image is None
            kv = kv or attention.project_kv(x)
            out = ops.attention(split(attention.to_q(x)), *kv, key_lengths=key_lengths)
            return to_out(out.flatten(2)) + residual

        attention.forward = run

    network = prepared(model, given, CHOICES[choice])
    x = images(model, 2, 2)
    result = network(x, at(0))
    for block in model.modules():
        if hasattr(block, "to_out"):
            forward(block)
    expected = plain(model, x, 0, given)
    assert (result - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert (result - plain(without, x, 0, given)).abs().max() > 1e-2


@pytest.mark.parametrize("rewrites", ["all", REWRITES], ids=["all", "by name"])
@pytest.mark.parametrize(
    "changes", [{}, TEXT_TIME, {"resnet_time_scale_shift": "scale_shift"}], ids=str
)
def test_autocast(changes: dict[str, Any], rewrites: Any) -> None:
    """As near to the model in float32 as the plain one under autocast; on and off again."""
    model = unet(**changes)
    kept, x = conditions(model, 4), images(model, 2, 2, (16, 16))
    network, expected = prepared(model, kept, rewrites), plain(model, x, 0, kept)
    before = network(x, at(0))
    with torch.autocast("cpu", torch.bfloat16):
        network.prepare(kept, GRID)
        result, narrow = network(x, at(0)), plain(model, x, 0, kept)
    assert_close(result, expected, narrow)
    network.prepare(kept, GRID)
    assert torch.equal(network(x, at(0)), before)


def test_hooks_on_layers_run() -> None:
    model = unet(torch.float64)
    seen = []
    model.conv_in.register_forward_hook(lambda *_: seen.append(1))
    check(model, "all")
    assert len(seen) == 4  # two rows, both networks


@pytest.mark.parametrize("size", [0, 6])
def test_bad_grids(size: int) -> None:
    model = unet()
    network = prepare(model, batch=1, halves=1, max_rows=5)
    with pytest.raises(ValueError, match=r"timesteps: expected \[N\] with N in \[1, 5\]"):
        network.prepare(conditions(model, 1), torch.zeros(size))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "context: expected text states"),
        (torch.randn(3, 5, 24), "context: expected shape"),
        ({"context": torch.randn(2, 5, 24), "time_ids": torch.zeros(2, 6)}, "time_ids: expected"),
    ],
)
def test_bad_contexts(context: Any, message: str) -> None:
    network = prepare(unet(), batch=1, halves=2, max_rows=5)
    with pytest.raises(ValueError, match=message):
        network.prepare(context, GRID)


def test_unknown_keywords_of_a_context() -> None:
    network = prepare(unet(), batch=1, halves=2, max_rows=5)
    with pytest.raises(TypeError, match="style"):
        network.prepare({"context": torch.randn(2, 5, 24), "style": torch.zeros(2)}, GRID)


def spied(model: UNet2DCondition, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed of the context and of the time grid, from now on."""
    made: list[str] = []
    for name in ("embed_context", "embed_time"):
        before = getattr(model, name)

        def call(*args: Any, name: str = name, before: Any = before) -> Any:
            made.append(name)
            return before(*args)

        monkeypatch.setattr(model, name, call)
    return made


@pytest.mark.parametrize("changes", [{}, TEXT_TIME], ids=["text", "pooled text"])
def test_a_context_that_is_there_is_not_prepared_again(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """And whatever is another value of the inputs, of the weights or of the surroundings is."""
    model = unet(torch.float64, **changes)
    given, x = conditions(model, 4), images(model, 2, 2)
    network, made = prepared(model, given), spied(model, monkeypatch)

    def prepare_again(given: dict[str, Tensor], grid: Tensor = GRID) -> list[str]:
        made.clear()
        network.prepare(given, grid)
        assert len(set(made)) == len(made)  # each part once
        again = made.copy()
        expected = model(x, grid[1], **given)
        assert error(network(x, at(1)), expected) <= 1e-9
        return again

    with torch.no_grad():
        same = {name: value.clone() for name, value in given.items()}
        assert not prepare_again(same)
        for name in given:
            other = same | {name: same[name] * 1.5}
            assert prepare_again(other)
            assert not prepare_again(other)
        assert prepare_again(same)
        same["context"].mul_(2)  # in place, the caller's own
        assert prepare_again(same) == ["embed_context"]
        assert prepare_again(same, GRID - 1) == ["embed_time"]
        shorter = same | {"context": same["context"][:, :-1]}
        assert prepare_again(shorter)
        assert prepare_again(same, GRID - 1)
        with df.use_backend("reference"):
            assert prepare_again(same, GRID - 1)
        randomize(model)
        network.refresh()
        assert prepare_again(same, GRID - 1)


def test_a_layer_that_is_more_than_its_weights_sees_every_run() -> None:
    model = unet(torch.float64)
    factor = [1.0]
    layer = next(m for n, m in model.named_modules() if n.endswith("attn2.to_k"))
    layer.register_forward_hook(lambda module, args, out: factor[0] * out)
    given, x = conditions(model, 4), images(model, 2, 2)
    network = prepared(model, given)
    before = network(x, at(1))
    factor[0] = 3.0
    network.prepare(given, GRID)
    assert error(network(x, at(1)), plain(model, x, 1, given)) <= 1e-9
    assert error(network(x, at(1)), before) > 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_takes_no_more_than_its_work_says(variant: str) -> None:
    model = unet(**VARIANTS[variant])
    work = prepared(model, conditions(model, 4)).work((9, 6))
    products = [args for name, args in work.calls() if name in ("linear", "conv2d")]
    count = sum(x.numel() // weight.shape[1] * weight.numel() for x, weight, *_ in products)
    assert 0 < count <= work.most < 100 * count
