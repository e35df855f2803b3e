"""The ComfyUI node on a stand-in for ComfyUI's ModelPatcher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_stand_in import Model, ModelPatcher, UNetModel, randomize
from engine.tape import TapeCapturer
from torch import Tensor, nn

from diffusion_fast import ops
from diffusion_fast.integrations import comfyui
from diffusion_fast.integrations.comfyui import DiffusionFastPatch
from diffusion_fast.integrations.comfyui.attention import attend, transformer_blocks
from diffusion_fast.integrations.comfyui.norms import norms

Call = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def patcher() -> ModelPatcher:
    return ModelPatcher(Model(randomize(UNetModel())))


def call(seed: int = 0, batch: int = 2) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return draw(batch, 4, 6, 6), draw(batch).abs(), draw(batch, 7, 12)


def patch(patcher: ModelPatcher, **switches: bool) -> ModelPatcher:
    off = {"attention": False, "norms": False, "graphs": False}
    return DiffusionFastPatch().patch(patcher, **{**off, **switches})[0]


def count(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """A list that grows with each call of an op."""
    calls: list[str] = []
    original = getattr(ops, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, name, counted)
    return calls


@pytest.mark.parametrize(
    ("switches", "op", "times"),
    [({"attention": True}, "attention", 12), ({"norms": True}, "group_norm_silu", 31)],
)
def test_a_patched_model_runs_the_op_and_draws_the_same(
    patcher: ModelPatcher,
    switches: dict[str, bool],
    op: str,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = patcher.sample(*call())
    patched = patch(patcher, **switches)
    calls = count(monkeypatch, op)
    patched.load()
    after = patched.sample(*call())
    assert len(calls) == times
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    patched.detach()
    assert torch.equal(patcher.sample(*call()), before)
    assert len(calls) == times


def test_the_model_itself_stays_as_it_is(patcher: ModelPatcher) -> None:
    patch(patcher, attention=True, norms=True, graphs=True)
    assert patcher.model_options == {"transformer_options": {}}
    assert patcher.object_patches == {}
    assert patcher.callbacks == {}


def test_every_transformer_and_norm_is_found(patcher: ModelPatcher) -> None:
    unet = patcher.model.diffusion_model
    blocks = set(transformer_blocks(unet))
    assert blocks == {("input", 1), ("input", 2), ("middle", 0)} | {
        ("output", i) for i in (3, 4, 5)
    }
    found = {name: silu for name, _, silu in norms(unet)}
    assert len(found) == sum(isinstance(m, nn.GroupNorm) for m in unet.modules())
    assert found["out.0"] == "out.1"
    assert found["middle_block.1.norm"] is None


def test_weights_are_read_at_every_call(patcher: ModelPatcher) -> None:
    """ComfyUI's own patches, such as LoRA, replace them."""
    patched = patch(patcher, norms=True)
    patched.load()
    norm = patcher.model.diffusion_model.out[0]
    norm.weight = nn.Parameter(norm.weight * 3)
    got = patched.sample(*call())
    patched.detach()
    wanted = patcher.sample(*call())
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_weights_that_change_on_their_way_are_left_to_comfyui(patcher: ModelPatcher) -> None:
    norm = patcher.model.diffusion_model.out[0]
    plain = type(norm).forward
    norm.weight_function = [lambda weight: weight * 3]
    norm.forward = lambda x: plain(norm, x) * 3
    wanted = patcher.sample(*call())
    patched = patch(patcher, norms=True)
    patched.load()
    got = patched.sample(*call())
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_attention_that_another_node_replaced_stays_its_own(
    patcher: ModelPatcher, caplog: pytest.LogCaptureFixture
) -> None:
    def other(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
        return q

    patcher.set_model_attn2_replace(other, "middle", 0)
    patched = patch(patcher, attention=True)
    replaced = patched.model_options["transformer_options"]["patches_replace"]
    assert replaced["attn2"]["middle", 0] is other
    assert replaced["attn1"]["middle", 0] is attend
    assert "other nodes keep the attention of attn2 of middle block 0" in caplog.text


def test_keys_of_another_batch_are_split_among_the_queries() -> None:
    """HyperTile tiles the queries alone, and ComfyUI reads keys and values in their batch."""
    q, k, v = torch.randn(8, 16, 32), torch.randn(2, 64, 32), torch.randn(2, 64, 32)
    tiles = k.view(8, 16, 32), v.view(8, 16, 32)
    assert torch.equal(attend(q, k, v, {"n_heads": 4}), attend(q, *tiles, {"n_heads": 4}))


def graphed(patcher: ModelPatcher) -> tuple[ModelPatcher, Any, TapeCapturer]:
    patched = patch(patcher, graphs=True)
    calls, capturer = patched.model_options["model_function_wrapper"], TapeCapturer()
    calls.capturer = capturer
    patched.load()
    return patched, calls, capturer


def test_calls_are_replayed(patcher: ModelPatcher) -> None:
    patched, calls, capturer = graphed(patcher)
    for seed in range(3):
        got = patched.sample(*call(seed))
        assert calls.why is None
        assert torch.equal(got, patcher.sample(*call(seed)))
    assert capturer.captures == 1
    for batch in range(3, 9):
        patched.sample(*call(0, batch))
    assert len(calls) == 4  # the newest shapes
    assert capturer.captures == 7


def test_graphs_are_dropped_when_the_model_is_moved(patcher: ModelPatcher) -> None:
    patched, calls, capturer = graphed(patcher)
    patched.sample(*call())
    patched.detach()
    assert len(calls) == 0
    with torch.no_grad():  # elsewhere, and back at other addresses
        for parameter in patcher.model.parameters():
            parameter.data = parameter.data.clone().mul_(1.5)
    patched.load()
    assert torch.equal(patched.sample(*call()), patcher.sample(*call()))
    assert capturer.captures == 2


def test_what_may_change_with_the_step_is_never_captured(patcher: ModelPatcher) -> None:
    patched, calls, capturer = graphed(patcher)
    control = [torch.ones(2, 128, 3, 3)]
    got = patched.sample(*call(), control={"middle": list(control)})
    assert torch.equal(got, patcher.sample(*call(), control={"middle": list(control)}))
    assert not torch.equal(got, patcher.sample(*call()))
    assert calls.why == "control may act differently at each step"
    patched.set_model_attn1_replace(lambda q, k, v, options: q, "middle", 0)
    patched.sample(*call())
    assert calls.why == "patches of other nodes may act differently at each step"
    assert capturer.captures == 0


def test_a_failed_capture_is_told_once_and_the_model_still_draws(
    patcher: ModelPatcher, caplog: pytest.LogCaptureFixture
) -> None:
    patched, calls, capturer = graphed(patcher)
    capturer.failures.append(RuntimeError("no room"))
    for _ in range(2):
        assert torch.equal(patched.sample(*call()), patcher.sample(*call()))
        assert calls.why == "capture failed: no room"
    assert caplog.text.count("no room") == 1
    assert len(calls) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_the_reason_is_told(patcher: ModelPatcher) -> None:
    patched = patch(patcher, graphs=True)
    assert torch.equal(patched.sample(*call()), patcher.sample(*call()))
    assert patched.model_options["model_function_wrapper"].why == "there is no CUDA device"


def test_errors_name_what_is_wrong(patcher: ModelPatcher) -> None:
    with pytest.raises(ValueError, match=r"model: expected a U-Net .*, got Linear"):
        patch(ModelPatcher(Model(nn.Linear(1, 1))), attention=True)
    patcher.set_model_unet_function_wrapper(lambda apply, call: None)
    with pytest.raises(ValueError, match="graphs: expected a model whose calls no other node"):
        patch(patcher, graphs=True)


def test_the_node_and_its_example_workflow_fit() -> None:
    node = comfyui.NODE_CLASS_MAPPINGS["DiffusionFastPatch"]
    inputs = {name: kind for part in node.INPUT_TYPES().values() for name, kind in part.items()}
    assert comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys() == comfyui.NODE_CLASS_MAPPINGS.keys()
    assert hasattr(node, node.FUNCTION)
    workflow = json.loads((Path(comfyui.__file__).parent / "workflow.json").read_text())
    used = [one for one in workflow.values() if one["class_type"] == "DiffusionFastPatch"]
    assert [one["inputs"].keys() for one in used] == [inputs.keys()]
    links = [v for one in workflow.values() for v in one["inputs"].values() if isinstance(v, list)]
    assert all(source in workflow for source, _ in links)
