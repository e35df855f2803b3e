"""The node's U-Net switch on a stand-in for ComfyUI, against the stand-in's own forward."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui_stand_in import CrossAttention, Model, ModelPatcher, UNetModel, randomize
from engine.tape import TapeCapturer
from numerics import assert_close
from torch import Tensor, nn

from diffusion_fast import ops
from diffusion_fast.integrations.comfyui import DiffusionFastPatch
from diffusion_fast.integrations.comfyui.sharing import compared
from diffusion_fast.integrations.comfyui.unet import UNetCalls

LAYOUTS: dict[str, dict[str, Any]] = {
    "sd1": {},
    "sd2": {"linear": True},
    "sdxl": {"linear": True, "depths": (0, 2), "pooled": 40},
    "inpainting": {"in_channels": 9},
}
SIZE = (9, 8)  # an odd side does not just double on the way up


def patcher_of(layout: str = "sd1") -> ModelPatcher:
    return ModelPatcher(Model(randomize(UNetModel(**LAYOUTS[layout]))))


def node(patcher: ModelPatcher, **switches: bool) -> ModelPatcher:
    off = {"attention": False, "norms": False, "graphs": False, "unet": True}
    return DiffusionFastPatch().patch(patcher, **{**off, **switches})[0]


def wrapper(patched: ModelPatcher) -> UNetCalls:
    return patched.model_options["model_function_wrapper"]


def call(layout: str = "sd1", parts: int = 2, images: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of a guided step: parts that share x and t, each with its own prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = parts * images
    found = {
        "x": draw(images, 4, *SIZE).repeat(parts, 1, 1, 1),
        "t": draw(images).abs().repeat(parts),
        "context": draw(rows, 7, 12),
        "parts": parts,
    }
    if "pooled" in LAYOUTS[layout]:
        found["y"] = draw(rows, LAYOUTS[layout]["pooled"])
    if layout == "inpainting":
        found["c_concat"] = draw(images, 5, *SIZE).repeat(parts, 1, 1, 1)
    return found


def fresh(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments; a call takes what a control holds out of its lists."""
    control = arguments.get("control")
    lists = {name: list(given) for name, given in (control or {}).items()}
    return {**arguments, "control": None if control is None else lists}


def hold(patched: ModelPatcher, arguments: dict[str, Any]) -> Tensor:
    """Hold a call by ours to the rule; the truth is the stand-in's own forward in float64."""
    calls, before = wrapper(patched), wrapper(patched).calls
    got = patched.sample(**fresh(arguments))
    assert calls.calls == before + 1, calls.others
    plain = ModelPatcher(patched.model)
    double = ModelPatcher(copy.deepcopy(patched.model).double())
    exact = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in fresh(arguments).items()
    }
    if exact.get("control"):
        exact["control"] = {
            name: [one if one is None else one.double() for one in given]
            for name, given in exact["control"].items()
        }
    assert_close(got, double.sample(**exact), plain.sample(**fresh(arguments)))
    return got


def rows_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches of all convolutions to come."""
    rows: list[int] = []
    original = ops.conv2d

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(x))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(ops, "conv2d", counted)
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [1, 2])
def test_every_layout_is_exact_and_shares_what_guidance_shares(
    layout: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched = node(patcher_of(layout))
    rows = rows_of(monkeypatch)
    hold(patched, call(layout, images=images))
    shared = layout != "sdxl"  # where the pooled text enters the time embedding
    assert rows[0] == (images if shared else 2 * images)
    assert max(rows) == 2 * images


def test_parts_of_other_places_run_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions of one size come in one batch: with another x, which is no half of guidance."""
    patched, arguments = node(patcher_of()), call(parts=3)
    arguments["x"][2:4] += 1  # the second of three
    rows = rows_of(monkeypatch)
    hold(patched, arguments)
    assert rows[0] == 4  # the images of two places
    assert max(rows) == 6


def test_times_that_differ_are_each_images_own() -> None:
    arguments = call("sdxl")
    arguments["y"][:] = arguments["y"][0]
    assert len(set(arguments["t"].tolist())) == 2
    hold(node(patcher_of("sdxl")), arguments)


def test_keys_and_values_of_a_prompt_are_made_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = ops.linear

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.extend(["kv"] * (x.shape[-1] == 12))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(ops, "linear", counted)
    patched, prompt = node(patcher_of()), call()["context"]
    layers = [m for m in patched.model.modules() if isinstance(m, CrossAttention)]
    each = len(layers)  # half of them attend to the prompt, each by keys and values

    def step(seed: int, context: Tensor) -> int:
        before = len(made)
        hold(patched, {**call(seed=seed), "context": context})
        return len(made) - before

    patched.pre_run()
    assert [step(seed, prompt.clone()) for seed in range(3)] == [each, 0, 0]
    other = prompt + 1
    assert [step(0, other), step(1, prompt), step(2, other)] == [each, 0, 0]
    to_k = layers[1].to_k  # what hooks of ComfyUI do between two steps, in a way nothing counts
    to_k.weight.data.copy_(to_k.weight * 2)
    assert [step(0, prompt), step(1, prompt)] == [each, 0]
    patched.cleanup()
    assert step(0, prompt) == each


def test_weights_are_comfyuis_own() -> None:
    patched = node(patcher_of())
    patched.sample(**call())
    theirs = {p.untyped_storage().data_ptr() for p in patched.model.parameters()}
    _, (network, leaves, _) = wrapper(patched)._linked
    assert {p.untyped_storage().data_ptr() for p in network.parameters()} <= theirs
    assert {leaf.weight.untyped_storage().data_ptr() for leaf in leaves} <= theirs
    assert len(list(network.parameters())) + len(leaves) > len(theirs) / 2


def test_a_lora_is_noticed_when_it_comes_and_when_it_goes() -> None:
    patcher = patcher_of()
    patched, arguments = node(patcher), call()
    before = hold(patched, arguments)
    lora = patched.clone()  # as the node behind this one makes it
    for name, weight in patcher.model.named_parameters():
        if name.endswith(("to_k.weight", "in_layers.2.weight", "proj.weight", "norm.bias")):
            lora.patches[name] = 0.3, torch.randn_like(weight) * weight.std()
    lora.load()
    moved = hold(lora, arguments)
    assert (moved - before).abs().max() > 0.01 * before.abs().max()
    lora.detach()
    assert torch.equal(patched.sample(**arguments), before)


@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_control_is_added_where_comfyui_adds_it(layout: str) -> None:
    patched, arguments = node(patcher_of(layout)), call(layout)
    torch.manual_seed(0)
    before = patched.sample(**arguments)
    sizes = [(64, 9, 8), (64, 9, 8), (64, 9, 8), (64, 5, 4), (128, 5, 4), (128, 5, 4)]
    controlnet = [torch.randn(4, *size) for size in sizes]
    middle = [torch.randn(1, *sizes[-1])]
    for control in (
        {"output": controlnet, "middle": middle},
        {"output": [None, *controlnet[4:]]},  # a short list is of the deepest
    ):
        got = hold(patched, {**arguments, "control": control})
        assert (got - before).abs().max() > 0.01 * before.abs().max()
    # A T2I-Adapter's: one for each level, where it ends; taken from the end of the list.
    first = 2 if layout == "sd1" else 3
    places = {first: torch.randn(4, *sizes[first]), 5: torch.randn(4, *sizes[5])}
    adapter = {"input": [places.get(i) for i in range(6)][::-1], "middle": [None]}
    got = hold(patched, {**arguments, "control": adapter})
    assert (got - before).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize(
    ("control", "why"),
    [
        ({"input": [None, torch.ones(4, 64, 9, 8), None]}, "control['input'] at block 1"),
        ({"middle": [torch.ones(4, 128, 1, 1)]}, "control['middle'] of [4, 128, 1, 1] where"),
        ({"else": [torch.ones(1)]}, "control['else']"),
    ],
)
def test_control_that_has_no_place_is_left_to_comfyui(control: Any, why: str) -> None:
    patcher = patcher_of()
    patched, arguments = node(patcher), {**call(), "control": control}
    got = patched.sample(**fresh(arguments))
    assert torch.equal(got, patcher.sample(**fresh(arguments)))
    assert why in next(iter(wrapper(patched).others))


def replaced(patcher: ModelPatcher) -> None:
    patcher.set_model_attn2_replace(lambda q, k, v, options: q, "middle", 0)


def block_patch(patcher: ModelPatcher) -> None:
    patcher.set_model_input_block_patch(lambda h, options: 1.5 * h)


def overridden(patcher: ModelPatcher) -> None:
    patcher.model_options["transformer_options"]["optimized_attention_override"] = None


def on_a_norm(patcher: ModelPatcher) -> None:
    norm = patcher.model.diffusion_model.out[0]
    norm.weight_function = (lambda weight: weight * 3,)


def hook(patcher: ModelPatcher) -> None:
    block = patcher.model.diffusion_model.input_blocks[1][0]
    block.register_forward_hook(lambda module, args, out: 2 * out)


def own_forward(patcher: ModelPatcher) -> None:
    unet = patcher.model.diffusion_model
    plain = unet._forward
    unet._forward = lambda *args, **kwargs: 2 * plain(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (replaced, "other nodes replace attn2 of middle 0"),
        (block_patch, "other nodes patch its blocks (input_block_patch)"),
        (overridden, "another node replaces its attention"),
        (on_a_norm, "out.0: expected GroupNorm"),
        (hook, "input_blocks.1.0: forward hooks"),
        (own_forward, "a _forward of its own"),
    ],
)
@pytest.mark.parametrize("order", ["before", "behind"])
def test_what_needs_the_inside_runs_on_the_op_patches(
    change: Callable[[ModelPatcher], None],
    why: str,
    order: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    patcher = patcher_of()
    switches = {"attention": True, "norms": True}
    if order == "before":
        change(patcher)
    patched, on_ops = (node(patcher, **switches, unet=unet) for unet in (True, False))
    if order == "behind":
        change(patched)
        if change in (replaced, block_patch, overridden):  # the others change the model itself
            change(on_ops)
    on_ops.load()
    wanted = on_ops.sample(**call())
    on_ops.detach()
    patched.load()
    for _ in range(2):
        assert torch.equal(patched.sample(**call()), wanted)
    calls = wrapper(patched)
    assert calls.calls == 0
    assert [(n, why in reason) for reason, n in calls.others.items()] == [(2, True)]
    assert caplog.text.count(why) == 1


def test_op_patches_and_what_their_removal_leaves_are_no_others(caplog: Any) -> None:
    patched, arguments = node(patcher_of(), attention=True, norms=True), call()
    patched.load()
    hold(patched, arguments)
    patched.detach()  # leaves bound methods as attributes
    hold(patched, arguments)
    patched.load()
    hold(patched, arguments)
    assert not wrapper(patched).others


def test_layers_whose_weights_are_changed_on_their_way_are_called() -> None:
    """With little memory ComfyUI applies a LoRA so, and casts what waits in another dtype."""
    patched, arguments = node(patcher_of()), call()
    before = hold(patched, arguments)
    unet = patched.model.diffusion_model
    attention = unet.input_blocks[1][1].transformer_blocks[0].attn2
    for layer in (attention.to_k, unet.input_blocks[2][0].in_layers[2], unet.time_embed[0]):
        layer.weight_function, layer.comfy_cast_weights = (lambda weight: weight * 2,), True
    moved = hold(patched, arguments)
    assert (moved - before).abs().max() > 0.01 * before.abs().max()
    unet.middle_block[1].proj_in.bfloat16()
    unet.middle_block[1].proj_in.comfy_cast_weights = True
    assert (hold(patched, arguments) - moved).abs().max() > 1e-5 * before.abs().max()


def test_the_unet_is_as_it_was_after_a_call() -> None:
    patched = node(patcher_of())
    unet = patched.model.diffusion_model
    before = dict(vars(unet))
    patched.sample(**call())
    assert vars(unet) == before
    with pytest.raises(RuntimeError):
        patched.sample(**{**call(), "t": torch.ones(3)})
    assert vars(unet) == before


def test_a_wrapper_that_was_there_is_called_inside() -> None:
    patcher = patcher_of()
    patcher.set_model_unet_function_wrapper(
        lambda apply, call: 2 * apply(call["input"], call["timestep"], **call["c"])
    )
    wanted = patcher.sample(**call())
    patched = node(patcher)
    got = patched.sample(**call())
    assert wrapper(patched).calls == 1
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    twice = node(patched)
    assert (twice.sample(**call()) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not wrapper(twice).others
    assert wrapper(twice.clone()) is wrapper(twice)


def test_a_run_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    patched = node(patcher_of())
    caplog.set_level(logging.INFO)
    patched.pre_run()
    patched.sample(**call())
    block_patch(patched)
    patched.sample(**call())
    patched.cleanup()
    told = "1 calls of the U-Net by diffusion_fast, 1 by ComfyUI (other nodes patch its blocks"
    assert told in caplog.text


def test_graphs_replay_calls_by_ours() -> None:
    patcher = patcher_of()
    patched = node(patcher, graphs=True)
    graphed, capturer = patched.model_options["model_function_wrapper"], TapeCapturer()
    graphed.capturer = capturer
    for seed in range(3):
        wanted = patcher.sample(**call(seed=seed))
        got = patched.sample(**call(seed=seed))
        assert graphed.why is None
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert capturer.captures == 1
    assert not graphed.unet.others
    block_patch(patched)
    patched.sample(**call())
    assert graphed.why == "patches of other nodes may act differently at each step"
    assert len(graphed.unet.others) == 1


def test_another_kind_of_unet_is_refused_by_name() -> None:
    patcher = patcher_of()
    del patcher.model.diffusion_model.out
    with pytest.raises(ValueError, match=r"unet: expected a model that diffusion_fast has"):
        node(patcher)
    assert "model_function_wrapper" not in patcher.model_options


def test_what_is_compared() -> None:
    x = torch.tensor([1.0, 2, 1, 2, 3, 2])[:, None]
    assert compared([x], 3, [(x, x), (x, -x)]) == (
        ([0, 1, 4, 5], [0, 1, 0, 1, 2, 3]),
        [True, False],
    )
    assert compared([x, torch.arange(6.0)], 3, []) == (None, [])
    assert compared([x], 1, []) == (None, [])
    assert compared([x], 4, []) == (None, [])  # no parts of equal size
    gap = torch.tensor([float("nan")] * 2)[:, None]
    assert compared([gap], 2, []) == (None, [])


def test_a_model_that_is_no_unet_of_comfyuis_is_left_to_itself() -> None:
    patcher = patcher_of()
    block: Any = patcher.model.diffusion_model.input_blocks[1]
    block.append(nn.Conv2d(64, 64, 1))  # a node that puts modules in, such as for motion
    wanted = patcher.sample(**call())
    patched = node(patcher)
    assert torch.equal(patched.sample(**call()), wanted)
    assert "input_blocks.1.2: a Conv2d with weights" in next(iter(wrapper(patched).others))
