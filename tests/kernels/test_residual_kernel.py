"""The kernel of bias, residual and scale, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, check, randn
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels import residual as kernel


def inputs(
    size: tuple[int, ...], dtype: torch.dtype, dim: int = 1, layout: str = "contiguous"
) -> dict[str, Tensor]:
    values = {name: randn(*size, dtype=dtype, layout=layout) for name in ("x", "residual")}
    return values | {"bias": randn(size[dim], dtype=dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_values_and_gradients(dtype: torch.dtype, layout: str) -> None:
    values = inputs((2, 5, 7, 9), dtype, layout=layout)
    call = lambda **v: ops.residual(**v, scale=0.7)  # noqa: E731
    check(call, values, list(values), repeat=layout == "contiguous")


@pytest.mark.parametrize(
    "names", [("x", *e) for n in range(3) for e in itertools.combinations(("residual", "bias"), n)]
)
def test_options(names: tuple[str, ...]) -> None:
    values = {n: v for n, v in inputs((2, 5, 6), torch.float32).items() if n in names}
    check(lambda **v: ops.residual(**v, scale=-1.5), values, names)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize(
    "size", [(3, 4, 5), (1, 1, 1), (40, 70, 9), (2, 3, 2050), (9, 1, 3), (2, 0, 3)]
)
def test_the_channels_may_be_any_dimension(size: tuple[int, ...], dim: int) -> None:
    values = inputs(size, torch.float64, dim)
    check(lambda **v: ops.residual(**v, scale=0.5, dim=dim), values, list(values))


@pytest.mark.parametrize("dim", [1, -1])
def test_64_bit_offsets(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tensor of 2^31 elements takes, on a small one."""
    monkeypatch.setattr(kernel.launch, "wide", lambda *_: True)
    values = inputs((3, 5, 700), torch.float32, dim)
    check(lambda **v: ops.residual(**v, dim=dim), values, list(values))


@pytest.mark.parametrize("dim", [1, -1])
def test_parts_of_several_tiles(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PARTS", 2)
    values = inputs((4, 3, 3000) if dim == 1 else (3000, 5), torch.float32, dim)
    check(lambda **v: ops.residual(**v, dim=dim), values, list(values))


def test_arguments_of_different_layouts() -> None:
    values = inputs((2, 8, 5, 6), torch.float32, layout="channels_last")
    values["residual"] = values["residual"].contiguous()
    check(ops.residual, values, list(values))


def test_a_scalar() -> None:
    x, residual = torch.tensor([2.0, 3.0], device=DEVICE).unbind()
    check(ops.residual, {"x": x, "residual": residual}, ("x",))


def test_operator_and_compile() -> None:
    values = {n: v.requires_grad_() for n, v in inputs((2, 3, 4), torch.float64).items()}
    with ops.use_backend("triton"):
        op = torch.ops.diffusion_fast.residual.default
        torch.library.opcheck(op, (*values.values(), 0.5, 1))
        compiled = torch.compile(ops.residual, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**values), ops.residual(**values))
