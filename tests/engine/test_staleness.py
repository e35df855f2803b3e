"""What is seen of the edits of a model, and what must not be taken for one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import error
from prepared import unet
from tape import TapeCapturer, tape
from torch import Tensor, nn

import diffusion_fast as df
from diffusion_fast.engine.staleness import Edit, Watch

__all__ = ["tape"]  # a fixture


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.scaling = {"default": 2.0, "other": 1.0}
        self.active = ["default"]
        self.names = {"b", "a"}
        self.adapter: str | None = None
        self.calls = 0
        self.last: Tensor | None = None
        self.own = nn.Identity()
        self.own.forward = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return self.norm(self.line(x))


def swap_buffers(model: Net) -> None:
    norm = model.norm
    norm.running_mean, norm.running_var = norm.running_var, norm.running_mean


def change_one_for_another(model: Net) -> None:
    """As many attributes as before."""
    del model.last
    model.line.forward = lambda x: x
    del model.line.in_features


EDITS: dict[str, Callable[[Net], object]] = {
    "new parameter": lambda m: setattr(m.line, "weight", nn.Parameter(m.line.weight.clone())),
    "one parameter more": lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))),
    "one module more": lambda m: m.add_module("more", nn.Identity()),
    "one buffer more": lambda m: m.norm.register_buffer("more", torch.ones(1)),
    "new data": lambda m: setattr(m.line.weight, "data", m.line.weight.detach().clone()),
    "a part of the data": lambda m: setattr(m.line.bias, "data", m.line.bias.detach()[:2]),
    "new module": lambda m: setattr(m, "line", nn.Linear(3, 3)),
    "dtype": lambda m: m.double(),
    "layout": lambda m: setattr(m.line.weight, "data", m.line.weight.detach().t()),
    "scale": lambda m: m.scaling.update(default=3.0),
    "adapter": lambda m: m.active.append("other"),
    "first adapter": lambda m: setattr(m, "adapter", "other"),
    "name in a set": lambda m: m.names.add("c"),
    "hook": lambda m: m.line.register_forward_hook(lambda *_: None),
    "forward": lambda m: setattr(m.line, "forward", lambda x: x),
    "another forward": lambda m: setattr(m.own, "forward", lambda x: x),
    "a name for a number": lambda m: setattr(m, "calls", "two"),
    "setting": lambda m: setattr(m.norm, "eps", 1e-3),
    "removed module": lambda m: delattr(m, "norm"),
    "removed setting": lambda m: delattr(m, "scaling"),
    "one attribute for another": change_one_for_another,
    "swapped buffers": swap_buffers,
}


def in_numpy(model: Net) -> None:
    model.line.weight.detach().numpy()[...] = 7


def in_inference_mode(model: Net) -> None:
    with torch.inference_mode():
        model.line.bias.add_(1)


def fused_step(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[Net], object]:
    def step(model: Net) -> None:
        made = optimizer(model.parameters(), lr=0.1, fused=True)
        for value in model.parameters():
            value.grad = torch.zeros_like(value)
        model.line.weight.grad = torch.ones(3, 3)
        made.step()

    return step


VALUES: dict[str, Callable[[Net], object]] = {
    "parameter": lambda m: m.line.weight.mul_(2),
    "buffer": lambda m: m.norm.running_mean.add_(1),
    "load_state_dict": lambda m: m.load_state_dict(Net().state_dict()),
    "fused AdamW": fused_step(torch.optim.AdamW),
    "fused Adam": fused_step(torch.optim.Adam),
    "fused SGD": fused_step(torch.optim.SGD),
    "fused Adagrad": fused_step(torch.optim.Adagrad),
    "data": lambda m: m.line.weight.data.mul_(2),
    "data of a buffer": lambda m: m.norm.running_var.data.fill_(4),
    "NumPy": in_numpy,
    "inference mode": in_inference_mode,
}


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_another_model(edit: str) -> None:
    model, watch = Net(), Watch()
    watch.look(model)
    assert watch.look(model) is Edit.NONE
    EDITS[edit](model)
    assert watch.look(model) is Edit.MODEL
    assert watch.look(model) is Edit.NONE


@pytest.mark.parametrize("edit", VALUES)
@torch.no_grad()
def test_other_values(edit: str) -> None:
    model, watch = Net(), Watch()
    watch.look(model)
    VALUES[edit](model)
    assert watch.look(model) is Edit.VALUES
    assert watch.look(model) is Edit.NONE


def test_a_call_is_no_edit() -> None:
    """A module may count its calls and keep tensors, under new names too."""
    model, watch = Net().eval(), Watch(verify=True)
    model.register_forward_hook(lambda module, *_: setattr(module, "since", torch.ones(1)))
    watch.look(model)
    for _ in range(3):
        model(torch.ones(2, 3))
        assert watch.look(model) is Edit.NONE


def test_values_written_along_with_what_is_no_setting() -> None:
    model, watch = Net(), Watch()
    watch.look(model)
    model.kept = torch.ones(1)
    model.line.weight.data.mul_(2)
    assert watch.look(model) is Edit.VALUES


def test_steps_of_other_weights_are_no_edit() -> None:
    model, watch = Net(), Watch()
    watch.look(model)
    VALUES["fused AdamW"](Net())
    assert watch.look(model) is Edit.NONE


def test_functions_are_told_apart() -> None:
    watch, model = Watch(), Net()
    found = [watch.look(one) for one in (len, len, max, model, model, Net(), len)]
    assert found == [Edit(i) for i in (2, 0, 2, 2, 0, 2, 2)]


@settings(max_examples=20)
@given(st.data())
def test_every_setting_that_is_assigned_anew(data: st.DataObject) -> None:
    """Of a module that is not ours: flags, strings and floats, alone and in containers."""
    plain = st.one_of(st.booleans(), st.floats(allow_nan=False), st.text(max_size=2))
    several = st.lists(plain, max_size=2) | st.dictionaries(st.text(max_size=1), plain, max_size=2)
    values = st.fixed_dictionaries(dict.fromkeys(("one", "two"), plain | several))
    before, after = data.draw(values), data.draw(values)
    model, watch = Net(), Watch()
    vars(model).update(before)
    watch.look(model)
    vars(model).update(after)
    expected = Edit.NONE if _same(before, after) else Edit.MODEL
    assert watch.look(model) is expected


def _same(a: Any, b: Any) -> bool:
    """Equal, and empty containers are as good as none."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(a.get(key), b.get(key)) for key in a.keys() | b.keys()]
        return list(a) == list(b) and all(_same(*pair) for pair in pairs)
    return bool(a == b)


SCHEDULE = df.DiffusionSchedule(timesteps=100)
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
