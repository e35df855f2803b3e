"""What every kernel test does: the same call by the kernel, by plain PyTorch and in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numerics import ATOL, error
from torch import Tensor

from diffusion_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)

Call = Callable[..., Any]


def randn(*size: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Random values; the layout ``"sliced"`` has odd strides and an odd address."""
    if layout == "sliced":
        larger = torch.randn(*size[:-1], 2 * size[-1] + 1, device=DEVICE)
        return larger.to(dtype)[..., 1::2]
    value = torch.randn(*size, device=DEVICE).to(dtype)
    if layout == "channels_last":
        value = value.contiguous(memory_format=torch.channels_last)
    return value


def _outputs(call: Call, values: dict[str, Tensor], gradients: Sequence[str]) -> list[Tensor]:
    leaves = {
        name: value.detach().requires_grad_(name in gradients) for name, value in values.items()
    }
    out = call(**leaves)
    out = out if isinstance(out, tuple) else (out,)
    results = [value.detach() for value in out]
    if gradients:
        reached = [value for value in out if value.requires_grad]
        cotangents = [
            torch.linspace(-1, 2, value.numel(), device=DEVICE).view(value.shape).to(value.dtype)
            for value in reached
        ]
        results += torch.autograd.grad(reached, [leaves[n] for n in gradients], cotangents)
    return results


def check(
    call: Call,
    values: dict[str, Tensor],
    gradients: Sequence[str] = (),
    repeat: bool = DEVICE == "cuda",
) -> None:
    """The tolerance rule for ``call``'s results and gradients under the Triton backend.

    ``call`` takes ``values`` by keyword. Run again, the kernel gives the same bits (``repeat``: the
    interpreter runs programs in order, so that there one case per kernel is enough).
    """
    with ops.use_backend("triton"):
        kernel = _outputs(call, values, gradients)
        again = _outputs(call, values, gradients) if repeat else kernel
    with ops.use_backend("reference"):
        plain = _outputs(call, values, gradients)
        double = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
        truth = _outputs(call, double, gradients)
    for result, repeated, ordinary, exact in zip(kernel, again, plain, truth, strict=True):
        close(result, exact, ordinary)
        assert same_bits(result, repeated), "two runs differ"
    for result, ordinary in zip(kernel, plain[: len(plain) - len(gradients)], strict=False):
        layouts = zip(result.stride(), ordinary.stride(), result.shape, strict=True)
        assert all(a == b for a, b, n in layouts if n > 1), (result.stride(), ordinary.stride())


def close(result: Tensor, truth: Tensor, plain: Tensor) -> None:
    """The tolerance rule; the interpreter truncates to bfloat16, which may cost one ulp there."""
    assert result.dtype == plain.dtype
    assert result.shape == truth.shape
    allowed = 2 * error(plain, truth) + ATOL[result.dtype]
    if result.dtype == torch.bfloat16 and DEVICE == "cpu":
        allowed += 2.0**-8  # truncation errs by up to 1 ulp where rounding errs by half of one
    got = error(result, truth)
    assert got <= allowed, f"relative error {got:.3g}, allowed {allowed:.3g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    dense = torch.contiguous_format
    a, b = (v.clone(memory_format=dense).view(-1).view(torch.uint8) for v in (a, b))
    return torch.equal(a, b)
