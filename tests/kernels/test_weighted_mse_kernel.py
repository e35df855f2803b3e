"""The kernels of the weighted mean squared error, forward and backward."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, check, randn

from diffusion_fast import ops
from diffusion_fast.kernels import weighted_mse as kernel

PAIR = ("prediction", "target")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(dtype: torch.dtype, layout: str, weighted: bool) -> None:
    values = {name: randn(3, 5, 7, 9, dtype=dtype, layout=layout) for name in PAIR}
    if weighted:
        values["weight"] = torch.rand(3, device=DEVICE).to(dtype)
    check(ops.weighted_mse, values, list(values), repeat=layout == "sliced")


@pytest.mark.parametrize("size", [(1,), (5,), (2, 1), (3, 9000), (130, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_sizes(size: tuple[int, ...], weighted: bool) -> None:
    values = {name: randn(*size, dtype=torch.float32) for name in PAIR}
    if weighted:
        values["weight"] = torch.rand(2 * size[0], device=DEVICE)[::2]
    check(ops.weighted_mse, values, list(values))


@pytest.mark.parametrize("permutation", [(1, 0, 2), (2, 1, 0), (2, 0, 1)])
def test_the_batch_may_lie_anywhere_in_memory(permutation: tuple[int, ...]) -> None:
    values = {name: randn(3, 4, 5, dtype=torch.float64).permute(permutation) for name in PAIR}
    values["target"] = values["target"].contiguous()
    values["weight"] = torch.rand(values["target"].shape[0], device=DEVICE).double()
    check(ops.weighted_mse, values, list(values))


@pytest.mark.parametrize(("offset", "scale"), [(1e4, 1.0), (0.0, 1e-18), (0.0, 1e15)])
def test_extreme_magnitudes(offset: float, scale: float) -> None:
    values = {name: randn(2, 3000, dtype=torch.float32) * scale + offset for name in PAIR}
    check(ops.weighted_mse, values, PAIR)


@pytest.mark.parametrize("size", [(3, 9001), (70, 3)])
def test_more_pieces_than_are_added_at_a_time(
    size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 1024)
    monkeypatch.setattr(kernel, "PIECES", 4)
    values = {name: randn(*size, dtype=torch.float32) for name in PAIR}
    values["weight"] = torch.rand(size[0], device=DEVICE)
    check(ops.weighted_mse, values, list(values))


def test_a_long_sum_keeps_its_digits() -> None:
    """Equal terms, whose plain running sum in float32 would stop growing."""
    values = {"prediction": torch.full((2, 300_000), 0.1, device=DEVICE)}
    values["target"] = torch.zeros(2, 300_000, device=DEVICE)
    check(ops.weighted_mse, values)


def test_a_weight_of_another_dtype() -> None:
    values = {name: randn(3, 50, dtype=torch.bfloat16) for name in PAIR}
    values["weight"] = torch.rand(3, device=DEVICE)
    check(ops.weighted_mse, values, list(values))


def test_operator_and_compile() -> None:
    values = {name: randn(3, 5, dtype=torch.float64).requires_grad_() for name in PAIR}
    weight = torch.rand(3, device=DEVICE).double().requires_grad_()
    with ops.use_backend("triton"):
        op = torch.ops.diffusion_fast.weighted_mse.default
        torch.library.opcheck(op, (*values.values(), weight))
        torch.library.opcheck(op, (*values.values(), None))
        compiled = torch.compile(ops.weighted_mse, fullgraph=True, backend="aot_eager")
        assert torch.equal(
            compiled(**values, weight=weight), ops.weighted_mse(**values, weight=weight)
        )
