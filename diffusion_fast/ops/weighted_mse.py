"""The loss of diffusion training: a mean squared error with one weight per image."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dispatch import Op, autocast, checks, triton


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean over all elements of weight[b] * (prediction - target)^2.

    Args:
        prediction, target: [B, ...].
        weight: [B], float; None for all ones.

    Under autocast prediction and target may have two dtypes.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: shapes, dtypes or devices that don't match, or an empty prediction.

    Examples:
        >>> prediction, target = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.zeros(2, 2)
        >>> df.ops.weighted_mse(prediction, target, torch.tensor([1.0, 0.5]))
        tensor(3.)
    """
    return _OP(prediction, target, weight)


def _under_autocast(prediction: Tensor, target: Tensor, weight: Any) -> autocast.Policy:
    (prediction, target), _ = autocast.promoted(prediction, target)
    return (prediction, target, weight), None


def _check(prediction: Any, target: Any, weight: Any) -> None:
    checks.floating("prediction", prediction)
    if prediction.dim() < 1 or not prediction.numel():
        checks.fail("prediction", "a shape [B, ...] with elements", list(prediction.shape))
    checks.like("target", target, "prediction", prediction)
    if weight is not None:
        checks.floating("weight", weight)
        checks.shape("weight", weight, prediction.shape[:1], "[B]")
        checks.same_device("weight", weight, "prediction", prediction)


def _per_image(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


def reference(prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    compute = torch.promote_types(prediction.dtype, torch.float32)
    if weight is None:
        return torch.nn.functional.mse_loss(prediction.to(compute), target.to(compute))
    square = (prediction.to(compute) - target.to(compute)).square()
    return (square * _per_image(weight, square)).mean()


def reference_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prediction, target and weight (empty without a weight)."""
    compute = torch.promote_types(prediction.dtype, torch.float32)
    difference = prediction.to(compute) - target.to(compute)
    factor = grad.to(compute) / prediction.numel()
    scaled = 2 * factor * difference
    if weight is not None:
        scaled = scaled * _per_image(weight, difference)
        dweight = (factor * difference.square().reshape(len(weight), -1).sum(1)).to(weight.dtype)
    else:
        dweight = prediction.new_empty(0)
    dprediction = scaled.to(prediction.dtype)
    return dprediction, -dprediction, dweight


def _fake(prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    return prediction.new_empty((), dtype=torch.promote_types(prediction.dtype, torch.float32))


_OP = Op(
    "weighted_mse",
    reference,
    _fake,
    public=weighted_mse,
    check=_check,
    policy=_under_autocast,
)
_BACKWARD = Op(
    "weighted_mse_backward",
    reference_backward,
    lambda grad, prediction, target, weight: (
        (prediction - target) * 1,
        (prediction - target) * 1,
        prediction.new_empty(0) if weight is None else torch.empty_like(weight),
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    prediction, target, weight = ctx.saved_tensors
    dprediction, dtarget, dweight = _BACKWARD(grad, prediction, target, weight)
    return dprediction, dtarget, dweight if weight is not None else None


_OP.autograd(_setup_context, _backward)


def _kernels() -> ModuleType:
    from ..kernels import weighted_mse

    return weighted_mse


for _op in (_OP, _BACKWARD):
    triton.add(_op, _kernels)
