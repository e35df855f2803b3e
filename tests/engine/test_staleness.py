"""What a fingerprint sees of a model, and what it must not be moved by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusion_fast.engine.staleness import checksums, fingerprint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.scaling = {"default": 2.0, "other": 1.0}
        self.active = ["default"]
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return self.norm(self.line(x))


IDENTITY: dict[str, Callable[[Net], object]] = {
    "new parameter": lambda m: setattr(m.line, "weight", nn.Parameter(m.line.weight.clone())),
    "new data": lambda m: setattr(m.line.weight, "data", m.line.weight.detach().clone()),
    "new module": lambda m: setattr(m, "line", nn.Linear(3, 3)),
    "dtype": lambda m: m.double(),
    "layout": lambda m: setattr(m.line.weight, "data", m.line.weight.detach().t()),
    "scale": lambda m: m.scaling.update(default=3.0),
    "adapter": lambda m: m.active.append("other"),
    "hook": lambda m: m.line.register_forward_hook(lambda *_: None),
    "forward": lambda m: setattr(m.line, "forward", lambda x: x),
    "setting": lambda m: setattr(m.norm, "eps", 1e-3),
    "removed module": lambda m: delattr(m, "norm"),
}
VALUES: dict[str, Callable[[Net], object]] = {
    "parameter": lambda m: m.line.weight.mul_(2),
    "buffer": lambda m: m.norm.running_mean.add_(1),
    "load_state_dict": lambda m: m.load_state_dict(Net().state_dict()),
}


@pytest.mark.parametrize("edit", IDENTITY)
@torch.no_grad()
def test_another_identity(edit: str) -> None:
    model = Net()
    before = fingerprint(model)
    IDENTITY[edit](model)
    assert fingerprint(model).identity != before.identity


@pytest.mark.parametrize("edit", VALUES)
@torch.no_grad()
def test_other_values(edit: str) -> None:
    model = Net()
    before = fingerprint(model)
    VALUES[edit](model)
    after = fingerprint(model)
    assert after.identity == before.identity
    assert after.versions != before.versions


def test_a_call_is_no_edit() -> None:
    """A module may count its calls and keep tensors."""
    model = Net().eval()
    before = fingerprint(model, verify=True)
    model(torch.ones(2, 3))
    assert fingerprint(model, verify=True) == before


def test_only_the_checksum_sees_data() -> None:
    model = Net()
    before = fingerprint(model, verify=True)
    model.line.weight.data[1, 2] += 1e-6
    after = fingerprint(model, verify=True)
    assert (after.identity, after.versions) == (before.identity, before.versions)
    assert after.checksum != before.checksum


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        model = Net()
    assert fingerprint(model) == fingerprint(model)


def test_a_function_is_known_by_its_address() -> None:
    assert fingerprint(len) == fingerprint(len)
    assert fingerprint(len) != fingerprint(max)


DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.uint8, torch.bool, torch.complex64),
]


@pytest.mark.parametrize("dtype", DTYPES)
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
