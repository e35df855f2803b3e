"""Everything a run consists of, as tensors and JSON, and back."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import CheckpointError
from ..ops import checks
from .batches import Batches
from .ema import named_tensors
from .sharding import fill, whole

if TYPE_CHECKING:
    from .trainer import Trainer

Groups = dict[str, dict[str, Tensor]]


def collect(trainer: Trainer) -> tuple[Groups, dict[str, Any]]:
    """Tensors by group and name, and the rest; every process has to call this.

    Those of a sharded model are whole in the first process, and empty in the others.
    """
    groups: Groups = {
        "model": named_tensors(trainer.model),
        "optimizer": _optimizer_tensors(trainer),
        "random": _random_states(trainer),
        "run": {"losses": torch.tensor(trainer.losses, dtype=torch.float64)},
        "timesteps": trainer.objective.timestep_sampler.state_dict(),
    }
    state: dict[str, Any] = {
        "step": trainer.step,
        "steps": trainer.steps,
        "batches": trainer.batches,
        "threads": torch.get_num_threads(),
        "settings": settings(trainer),
    }
    if trainer.ema is not None:
        groups["ema"] = trainer.ema.state_dict()
        state["ema_updates"] = trainer.ema.updates
    return {name: whole(group, trainer.processes) for name, group in groups.items() if group}, state


@torch.no_grad()
def restore(trainer: Trainer, groups: Groups, state: Mapping[str, Any], origin: str) -> None:
    """Put a run's state into a trainer with the same settings.

    Raises:
        CheckpointError: tensors that are missing, extra or misshapen; nothing was changed then.
    """
    targets = {"model": named_tensors(trainer.model)}
    if trainer.ema is not None:
        targets["ema"] = trainer.ema.state_dict()
    for group, target in targets.items():
        _compare(group, target, groups.get(group, {}), origin)
    for group, target in targets.items():
        for name, value in groups[group].items():
            fill(target[name], value)
    if trainer.ema is not None:
        trainer.ema.updates = int(state["ema_updates"])
    _restore_optimizer(trainer, groups.get("optimizer", {}))
    _restore_random(trainer, groups["random"])
    trainer.objective.timestep_sampler.load_state_dict(groups.get("timesteps", {}))
    trainer.losses = groups["run"]["losses"].tolist()
    trainer.step, trainer.steps = int(state["step"]), int(state["steps"])
    trainer.batches = int(state["batches"])


def settings(trainer: Trainer) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON can hold it."""
    schedule, data = trainer.schedule, trainer.dataloader
    parameters = list(trainer.model.parameters())
    values = trainer.options.settings() | {
        "model": f"{trainer.model_name}, {sum(p.numel() for p in parameters)} parameters",
        "schedule": f"{schedule!r}, checksum {zlib.crc32(schedule.betas.numpy().tobytes()):08x}",
        "seed": trainer.seed,
        "timestep_sampler": trainer.objective.timestep_sampler.settings(),
    }
    if isinstance(data, Batches):
        values["data"] = data.settings()
    return values


def compare_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], ignore: Iterable[str], origin: str
) -> None:
    """Refuse to go on with another configuration.

    Raises:
        ValueError: lists everything that differs.
    """
    before, now = _flat(before), _flat(now)
    for name in ignore:
        checks.one_of("ignore", name, sorted(before.keys() | now.keys()))
    lines = [
        f"\n  {name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in ignore
    ]
    if lines:
        raise ValueError(f"resume: expected the settings of {origin}, got others:{''.join(lines)}")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            out[name] = value
    return out


def _compare(
    group: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: str
) -> None:
    problems = [f"missing: {name}" for name in expected.keys() - found.keys()]
    problems += [f"extra: {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"misshapen: {name} expected {list(value.shape)}, got {list(found[name].shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise CheckpointError(f"{origin}: not the tensors of this {group}:{lines}")


def _optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Moments and step counts by the names of their parameters."""
    state = trainer.optimizer.state
    return {
        f"{key}.{name}": value
        for name, parameter in trainer.model.named_parameters()
        for key, value in state.get(parameter, {}).items()
    }


def _restore_optimizer(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    trainer.optimizer.state.clear()
    parameters = dict(trainer.model.named_parameters())
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        parameter = parameters[name]
        # In the layout of the parameter, which the fused kernels take for granted.
        if value.shape == parameter.shape:
            own = torch.empty_like(parameter, dtype=value.dtype)
            fill(own, value)
        else:
            own = value.to(parameter.device)
        trainer.optimizer.state[parameter][key] = own


def _random_states(trainer: Trainer) -> dict[str, Tensor]:
    """The global generators of every process, and the trainer's own, which are all alike."""
    own = {"global": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(trainer.device)
    states: dict[str, Tensor] = {}
    for name, value in own.items():
        joint = trainer.processes.gather(value[None].to(trainer.device)).cpu()
        states |= {f"{name}.{rank}": row.clone() for rank, row in enumerate(joint)}
    if trainer.objective.generator is not None:
        states["trainer"] = trainer.objective.generator.get_state()
    return states


def _restore_random(trainer: Trainer, states: Mapping[str, Tensor]) -> None:
    """More processes than before keep the generators they started with."""
    rank = trainer.processes.rank
    if f"global.{rank}" in states:
        torch.set_rng_state(states[f"global.{rank}"])
    if f"cuda.{rank}" in states and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda.{rank}"], trainer.device)
    if trainer.objective.generator is not None:
        trainer.objective.generator.set_state(states["trainer"])
