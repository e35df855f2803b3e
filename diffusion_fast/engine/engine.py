"""Run a sampler: prepare what does not depend on the step once, then loop."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..conditioning import Context, Model, PerStep, join_steps
from ..cores import warn_of_threads
from ..edits import Edit, Watch
from ..ops import Philox, checks
from ..ops.cpu import contest, threads
from ..ops.cpu import library as cpu_kernels
from ..samplers import SamplerOptions, table_of
from ..schedule import DiffusionSchedule
from ..turns import Turns
from .buffers import Generators, Layout
from .graphs.policy import Graphs
from .loop import Loop, Run, Start, check_extra, checked_shape, denoise
from .predictor import PlainPredictor, Predictor, predictor_for

Callback = Callable[[int, float, Tensor], None]
MAX_STEPS = 100  # of tables that need no new buffers, by default
LOOPS = 4  # shapes whose buffers are kept


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
        graph: whether to run as a CUDA graph. ``"loop"``: all of the loop is one, which hides the
            steps; ``"step"``: the host replays one for each step; ``"auto"``: the first of them
            that works and shows what is asked for (a callback or progress bar sees each step), or
            none; ``"off"``: none. A capture serves every prompt, seed, guidance scale, sampler and
            number of steps. A callable that is no ``nn.Module`` is captured only when asked for by
            name, because nobody sees its weights change.
        rewrites: the rewrites of a U-Net to use: ``"all"``, which are exact, ``"none"`` or their
            names. A lossy one is used by name only: ``["all", "int8"]`` adds it to all others.
        max_steps: how many model calls :meth:`configure` may ask for without new buffers; by
            default 100, and always those of the table.
        verify: read all weights before each run, to see every single element that is written in
            ways that PyTorch doesn't count; see :meth:`refresh`.
        device: where to sample; by default where the model's parameters are.
        progress: show a progress bar.
        table: attributes of :class:`~diffusion_fast.samplers.SamplerOptions`: sampler, steps,
            timestep_spacing, eta, guidance_scale and so on.

    Several threads may share an engine; their runs take turns. A callback can't use the engine that
    calls it. A copy or pickle of an engine has one of the model too.

    Raises:
        ValueError: an argument that can't be; the message names it.
        RuntimeError: ``graph`` is ``"loop"`` or ``"step"`` and nothing can be captured, here or in
            :meth:`sample`.

    Examples:
        >>> engine = df.Engine(lambda x, t: x, df.DiffusionSchedule(), sampler="dpmpp_2m", steps=5)
        >>> engine.sample((2, 3)).shape
        torch.Size([2, 3])
        >>> engine.configure(sampler="euler", steps=8)
        >>> engine.table.steps
        8
    """

    def __init__(
        self,
        model: Model,
        schedule: DiffusionSchedule,
        graph: str = "auto",
        *,
        rewrites: str | Sequence[str] = "all",
        max_steps: int | None = None,
        verify: bool = False,
        device: torch.device | str | None = None,
        progress: bool = False,
        **table: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        if not isinstance(schedule, DiffusionSchedule):
            kind = type(schedule).__name__
            raise TypeError(f"schedule: expected a DiffusionSchedule, got {kind}")
        if max_steps is not None:
            checks.positive_int("max_steps", max_steps)
        self.model, self.schedule, self.progress = model, schedule, progress
        self.rewrites = rewrites if isinstance(rewrites, str) else tuple(rewrites)
        self._asked_device = device
        self._graphs = Graphs(graph, model, _device_of(model, device))
        self._by_step(None, None)
        self._turns = Turns("Engine")
        self._loops: OrderedDict[Layout, Loop] = OrderedDict()
        self._predictors: dict[tuple[Any, ...], Predictor] = {}
        self._watch = Watch(verify)
        self._options = SamplerOptions().replace(**table)
        self.table = table_of(self._options, schedule)
        self._max_rows = max(max_steps or MAX_STEPS, len(self.table))
        if _device_of(model, device).type == "cpu":
            cpu_kernels.begin()
            warn_of_threads()

    def configure(self, **table: Any) -> None:
        """Another sampler, number of steps, guidance and so on; what is not named stays.

        Args:
            table: attributes of :class:`~diffusion_fast.samplers.SamplerOptions`.

        Up to ``max_steps`` model calls, this takes no new buffers.
        """
        with self._turns:
            self._configure(table)

    def sample(
        self,
        shape: Sequence[int],
        context: Context | PerStep = None,
        null_context: Context | PerStep = None,
        x_T: Tensor | None = None,
        generator: Generators = None,
        callback: Callback | None = None,
        x_0: Tensor | None = None,
        mask: Tensor | None = None,
        extra_channels: Tensor | None = None,
        table: Mapping[str, Any] | None = None,
        preview: Callback | None = None,
    ) -> Tensor:
        """Run the loop.

        Args:
            shape: shape of the result, [B, ...].
            context: what the model is conditioned on: a tensor [B, L, C] (or labels [B]), or a dict
                whose tensors are passed to the model by keyword. A batch of 1 serves all images. A
                :class:`~diffusion_fast.PerStep` has several for the steps of the run.
            null_context: the same for the unconditional half of guidance.
            x_T: standard normal noise to start from, in place of drawn noise.
            generator: source of all noise; or one per image, so that image i doesn't depend on the
                batch; or a :class:`~diffusion_fast.ops.Philox`: its own stream is the starting
                noise, and row i of the table reads the one that is 1 + i offsets on.
            callback: called as ``callback(step, t, x)`` after each step (of which some samplers'
                have two model calls) with a copy of the state; steps count from 0, t is the
                step's first timestep. The steps after it run with the weights that it leaves, as
                far as PyTorch counts writes.
            x_0: an image to start from, noised to where ``strength`` begins (image-to-image), or
                the image to keep outside of ``mask``.
            mask: inpainting, [B or 1, 1 or C, ...] in [0, 1] or bool: 1 draws, 0 keeps x_0. After
                each step x becomes mask x + (1 - mask) (A x_0 + S z), with z the starting noise and
                A, S the level that the step has reached; after the last step, x_0 itself. Without
                ``strength`` the loop starts from pure noise.
            extra_channels: [B or 1, C', ...], joined to the channels of every input of the model.
            table: keywords of :meth:`configure`, for this run and those after it; no other thread's
                run comes in between.
            preview: called as ``preview(step, t, x_0)`` after each step, before ``callback``, with
                the sample without noise that the step's last model call predicts.

        Returns:
            [B, ...] on the engine's device, float32 (float64 for float64 models).

        Raises:
            ValueError: an argument that doesn't fit; TypeError: a model that returns no tensor.
            FloatingPointError: the model's output was not finite; names the first such step.
            RuntimeError: the graph that was asked for by name can't be captured; or a callback, or
                the model, calls its own engine; or a callback changes more of a model with rewrites
                or graphs than the values of its weights.
        """
        shape = checked_shape(shape)
        check_extra(shape, extra_channels)
        with self._turns, _plain_tensors(), _evaluating(self.model):
            if table is not None:
                self._configure(table)
            from_image = self._options.strength is not None
            start = Start(x_T, x_0, mask, generator, from_image)
            start.check(shape)
            self._notice_edits()
            steps = self.table.step_of_row.tolist()
            joined = join_steps(context, null_context, self.table.halves, shape[0], steps)
            loop = self._loop_for(shape, 0 if extra_channels is None else extra_channels.shape[1])

            execute = self._graphs.executor(loop.predictor, loop.buffers.layout.device)
            prepared = loop.prepare(self.table, joined, extra_channels, execute)
            way = self._graphs.choose(
                prepared.capturable(mask is not None, preview is not None),
                philox=isinstance(generator, Philox),
                by_step=self._by_step(callback, preview),
            )
            with loop.threads():
                run = prepared.begin(way, start, preview is not None)
                rows = _track(range(len(self.table)), self.table.sampler, self.progress)
                seen = callback is not None or preview is not None
                denoise(run, rows, self._at_ends(run, callback, preview) if seen else None)
                return run.result()

    def refresh(self) -> None:
        """Take the weights as they are now.

        Edits are noticed without it at the next run: in place, by any optimizer of PyTorch,
        ``load_state_dict``, new tensors or modules, ``.to()``, a merged or switched LoRA. Of what
        PyTorch doesn't count, writes through ``.data``, by NumPy or another process, only those of
        whole tensors are noticed, by 64 spread elements of each. After single elements are written
        so, call this, or make the engine with ``verify=True``.
        """
        with self._turns, _plain_tensors():
            self._refresh()

    def explain(self) -> dict[str, Any]:
        """What a run of this engine does: table, halves of guidance, dtypes, graph, backends.

        ``"rewrites"`` has a row for each rewrite of the last run's predictor, ``"products"`` how
        many of a step's products and convolutions go which way on a CPU, ``"threads"`` how many
        share a step there.
        """
        step = ops.explain("sampler_step")
        device, model_dtype, dtype = self._placement()
        last = next(reversed(self._loops.values())) if self._loops else None
        return {
            "sampler": f"{self.table.sampler}, {len(self.table)} model calls",
            "guidance halves": self.table.halves,
            "state": f"{dtype} on {device}, model in {model_dtype}",
            "graph": f"{self._graphs.last.mode} ({self._graphs.last.why})",
            "sampler_step": step.backend,
            "products": _products(last),
            "threads": _threads(last),
            "rewrites": list(last.predictor.explain()) if last is not None else [],
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is an engine with these settings and buffers of its own."""
        settings: dict[str, Any] = {
            "graph": self._graphs.mode,
            "rewrites": self.rewrites,
            "max_steps": self._max_rows,
            "verify": self._watch.verify,
            "device": self._asked_device,
            "progress": self.progress,
        }
        make = functools.partial(type(self), **settings, **vars(self._options))
        return make, (self.model, self.schedule)

    def _by_step(self, callback: Callback | None, preview: Callback | None) -> str | None:
        """Why the host must see each step."""
        asked = {"callback": callback, "preview": preview, "progress": self.progress or None}
        seen = {name: value for name, value in asked.items() if value is not None}
        if not seen:
            return None
        if self._graphs.mode == "loop":
            name, got = next(iter(seen.items()))
            off = False if name == "progress" else None
            checks.fail(name, f"{off}, because graph='loop' hides the steps", got)
        return "a callback or progress bar sees each step"

    def _at_ends(
        self, run: Run, callback: Callback | None, preview: Callback | None
    ) -> Callable[[int], None]:
        """What is to be done after each row: the callbacks, where a step ends."""

        def seen(row: int) -> None:
            if preview is not None:
                preview(*run.rows.step_of(row), run.prediction())
            if callback is not None:
                callback(*run.rows.step_of(row), run.loop.buffers.x.clone())
            edit = self._watch.look(self.model, closely=False)
            if edit is Edit.VALUES:
                self._refresh()
                run.prepared.renew()
            elif edit is Edit.MODEL:
                self._forget()
                if run.way.graph is not None or not isinstance(run.loop.predictor, PlainPredictor):
                    raise RuntimeError(
                        "callback: expected one that changes nothing of the model but the values of"
                        " its weights, got other tensors, modules, hooks or settings"
                    )

        def after(row: int) -> None:
            if run.rows.ends[row]:
                with threads.using(threads.most()):
                    seen(row)

        return after

    def _configure(self, table: Mapping[str, Any]) -> None:
        options = self._options.replace(**table)
        self.table = table_of(options, self.schedule)
        self._options = options
        self._max_rows = max(self._max_rows, len(self.table))

    def _notice_edits(self) -> None:
        """Nothing that was captured or derived from other weights is used again."""
        edit = self._watch.look(self.model)
        if edit is Edit.MODEL:
            self._forget()
        elif edit is Edit.VALUES:
            self._refresh()

    def _refresh(self) -> None:
        self._graphs.clear()
        try:
            for predictor in self._predictors.values():
                predictor.refresh()
        except BaseException:  # some of what was derived is old
            self._forget()
            raise

    def _forget(self) -> None:
        self._loops.clear()
        self._predictors.clear()
        self._graphs.clear()

    def _placement(self) -> tuple[torch.device, torch.dtype, torch.dtype]:
        """Device, dtype of the model and dtype of the state, as the model is now."""
        model_dtype = _dtype_of(self.model)
        dtype = torch.float64 if model_dtype == torch.float64 else torch.float32
        return _device_of(self.model, self._asked_device), model_dtype, dtype

    def _loop_for(self, shape: tuple[int, ...], extra: int) -> Loop:
        """The loop of this shape, made at its first run."""
        device, model_dtype, dtype = self._placement()
        halves = 2 if self.table.halves == "both" else 1
        layout = Layout(shape, extra, halves, self._max_rows, dtype, model_dtype, device)
        loop = self._loops.get(layout)
        if loop is None:
            loop = Loop(layout, self._predictor_for(layout))
            if device.type == "cpu":  # before the first step, none of which waits or measures
                contest.prepare(loop.predictor.work(shape[2:]))
            self._loops[layout] = loop
            if len(self._loops) > LOOPS:
                self._give_up(next(iter(self._loops)))
        self._loops.move_to_end(layout)
        return loop

    def _give_up(self, layout: Layout) -> None:
        """Free a loop, its graphs, and its predictor if no other loop has it."""
        self._graphs.drop(self._loops.pop(layout))
        kept = {id(loop.predictor) for loop in self._loops.values()}
        for key, predictor in list(self._predictors.items()):
            if id(predictor) not in kept:
                self._graphs.drop(self._predictors.pop(key))

    def _predictor_for(self, layout: Layout) -> Predictor:
        """Images of the same batch share a predictor, whatever their sizes."""
        key = (layout.shape[0], layout.halves, layout.rows, layout.model_dtype, layout.device)
        if key not in self._predictors:
            self._predictors[key] = predictor_for(
                self.model,
                self.rewrites,
                batch=layout.shape[0],
                halves=layout.halves,
                max_rows=layout.rows,
            )
        return self._predictors[key]


def _products(loop: Loop | None) -> str:
    """Which ways the products of a loop go, as they were measured on a CPU."""
    if loop is None or loop.buffers.layout.device.type != "cpu":
        return "nothing was measured"
    return contest.told(loop.predictor.work(loop.buffers.layout.shape[2:]))


def _threads(loop: Loop | None) -> str:
    """How many threads share a step of a loop on a CPU."""
    most = threads.most()
    if loop is None or loop.buffers.layout.device.type != "cpu":
        return "not decided"
    count, work = loop.shared_by(most), loop.predictor.work(loop.buffers.layout.shape[2:])
    why = ", for so small a network" if work.tiny else ", measured to be faster"
    return f"{count} of {most}" + why * (count < most)


def _track(rows: range, label: str, enabled: bool) -> Iterable[int]:
    """The rows as they are, or with a progress bar on standard error."""
    if not enabled:
        return rows
    from rich.console import Console
    from rich.progress import track

    return track(rows, description=label, console=Console(stderr=True))


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, and no inference mode: its tensors could not be written to after it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _device_of(model: Model, device: torch.device | str | None) -> torch.device:
    """The device asked for, or that of the model's parameters; they must be the same."""
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
    """The dtype of the model's first floating parameter; float32 without one."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


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
