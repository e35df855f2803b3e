"""The denoising objective: one random timestep per image, one prediction, one squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..conditioning import Context, Model, bind
from ..kernels.layout import channels_last, format_of
from ..ops import checks
from ..schedule import DiffusionSchedule


def diffusion_loss(
    model: Model,
    schedule: DiffusionSchedule,
    x_0: Tensor,
    context: Context = None,
    *,
    prediction_type: str = "epsilon",
    weight: Tensor | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The simplified objective of DDPM (Ho et al. 2020, eq. 14), for any prediction type.

    .. math:: L = \mathbb{E}_{t, \epsilon} \, w \, \lVert target - model(x_t, t) \rVert^2

    Args:
        model: called as ``model(x_t, t)`` or ``model(x_t, t, context)``.
        schedule: gives x_t.
        x_0: data, [B, ...].
        context: what the model is conditioned on, or None.
        prediction_type: what the model predicts: ``"epsilon"``, ``"v_prediction"``, ``"sample"``.
        weight: one per image, [B].
        t: timesteps, int64 [B]; drawn uniformly by default.
        noise: standard normal, like ``x_0``; drawn by default.
        generator: source of timesteps and noise, on the device of ``x_0``.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: a batch, context or model output of another shape than expected.
    """
    checks.floating("x_0", x_0)
    if t is None:
        size = (x_0.shape[0],)
        t = torch.randint(schedule.timesteps, size, generator=generator, device=x_0.device)
    if noise is None:
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
    prediction, target = predict(model, schedule, x_0, context, t, noise, prediction_type)
    return ops.weighted_mse(prediction, target, weight)


def predict(
    model: Model,
    schedule: DiffusionSchedule,
    x_0: Tensor,
    context: Context,
    t: Tensor,
    noise: Tensor,
    prediction_type: str,
    perturbed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the model makes of x_t, and what it should have made; arguments as above.

    Args:
        perturbed: the noise in x_t, where it is not the one that the target is made of.

    Returns:
        Prediction and target, both [B, ...] of the wider of their dtypes: under autocast the model
        answers in bfloat16, and the error is still taken in float32.
    """
    tables = schedule.tables(x_0.device)
    levels = t, tables["signal"], tables["noise"], prediction_type
    x_t, target = ops.add_noise(x_0, noise, *levels)
    if perturbed is not None:
        x_t, _ = ops.add_noise(x_0, perturbed, *levels)
    if format_of(x_0) == torch.channels_last:  # whatever the noise is, and for one channel too
        x_t = channels_last(x_t)
    prediction = bind(model, context)(x_t, t)
    if not isinstance(prediction, Tensor):
        raise TypeError(f"model: expected it to return a tensor, got {type(prediction).__name__}")
    if prediction.shape != target.shape:
        wanted = f"an output of the shape of its input {list(target.shape)}"
        checks.fail("model", wanted, list(prediction.shape))
    dtype = torch.promote_types(prediction.dtype, target.dtype)
    return prediction.to(dtype), target.to(dtype)


def image_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each image, without a gradient: [B, ...] to float32 [B]."""
    square = (prediction.detach().float() - target.float()).square()
    return square.flatten(1).mean(1)


def drop_condition(
    context: Context,
    null_context: Context,
    probability: float,
    generator: torch.Generator | None = None,
) -> Context:
    """Replace whole conditions by the null one, so that the model learns both halves of guidance.

    Classifier-free guidance (Ho & Salimans 2022, algorithm 1) trains one network on p(x | c) and
    p(x): with ``probability`` each image loses its condition.

    Args:
        context: a tensor [B, ...] or a dict of them; None stays None.
        null_context: the same with a batch of 1 or B.
        probability: in [0, 1].
        generator: on the device of the context.
    """
    if not 0 <= probability <= 1:
        checks.fail("condition_dropout", "a probability in [0, 1]", probability)
    if context is None or probability == 0:
        return context
    if null_context is None:
        checks.fail("null_context", "what stands for no condition, because of dropout", None)
    some = next(iter(context.values())) if isinstance(context, Mapping) else context
    dropped = (
        torch.rand(len(some), generator=generator, dtype=torch.float32, device=some.device)
        < probability
    )
    return replace_condition(context, null_context, dropped)


def replace_condition(context: Context, null_context: Context, dropped: Tensor) -> Context:
    """The null condition where ``dropped`` (bool [B]) is true, else the condition.

    Raises:
        ValueError: a null condition that can't stand in the place of the condition.
    """
    if isinstance(context, Mapping):
        if not isinstance(null_context, Mapping) or null_context.keys() != context.keys():
            got = sorted(null_context) if isinstance(null_context, Mapping) else "a tensor"
            checks.fail("null_context", f"a dict with the keys {sorted(context)}", got)
        pairs = {
            key: (f"null_context[{key!r}]", null_context[key], context[key]) for key in context
        }
        return {key: _replaced(*pair, dropped) for key, pair in pairs.items()}
    assert context is not None  # the callers ask before
    return _replaced("null_context", null_context, context, dropped)


def _replaced(name: str, null: Any, value: Tensor, dropped: Tensor) -> Tensor:
    checks.tensor(name, null)
    if null.shape[:1] not in (value.shape[:1], (1,)) or null.shape[1:] != value.shape[1:]:
        wanted = [f"{len(value)} or 1", *value.shape[1:]]
        checks.fail(name, f"shape [{', '.join(map(str, wanted))}]", list(null.shape))
    if null.is_floating_point() != value.is_floating_point():
        checks.fail(name, f"a dtype like the condition's ({value.dtype})", null.dtype)
    return torch.where(dropped.view(-1, *(1,) * (value.dim() - 1)), null.to(value), value)
