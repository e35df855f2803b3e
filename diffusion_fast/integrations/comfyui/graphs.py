"""Calls of the U-Net as CUDA graphs, through ``ModelPatcher.set_model_unet_function_wrapper``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...engine.graphs.capture import Capturer, CudaCapturer, Graph
from .attention import attend
from .unet import CHANGES, UNetCalls

log = logging.getLogger(__name__)

Apply = Callable[..., Tensor]
LIMIT = 4  # shapes whose graphs are kept


class GraphedCalls:
    """A wrapper of the model's calls, which replays a captured graph where it can.

    One graph per shape, dtype and set of conditions. All are dropped when the model is loaded or
    moved away, because a graph reads the weights' old addresses.

    Args:
        unet: the wrapper in which the U-Net runs our forward, which is called inside of this one;
            None for none. In a captured call it neither compares nor keeps anything.

    Attributes:
        why: why the last call was not a graph; None if it was.
    """

    def __init__(self, unet: UNetCalls | None = None) -> None:
        self.unet = unet
        self.capturer: Capturer = CudaCapturer()
        self.why: str | None = "no call yet"
        self._calls: dict[Hashable, tuple[dict[str, Tensor], Tensor, Graph]] = {}
        self._failed: dict[Hashable, str] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __deepcopy__(self, memo: Any) -> GraphedCalls:
        """Itself: clones of a ``ModelPatcher``, whose options are copied, share its model."""
        return self

    def drop(self, *_: Any) -> None:
        """Forget everything captured; ComfyUI calls it with whatever its hooks pass."""
        self._calls.clear()
        self._failed.clear()

    def __call__(self, apply: Apply, call: Mapping[str, Any]) -> Tensor:
        """``apply(input, timestep, **c)``, as ComfyUI hands it over."""
        if self.unet is not None:
            apply = self._through(self.unet, apply, call)
        x, t, options = call["input"], call["timestep"], call["c"]
        tensors = {"input": x, "timestep": t}
        tensors |= {name: value for name, value in options.items() if isinstance(value, Tensor)}
        key = tuple((name, v.shape, v.dtype, v.device) for name, v in sorted(tensors.items()))
        self.why = self._reason(x, options, tensors) or self._failed.get(key)
        if self.why is not None:
            return apply(x, t, **options)
        if key not in self._calls:
            try:
                self._capture(key, apply, tensors, options)
            except RuntimeError as error:
                self.why = self._failed[key] = f"capture failed: {error}"
                log.warning("diffusion_fast: %s", self.why)
                return apply(x, t, **options)
        static, out, graph = self._calls[key]
        for name, value in tensors.items():
            static[name].copy_(value)
        graph.replay()
        return out.clone()

    @staticmethod
    def _through(unet: UNetCalls, apply: Apply, call: Mapping[str, Any]) -> Apply:
        """``apply`` with the U-Net's forward replaced by ours."""

        def through(x: Tensor, t: Tensor, **options: Any) -> Tensor:
            return unet(apply, {**call, "input": x, "timestep": t, "c": options})

        return through

    def _reason(
        self, x: Tensor, options: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> str | None:
        """Why a call can't be a graph: whatever may act differently at another step."""
        why = self.capturer.unavailable(x.device)
        if why is not None:
            return why
        others = options.keys() - tensors.keys() - {"transformer_options"}
        active = sorted(name for name in others if options[name] is not None)
        if active:
            return f"{', '.join(active)} may act differently at each step"
        transformer = options.get("transformer_options", {})
        if transformer.get("patches") or any(
            patch is not attend
            for patches in transformer.get("patches_replace", {}).values()
            for patch in patches.values()
        ):
            return "patches of other nodes may act differently at each step"
        return None

    def _capture(
        self, key: Hashable, apply: Apply, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
    ) -> None:
        static = {name: value.clone() for name, value in tensors.items()}
        fixed = {n: v for n, v in options.items() if n not in static}
        fixed |= {n: v for n, v in static.items() if n not in ("input", "timestep")}
        made: list[Tensor] = []

        def work() -> None:
            made[:] = [apply(static["input"], static["timestep"], **fixed)]

        steadily = nullcontext() if self.unet is None else self.unet.steadily()
        with torch.no_grad(), steadily:
            graph = self.capturer.capture(static["input"].device, work, work)
        while len(self._calls) >= LIMIT:
            del self._calls[next(iter(self._calls))]
        self._calls[key] = static, made[0], graph


def patch_graphs(patcher: Any) -> GraphedCalls:
    """Wrap the calls of a model, and drop the graphs when ComfyUI loads or moves it.

    Raises:
        ValueError: another node wraps the calls already.
    """
    wrapper = patcher.model_options.get("model_function_wrapper")
    unet = wrapper if isinstance(wrapper, UNetCalls) and wrapper.before is None else None
    if wrapper is not unet:
        raise ValueError(
            "graphs: expected a model whose calls no other node wraps, got one with a"
            " model_function_wrapper; switch graphs off, or put this node before the other one"
        )
    calls = GraphedCalls(unet)
    patcher.set_model_unet_function_wrapper(calls)
    for when in CHANGES:
        patcher.add_callback(when, calls.drop)
    return calls
