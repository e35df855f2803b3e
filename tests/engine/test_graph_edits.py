"""After an edit of the model nothing of before is used again, neither graphs nor weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_model import CONTEXTS, EDITS, SCHEDULE, SHAPE, Model, plain, same, seeded
from numerics import error
from prepared import unet
from tape import TapeCapturer, tape
from torch import Tensor, nn

import diffusion_fast as df

__all__ = ["tape"]  # a fixture


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_never_missed(tape: TapeCapturer, edit: str) -> None:
    model = Model()
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    call = {"context": CONTEXTS["context"], "generator": seeded()}
    before = engine.sample(SHAPE, **call)
    EDITS[edit](model)
    after = engine.sample(SHAPE, **call | {"generator": seeded()})
    assert error(after, plain(model, sampler="ddim", steps=4, context=call["context"])) < 1e-5
    assert error(after, before) > 1e-3
    assert tape.captures == 2
    assert len(engine._graphs.cache) == 2  # a step and its loop: the old ones are freed
    engine.sample(SHAPE, **call)
    assert tape.captures == 2


@pytest.mark.parametrize("verify", [False, True])
def test_an_edit_that_nobody_counts(tape: TapeCapturer, verify: bool) -> None:
    """A tape reads weights where they lie; so what is seen here is whether it was made anew."""
    model = Model()
    model.mix.register_buffer("large", torch.zeros(1000))
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4, verify=verify)
    engine.sample(SHAPE)
    model.mix.large.data[1] += 1e-9
    engine.sample(SHAPE)
    assert tape.captures == (2 if verify else 1)
    engine.refresh()
    engine.sample(SHAPE)
    assert tape.captures == (3 if verify else 2)


def test_lora_by_peft(tape: TapeCapturer) -> None:
    """Injected, switched off, scaled, merged: each gives what the plain loop gives."""
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.line(x)

    model = Net()
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    seen = [engine.sample(SHAPE, generator=seeded())]

    def check() -> None:
        x = engine.sample(SHAPE, generator=seeded())
        assert same(x, plain(model, sampler="ddim", steps=4))
        assert error(x, seen[-1]) > 1e-4
        seen.append(x)

    config = peft.LoraConfig(target_modules=["line"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    check()
    model.line.enable_adapters(False)
    check()
    model.line.enable_adapters(True)
    check()
    model.line.scale_layer(3.0)
    check()
    model.line.unscale_layer()
    check()
    model.line.merge()
    merged = engine.sample(SHAPE, generator=seeded())
    assert same(merged, plain(model, sampler="ddim", steps=4))
    assert error(merged, seen[-1]) < 1e-9


REWRITES = ["all", "none", ["cached_context", "time_table"]]


@pytest.mark.parametrize("rewrites", REWRITES, ids=str)
@pytest.mark.parametrize("graph", ["off", "step"])
def test_weights_that_a_callback_changes_serve_the_steps_after_it(
    tape: TapeCapturer, graph: str, rewrites: Any
) -> None:
    """As for the plain loop; and the next run begins with them."""
    call = {"x_T": torch.randn(1, 4, 8, 8), "context": torch.randn(1, 5, 24)}
    call = {name: value.double() for name, value in call.items()}

    def edits(model: nn.Module) -> Callable[[int, float, Tensor], None]:
        def edit(step: int, t: float, x: Tensor) -> None:
            if step == 1:
                with torch.no_grad():
                    for value in model.parameters():
                        value.mul_(0.9)

        return edit

    model = unet(torch.float64)
    twin = copy.deepcopy(model)
    options = {"sampler": "ddim", "steps": 4}
    engine = df.Engine(model, SCHEDULE, graph, rewrites=rewrites, **options)
    before = engine.sample((1, 4, 8, 8), **call)
    for _ in range(2):
        edited = engine.sample((1, 4, 8, 8), **call, callback=edits(model))
        truth = df.sample(twin, SCHEDULE, (1, 4, 8, 8), **call, callback=edits(twin), **options)
        assert error(edited, truth) < 1e-9
        assert error(edited, before) > 1e-3


def test_a_callback_that_changes_more_of_a_model_is_refused() -> None:
    model = unet()
    engine = df.Engine(model, SCHEDULE, sampler="ddim", steps=4)
    context = torch.randn(1, 5, 24)

    def hook(*_: Any) -> None:
        model.conv_out.register_forward_hook(lambda module, args, out: 2 * out)

    with pytest.raises(RuntimeError, match="callback: expected one that changes nothing"):
        engine.sample((1, 4, 8, 8), context=context, callback=hook)
    x_T = torch.randn(1, 4, 8, 8)
    x = engine.sample((1, 4, 8, 8), context=context, x_T=x_T)
    plain = df.sample(
        model, SCHEDULE, (1, 4, 8, 8), sampler="ddim", steps=4, context=context, x_T=x_T
    )
    assert error(x, plain) < 1e-5
