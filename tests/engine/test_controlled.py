"""A prepared U-Net with ControlNets and T2I-Adapters computes what the plain one does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from numerics import error
from prepared import GRID, LIKE_SDXL, TEXT_TIME, at, conditions, images, randomize, unet
from torch import Tensor
from torch.utils._pytree import tree_leaves

import diffusion_fast as df
from diffusion_fast.engine.rewrites.controlled import PreparedControlled, prepare
from diffusion_fast.engine.rewrites.plan import CONTROL, IMAGES, REWRITES, RewriteReport
from diffusion_fast.models.controlled import ControlledUNet
from diffusion_fast.models.controlnet import ControlNet
from diffusion_fast.models.controlnet_config import ControlNetConfig
from diffusion_fast.models.t2i_adapter import T2IAdapter
from diffusion_fast.models.t2i_adapter_config import T2IAdapterConfig

CHOICES: dict[str, str | Iterable[str]] = {
    **{name: [name] for name in CONTROL},
    "all": "all",
    "none": "none",
    "every": REWRITES,
}
CLOSE = 1e-9  # float64


def controlled(
    nets: int = 1, adapters: int = 0, guess_mode: bool = False, **changes: Any
) -> ControlledUNet:
    """All random, in float64; the second network has other weights."""
    base = unet(torch.float64, **changes)
    widths = base.config.block_out_channels
    controls: list[Any] = []
    for _ in range(nets):
        hint = {"conditioning_embedding_out_channels": (4, 4, 6, 8)}
        controls.append(ControlNet(ControlNetConfig(base.config, **hint)))
    for _ in range(adapters):
        controls.append(T2IAdapter(T2IAdapterConfig(channels=widths, num_res_blocks=1)))
    for control in controls:
        randomize(control)
        control.double().eval()
    return ControlledUNet(base, controls, guess_mode).eval()


def given_to(model: ControlledUNet, batch: int = 2, halves: int = 2) -> dict[str, Tensor]:
    """Random conditions; the first network acts until timestep 300, the others always."""
    count = len(model.controls)
    windows = torch.tensor([[300.0, 1000.0]] + [[0.0, 1000.0]] * (count - 1))
    scales = torch.rand(count) + 0.5
    given = {
        **conditions(model.unet, halves * batch),
        "hints": torch.rand(batch, count, 3, 64, 64).double().repeat(halves, 1, 1, 1, 1),
        "scales": scales.repeat(halves * batch, 1),
        "windows": windows.repeat(halves * batch, 1, 1),
    }
    if model.guess_mode and halves == 2:
        given["scales"][:batch] = 0
    return given


def prepared(model: ControlledUNet, given: dict[str, Tensor], rewrites: Any) -> PreparedControlled:
    batch = len(given["hints"]) // 2
    network = prepare(model, batch=batch, halves=2, max_rows=5, rewrites=rewrites)
    assert isinstance(network, PreparedControlled)
    network.prepare(given, GRID)
    return network


@torch.no_grad()
def check(network: PreparedControlled, given: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Each row is as the plain model has it; on the device, too, where all networks run."""
    results = []
    for row in range(len(GRID)):
        expected = network.model(x, GRID[row], **given)
        result = network(x, at(row))
        assert error(result, expected) <= CLOSE
        clock = at(0)
        with clock.on_device():
            clock.counter.fill_(row)
            assert error(network(x, clock), expected) <= CLOSE
        results.append(result)
    return results


KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "two and an adapter": {"nets": 2, "adapters": 1},
    "adapter": {"nets": 0, "adapters": 1},
    "guess": {"guess_mode": True},
    "like sdxl": LIKE_SDXL,
    "inpainting": {"in_channels": 9, "nets": 0, "adapters": 2},
}


@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        *(("two and an adapter", choice) for choice in CHOICES),
        *(
            (kind, choice)
            for kind in KINDS
            if kind != "two and an adapter"
            for choice in ("all", "none")
        ),
        ("guess", "control_residuals"),
    ],
)
def test_each_rewrite_alone_and_all_together(kind: str, choice: str) -> None:
    torch.manual_seed(1)
    model = controlled(**KINDS[kind])
    given, x = given_to(model), images(model.unet, 2, 2)
    results = check(prepared(model, given, CHOICES[choice]), given, x)
    with torch.no_grad():
        rest = {n: v for n, v in given.items() if n not in ("hints", "scales", "windows")}
        plain = [model.unet(x, t, **rest) for t in GRID]
    assert error(results[0], plain[0]) > 0.01  # it moves the output
    if len(model.controls) == 1:  # and not behind its window
        assert error(results[2], plain[2]) <= CLOSE


def addresses(network: PreparedControlled) -> list[int]:
    own = [c.given for c in network.controls if c is not None]
    kept = tree_leaves((network.made, network.factors, network.unet.given, own))
    return [value.data_ptr() for value in kept if value is not None]


@pytest.mark.parametrize("choice", ["all", "none"])
def test_another_hint_or_scale_keeps_the_addresses(choice: str) -> None:
    """So a captured graph serves it."""
    model = controlled(2, 1)
    given, x = given_to(model), images(model.unet, 2, 2)
    network = prepared(model, given, choice)
    places, before = addresses(network), network(x, at(0))
    for name, other in (
        ("hints", given["hints"].flip(3)),
        ("scales", given["scales"] * 0.3),
        ("windows", given["windows"].clamp(max=500)),
    ):
        network.prepare(given | {name: other}, GRID)
        [first, *_] = check(network, given | {name: other}, x)
        assert error(first, before) > 1e-4
        assert addresses(network) == places


def test_refresh_follows_the_weights() -> None:
    model = controlled()
    given, x = given_to(model), images(model.unet, 2, 2)
    network = prepared(model, given, "all")
    places = addresses(network)
    randomize(model)
    network.refresh()
    network.prepare(given, GRID)
    check(network, given, x)
    assert addresses(network) == places


def test_in_guess_mode_one_half_runs() -> None:
    model = controlled(guess_mode=True)
    network = prepared(model, given_to(model), "all")
    [control] = network.controls
    assert control is not None
    assert control.batch == 2
    rows = {row.name: row for row in network.explain()}
    assert "guess mode" in rows["control_prefix"].why


def saved(model: ControlledUNet) -> dict[str, RewriteReport]:
    given = given_to(model)
    network = prepared(model, given, REWRITES)
    network(images(model.unet, 2, 2), at(0))
    return {row.name: row for row in network.explain() if row.name in REWRITES}


def test_explain_counts_what_is_saved() -> None:
    rows = saved(controlled())
    assert [*rows] == list(REWRITES)
    assert [name for name, row in rows.items() if not row.on] == [*IMAGES]
    transformers, tokens, width = 1 + 1, 5, 24  # down, middle
    context = rows["control_context"]
    assert context.launches == 2 * transformers
    assert context.flops == 2 * (4 * tokens) * width * 2 * (16 + 32)
    assert rows["control_hint"].launches == 8 + 7  # convolutions and the SiLUs between them
    assert rows["control_hint"].flops > 0
    assert rows["control_prefix"].flops > 0
    residuals = rows["control_residuals"]
    assert residuals.launches == 4 + 1  # skips and the bottom
    assert residuals.bytes > 0
    assert residuals.flops == 0


def test_reasons_against() -> None:
    rows = saved(controlled(0, 1))
    assert rows["control_hint"].on
    assert [rows[name].why for name in CONTROL[1:]] == ["no ControlNet"] * 3
    rows = saved(controlled(**TEXT_TIME))
    assert rows["control_prefix"].why == "pooled text enters the time embedding"


@pytest.mark.parametrize("name", ["hints", "scales", "windows"])
def test_bad_hints(name: str) -> None:
    model = controlled()
    given = given_to(model)
    other = given[name].clone()
    other[0] += 0.25
    network = prepared(model, given, "all")
    with pytest.raises(ValueError, match=f"{name}: expected the same for both halves"):
        network.prepare(given | {name: other}, GRID)
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        network.prepare(given | {name: other[:1]}, GRID)
    with pytest.raises(TypeError, match=name):
        network.prepare({n: v for n, v in given.items() if n != name}, GRID)


def test_hints_of_another_size() -> None:
    model = controlled()
    given = given_to(model)
    with pytest.raises(ValueError, match=r"hints: expected 48 x 64 pixels"):
        prepared(model, given, "all")(images(model.unet, 2, 2, (6, 8)), at(0))


@pytest.mark.parametrize("rewrites", ["all", "none"])
def test_engines_run_it(rewrites: str) -> None:
    """A plain engine and one with rewrites draw the same, with one half of guidance, too."""
    model = controlled(1, 1)
    given = given_to(model, halves=1)
    null = {**given, "context": given["context"].flip(1)}
    schedule = df.DiffusionSchedule(kind="scaled_linear")
    x_T = torch.randn(2, 4, 8, 8).double()
    for scale in (1.0, 4.0):
        expected = df.sample(
            model,
            schedule,
            x_T.shape,
            sampler="ddim",
            steps=3,
            guidance_scale=scale,
            context=given,
            null_context=null,
            x_T=x_T,
        )
        engine = df.Engine(
            model, schedule, rewrites=rewrites, sampler="ddim", steps=3, guidance_scale=scale
        )
        result = engine.sample(x_T.shape, given, null, x_T=x_T)
        assert error(result, expected) <= CLOSE
