"""Launches, bytes and FLOPs of a network's step, counted from the ops that it really calls.

The network runs once on the meta device, where tensors have shapes and no data, and every op of
:mod:`diffusion_fast.ops` is one call.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels import layout
from ...models import UNet2DCondition, UNetConfig
from ...models.controlled import Control, ControlledUNet
from ...models.controlnet import ControlNet
from ...models.ip_adapter import IPAdapter
from ...models.t2i_adapter import T2IAdapter
from ...ops.cpu.contest import Work
from ..buffers import Clock
from .plan import LOSSY, REWRITES, OpCall, Rewritable, RewritePlan, RewriteReport, unet_of

DEVICE = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """What a computation takes.

    Attributes:
        launches: ops that compute or move data; views cost nothing.
        bytes: read and written by them, each tensor once per op.
        flops: operations of products, convolutions and attention, a multiply-add as two.
    """

    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.launches + other.launches, self.bytes + other.bytes, self.flops + other.flops
        )

    def __sub__(self, other: Cost) -> Cost:
        return self + Cost(-other.launches, -other.bytes, -other.flops)


class Counter(TorchDispatchMode):
    """The cost of everything called inside the ``with`` block.

    Attributes:
        calls: each op's name, its arguments and its cost, in order.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton

        super().__init__()
        self._formulas = flop_registry
        self.calls: list[tuple[str, tuple[Any, ...], Cost]] = []

    @property
    def by_op(self) -> dict[str, Cost]:
        """The sum for each op, by its name."""
        found: dict[str, Cost] = {}
        for name, _, cost in self.calls:
            found[name] = found.get(name, Cost()) + cost
        return found

    @property
    def total(self) -> Cost:
        return sum((cost for _, _, cost in self.calls), Cost())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _tensors(out) and not _is_free(func):
            arrays = _tensors((args, kwargs, out))
            size = sum(value.numel() * value.element_size() for value in arrays)
            name = func._schema.name.split("::")[-1]
            cost = Cost(1, size, self._flops(func, args, kwargs, out))
            self.calls.append((name, args, cost))
        return out

    def _flops(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
        space, _, name = func._schema.name.partition("::")
        if space == "diffusion_fast":
            return flops(name, args, out)
        packet = func._overloadpacket
        if packet in self._formulas:
            return int(self._formulas[packet](*args, **kwargs, out_val=out))
        return 0


def flops(name: str, args: tuple[Any, ...], out: Any) -> int:
    """What a call of one of the project's ops takes, see :class:`Cost`.

    Args:
        name: the op's.
        args: the call's arguments.
        out: what it returned.
    """
    if name == "linear":
        x, weight = args[:2]
        return 2 * x.numel() * weight.shape[0]
    if name == "conv2d":
        return 2 * out.numel() * args[1][0].numel()
    if name in ("attention", "decoupled_attention"):
        q, k = args[:2]
        return 4 * q.numel() * k.shape[1]
    return 0


class Calls(TorchDispatchMode):
    """The calls of the project's ops inside the ``with`` block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "diffusion_fast":
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            given |= kwargs or {}
            every = (given.get(a.name, a.default_value) for a in func._schema.arguments)
            self.found.append((name, tuple(every)))
        return func(*args, **(kwargs or {}))


def _is_free(func: Any) -> bool:
    """Views, and allocations that write nothing."""
    name = func._schema.name.split("::")[-1]
    if name.startswith(("empty", "new_empty", "_unsafe_view")):
        return True
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _twin(model: Rewritable) -> Rewritable:
    """The same network without weights."""
    unet = UNet2DCondition(unet_of(model).config)
    if not isinstance(model, ControlledUNet):
        return unet
    controls = [
        ControlNet(one.control_config) if isinstance(one, ControlNet) else T2IAdapter(one.config)
        for one in cast("list[Control]", model.controls)
    ]
    return ControlledUNet(unet, controls, model.guess_mode)


class DryRun:
    """Counts steps of predictors of a model, on a twin of its config without weights.

    Args:
        model: the model.
        dtype: dtype of its parameters.
        batch: images in a call, all halves of guidance counted.
        size: height and width of its input.
        tokens: number of tokens of the context; 1 for labels.
        images: for each IP-Adapter its number of images, and of tokens of each.
    """

    def __init__(
        self,
        model: Rewritable,
        dtype: torch.dtype,
        batch: int,
        size: tuple[int, int],
        tokens: int,
        images: Sequence[tuple[int, int]] = (),
    ) -> None:
        config = unet_of(model).config
        with DEVICE:
            self.twin = _twin(model).to(dtype).eval()
            self._x = torch.empty(batch, config.in_channels, *size, dtype=dtype)
            self._context: dict[str, Any] = {"context": torch.empty(batch, dtype=torch.int64)}
            if config.num_classes is None:
                text = self._x.new_empty(batch, tokens, config.cross_attention_dim)
                self._context = {"context": text}
            if config.addition_embed_type is not None:
                sizes, width = 6, config.addition_time_embed_dim or 0
                pooled = (config.projection_class_embeddings_input_dim or 0) - sizes * width
                self._context["text_embeds"] = self._x.new_empty(batch, pooled)
                self._context["time_ids"] = torch.empty(batch, sizes)
            if isinstance(model, ControlledUNet):
                count, sides = len(model.controls), (side * model.grain for side in size)
                self._context["hints"] = self._x.new_empty(batch, count, 3, *sides)
                self._context["scales"] = torch.empty(batch, count)
                self._context["windows"] = torch.empty(batch, count, 2)

            if config.time_cond_proj_dim is not None:
                guided = self._x.new_empty(batch, config.time_cond_proj_dim)
                self._context["timestep_cond"] = guided

            places, width = unet_of(self.twin).cross_attentions(), config.cross_attention_dim
            for _ in images:
                widths = [attention.to_k.out_features for _, attention in places]
                made = IPAdapter(nn.Identity(), width, widths).to(dtype).eval()
                unet_of(self.twin).ip_adapters.append(made)
            if images:
                own = [self._x.new_empty(batch, n, size, width) for n, size in images]
                weights = self._x.new_empty(batch, len(places), sum(n for n, _ in images))
                self._context |= {"image_tokens": own, "image_weights": weights}

    def step(self, prepare: Callable[[Any], Any]) -> Counter:
        """The cost of one call of the predictor that ``prepare`` makes for a model."""
        counter = Counter()
        self.watched(prepare, counter)
        return counter

    def watched(self, prepare: Callable[[Any], Any], watch: TorchDispatchMode) -> None:
        """The same call, watched by something else."""
        with DEVICE, torch.no_grad():
            predictor, clock = prepare(self.twin), Clock(DEVICE)
            predictor.prepare(self._context, torch.empty(1))
            with watch:
                predictor(self._x, clock)


def work_of(
    network: nn.Module, pixels: int, found: Callable[[], list[OpCall]], *parts: object
) -> Work:
    """Op calls that a machine has to find once.

    Args:
        network: whose weights they read, each at most once for a pixel.
        pixels: of all images at their largest.
        found: finds the calls.
        parts: what decides them beside the code, by their texts.
    """
    texts = [repr(sorted(part) if isinstance(part, frozenset) else part) for part in parts]
    most = pixels * sum(weight.numel() for weight in network.parameters())
    return Work(" ".join([*texts, _code()]), found, most)


@functools.cache
def _code() -> str:
    """Of the files that decide which ops a network calls with which arguments."""
    digest, package = hashlib.sha256(), Path(__file__).parents[2]
    folders = (package / name for name in ("models", "engine", "ops"))
    files = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    for path in (*files, Path(layout.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def calls(
    config: UNetConfig,
    build: Callable[[Any, RewritePlan], Any],
    on: frozenset[str],
    dtype: torch.dtype,
    batch: int,
    halves: int,
    size: tuple[int, int],
) -> list[tuple[str, tuple[Any, ...]]]:
    """The op calls of a step, with tensors on the meta device in the place of their arguments.

    Args:
        config: the U-Net's.
        build: makes the predictor of such a model and a plan.
        on: the rewrites that are on.
        dtype: of its parameters.
        batch, halves: images, and halves of guidance in a call.
        size: height and width of the U-Net's input.
    """
    with DEVICE:
        model = UNet2DCondition(config)
    off = {name: "" for name in REWRITES if name not in on}
    plan = RewritePlan(batch, halves, 1, dtype, DEVICE, off, on & LOSSY.keys())
    watch = Calls()
    DryRun(model, dtype, halves * batch, size, 1).watched(lambda twin: build(twin, plan), watch)
    return watch.found


def explain(
    plan: RewritePlan,
    model: Rewritable,
    build: Callable[[Any, RewritePlan], Any],
    size: tuple[int, int] | None,
    tokens: int,
    images: Sequence[tuple[int, int]] = (),
) -> list[RewriteReport]:
    """What each rewrite saves: the cost of a step without it, less that of a step with all.

    What is lossy costs as many operations, of another kind: it is left out of the count.

    Args:
        plan: the rewrites that are on, and the sizes they were planned for.
        model: the U-Net, alone or with what steers it.
        build: makes the predictor of such a model and a plan.
        size: height and width of the U-Net's input; None leaves the savings open.
        tokens: number of tokens of the context.
        images: for each IP-Adapter its number of images, and of tokens of each.
    """
    batch, tokens = plan.halves * plan.batch, max(tokens, 1)
    run = size and DryRun(model, plan.dtype, batch, size, tokens, images)

    def cost_of(on: Collection[str]) -> Cost:
        off = {name: "" for name in REWRITES if name not in on}
        part = RewritePlan(plan.batch, plan.halves, 1, plan.dtype, DEVICE, off)
        assert run is not None
        return run.step(lambda twin: build(twin, part)).total

    now, reports = cost_of(plan.on) if run else None, []
    for name, rewrite in (REWRITES | LOSSY).items():
        exact = name in REWRITES
        on, saved = name in plan.on, Cost() if now and exact else None
        if on and now and exact:
            saved = cost_of(plan.on - {name}) - now
        why = rewrite.does if on else plan.off[name]
        reports.append(RewriteReport(name, on, why, *(astuple(saved) if saved else ())))
    return reports
