"""The whole U-Net by our forward, through ``ModelPatcher.set_model_unet_function_wrapper``.

What ComfyUI does around its U-Net (scaling the input, joining what an inpainting model sees, casts,
its wrappers) stays its own: for the time of a call, only the U-Net's forward is ours. It reads
ComfyUI's weights where they are (see :mod:`.twin`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ...engine.rewrites.prepare import rewritten
from ...models.blocks import timestep_embedding
from ...models.config import UNetConfig
from ...models.unet import UNet2DCondition
from ...ops import checks
from ..twin import Unlike
from .attention import attend
from .contexts import KeptContexts
from .control import Added, added_by
from .sharing import compared, times_of
from .twin import ComfyTwin, config_of

log = logging.getLogger(__name__)

Apply = Callable[..., Tensor]
Wrapper = Callable[[Apply, Mapping[str, Any]], Tensor]
CHANGES = ("on_load_after", "on_detach_after")  # CallbacksMP.ON_LOAD and ON_DETACH of ComfyUI
START, END = "on_pre_run", "on_cleanup"  # of a run
# The rewrites that derive no weights from ComfyUI's.
REWRITES = ("epilogues", "removed_no_ops")


class Linked(NamedTuple):
    """Our U-Net over ComfyUI's layers.

    Attributes:
        network: its blocks as they run, with other leaves.
        leaves: what reads weights again before each call.
        contexts: keys and values of the prompts so far.
    """

    network: UNet2DCondition
    leaves: Sequence[Any]
    contexts: KeptContexts


class UNetCalls:
    """A wrapper of the model's calls, in which the U-Net runs our forward where it can.

    Args:
        unet: ComfyUI's U-Net.
        config: its config.
        before: the wrapper that was there before, which is called inside of this one.

    Attributes:
        calls: how many calls of the U-Net ours has run.
        others: how many ComfyUI's own forward has run, by reason.
    """

    def __init__(self, unet: Any, config: UNetConfig, before: Wrapper | None = None) -> None:
        self.unet, self.config, self.before = unet, config, before
        self.calls = 0
        self.others: Counter[str] = Counter()
        self._told: set[str] = set()
        self._twin: ComfyTwin | None = None
        self._linked: tuple[object, Linked] | None = None  # for a state of the twin
        self._steady = False
        # ComfyUI's U-Net has its own wrappers around `_forward`; older ones have `forward` alone.
        self._slot = "_forward" if hasattr(type(unet), "_forward") else "forward"

    def __deepcopy__(self, memo: Any) -> UNetCalls:
        """Itself: clones of a ``ModelPatcher``, whose options are copied, share its model."""
        return self

    def to(self, device: torch.device) -> UNetCalls:
        """ComfyUI moves a wrapper so; what this one keeps is where the model is."""
        move = getattr(self.before, "to", None)
        self.before = self.before if move is None else move(device)
        return self

    def models(self) -> list[Any]:
        """The models that ComfyUI must load with this wrapper."""
        models = getattr(self.before, "models", None)
        return [] if models is None else list(models())

    def drop(self, *_: Any) -> None:
        """Forget what was made of the weights; ComfyUI calls it with whatever its hooks pass."""
        self._linked = None

    def start(self, *_: Any) -> None:
        """A run begins: its reasons are told anew."""
        self._told.clear()
        self.calls = 0
        self.others.clear()

    def end(self, *_: Any) -> None:
        """A run has ended: tell what it ran on, and keep nothing of it."""
        counts = [f"{self.calls} calls of the U-Net by diffusion_fast"]
        counts += [f"{count} by ComfyUI ({why})" for why, count in self.others.items()]
        log.info("diffusion_fast: %s", ", ".join(counts))
        self.drop()

    def __call__(self, apply: Apply, call: Mapping[str, Any]) -> Tensor:
        """``apply(input, timestep, **c)``, as ComfyUI hands it over."""
        with self._in_place():
            if self.before is not None:
                return self.before(apply, call)
            return apply(call["input"], call["timestep"], **call["c"])

    @contextmanager
    def steadily(self) -> Iterator[None]:
        """Calls that can be captured: nothing is compared or kept between them."""
        self._steady = True
        try:
            yield
        finally:
            self._steady = False

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        own = vars(self.unet)
        before = own.get(self._slot)
        if before is not None and before != self._theirs:
            self._tell(f"a {self._slot} of its own")
            yield
            return
        own[self._slot] = self.forward
        try:
            yield
        finally:
            del own[self._slot]
            if before is not None:
                own[self._slot] = before

    @property
    def _theirs(self) -> Callable[..., Tensor]:
        theirs: Callable[..., Tensor] = getattr(type(self.unet), self._slot).__get__(self.unet)
        return theirs

    def _tell(self, reason: str) -> None:
        self.others[reason] += 1
        if reason not in self._told:
            self._told.add(reason)
            log.warning("diffusion_fast: the U-Net runs ComfyUI's own forward: %s", reason)

    def forward(
        self,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **others: Any,
    ) -> Tensor:
        """As the forward of ComfyUI's U-Net; what it does not know among ``others`` is ignored."""
        options = {} if transformer_options is None else transformer_options
        if not torch.compiler.is_compiling():
            try:
                self._check(x, timesteps, context, y, options)
                linked = self._link(x)
                added = added_by(control, linked.network, x)
            except Unlike as reason:
                self._tell(str(reason))
            else:
                self.calls += 1
                return self._run(linked, x, timesteps, context, y, added, options)
        return self._theirs(x, timesteps, context, y, control, options, **others)

    def _check(self, x: Tensor, timesteps: Any, context: Any, y: Any, options: Any) -> None:
        """Raise Unlike for a call that ours can't be, whatever the weights."""
        if why := needs_the_inside(options):
            raise Unlike(why)
        config, batch = self.config, len(x)
        wanted: dict[str, tuple[Any, int, int, int | None]] = {
            "x": (x, 4, 1, config.in_channels),
            "context": (context, 3, 2, config.cross_attention_dim),
        }
        if config.addition_embed_type is not None:
            wanted["y"] = (y, 2, 1, config.projection_class_embeddings_input_dim)
        elif y is not None:
            raise Unlike("y for a model that takes none")
        for name, (value, dims, dim, size) in wanted.items():
            if not isinstance(value, Tensor):
                raise Unlike(f"{name} is a {type(value).__name__}, not a tensor")
            if value.dim() != dims or value.shape[dim] != size or len(value) != batch:
                raise Unlike(f"{name} of {list(value.shape)}")
            if (value.dtype, value.device) != (x.dtype, x.device):
                raise Unlike(f"{name} of {value.dtype} on {value.device}, as x is not")
        if not isinstance(timesteps, Tensor) or timesteps.shape != (batch,):
            raise Unlike("timesteps that are not one for each image")

    def _link(self, x: Tensor) -> Linked:
        """Our U-Net over ComfyUI's layers as they are now.

        Raises:
            Unlike: they can't be linked.
        """
        place = x.dtype, x.device
        if self._twin is None:
            self._twin = ComfyTwin(self.unet, self.config, place)
        twin = self._twin
        twin.place = place
        if problem := twin.problem():
            self._linked = None
            raise Unlike(problem)
        if self._linked is None or self._linked[0] is not twin.links:
            on = {*REWRITES, "split_skips"} if x.device.type == "cuda" else set(REWRITES)
            ours = cast("UNet2DCondition", twin.ours)
            network, leaves = rewritten(ours, on)
            self._linked = twin.links, Linked(network, leaves, KeptContexts(ours))
        linked = self._linked[1]
        for leaf in linked.leaves:
            leaf.refresh()
        return linked

    @torch.no_grad()
    def _run(
        self,
        linked: Linked,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None,
        added: tuple[Added, Added],
        options: Mapping[str, Any],
    ) -> Tensor:
        network = linked.network
        residuals, features = added
        if self._steady:
            time = network.project_time(embed_time(network, timesteps, y, x.dtype))
            kv = network.project_context(context)
            return network.denoise(x, time, kv, None, residuals, features)
        candidates = linked.contexts.candidates(context)
        rows, (one_time, *known) = compared(
            [x, timesteps] if y is None else [x, timesteps, y],
            len(options.get("cond_or_uncond", (0,))),
            [(timesteps, timesteps[:1].expand_as(timesteps))]
            + [(context, other) for other, _ in candidates],
        )
        made = [kv for (_, kv), equal in zip(candidates, known, strict=True) if equal]
        kv = made[0] if made else network.project_context(context)
        linked.contexts.keep(context, kv)
        if one_time and y is None:
            timesteps = timesteps[:1]
        time = network.project_time(embed_time(network, timesteps, y, x.dtype))
        image: Tensor | None = None
        # What a T2I-Adapter adds has a row for each prompt; it must not meet rows of images.
        if rows is not None and not (features and network.first_attention):
            firsts, image = (torch.tensor(one, device=x.device) for one in rows)
            x = x.index_select(0, firsts)
            if len(timesteps) > 1:
                time = times_of(network, time, firsts)
        return network.denoise(x, time, kv, None, residuals, features, image)


def patch_unet(patcher: Any, unet: Any) -> UNetCalls:
    """Wrap the calls of a model so that its U-Net runs ours.

    Raises:
        ValueError: a U-Net that ours can't be.
    """
    try:
        config = config_of(unet)
    except (KeyError, ValueError) as error:
        why = f"{type(unet).__name__} ({type(error).__name__}: {error})"
        checks.fail("unet", "a model that diffusion_fast has (SD 1.x, SD 2.x, SDXL)", why)
    before = patcher.model_options.get("model_function_wrapper")
    if isinstance(before, UNetCalls):
        before = before.before
    calls = UNetCalls(unet, config, before)
    patcher.set_model_unet_function_wrapper(calls)
    for when in CHANGES:
        patcher.add_callback(when, calls.drop)
    patcher.add_callback(START, calls.start)
    patcher.add_callback(END, calls.end)
    return calls


def needs_the_inside(options: Mapping[str, Any]) -> str | None:
    """What other nodes do inside of the U-Net's blocks; None if nothing."""
    patches = sorted(name for name, given in options.get("patches", {}).items() if given)
    if patches:
        return f"other nodes patch its blocks ({', '.join(patches)})"
    replaced = [
        f"{name} of {' '.join(map(str, place))}"
        for name, places in sorted(options.get("patches_replace", {}).items())
        for place, patch in places.items()
        if patch is not attend
    ]
    if replaced:
        return f"other nodes replace {', '.join(replaced[:3])}" + (" ..." * (len(replaced) > 3))
    if "optimized_attention_override" in options:
        return "another node replaces its attention (optimized_attention_override)"
    return None


def embed_time(
    unet: UNet2DCondition, timesteps: Tensor, y: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The activated time embedding [B, T]; ``y`` [B, P] is SDXL's pooled text with its sizes."""
    config = unet.config
    width, order = config.block_out_channels[0], (config.flip_sin_to_cos, config.freq_shift)
    emb = unet.time_embedding(timestep_embedding(timesteps, width, *order).to(dtype))
    return F.silu(emb if y is None else emb + unet.add_embedding(y))
