"""The state of an optimizer and of random generators, as tensors by name, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import Processes, fill

_NUMBER = "#number"  # behind the name of a number kept as a tensor
_SET = ("lr", "initial_lr", "factor")  # numbers of a group that the trainer sets


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by the names of their parameters, and what groups have counted."""
    values = {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    if _counts(optimizer):
        values |= {
            f"group{number}.{key}": value
            for number, group in enumerate(optimizer.param_groups)
            for key, value in group.items()
            if _is_number(value) and key not in _SET
        }
    return {
        name + _NUMBER * _is_number(value): torch.tensor(value, dtype=torch.float64)
        if _is_number(value)
        else value
        for name, value in values.items()
    }


@torch.no_grad()
def load_optimizer_state(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Go on from :func:`optimizer_state`."""
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        key, _, name = full_name.removesuffix(_NUMBER).partition(".")
        if key.startswith("group"):
            group = optimizer.param_groups[int(key.removeprefix("group"))]
            group[name] = type(group.get(name, 0.0))(value.item())  # some come with the first step
            continue
        parameter = parameters[name]
        if full_name.endswith(_NUMBER):
            number = float(value)
            optimizer.state[parameter][key] = int(number) if number.is_integer() else number
            continue
        # In the layout of the parameter, which the fused kernels take for granted.
        if value.shape == parameter.shape:
            own = torch.empty_like(parameter, dtype=value.dtype)
            fill(own, value)
        else:
            own = value.to(parameter.device)
        optimizer.state[parameter][key] = own


def random_state(
    processes: Processes, device: torch.device, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """The global generators of every process, and the trainer's own, which are all alike."""
    own = {"global": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    states: dict[str, Tensor] = {}
    for name, value in own.items():
        joint = processes.gather(value[None].to(device)).cpu()
        states |= {f"{name}.{rank}": row.clone() for rank, row in enumerate(joint)}
    if generator is not None:
        states["trainer"] = generator.get_state()
    return states


def load_random_state(
    processes: Processes,
    device: torch.device,
    generator: torch.Generator | None,
    states: Mapping[str, Tensor],
) -> None:
    """Go on from :func:`random_state`; more processes than before keep what they started with."""
    rank = processes.rank
    if f"global.{rank}" in states:
        torch.set_rng_state(states[f"global.{rank}"])
    if f"cuda.{rank}" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda.{rank}"], device)
    if generator is not None:
        generator.set_state(states["trainer"])


def _counts(optimizer: Optimizer) -> bool:
    """Whether the optimizer keeps numbers of its own in its groups (Prodigy's step size)."""
    return any("d_numerator" in group for group in optimizer.param_groups)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
