"""The engine with its rewrites, eager and captured, against the plain loop with the same noise."""

from __future__ import annotations

from typing import Any

import prepared
import pytest
import torch
from numerics import assert_close, error
from tape import TapeCapturer, captured, tape
from torch import Tensor

import diffusion_fast as df
from diffusion_fast.engine.rewrites.plan import IMAGES, LOSSY, REWRITES
from diffusion_fast.samplers import SAMPLERS

__all__ = ["tape"]  # a fixture

SHAPE = (2, 4, 6, 6)
SCHEDULE = df.DiffusionSchedule(timesteps=100)
CONFIG = df.UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=6,
    attention_head_dim=2,
)
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
LEVELS = {torch.float64: 1e-9, torch.float32: 1e-5}
GUIDANCE: dict[str, dict[str, Any]] = {
    "conditional": {"guidance_scale": 1.0},
    "unconditional": {"guidance_scale": 0.0},
    "both": {"guidance_scale": 3.0},
    "mixed": {"guidance_scale": [1.0, 0.0, 3.0, 2.0]},
    "rescale": {"guidance_scale": 3.0, "guidance_rescale": 0.7},
    "interval": {"guidance_scale": 3.0, "guidance_interval": (0.2, 1.5)},
}

# One of each kind of table: what it keeps, draws and reads. (With more calls a step a random
# network's own sensitivity grows past float32's level here, so the others go in float64 below.)
TRIED = (
    *("ddpm", "ddim", "dpmpp_1", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_diffusers", "dpmpp_2m_sde"),
    *("euler", "euler_ancestral", "heun", "unipc", "unipc_3"),
    "dpm_solver_2m",
)


def unet(dtype: torch.dtype) -> df.UNet2DCondition:
    torch.manual_seed(3)
    model = df.UNet2DCondition(CONFIG).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def contexts(dtype: torch.dtype, tokens: int = 3) -> dict[str, Tensor]:
    return {name: torch.randn(2, tokens, 6, dtype=dtype) for name in ("context", "null_context")}


@pytest.mark.parametrize("dtype", LEVELS)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    "share", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["a third", "every sampler"]
)
def test_every_sampler(
    tape: TapeCapturer, dtype: torch.dtype, guidance: str, prediction_type: str, share: int
) -> None:
    """One engine is configured anew for each sampler; the default run meets each pair of sampler
    with prediction type and with guidance."""
    model, both = unet(dtype), contexts(dtype)
    options = {"steps": 4, "prediction_type": prediction_type, **GUIDANCE[guidance]}
    engines = [df.Engine(model, SCHEDULE, graph=graph, **options) for graph in ("off", "loop")]
    z = torch.randn(SHAPE, dtype=dtype)
    place = list(GUIDANCE).index(guidance) + PREDICTIONS.index(prediction_type)
    for sampler in TRIED[place % share :: share]:
        call = {**both, "x_T": z}
        truth = df.sample(
            model, SCHEDULE, SHAPE, sampler=sampler, generator=seeded(), **call, **options
        )
        for engine in engines:
            engine.configure(sampler=sampler)
            x = engine.sample(SHAPE, **call, generator=seeded())
            assert error(x, truth) < LEVELS[dtype], f"{sampler}, {engine.explain()['graph']}"


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_every_other_sampler(tape: TapeCapturer, prediction_type: str) -> None:
    """A third of them with each prediction type, in float64 with guidance, captured."""
    model, both = unet(torch.float64), contexts(torch.float64)
    options = {"steps": 3, "prediction_type": prediction_type, **GUIDANCE["both"]}
    engine = df.Engine(model, SCHEDULE, graph="loop", **options)
    call = {**both, "x_T": torch.randn(SHAPE, dtype=torch.float64)}
    others = [name for name in SAMPLERS if name not in (*TRIED, "pndm")]
    others = others[PREDICTIONS.index(prediction_type) :: 3]
    for sampler in [*others, *["pndm"] * (prediction_type == "epsilon")]:
        truth = df.sample(
            model, SCHEDULE, SHAPE, sampler=sampler, generator=seeded(), **call, **options
        )
        engine.configure(sampler=sampler)
        x = engine.sample(SHAPE, **call, generator=seeded())
        assert error(x, truth) < LEVELS[torch.float64], sampler


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
def test_bfloat16(tape: TapeCapturer, sampler: str) -> None:
    """Held to the error that the plain loop has in bfloat16."""
    model, both = unet(torch.bfloat16), contexts(torch.float64)
    options = {"sampler": sampler, "steps": 4, "guidance_scale": 3.0}
    z = torch.randn(SHAPE)
    narrow = {name: value.bfloat16() for name, value in both.items()}
    plain = df.sample(model, SCHEDULE, SHAPE, x_T=z, **narrow, **options)
    x = df.Engine(model, SCHEDULE, graph="loop", **options).sample(SHAPE, x_T=z, **narrow)
    wide = {name: value.double() for name, value in narrow.items()}
    truth = df.sample(model.double(), SCHEDULE, SHAPE, x_T=z.double(), **wide, **options)
    assert x.dtype == torch.float32
    assert_close(x.bfloat16(), truth, plain.bfloat16())


@pytest.mark.parametrize("dtype", LEVELS)
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_like_sdxl(tape: TapeCapturer, dtype: torch.dtype, sampler: str) -> None:
    """Three levels of other depths, and contexts with pooled text and sizes."""
    model = prepared.unet(dtype, **prepared.LIKE_SDXL)
    options = {"sampler": sampler, "steps": 3, "guidance_scale": 5.0}
    engines = [
        df.Engine(model, SCHEDULE, graph="off", **options),
        df.Engine(model, SCHEDULE, graph="loop", rewrites=REWRITES, **options),
    ]
    images = []
    for size in ((8, 8), (8, 8), (9, 6)):
        shape = 2, 4, *size
        call = {
            "x_T": torch.ones(shape, dtype=dtype),  # so that the prompts make the difference
            "context": prepared.conditions(model, batch=2),
            "null_context": prepared.conditions(model, batch=1),
        }
        images.append(df.sample(model, SCHEDULE, shape, **call, generator=seeded(), **options))
        for engine in engines:
            x = engine.sample(shape, **call, generator=seeded())
            assert error(x, images[-1]) < LEVELS[dtype], engine.explain()["graph"]
    assert error(images[0], images[1]) > 1e-2
    assert len(captured(engines[1], "step")) == 2  # one for each size
    rows = engines[1].explain()["rewrites"]
    off = {row.name for row in rows if not row.on}
    absent = {name for name in off if name.startswith("control")} | {*IMAGES, *LOSSY}
    assert off - absent == {"shared_prefix"}, rows


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("graph", ["off", "loop"])
def test_prompts_lengths_shapes_and_edits(tape: TapeCapturer, graph: str) -> None:
    """One after the other and back again: nothing of an earlier run is left in a later one."""
    model = unet(torch.float64)
    options = {"sampler": "dpmpp_2m", "steps": 4, "guidance_scale": 3.0}
    engine = df.Engine(model, SCHEDULE, graph=graph, **options)
    short, long, other = (contexts(torch.float64, tokens) for tokens in (3, 9, 3))

    def check(shape: tuple[int, ...], call: dict[str, Tensor]) -> None:
        x = engine.sample(shape, **call, generator=seeded())
        assert error(
            x, df.sample(model, SCHEDULE, shape, **call, generator=seeded(), **options)
        ) < (1e-9)

    for call in (short, long, other, short, long):
        check(SHAPE, call)
    check((2, 4, 8, 6), other)
    before = len(captured(engine, "step"))
    check(SHAPE, short)
    check(SHAPE, long)
    assert len(captured(engine, "step")) == before == (3 if graph == "loop" else 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    check(SHAPE, short)
    check((2, 4, 8, 6), long)
    model.down_blocks[0].attentions[0] = unet(torch.float64).down_blocks[0].attentions[0]
    check(SHAPE, short)
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    engine.refresh()
    check(SHAPE, short)


def test_explain_has_a_row_for_each_rewrite() -> None:
    engine = df.Engine(unet(torch.float32), SCHEDULE, sampler="ddim", steps=2)
    assert engine.explain()["rewrites"] == []
    engine.sample(SHAPE, context=torch.randn(2, 3, 6))
    rows = engine.explain()["rewrites"]
    assert rows
    assert any(row.on for row in rows)
    plain = df.Engine(unet(torch.float32), SCHEDULE, sampler="ddim", steps=2, rewrites="none")
    plain.sample(SHAPE, context=torch.randn(2, 3, 6))
    assert plain.explain()["rewrites"] == []
