"""Which rewrites are used, why not, and what the rows of explain() say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prepared import LIKE_SDXL, TEXT_TIME, at, conditions, images, prepared, unet

from diffusion_fast import DiffusionSchedule, Engine
from diffusion_fast.engine.rewrites import plan
from diffusion_fast.engine.rewrites.controlled import prepare
from diffusion_fast.engine.rewrites.plan import CONTROL, IMAGES, LOSSY, REWRITES, make_plan
from diffusion_fast.models import UNet2DCondition

# What needs networks beside the U-Net or its own name, and why it is off without.
ABSENT = dict.fromkeys(CONTROL, "no ControlNet, no T2I-Adapter")
ABSENT |= dict.fromkeys(IMAGES, "the model has no IP-Adapter")
ABSENT |= dict.fromkeys(LOSSY, "lossy, and not asked for by name")


def decisions(model: UNet2DCondition, rewrites: Any = "all", **sizes: int) -> dict[str, str]:
    sizes = {"batch": 1, "halves": 2, "max_rows": 10, **sizes}
    return make_plan(model, rewrites=rewrites, **sizes).off


def test_all_leaves_out_what_does_not_pay() -> None:
    off = decisions(unet())
    assert off.keys() == {"folded_layer_norm", "split_skips", *ABSENT}
    assert all("on a CPU" in why for name, why in off.items() if name not in ABSENT)
    with torch.device("meta"):  # any other device reads both sources where they lie
        off = decisions(UNet2DCondition(unet().config))
    assert off.keys() == {"folded_layer_norm", "recorded_step", *ABSENT}
    assert off["recorded_step"] == "for CPUs alone: on a GPU a graph holds the step"
    assert "not measured" in off["folded_layer_norm"]


def test_text_and_images_in_one_call_on_every_device() -> None:
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = UNet2DCondition(unet().config)
        model.ip_adapters.append(torch.nn.Identity())
        assert not decisions(model).keys() & set(IMAGES)


def test_by_name_it_is_used_all_the_same() -> None:
    assert decisions(unet(), REWRITES) == ABSENT
    assert "folded_layer_norm" not in decisions(unet(), ["folded_layer_norm"])


def test_none() -> None:
    assert decisions(unet(), "none") == dict.fromkeys(REWRITES, "not asked for") | ABSENT


@pytest.mark.parametrize("name", sorted(REWRITES.keys() - ABSENT.keys()))
def test_one_by_name(name: str) -> None:
    for rewrites in (name, [name], {name}):
        others = dict.fromkeys(set(REWRITES) - {name}, "not asked for")
        assert decisions(unet(), rewrites) == others | ABSENT


@pytest.mark.parametrize("rewrites", ["fast", ["fused_qkv", "fast"], [3]])
def test_unknown_names_are_refused_by_name(rewrites: Any) -> None:
    with pytest.raises(
        ValueError, match=r"rewrites: expected one of .*fused_qkv.*, got ('fast'|3)"
    ):
        decisions(unet(), rewrites)


@pytest.mark.parametrize("size", ["batch", "halves", "max_rows"])
def test_sizes_below_one_are_refused(size: str) -> None:
    with pytest.raises(ValueError, match=f"{size}: expected a positive integer, got 0"):
        decisions(unet(), **{size: 0})


@pytest.mark.parametrize(
    ("name", "model", "sizes", "why"),
    [
        ("shared_prefix", {}, {"halves": 1}, "one half of guidance runs"),
        ("shared_prefix", TEXT_TIME, {}, "pooled text enters the time embedding"),
        (
            "folded_upsample",
            {
                "block_out_channels": (16,),
                "down_block_types": ("CrossAttnDownBlock2D",),
                "up_block_types": ("CrossAttnUpBlock2D",),
            },
            {},
            "the model has one level",
        ),
    ],
)
@pytest.mark.parametrize("rewrites", ["all", REWRITES], ids=["all", "by name"])
def test_what_does_not_apply(
    name: str, model: dict[str, Any], sizes: dict[str, int], why: str, rewrites: Any
) -> None:
    assert decisions(unet(**model), rewrites, **sizes)[name] == why


def test_a_time_table_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unet()
    widths = sum(block.conv1.out_channels for block in model.modules() if hasattr(block, "conv1"))
    monkeypatch.setattr(plan, "TABLE_LIMIT", 10 * widths * 4)
    assert "time_table" not in decisions(model, max_rows=10)
    assert "MB, more than" in decisions(model, max_rows=11)["time_table"]
    pooled = unet(**TEXT_TIME)  # a row for each image of both halves
    assert "MB, more than" in decisions(pooled, max_rows=10)["time_table"]


def test_hooks_on_blocks_are_refused() -> None:
    model = unet()
    model.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model: expected .* got one with a hook on 'mid_block'"):
        decisions(model)


@pytest.mark.parametrize("name", ["", "mid_block", "down_blocks.0.attentions.0.norm"])
def test_a_model_with_hooks_on_blocks_runs_as_it_is_and_says_so(name: str) -> None:
    model = unet(torch.float64)
    given, x = conditions(model, 4), images(model, 2, 2)
    schedule = DiffusionSchedule(timesteps=100)
    engine = Engine(model, schedule, sampler="ddim", steps=2, guidance_scale=3.0)
    context, null_context = given["context"].chunk(2)

    def drawn(by: Engine) -> torch.Tensor:
        return by.sample(x[:2].shape, context, null_context, x_T=x[:2])

    drawn(engine)
    assert any(row.on for row in engine.explain()["rewrites"])
    module = model.get_submodule(name)
    module.register_forward_hook(lambda module, args, output: 1.5 * output)
    plain = Engine(
        model, schedule, "off", rewrites="none", sampler="ddim", steps=2, guidance_scale=3.0
    )
    assert torch.equal(drawn(engine), drawn(plain))
    rows = engine.explain()["rewrites"]
    assert [row.name for row in rows] == [*REWRITES, *LOSSY]
    assert not any(row.on for row in rows)
    assert f"a hook on {name or 'UNet2DCondition'!r}" in rows[0].why
    with pytest.raises(ValueError, match="model: expected one without hooks on its blocks"):
        drawn(Engine(model, schedule, rewrites=["epilogues"], sampler="ddim", steps=2))


def test_explain_before_the_first_call() -> None:
    rows = prepare(unet(), batch=1, halves=2, max_rows=3).explain()
    assert [row.name for row in rows] == [*REWRITES, *LOSSY]
    assert all(row.launches is row.bytes is row.flops is None for row in rows)
    off = {row.name for row in rows if not row.on}
    assert off == {"split_skips", "folded_layer_norm", *ABSENT}


def test_explain_counts_what_is_saved() -> None:
    model = unet(layers_per_block=2, downsample_padding=0)
    network = prepared(model, conditions(model, 4, tokens=7), REWRITES)
    network(images(model, 2, 2, (12, 8)), at(0))
    rows = {row.name: row for row in network.explain()}
    assert all(row.on for row in rows.values() if row.name not in ABSENT)
    transformers, tokens, width = 2 + 3 + 1, 7, 24  # down, up, middle

    cached = rows["cached_context"]
    channels = 16 * (2 + 3) + 32
    assert cached.launches == 2 * transformers
    assert cached.flops == 2 * (4 * tokens) * width * 2 * channels

    fused = rows["fused_qkv"]
    assert (fused.launches, fused.flops) == (2 * transformers, 0)
    # The 2x2 kernels save 5 of 9 products, and have a row and a column more than the small image.
    up = rows["folded_upsample"]
    assert up.flops == 2 * 4 * 32 * 32 * (9 * 12 * 8 - 4 * 4 * 7 * 5)
    # Until the first cross-attention: conv_in, a residual block, a third of a transformer.
    assert rows["shared_prefix"].flops > 0
    assert rows["split_skips"].launches == 2 * 3
    # The statistics are a launch, as the norm was, and write two numbers instead of a row.
    assert rows["folded_layer_norm"].launches == 0
    assert rows["folded_layer_norm"].bytes > 0
    assert rows["removed_no_ops"].launches == 1
    assert rows["time_table"].launches > 10
    assert rows["epilogues"].launches > transformers
    assert rows["epilogues"].bytes > 0


def test_explain_does_not_disturb_the_network() -> None:
    model = unet(**LIKE_SDXL)
    network = prepared(model, conditions(model, 4), REWRITES)
    x = images(model, 2, 2)
    before = network(x, at(0))
    rows = {row.name: row for row in network.explain()}
    assert not rows["shared_prefix"].on
    assert (rows["shared_prefix"].launches, rows["shared_prefix"].flops) == (0, 0)
    assert torch.equal(network(x, at(0)), before)
