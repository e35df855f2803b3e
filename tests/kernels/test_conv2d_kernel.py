"""The product's kernel as a convolution: windows, sources, layouts, epilogues, parts of the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, check, randn
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels import matmul

# (window, stride, padding)
WINDOWS = (
    ((3, 3), 1, 1),
    ((1, 1), 1, 0),
    ((3, 3), 2, 1),
    ((3, 3), 2, (0, 1, 0, 1)),
    ((2, 2), 1, (1, 0, 0, 1)),
    ((2, 4), 3, (2, 1, 0, 3)),
)
PARTS = ("bias", "x2", "add", "residual")
SMALL = matmul.Config(16, 16, 16, 4, 2)


def case(
    names: tuple[str, ...],
    dtype: torch.dtype,
    window: tuple[Any, ...] = WINDOWS[0],
    size: tuple[int, int, int] = (2, 3, 4),
    channels: tuple[int, int, int] = (18, 3, 17),
    layout: str = "channels_last",
    weight_last: bool = True,
) -> tuple[Any, dict[str, Tensor]]:
    """A call and its tensors; ``channels`` are those of x, of x2 and of the result."""
    (rows, columns), stride, padding = window
    (batch, height, width), (first, second, out) = size, channels
    left, right, top, bottom = (padding,) * 4 if isinstance(padding, int) else padding
    after = (height + top + bottom - rows) // stride + 1, (width + left + right - columns) // stride
    inside = first + (second if "x2" in names else 0)
    weight_layout = "channels_last" if weight_last else "contiguous"
    more = {
        "bias": randn(out, dtype=dtype),
        "x2": randn(batch, second, height, width, dtype=dtype, layout=layout),
        "add": randn(batch, out, dtype=dtype),
        "residual": randn(batch, out, after[0], after[1] + 1, dtype=dtype, layout=layout),
    }
    values = {
        "x": randn(batch, first, height, width, dtype=dtype, layout=layout),
        "weight": randn(out, inside, rows, columns, dtype=dtype, layout=weight_layout),
    } | {name: more[name] for name in names}

    def call(x: Tensor, weight: Tensor, **more: Tensor) -> Tensor:
        return ops.conv2d(x, weight, stride=stride, padding=padding, **more)

    return call, values


@pytest.fixture(params=[1, 5], ids=["whole", "parts"])
def _parts(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that there are several; the sum whole or cut in parts."""
    monkeypatch.setattr(matmul, "configs", lambda p: [SMALL._replace(parts=request.param)])


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_windows_and_layouts(window: tuple[Any, ...], layout: str) -> None:
    check(*case(PARTS, torch.float32, window, layout=layout, weight_last=layout == "sliced"))


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_tiles_and_parts(window: tuple[Any, ...]) -> None:
    check(*case(PARTS, torch.float32, window), repeat=window == WINDOWS[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(), PARTS], ids=["alone", "everything"])
def test_dtypes(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    check(*case(names, dtype))


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("name", PARTS)
def test_each_epilogue_alone(name: str) -> None:
    check(*case((name,), torch.float32, WINDOWS[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients(dtype: torch.dtype) -> None:
    call, values = case(PARTS, dtype, WINDOWS[3], (2, 3, 4), (4, 3, 5))
    check(call, values, tuple(values))


def test_a_packed_weight_is_read_as_it_is() -> None:
    call, values = case(("x2",), torch.float32, weight_last=False)
    packed = (values["weight"].contiguous(memory_format=torch.channels_last),)
    with ops.use_backend("triton"):
        plain = call(**values)
        again = call(**values, packed=packed)
    assert torch.equal(plain, again)


def test_an_empty_batch() -> None:
    check(*case(PARTS, torch.float32, size=(0, 4, 5)))


@settings(deadline=None, max_examples=15)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
    window=st.tuples(
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.integers(1, 3),
        st.tuples(*[st.integers(1, 2)] * 4),
    ),
    names=st.sets(st.sampled_from(PARTS)),
    layout=st.sampled_from(("contiguous", "channels_last", "sliced")),
    parts=st.integers(1, 4),
)
def test_any_shape(
    size: tuple[int, int, int],
    channels: tuple[int, int, int],
    window: tuple[Any, ...],
    names: set[str],
    layout: str,
    parts: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "configs", lambda p: [SMALL._replace(parts=parts)])
        check(*case(tuple(sorted(names)), torch.float32, window, size, channels, layout))
