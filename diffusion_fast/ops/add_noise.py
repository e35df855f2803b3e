"""The noising step q(x_t | x_0) and the training target, in one pass."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import philox as _philox
from .dispatch import Op, autocast, checks, triton
from .philox import Philox

TARGETS = ("epsilon", "v_prediction", "sample")


def add_noise(
    x_0: Tensor,
    noise: Tensor | Philox,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    target: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    r"""Noise data in closed form (Ho et al. 2020, eq. 4), and what a network learns from it.

    .. math:: x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon

    Args:
        x_0: data, [B, ...].
        noise: standard normal, of the shape, dtype and device of ``x_0``, or a
            :class:`~diffusion_fast.ops.Philox`: then it is drawn on the way and never read.
        t: timesteps, int64 [B], values in [0, T).
        sqrt_alphas_cumprod: [T], on the device of ``x_0``.
        sqrt_one_minus_alphas_cumprod: [T], on the device of ``x_0``.
        target: ``"epsilon"`` (the noise), ``"sample"`` (x_0) or ``"v_prediction"``
            (sqrt(abar) noise - sqrt(1 - abar) x_0; Salimans & Ho 2022, appendix D).

    Under autocast ``x_0`` and ``noise`` of two dtypes are promoted.

    Returns:
        ``x_t`` and the target, both like ``x_0``. For ``"epsilon"`` and ``"sample"`` the target is
        the argument itself, not a copy; noise that was drawn is returned for ``"epsilon"``.

    Raises:
        ValueError: shapes, dtypes or devices that don't match, ``t`` out of range, unknown target.
            (On a GPU the values of ``t`` are not read on the host: they stay the caller's duty.)

    Examples:
        >>> schedule = df.DiffusionSchedule()
        >>> x_0, noise = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
        >>> tables = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        >>> x_t, target = df.ops.add_noise(x_0, noise, torch.tensor([0, 999]), *tables)
        >>> x_t[:, 0, 0, 0]  # little noise, then nearly nothing else
        tensor([0.0100, 1.0000])
    """
    checks.one_of("target", target, TARGETS)
    rest = t, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod
    if isinstance(noise, Philox):
        x_t, drawn = _PHILOX(x_0, noise.state, *rest, target)
        return x_t, x_0 if target == "sample" else drawn
    x_t, v = _OP(x_0, noise, *rest, target == "v_prediction")
    return x_t, {"epsilon": noise, "sample": x_0, "v_prediction": v}[target]


def _check(x_0: Any, noise: Any, t: Any, signal: Any, sigma: Any, velocity: Any) -> None:
    _check_data(x_0)
    checks.like("noise", noise, "x_0", x_0)
    _check_times(x_0, t, signal, sigma)


def _check_data(x_0: Any) -> None:
    checks.floating("x_0", x_0)
    if x_0.dim() < 1:
        checks.fail("x_0", "shape [B, ...]", list(x_0.shape))


def _check_times(x_0: Tensor, t: Any, signal: Any, sigma: Any) -> None:
    names = "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"
    for name, table in zip(names, (signal, sigma), strict=True):
        checks.floating(name, table)
        checks.shape(name, table, (signal.numel(),), "[T]")
        checks.same_device(name, table, "x_0", x_0)
    checks.tensor("t", t)
    if t.dtype != torch.int64:
        checks.fail("t", "dtype torch.int64", t.dtype)
    checks.shape("t", t, (len(x_0),), "[B]")
    checks.same_device("t", t, "x_0", x_0)


def _check_philox(x_0: Any, state: Tensor, t: Any, signal: Any, sigma: Any, target: Any) -> None:
    _check_data(x_0)
    _philox.check_device("noise", state, x_0)
    _check_times(x_0, t, signal, sigma)


def _check_values(x_0: Any, noise: Any, t: Tensor, signal: Tensor, *_: Any) -> None:
    count = signal.numel()
    checks.values_between("t", t, 0, count - 1, f"[0, {count})")


def _under_autocast(x_0: Tensor, noise: Tensor, *rest: Any) -> autocast.Policy:
    both, _ = autocast.promoted(x_0, noise)
    return (*both, *rest), None


def _coefficients(x: Tensor, t: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Rows t as [B, 1, ...], at least float32, so that half precision rounds only the result."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = (-1,) + (1,) * (x.dim() - 1)
    return signal[t].to(dtype).view(shape), sigma[t].to(dtype).view(shape)


def reference(
    x_0: Tensor, noise: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, velocity: bool
) -> tuple[Tensor, Tensor]:
    a, s = _coefficients(x_0, t, signal, sigma)  # [B, 1, ...]
    x_t = (a * x_0 + s * noise).to(x_0.dtype)
    # x_0 stands first in both, as its layout is that of the result.
    v = (-s * x_0 + a * noise).to(x_0.dtype) if velocity else x_0.new_empty(0)
    return x_t, v


def reference_backward(
    grad_x_t: Tensor, grad_v: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, velocity: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x_0 and noise."""
    a, s = _coefficients(grad_x_t, t, signal, sigma)
    grad_x_0, grad_noise = a * grad_x_t, s * grad_x_t
    if velocity:
        grad_x_0, grad_noise = grad_x_0 - s * grad_v, grad_noise + a * grad_v
    return grad_x_0.to(grad_x_t.dtype), grad_noise.to(grad_x_t.dtype)


def philox_reference(
    x_0: Tensor, state: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, target: str
) -> tuple[Tensor, Tensor]:
    """x_t and the target; an empty one for ``"sample"``, which is x_0 itself."""
    noise = _philox.normal(state, x_0.shape, x_0.dtype, x_0.device)
    noise = torch.empty_like(x_0).copy_(noise)
    x_t, v = reference(x_0, noise, t, signal, sigma, target == "v_prediction")
    return x_t, noise if target == "epsilon" else v


_OP = Op(
    "add_noise",
    reference,
    lambda x_0, noise, t, signal, sigma, velocity: (
        x_0 * 1 + noise,
        x_0 * 1 + noise if velocity else x_0.new_empty(0),
    ),
    public=add_noise,
    check=_check,
    values=_check_values,
    policy=_under_autocast,
)
_PHILOX = Op(
    "add_noise_philox",
    philox_reference,
    lambda x_0, state, t, signal, sigma, target: (
        torch.empty_like(x_0),
        x_0.new_empty(0) if target == "sample" else torch.empty_like(x_0),
    ),
    public=add_noise,
    check=_check_philox,
    values=_check_values,
)
_BACKWARD = Op(
    "add_noise_backward",
    reference_backward,
    lambda grad_x_t, *_: (grad_x_t * 1, grad_x_t * 1),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, t, signal, sigma, ctx.velocity = inputs
    ctx.save_for_backward(t, signal, sigma)


def _backward(ctx: Any, grad_x_t: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    grad_x_0, grad_noise = _BACKWARD(grad_x_t, grad_v, *ctx.saved_tensors, ctx.velocity)
    return grad_x_0, grad_noise, None, None, None, None


_OP.autograd(_setup_context, _backward)


def _setup_philox_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, t, signal, sigma, target = inputs
    ctx.velocity = target == "v_prediction"
    ctx.save_for_backward(t, signal, sigma)


def _philox_backward(ctx: Any, grad_x_t: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
    grad_x_0, _ = _BACKWARD(grad_x_t, grad_target, *ctx.saved_tensors, ctx.velocity)
    return grad_x_0, None, None, None, None, None


_PHILOX.autograd(_setup_philox_context, _philox_backward)


def _kernels() -> ModuleType:
    from ..kernels import add_noise

    return add_noise


for _op in (_OP, _PHILOX, _BACKWARD):
    triton.add(_op, _kernels)
