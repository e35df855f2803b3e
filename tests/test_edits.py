"""What is seen of the edits of a model and of tensors, and what must not be taken for one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusion_fast.edits import Edit, Watch, Writes, checksums, spread


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
        self.memory = torch.ones(4, 4)
        self.wide = nn.Parameter(self.memory[:2])  # strides and count of memory[:4, :2]
        self.own = nn.Identity()
        self.own.forward = lambda x: x
        for _ in range(2):
            self.own.register_forward_hook(lambda *_: None)

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
    "hooks in another order": lambda m: m.own._forward_hooks.move_to_end(min(m.own._forward_hooks)),
    "another shape": lambda m: setattr(m.wide, "data", m.memory[:4, :2]),
    "another size": lambda m: setattr(m.line.bias, "data", m.line.bias.detach()[:1]),
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
    same = all(_same(before[name], after[name]) for name in before)  # their order is as it was
    expected = Edit.NONE if same else Edit.MODEL
    assert watch.look(model) is expected


def _same(a: Any, b: Any) -> bool:
    """Equal, and empty containers are as good as none."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(a.get(key), b.get(key)) for key in a.keys() | b.keys()]
        return list(a) == list(b) and all(_same(*pair) for pair in pairs)
    return bool(a == b)


DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.uint8, torch.bool, torch.complex64),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.t(),
    "channels_last": lambda x: x.view(4, 5, 5, 5).contiguous(memory_format=torch.channels_last),
    "every other": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(7, -1),
    "part": lambda x: x[:4, :9],
    "one": lambda x: x[0, 0],
    "none": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_tensors_written_without_a_count(layout: str, dtype: torch.dtype) -> None:
    whole = torch.rand(20, 25).mul(4).add(1).to(dtype)
    value = LAYOUTS[layout](whole)
    writes = Writes([torch.zeros(3), value])
    assert not writes()
    memory = whole if value.data_ptr() == whole.data_ptr() else value
    memory.data.zero_()
    assert writes() == bool(value.numel())
    assert not writes()


def test_what_is_no_number_compares() -> None:
    value = torch.full((100,), float("nan"))
    writes = Writes([value])
    assert not writes()
    value.data.zero_()
    assert writes()
    value.data.neg_()
    assert writes()


@given(st.lists(st.integers(1, 40), max_size=4))
def test_a_sample_is_of_many_rows_and_columns(shape: list[int]) -> None:
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    (sample,) = spread(places)
    assert len(sample) >= min(64, places.numel())
    assert len(sample.unique()) == len(sample)
    for dim, size in enumerate(shape):
        if places.numel() > 1000 and size > 2:
            inside = places.stride(dim)
            assert len((sample // inside % size).unique()) > 1


def test_one_element_is_seen_by_its_checksum_alone() -> None:
    value = torch.zeros(1000)
    quick, sceptical = Writes([value]), Writes([value], verify=True)
    value.data[1] = 1e-6
    assert (quick(), sceptical()) == (False, True)


def test_inference_tensors_have_no_count() -> None:
    with torch.inference_mode():
        value = torch.zeros(10)
    writes = Writes([value])
    assert not writes()
    with torch.inference_mode():
        value.add_(1)
    assert writes()


def test_tensors_without_memory() -> None:
    writes = Writes([torch.empty(3, device="meta"), torch.eye(3).to_sparse()])
    assert not writes()


def test_steps_are_heard_of_where_the_sample_sees_nothing() -> None:
    value = torch.nn.Parameter(torch.zeros(1000))
    writes, other = Writes([value]), Writes([torch.zeros(1)])
    optimizer = torch.optim.SGD([{"params": [value]}], lr=0.1, fused=True)
    value.grad = torch.zeros(1000)
    value.grad[1] = 1
    optimizer.step()
    assert value[1] != 0
    assert (writes(), other()) == (True, False)
    assert not writes()


def test_questions_are_forgotten_with_who_asked() -> None:
    value = torch.nn.Parameter(torch.zeros(3))
    writes = Writes([value])
    del writes
    gc.collect()
    value.grad = torch.ones(3)
    torch.optim.SGD([value], lr=0.1, fused=True).step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_a_checksum(dtype: torch.dtype) -> None:
    value = torch.rand(5, 3).mul(4).to(dtype)
    other = value.clone()
    other.view(torch.uint8).reshape(-1)[-1] ^= 1
    assert checksums([value]) == checksums([value.clone()])
    assert checksums([value]) != checksums([other])
    assert len(checksums([value, torch.zeros(0)])) == 2


@given(st.data())
def test_any_one_change_and_any_swap_is_seen(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    bits = st.integers(-(2**31), 2**31 - 1)
    value = torch.tensor(data.draw(st.lists(bits, min_size=count, max_size=count)))
    value = value.to(torch.int32).view(torch.float32)
    place = data.draw(st.integers(0, count - 1))
    other = value.clone()
    other.view(torch.int32)[place] ^= data.draw(st.integers(1, 2**31 - 1))
    assert checksums([value]) != checksums([other])
    i, j = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    swapped = value.clone().view(torch.int32)
    swapped[[i, j]] = swapped[[j, i]]
    same = torch.equal(swapped, value.view(torch.int32))
    assert (checksums([swapped.view(torch.float32)]) == checksums([value])) == same
