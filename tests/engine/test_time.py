"""How the time enters the residual blocks: through a convolution's bias, or in the norm behind it.

Where it does the latter, as on a GPU, the norm picks the row of its table by the device's counter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close, error
from prepared import (
    GRID,
    LIKE_SDXL,
    TEXT_TIME,
    at,
    check,
    conditions,
    images,
    plain,
    prepared,
    randomize,
    unet,
)
from tape import TapeCapturer, tape
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion_fast as df
from diffusion_fast import ops
from diffusion_fast.engine.buffers import Clock
from diffusion_fast.engine.rewrites import leaves
from diffusion_fast.engine.rewrites.cost import DEVICE, Counter
from diffusion_fast.engine.rewrites.plan import REWRITES, RewritePlan
from diffusion_fast.engine.rewrites.prepare import PreparedUNet
from diffusion_fast.models import UNet2DCondition
from diffusion_fast.models.blocks import ResBlock

__all__ = ["tape"]  # a fixture

VARIANTS: dict[str, dict[str, Any]] = {
    "small": {},
    "like_sdxl": LIKE_SDXL,
    "text_time": TEXT_TIME,
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift_text_time": {"resnet_time_scale_shift": "scale_shift", **TEXT_TIME},
}
CHOICES: dict[str, Any] = {
    "all": "all",
    "every": REWRITES,
    "no table": set(REWRITES) - {"time_table"},
    "no epilogues": set(REWRITES) - {"epilogues"},
    "table alone": ["time_table"],
}


@pytest.fixture(params=["convolution", "norm"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the time enters, as on a CPU and as on a GPU."""
    monkeypatch.setattr(leaves, "joins_norm", lambda _: request.param == "norm")
    return request.param


@pytest.fixture
def in_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "joins_norm", lambda _: True)


def test_the_device_decides() -> None:
    assert not leaves.joins_norm(torch.device("cpu"))
    assert leaves.joins_norm(torch.device("cuda"))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_kind_of_model(variant: str, choice: str, place: str) -> None:
    check(unet(torch.float64, **VARIANTS[variant]), CHOICES[choice])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype, place: str) -> None:
    check(unet(dtype), "all")
    check(unet(dtype, **LIKE_SDXL), "all", batch=1, halves=1)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_device_may_count(variant: str, choice: str, place: str) -> None:
    """The same bits as when the host counts, and so the same as in a run that is not captured."""
    model = unet(torch.float64, **VARIANTS[variant])
    network, x = prepared(model, conditions(model, 4), CHOICES[choice]), images(model, 2, 2)
    for row in range(3):
        clock = at(0)
        with clock.on_device():
            for _ in range(row):
                clock.advance()
            assert torch.equal(network(x, clock), network(x, at(row)))


@pytest.mark.parametrize("variant", ["small", "like_sdxl", "scale_shift"])
def test_the_kernel_picks_the_row(variant: str, in_norm: None) -> None:
    """In Triton's interpreter, on a model with the tables of a GPU."""
    pytest.importorskip("triton")
    model = unet(torch.float64, **VARIANTS[variant])
    given, x = conditions(model, 2), images(model, 1, 2, (4, 4))
    network = prepared(model, given, batch=1)
    clock = at(0)
    with ops.use_backend(group_norm_silu="triton"), clock.on_device():
        clock.advance()
        result = network(x, clock)
    assert ops.explain("group_norm_silu").last_ran == "triton"
    assert error(result, plain(model, x, 1, given)) <= 1e-9


def twin(**changes: Any) -> tuple[UNet2DCondition, RewritePlan]:
    """A model without data, and the plan of all rewrites for it."""
    with DEVICE:
        model = UNet2DCondition(unet(**changes).config).eval()
    return model, RewritePlan(1, 1, 5, torch.float32, DEVICE, {})


@pytest.mark.parametrize("variant", ["small", "scale_shift"])
def test_no_op_but_the_norm_picks(variant: str, in_norm: None) -> None:
    model, plan = twin(**VARIANTS[variant])
    network = PreparedUNet(model, plan)
    with torch.no_grad(), DEVICE:
        network.prepare(torch.empty(1, 5, 24), torch.empty(3))
        x, clock = torch.empty(1, 4, 8, 8), Clock(DEVICE)
        with Counter() as by_host:
            network(x, clock)
        with clock.on_device(), Counter() as by_device:
            network(x, clock)
    launches = {name: cost.launches for name, cost in by_host.by_op.items()}
    assert launches == {name: cost.launches for name, cost in by_device.by_op.items()}
    assert "index_select" not in launches


def test_the_first_convolution_has_no_bias_of_its_own(place: str) -> None:
    model, plan = twin()
    made = PreparedUNet(model, plan).network
    blocks = [name for name, m in model.named_modules() if isinstance(m, ResBlock)]
    kind = leaves.TimeInBias if place == "convolution" else leaves.TimeInNorm
    assert blocks
    for name in blocks:
        block = made.get_submodule(name)
        assert block.conv1.weights.bias is None
        assert block.conv2.weights.bias is model.get_submodule(name).conv2.bias
        assert isinstance(block.timed, kind)


@pytest.mark.parametrize("variant", ["small", "text_time", "scale_shift"])
@pytest.mark.parametrize("mode", ["loop", "step"])
def test_captured(variant: str, mode: str, place: str, tape: TapeCapturer) -> None:
    """One captured step serves every row."""
    model = unet(torch.float64, **VARIANTS[variant])
    given, schedule = conditions(model, 2), df.DiffusionSchedule(timesteps=100)
    contexts = {
        name: {key: value[i : i + 1] for key, value in given.items()}
        for i, name in enumerate(("context", "null_context"))
    }
    x_T = torch.randn(1, 4, 8, 8)
    options: dict[str, Any] = {"sampler": "ddim", "steps": 4, "guidance_scale": 3.0}
    eager, captured, truth = (
        df.Engine(model, schedule, graph, rewrites=rewrites, **options).sample(
            x_T.shape, **contexts, x_T=x_T
        )
        for graph, rewrites in (("off", "all"), (mode, "all"), ("off", "none"))
    )
    assert tape.captures == 1
    assert error(captured, eager) <= 1e-12  # PyTorch's sampler step rounds differently
    assert error(captured, truth) <= 1e-9


def test_refresh_follows_the_bias(place: str) -> None:
    model = unet(torch.float64)
    given, x = conditions(model, 4), images(model, 2, 2)
    network = prepared(model, given)
    network(x, at(0))
    assert network.times is not None
    tables = [table.data_ptr() for table in tree_leaves(network.times.tables)]
    randomize(model)
    network.refresh()
    network.prepare(given, GRID)
    assert error(network(x, at(1)), plain(model, x, 1, given)) <= 1e-9
    assert [table.data_ptr() for table in tree_leaves(network.times.tables)] == tables


def test_a_hooked_convolution_keeps_its_bias(place: str) -> None:
    model = unet(torch.float64)
    seen: list[int] = []
    convs = [m.conv1 for m in model.modules() if isinstance(getattr(m, "conv1", None), nn.Module)]
    convs[0].register_forward_hook(lambda *_: seen.append(1))
    check(model, "all")
    assert len(seen) == 4  # two rows, both networks


class Casts(TorchDispatchMode):
    """The addresses of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.places.add(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["small", "text_time", "scale_shift"])
def test_autocast(variant: str, place: str) -> None:
    """Where the tables are wider than what they join: a row of them is cast."""
    model = unet(**VARIANTS[variant])
    kept, x = conditions(model, 4), images(model, 2, 2, (16, 16))
    network, expected = prepared(model, kept), plain(model, x, 0, kept)
    results: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        network.prepare(kept, GRID)
        narrow, clock = plain(model, x, 0, kept), at(0)
        results.append(network(x, clock))
        with clock.on_device(), Casts() as casts:
            results.append(network(x, clock))
    assert casts.places
    assert network.times is not None
    assert not casts.places & {table.data_ptr() for table in tree_leaves(network.times.tables)}
    assert_close(results[0], expected, narrow)
    assert torch.equal(*results)
