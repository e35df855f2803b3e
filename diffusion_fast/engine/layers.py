"""Linear layers and convolutions of a prepared network: weights, packing, epilogues."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from .. import ops
from ..models import blocks as plain
from ..models.blocks import hooked
from ..ops.conv2d import Padding, pads_of
from ..ops.linear import NO_NORM
from ..ops.op import Site
from ..ops.packing import Packed
from .folding import Rows, Weights

PLAIN = (nn.Linear, nn.Conv2d, plain.Linear, plain.Conv2d)


def is_plain(module: nn.Module) -> bool:
    """Whether a layer is all in its weight and bias: no adapter in its place, no hooks."""
    return type(module) in PLAIN and not hooked(module)


class Layer:
    """The weights of one op: the model's own, or derived from them and kept at one address.

    Args:
        source: the weights as the model has them now.
        on: the names of the rewrites that are on.
        derived: whether ``source`` computes them; else they are the model's own and shared.
        opaque: a layer to be called as it is instead, because it isn't plain.
    """

    def __init__(
        self,
        source: Callable[[], Weights],
        on: Collection[str],
        derived: bool = False,
        opaque: nn.Module | None = None,
    ) -> None:
        if opaque is not None and is_plain(opaque):
            opaque = None
        self._source, self._derived, self.opaque = source, derived, opaque
        self.epilogues = "epilogues" in on and opaque is None
        weights = source() if opaque is None else Weights(torch.empty(0))
        self.weight, self.bias, self.column_sums = weights
        self._to_pack = "packed_weights" in on and opaque is None
        self._packed: Packed | None = None
        self._packed_for: torch.Size | None = None

    def refresh(self) -> None:
        """Read the model's weights again; derived tensors keep their addresses."""
        if self.opaque is not None:
            return
        weights = self._source()
        if self._derived:
            for kept, new in zip((self.weight, self.bias, self.column_sums), weights, strict=True):
                if kept is not None and new is not None:
                    kept.copy_(new)
        else:
            self.weight, self.bias, self.column_sums = weights
        new_packed = None if self._packed_for is None else self._pack(self._packed_for)
        if self._packed is not None and new_packed is not None:
            pairs = zip(self._packed, new_packed, strict=True)
            self._packed = tuple(_rewritten(old, new) for old, new in pairs)

    def packed(self, x: Tensor) -> Packed | None:
        """The packed weight, made at the first call: what is best depends on the input's size."""
        if self._to_pack:
            self._to_pack, self._packed_for = False, x.shape
            self._packed = self._pack(x.shape)
        return self._packed

    def _pack(self, shape: torch.Size) -> Packed | None:
        raise NotImplementedError


def _rewritten(old: Tensor, new: Tensor) -> Tensor:
    """``new`` at the address of ``old``; opaque tensors of a CPU have none that anybody keeps."""
    return new if old.layout == torch._mkldnn else old.copy_(new)  # type: ignore[attr-defined]


class Linear(Layer):
    """x W^T + b, with what follows it in one op where epilogues are on.

    Args:
        source, on, derived, opaque: as for :class:`Layer`.
        geglu: ends with the gate.
    """

    def __init__(
        self,
        source: Callable[[], Weights],
        on: Collection[str],
        derived: bool = False,
        opaque: nn.Module | None = None,
        geglu: bool = False,
    ) -> None:
        super().__init__(source, on, derived, opaque)
        self.geglu = geglu
        self._gate = geglu and self.epilogues
        self._op = Site("linear")

    def __call__(
        self, x: Tensor, rows: Rows | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """[..., K] to [..., N].

        Args:
            x: the input; with a folded layer norm, before the norm.
            rows: its statistics then.
            residual: what is added to the result.
        """
        if self.opaque is not None:
            y = plain.project(self.opaque, x)
        else:
            norm = NO_NORM if rows is None else (*rows, self.column_sums)
            joined = residual if self.epilogues else None
            packed = self.packed(x)
            y = self._op(x, self.weight, self.bias, joined, self._gate, *norm, packed)
        if self.epilogues:
            return y
        if self.geglu:
            y = ops.geglu(y)
        return y if residual is None else residual + y

    def _pack(self, shape: torch.Size) -> Packed | None:
        return ops.pack_linear(self.weight, shape[:-1].numel(), geglu=self._gate)


class Conv2d(Layer):
    """A convolution, with what follows it in one op where epilogues are on.

    Args:
        source, on, derived, opaque: as for :class:`Layer`.
        stride: of both dimensions.
        padding: as :func:`diffusion_fast.ops.conv2d` takes it.
    """

    def __init__(
        self,
        source: Callable[[], Weights],
        on: Collection[str],
        derived: bool = False,
        opaque: nn.Module | None = None,
        *,
        stride: int = 1,
        padding: Padding = 0,
    ) -> None:
        super().__init__(source, on, derived, opaque)
        self.stride, self.padding = stride, padding
        self._pads = pads_of(padding)
        self._op = Site("conv2d")

    def __call__(
        self,
        x: Tensor,
        x2: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """[B, C, H, W] to [B, O, H', W'].

        Args:
            x: the input, [B, C1, H, W].
            x2: its further channels, [B, C2, H, W].
            shift: [B, O], or [1, O] for all images: takes the place of the bias.
            residual: what is added to the result.
        """
        if self.opaque is not None:
            y = self.opaque(x if x2 is None else torch.cat((x, x2), dim=1))
            return y if residual is None else y + residual
        packed = self.packed(x)
        bias, add = self.bias, None
        if shift is not None:
            bias, add = (shift[0], None) if len(shift) == 1 else (None, shift)
        joined = residual if self.epilogues else None
        y = self._op(x, self.weight, bias, self.stride, self._pads, x2, add, joined, packed)
        return y if residual is None or self.epilogues else y + residual

    def _pack(self, shape: torch.Size) -> Packed | None:
        size = (shape[0], self.weight.shape[1], shape[2], shape[3])
        return ops.pack_conv2d(self.weight, size, stride=self.stride, padding=self.padding)
