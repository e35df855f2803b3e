"""GroupNorm and the SiLU after it in one op, through ``ModelPatcher.add_object_patch``.

Patched is the ``forward`` of a module, not the module: so weights stay where ComfyUI's own patches,
such as LoRA, find them, and are read at every call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops

Forward = Callable[[Tensor], Tensor]


def patch_norms(patcher: Any, unet: nn.Module) -> int:
    """Replace all group norms, with the SiLU where one follows; the number of norms."""
    found = list(norms(unet))
    for name, norm, silu in found:
        path = f"diffusion_model.{name}"
        patcher.add_object_patch(f"{path}.forward", Normalized(norm, silu is not None))
        if silu is not None:
            patcher.add_object_patch(f"diffusion_model.{silu}.forward", Unchanged())
    return len(found)


def norms(unet: nn.Module) -> Iterator[tuple[str, nn.GroupNorm, str | None]]:
    """Each group norm with affine weights: its name, itself, the name of the SiLU it feeds."""
    for name, module in unet.named_modules():
        children = dict(module.named_children())
        followers = dict(itertools.pairwise(children)) if isinstance(module, nn.Sequential) else {}
        for child, norm in children.items():
            if not isinstance(norm, nn.GroupNorm) or norm.weight is None:
                continue
            prefix = f"{name}." if name else ""
            after = followers.get(child)
            fused = after is not None and isinstance(children[after], nn.SiLU)
            yield prefix + child, norm, prefix + after if fused and after is not None else None


class OnOps:
    """A forward that this package puts in the place of a module's."""


class Normalized(OnOps):
    """A group norm's forward, with the SiLU behind it or without."""

    def __init__(self, norm: nn.GroupNorm, silu: bool) -> None:
        self.norm, self.silu = norm, silu
        before = norm.forward  # the patch of another clone of the model may still be in place
        self.original: Forward = before.original if isinstance(before, Normalized) else before

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        # With little memory, ComfyUI applies LoRAs to weights on their way to the GPU.
        if getattr(norm, "weight_function", None) or getattr(norm, "bias_function", None):
            return F.silu(self.original(x)) if self.silu else self.original(x)
        # Weights may wait in another dtype or on another device until they are needed.
        weight, bias = norm.weight.to(x), norm.bias.to(x)
        return ops.group_norm_silu(x, norm.num_groups, weight, bias, norm.eps, self.silu)


class Unchanged(OnOps):
    """The forward of a SiLU that a norm has done."""

    def __call__(self, x: Tensor) -> Tensor:
        return x
