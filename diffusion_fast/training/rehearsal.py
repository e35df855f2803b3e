"""How a training step is the fastest on a CPU: tried on a copy, before the first one.

At every small op the threads of a process wait for the last of them. Beside another program that is
a thread which isn't running, so more threads can be many times slower than one. Images whose
channels are innermost are what the kernels for a CPU compute; in a small batch, PyTorch's own
convolutions of small images are faster.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .. import ops
from ..conditioning import Context, bind, form
from ..engine.rewrites.cost import Calls
from ..engine.rewrites.plan import OpCall
from ..files import CheckpointError
from ..kernels.layout import channels_last
from ..ops.cpu import contest, library, step_contest, threads
from ..schedule import DiffusionSchedule
from .batches import moved, split, unpacked
from .gradient import WITH_ADAPTERS, Gradient, only_computes
from .loss import predict
from .objective import Objective
from .options import autocast


class Way(NamedTuple):
    """How a step is computed.

    Attributes:
        threads: how many threads share it.
        channels_last: whether images have their channels innermost.
    """

    threads: int
    channels_last: bool


class Step(NamedTuple):
    """A step that may be measured.

    Attributes:
        work: its op calls.
        ways: computes it, by the layouts of images that are open.
    """

    work: contest.Work
    ways: dict[str, Callable[[], None]]


class Rehearsals:
    """How the steps of a run are computed: rehearsed before its first one.

    Args:
        model: the network.
        objective: what trains it.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.model, self.objective = model, objective
        self._ways: dict[int, Way] = {}  # by PyTorch's number of threads
        self._measured: set[tuple[int, torch.Size]] = set()  # that number, and a batch's shape

    def ready(self, batch: Any) -> contextlib.AbstractContextManager[None]:
        """On a CPU lay images out as is the fastest, and share steps among as many threads.

        Products of a batch of another shape are measured when the first of them comes.
        """
        if self.objective.device.type != "cpu":
            return contextlib.nullcontext()
        most = threads.most()
        kind = most, unpacked(batch, self.objective.device)[0].shape
        if most not in self._ways:
            self._ways[most] = for_step(self.model, self.objective, batch)
        elif kind not in self._measured:
            measured(self.model, self.objective, batch)
        self._measured.add(kind)
        count, self.objective.channels_last = self._ways[most]
        return threads.using(count)

    def state_dict(self) -> dict[str, Any]:
        """What was found, as JSON can hold it: sums are rounded by it."""
        found: dict[str, Any] = {"contests": contest.taken()}
        if way := self._ways.get(threads.most()):
            found |= {"shared_by": way.threads, "images_channels_last": way.channels_last}
        return found

    def load_state_dict(self, saved: Mapping[str, Any], origin: str) -> None:
        """Go on as :meth:`state_dict` says, if that was on this machine.

        Args:
            saved: a checkpoint's values; older ones lack some.
            origin: the checkpoint, for errors.

        Raises:
            CheckpointError: a value that can't be.
        """
        contests = saved.get("contests", {})
        ways = (
            contests.get("ways", None if contests else {}) if isinstance(contests, dict) else None
        )
        if not isinstance(ways, dict) or not all(isinstance(way, str) for way in ways.values()):
            wanted = "expected ways by kinds of calls"
            raise CheckpointError(f"{origin}: contests: {wanted}, got {contests!r:.60}")
        if not contest.take(contests) or saved.get("shared_by") is None:
            return
        most, count, last = threads.most(), saved["shared_by"], saved.get("images_channels_last")
        if type(count) is not int or not 1 <= count <= most:
            raise CheckpointError(f"{origin}: shared_by: expected 1 to {most}, got {count!r}")
        if not isinstance(last, bool | None):
            wanted = "expected true or false"
            raise CheckpointError(f"{origin}: images_channels_last: {wanted}, got {last!r}")
        self._ways[most] = Way(count, bool(last))


def for_step(model: nn.Module, objective: Objective, batch: Any) -> Way:
    """The way in which a training step takes the least time on this CPU.

    Measured once for each network, batch and machine, as an engine measures: its products as by
    :func:`measured`, then a :func:`rehearsal` in both layouts, and with fewer threads. Where
    nothing is measured the options decide, and all threads share the step.

    Args:
        model: the network.
        objective: what trains it.
        batch: as the objective takes it.
    """
    step = measured(model, objective, batch)
    if step is None:
        return Way(threads.most(), objective.options.channels_last)
    layout = step_contest.way_of_step(step.work, "layout", step.ways)
    return Way(step_contest.threads_for(step.work, step.ways[layout]), layout == "channels_last")


def measured(model: nn.Module, objective: Objective, batch: Any) -> Step | None:
    """A step; products like its own and those of its gradients have been measured, in float32.

    None where a call may do more than to compute, in a network with hooks or with modules of
    unknown packages, in several processes, and without kernels for this CPU. Arguments as for
    :func:`for_step`.
    """
    options = objective.options
    alone = objective.processes.count == 1 and not options.compile and not library.machine()
    if not alone or not only_computes(model, WITH_ADAPTERS):
        return None
    x_0, context, _ = unpacked(batch, objective.device)
    _, x_0, context = split(x_0, context, options.accumulate)[0]
    exact = options.precision == "float32"  # what contests are about
    images = {"contiguous": x_0}
    if x_0.dim() == 4 and (options.channels_last or (exact and not _drops(model))):
        last = {"channels_last": channels_last(x_0)}
        images = last if options.channels_last else last | images
    weights = [(p.shape, p.stride(), p.dtype, p.requires_grad) for p in _parameters(model)]
    about = (str(model), weights, x_0.shape, x_0.stride(), x_0.dtype, form(context))
    kind = {"prediction_type": options.prediction_type, "precision": options.precision}
    first = next(iter(images.values()))
    name = f"training {about} {sorted(kind.items())}"
    work = contest.Work(name, functools.cache(lambda: _calls(model, first, context)))
    if exact:
        contest.prepare(work)
    ways = {
        layout: rehearsal(model, objective.schedule, (x, context), **kind)
        for layout, x in images.items()
    }
    return Step(work, ways)


@torch.enable_grad()
def _calls(model: nn.Module, x_0: Tensor, context: Context) -> list[OpCall]:
    """The op calls of forward and backward pass, found on the meta device.

    As far as that goes, where it lacks an operator of PyTorch's or a number is read.
    """
    place = torch.device("meta")
    twin, watch = _twin(model, lambda value: value.to(place)), Calls()
    t = torch.empty(len(x_0), dtype=torch.int64, device=place)
    with watch, contextlib.suppress(RuntimeError, TypeError):
        bind(twin, moved(context, place))(x_0.to(place), t).square().sum().backward()
    return watch.found


def _drops(model: nn.Module) -> bool:
    """Whether numbers are dropped at random: which ones depends on how images lie in memory."""
    return any(isinstance(one, _DropoutNd) and one.p > 0 for one in model.modules())


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of all modules; a network that is fine-tuned tells of what is trained alone."""
    found = (own for module in model.modules() for own in module._parameters.values())
    return [own for own in found if own is not None]


def _twin(model: nn.Module, as_its: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model, in training, with other tensors in the place of its weights."""
    memory: dict[int, Any] = {}
    for parameter in _parameters(model):
        own = nn.Parameter(as_its(parameter.detach()), parameter.requires_grad)
        memory[id(parameter)] = own
    for module in model.modules():
        for buffer in filter(torch.is_tensor, module._buffers.values()):
            memory[id(buffer)] = as_its(buffer.detach()).clone()
    return copy.deepcopy(model, memory).train()


def rehearsal(
    model: nn.Module,
    schedule: DiffusionSchedule,
    batch: tuple[Any, Context],
    *,
    prediction_type: str = "epsilon",
    precision: str = "float32",
) -> Callable[[], None]:
    """A training step without consequences: on a copy of the model, with generators kept.

    The copy shares the memory of the weights, which no step without an optimizer writes to.

    Args:
        model: network to train.
        schedule: the noise schedule.
        batch: x_0 and its context, on the device of the model.
        prediction_type: what the model predicts.
        precision: as for a Trainer.
    """
    x_0, context = batch
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(schedule.timesteps, (len(x_0),), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)

    @functools.cache
    def made() -> tuple[nn.Module, Gradient]:  # unless nothing is measured
        twin = _twin(model, lambda value: value)

        def loss(x: Tensor, c: Context, t: Tensor, noise: Tensor) -> tuple[Tensor, None]:
            with autocast(x.device, precision):
                prediction, target = predict(twin, schedule, x, c, t, noise, prediction_type)
            return ops.weighted_mse(prediction, target), None

        return twin, Gradient(twin, loss)

    def step() -> None:
        twin, gradient = made()
        with torch.random.fork_rng(devices=[]):  # for dropout
            gradient(x_0, context, t, noise)
        twin.zero_grad()

    return step
