"""A step of training's forward and backward pass: all gradients of a mean square."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diffusion_fast as df
from diffusion_fast.conditioning import bind
from diffusion_fast.ops.cpu import library, threads
from diffusion_fast.training.gradient import Gradient
from diffusion_fast.training.rehearsal import for_step

from ..lib.environment import GPU
from . import in_diffusers
from .measure import Call, Variant
from .networks import Networks
from .variants import Build, on_reference, variants, wide, widened


def gradient_variants(networks: Networks, images: int, steps: int, compiles: bool) -> list[Variant]:
    """The U-Net's gradients for a batch of images; ``steps`` is 1.

    Batches are as training has them: a timestep for each image, no halves of guidance.
    """
    x, t, noise, given = batch(networks, images)

    def ours() -> tuple[nn.Module, Call]:
        shared = {id(p): nn.Parameter(p.detach()) for p in networks.unet.parameters()}
        model = trained(copy.deepcopy(networks.unet, shared))
        return model, lambda: gradients(model, lambda: model(x, t, **given), noise)

    def as_trainer() -> Call:
        model, step = ours()
        return step if GPU else by_trainer(model, (x, given), t, noise)

    def theirs() -> Call:
        model, options = trained(in_diffusers.unet(networks)), in_diffusers.unet_options(given)
        return lambda: gradients(model, lambda: model(x, t, **options)[0], noise)

    builds: dict[str, Build] = {
        "eager": lambda: on_reference(ours()[1]),
        "model": as_trainer,
        "diffusers": theirs,
    }
    return variants(builds, networks, compiles)


def gradient_truth(networks: Networks, images: int, steps: int) -> Tensor:
    x, t, noise, given = batch(networks, images)
    exact = networks.exact("unet")
    model, given = trained(exact.unet), widened(given, exact.dtype)
    x, noise = wide(x, exact.dtype), wide(noise, exact.dtype)
    return on_reference(lambda: gradients(model, lambda: model(x, t, **given), noise))()


def batch(networks: Networks, images: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Noisy images, a timestep for each, the noise to predict, and the other keywords."""
    inputs, generator = networks.inputs(images), torch.Generator().manual_seed(2)
    x = inputs.x_T.to(networks.dtype)
    t = torch.randint(1000, (images,), generator=generator).to(networks.device)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return x, t, noise, inputs.positive


def by_trainer(model: nn.Module, batch: tuple[Tensor, Any], t: Tensor, noise: Tensor) -> Call:
    """The step as a Trainer takes it on a CPU: its layout, threads, and way to a gradient."""
    objective = df.Trainer(model, [], df.DiffusionSchedule()).objective
    library.settle()
    with torch.enable_grad():
        count, objective.channels_last = for_step(model, objective, batch)
    given = objective.unpacked(batch)[:2]

    def loss(x: Tensor, context: Any) -> tuple[Tensor, None]:
        return F.mse_loss(bind(model, context)(x, t), noise), None

    gradient = Gradient(model, loss)

    def step() -> Tensor:
        model.zero_grad()
        with threads.using(count), torch.enable_grad():
            gradient(*given)
        return in_order(model)

    return step


def trained(model: Any) -> Any:
    """The model with gradients, as training has it."""
    return model.train().requires_grad_(True)


def gradients(model: nn.Module, predict: Callable[[], Tensor], noise: Tensor) -> Tensor:
    """Those of the mean square, in the order of the parameters' names, in one vector."""
    with torch.enable_grad():
        loss = F.mse_loss(predict(), noise)
    model.zero_grad()
    loss.backward()
    return in_order(model)


def in_order(model: nn.Module) -> Tensor:
    """The gradients in the order of the parameters' names, in one vector."""
    named = sorted(model.named_parameters())
    return torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])
