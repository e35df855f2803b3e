"""The sampling loop: noise in, samples out, everything that can be done once done once."""

from __future__ import annotations

import contextlib
import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..conditioning import Context, Model, bind, join_halves
from ..ops import checks
from ..samplers import make_table
from ..samplers.table import StepTable
from ..schedule import DiffusionSchedule
from .buffers import Buffers, Generators, noise_source
from .progress import track

Callback = Callable[[int, float, Tensor], None]
GRAPHS = ("auto", "loop", "step", "off")
TABLE_KEYWORDS = inspect.signature(make_table).parameters.keys() - {"schedule"}


class Engine:
    """A model, a schedule and a sampler, made ready to sample many times.

    The sampler becomes a table of numbers (:func:`diffusion_fast.samplers.make_table`), built once;
    the buffers of the loop are allocated once per shape; a step does no work on the host but call
    the model and one op.

    Args:
        model: called as ``model(x, t)``, ``model(x, t, context)``, or with a dict context's tensors
            as keywords. x is [B, ...] in the model's dtype, t is [B]: int64 where every timestep
            of the grid is whole, else float32. With guidance, B is doubled and the unconditional
            half comes first. It must not change x or t in place. An ``nn.Module`` is put in eval
            mode while it samples, and may be moved or cast between two runs.
        schedule: what the model was trained with.
        graph: ``"auto"``, ``"loop"``, ``"step"`` or ``"off"``: whether to capture the loop as a
            CUDA graph. Asking for one where none can be captured raises.
        device: where to sample; by default where the model's parameters are.
        progress: show a progress bar.
        table: everything else, as in :func:`diffusion_fast.samplers.make_table`: sampler, steps,
            timestep_spacing, steps_offset, final_alpha, prediction_type, variance, eta,
            clip_sample, strength, guidance_scale, guidance_interval, guidance_rescale.

    Raises:
        ValueError: an argument that can't be; the message names it.
    """

    def __init__(
        self,
        model: Model,
        schedule: DiffusionSchedule,
        graph: str = "auto",
        *,
        device: torch.device | str | None = None,
        progress: bool = False,
        **table: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        if not isinstance(schedule, DiffusionSchedule):
            kind = type(schedule).__name__
            raise TypeError(f"schedule: expected a DiffusionSchedule, got {kind}")
        checks.one_of("graph", graph, GRAPHS)
        unknown = sorted(table.keys() - TABLE_KEYWORDS)
        if unknown:
            known = ", ".join(sorted(TABLE_KEYWORDS))
            raise TypeError(f"{unknown[0]}: expected one of the keywords {known}")
        self.table = make_table(schedule=schedule, **{"sampler": "ddpm", **table})
        self._starts_from_image = table.get("strength") is not None
        self._rows: list[list[float]] = self.table.folded().tolist()
        self.model, self.schedule, self.progress = model, schedule, progress
        self._asked_device = device
        _device_of(model, device)
        self.graph, self.graph_reason = _graph_mode(graph)
        self._buffers: Buffers | None = None
        self._buffers_key: tuple[Any, ...] = ()
        self._lock = threading.Lock()

    def sample(
        self,
        shape: Sequence[int],
        context: Context = None,
        null_context: Context = None,
        x_T: Tensor | None = None,
        generator: Generators = None,
        callback: Callback | None = None,
        x_0: Tensor | None = None,
    ) -> Tensor:
        """Run the loop.

        Args:
            shape: of the result, [B, ...].
            context: what the model is conditioned on: a tensor [B, L, C] (or labels [B]), or a dict
                whose tensors are passed to the model by keyword. A batch of 1 serves all images.
            null_context: the same for the unconditional half of guidance.
            x_T: standard normal noise to start from, in place of drawn noise.
            generator: for all noise; or one per image, so that image i doesn't depend on the batch.
            callback: called as ``callback(step, t, x)`` after each step (of which some samplers'
                have two model calls) with a copy of the state; steps count from 0, t is the
                step's first timestep.
            x_0: an image to start from, noised to where ``strength`` begins (image-to-image);
                needed with ``strength``, and only then.

        Returns:
            [B, ...] on the engine's device, float32 (float64 for float64 models).

        Raises:
            ValueError: an argument that doesn't fit; TypeError: a model that returns no tensor.
            FloatingPointError: the model's output was not finite; names the first such step.
        """
        shape = _checked_shape(shape)
        table = self.table
        if self._starts_from_image and x_0 is None:
            checks.fail("x_0", "an image to start from, because strength is given", None)
        if x_0 is not None and not self._starts_from_image:
            checks.fail("strength", "how far to noise x_0, in (0, 1]", None)
        halves = 2 if table.halves == "both" else 1
        context = join_halves(context, null_context, table.halves, shape[0])
        with self._lock, torch.no_grad(), _evaluating(self.model):
            buffers = self._buffers_for(shape, halves)
            buffers.start(self._first_state(buffers, x_T, x_0, generator))
            predict = bind(self.model, context)
            draw = noise_source(buffers.noise, generator) if buffers.noise is not None else None
            draws, steps = table.draws.tolist(), _Steps(table)
            for row in track(range(len(table)), table.sampler, enabled=self.progress):
                output = self._call(predict, buffers, row)
                if draw is not None and draws[row]:
                    draw()
                self._advance(buffers, row, output)
                if callback is not None and steps.ends(row):
                    callback(*steps.of(row), buffers.x.clone())
            _check_finite(buffers.peak, steps)
            return buffers.x.clone()

    def explain(self) -> dict[str, str]:
        """What a run of this engine does: table, halves of guidance, dtypes, graph, backends."""
        step = ops.explain("sampler_step")
        device, model_dtype, dtype = self._placement()
        return {
            "sampler": f"{self.table.sampler}, {len(self.table)} model calls",
            "guidance halves": self.table.halves,
            "state": f"{dtype} on {device}, model in {model_dtype}",
            "graph": f"{self.graph} ({self.graph_reason})",
            "sampler_step": step.backend,
        }

    def _placement(self) -> tuple[torch.device, torch.dtype, torch.dtype]:
        """Device, dtype of the model and dtype of the state, as the model is now."""
        model_dtype = _dtype_of(self.model)
        dtype = torch.float64 if model_dtype == torch.float64 else torch.float32
        return _device_of(self.model, self._asked_device), model_dtype, dtype

    def _buffers_for(self, shape: tuple[int, ...], halves: int) -> Buffers:
        device, model_dtype, dtype = self._placement()
        key = (shape, device, model_dtype, dtype)
        if self._buffers is None or self._buffers_key != key:
            self._buffers = Buffers.allocate(self.table, shape, halves, dtype, model_dtype, device)
            self._buffers_key = key
        return self._buffers

    def _first_state(
        self, buffers: Buffers, x_T: Tensor | None, x_0: Tensor | None, generator: Generators
    ) -> Tensor:
        x = buffers.x
        for name, given in (("x_T", x_T), ("x_0", x_0)):
            if given is not None:
                checks.floating(name, given)
                checks.shape(name, given, x.shape, "of the samples")
        if x_T is not None:
            x.copy_(x_T)
        else:
            noise_source(x, generator)()
        if x_0 is None:
            return x.mul_(self.table.initial_scale)
        return x.mul_(self.table.noise).add_(x_0.to(x), alpha=self.table.signal)

    def _call(
        self, predict: Callable[[Tensor, Tensor], Tensor], buffers: Buffers, row: int
    ) -> Tensor:
        """One call of the model, which is handed the buffers themselves: it may only read them."""
        x, t = buffers.model_input, buffers.timesteps[row]
        versions = x._version, t._version
        output = predict(x, t)
        if (x._version, t._version) != versions:
            changed = "x" if x._version != versions[0] else "t"
            checks.fail(
                "model",
                f"one that leaves {changed} as it is",
                f"one that changes it in place (give it {changed}.clone())",
            )
        return output

    def _advance(self, buffers: Buffers, row: int, output: Tensor) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"model: expected it to return a tensor, got {type(output).__name__}")
        if output.shape != buffers.model_input.shape:
            checks.fail(
                "model",
                f"an output of the shape of its input {list(buffers.model_input.shape)}",
                list(output.shape),
            )
        if output.data_ptr() == buffers.x.data_ptr():
            output = output.clone()  # a model that returns its input: x changes in place
        ops.sampler_step(
            buffers.x,
            output,
            self._rows,
            row,
            noise=buffers.noise,
            y=buffers.y,
            h1=buffers.h1,
            h2=buffers.h2,
            model_input=None if buffers.model_input is buffers.x else buffers.model_input,
            peak=buffers.peak,
            scratch=buffers.scratch,
        )


def sample(
    model: Model,
    schedule: DiffusionSchedule,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    sampler: str = "ddpm",
    steps: int | None = None,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    final_alpha: str = "one",
    prediction_type: str = "epsilon",
    variance: str = "large",
    eta: float = 0.0,
    clip_sample: bool | float = False,
    context: Context = None,
    null_context: Context = None,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float = 0.0,
    x_T: Tensor | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool = False,
    x_0: Tensor | None = None,
    strength: float | None = None,
) -> Tensor:
    """Sample once: the short form of :class:`Engine`, where all arguments are described.

    ``guidance_scale`` 1.0 runs the conditional half only, 0.0 the unconditional half only, anything
    else both. ``steps=None`` takes all T steps of the schedule. With ``x_0`` and ``strength`` the
    loop starts from a noised image instead of pure noise.
    """
    engine = Engine(
        model,
        schedule,
        device=device,
        progress=progress,
        sampler=sampler,
        steps=steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        final_alpha=final_alpha,
        prediction_type=prediction_type,
        variance=variance,
        eta=eta,
        clip_sample=clip_sample,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
        strength=strength,
    )
    return engine.sample(shape, context, null_context, x_T, generator, callback, x_0)


def _graph_mode(graph: str) -> tuple[str, str]:
    """The mode that runs and why. Capture is not built yet, so asking for it is an error."""
    if graph in ("loop", "step"):
        why = "this version does not capture CUDA graphs"
        if not torch.cuda.is_available():
            why = "there is no CUDA device"
        raise RuntimeError(f"graph: {graph!r} was asked for and can't run: {why}")
    return "off", "as asked" if graph == "off" else "this version does not capture CUDA graphs"


def _device_of(model: Model, device: torch.device | str | None) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if device is None:
        return parameter.device if parameter is not None else torch.device("cpu")
    try:
        device = torch.empty(0, device=device).device  # "cuda" is the current one, such as cuda:0
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that works, got {device!r}: {reason}") from error
    if parameter is not None and parameter.device != device:
        checks.fail("device", f"the device of the model's parameters ({parameter.device})", device)
    return device


def _dtype_of(model: Model) -> torch.dtype:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        checks.fail("shape", "positive sizes [B, ...]", repr(shape))
    if not sizes or min(sizes) < 1:
        checks.fail("shape", "positive sizes [B, ...]", list(sizes))
    return sizes


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Eval mode for the time of a run; every module gets back the mode that it had."""
    modules = list(model.modules()) if isinstance(model, nn.Module) and model.training else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Steps:
    """Which step each row belongs to: some samplers call the model twice in a step."""

    def __init__(self, table: StepTable) -> None:
        self._step: list[int] = table.step_of_row.tolist()
        self._t: list[float] = table.timesteps.tolist()

    def __len__(self) -> int:
        return self._step[-1] + 1

    def ends(self, row: int) -> bool:
        return row + 1 == len(self._step) or self._step[row + 1] != self._step[row]

    def of(self, row: int) -> tuple[int, float]:
        """The step, counted from 0, and its first timestep."""
        step = self._step[row]
        return step, self._t[self._step.index(step)]


def _check_finite(peak: Tensor, steps: _Steps) -> None:
    """The one host read of a run, after its last step."""
    finite = peak.isfinite()
    if not finite.all():
        step, t = steps.of(int((~finite).nonzero()[0]))
        raise FloatingPointError(
            f"model: expected finite outputs, got NaN or infinity first at step {step} (t = {t:g};"
            f" steps count from 0 to {len(steps) - 1})"
        )
