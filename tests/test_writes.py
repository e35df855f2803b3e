"""Which writes to tensors are seen, whatever their dtypes and strides."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion_fast.writes import Writes, checksums, spread

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
