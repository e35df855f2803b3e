"""The launch helper: what it says of strides, sizes and devices."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DEVICE

from diffusion_fast.kernels import launch


@given(
    size=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    data=st.data(),
)
def test_image_strides_find_every_element(size: list[int], data: st.DataObject) -> None:
    """Where the space collapses, (b, c, s) strides lead to the same elements as indexing does."""
    order = data.draw(st.permutations(range(len(size))))
    inverse = [order.index(i) for i in range(len(size))]
    value = torch.arange(torch.Size(size).numel()).view([size[i] for i in order]).permute(inverse)
    if data.draw(st.booleans()):
        value = value[..., ::2]
    if data.draw(st.booleans()):
        value = value[:1].expand(3, *value.shape[1:])
    strides = launch.image_strides(value)
    if strides is None:
        assert value.dim() > 3
        return
    flat = value.reshape(*value.shape[:2], -1)
    base = value.storage_offset()
    storage = torch.arange(value.untyped_storage().nbytes() // 8)
    view = storage.as_strided(flat.shape, strides, base)
    assert torch.equal(view, flat)


def test_an_expanded_tensor_has_stride_zero() -> None:
    """The gradient of a sum is one."""
    assert launch.image_strides(torch.ones(()).expand(2, 3, 4, 5)) == (0, 0, 0)


def test_wide_tensors_are_recognised_by_their_span() -> None:
    small = torch.empty(2**31, device="meta")
    assert not launch.wide(small, None)
    assert launch.wide(torch.empty(2**31 + 1, device="meta"))
    assert launch.wide(torch.empty(2, 2**31, device="meta")[:, :3])


def test_dense_batch_finds_dimension_0() -> None:
    x = torch.empty(3, 4, 5)
    assert launch.dense_batch(x) == (1, 3, 20)
    assert launch.dense_batch(x.transpose(0, 1)) == (3, 4, 5)
    assert launch.dense_batch(x.permute(2, 0, 1)) == (12, 5, 1)


def test_laid_out_like_copies_only_what_it_must() -> None:
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    assert launch.laid_out_like(x, torch.empty_like(x)) is x
    last = torch.empty_like(x, memory_format=torch.channels_last)
    copied = launch.laid_out_like(x, last)
    assert copied.stride() == last.stride()
    assert torch.equal(copied, x)
    one, other = x[:, :, :1, :1], last[:, :, :1, :1].contiguous()
    assert launch.laid_out_like(one, other).shape == one.shape


def test_kernels_for_the_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 must be set"):
        launch.launch(None, (1,), device=torch.device("cpu"))
    launch.launch(None, (0,), device=torch.device("cpu"))  # an empty grid is nothing to do


@pytest.mark.parametrize(("n", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_2(n: int, expected: int) -> None:
    assert launch.power_of_2(n) == expected


def _unannotated(source: str) -> list[str]:
    """Functions that lack annotations, those of Triton's language left out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        if any("triton.jit" in ast.unparse(one) for one in node.decorator_list):
            continue
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        missing = [
            a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
        ]
        if missing or node.returns is None:
            found.append(node.name)
    return found


def test_launchers_are_typed() -> None:
    """What mypy can't be told: every function but those under @triton.jit has annotations."""
    assert _unannotated("def launcher(x): ...") == ["launcher"]
    assert _unannotated("@triton.jit\ndef kernel(x): ...") == []
    files = sorted(Path(launch.__file__).parent.glob("*.py"))
    assert {file.name: names for file in files if (names := _unannotated(file.read_text()))} == {}
