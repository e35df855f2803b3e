"""Whether tensors were written to since somebody last asked, also by what PyTorch doesn't count."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

SAMPLE = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_version = attrgetter("_version")


class Writes:
    """The writes to some tensors, from one question to the next.

    Three things tell of a write. PyTorch counts most of them. The steps of optimizers are heard of,
    because fused ones are not counted. Writes through ``.data``, by NumPy or another process are
    not counted either, but whole tensors that are written so differ in a sample of their elements.
    Of single elements written so, only a checksum of all bits tells.

    Args:
        tensors: what to watch; they are kept alive.
        verify: take a checksum of all bits at each question.
    """

    def __init__(self, tensors: Iterable[Tensor], verify: bool = False) -> None:
        self._tensors, self._verify = list(tensors), verify
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._ids, self._stepped = set(map(id, self._tensors)), False
        views: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._apart: list[Tensor] = []  # which have no such view
        readable = [  # not on the meta device, and not spread over processes or compressed
            tensor
            for tensor in self._tensors
            if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
            and not (tensor.is_meta or tensor.is_quantized)
            and tensor.layout == torch.strided
        ]
        for tensor, sample in zip(readable, spread(*readable), strict=True):
            if sample.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                views.setdefault((sample.device, sample.dtype), []).append(sample)
            else:
                self._apart.append(tensor)
        self._views = list(views.values())
        self._versions, self._uncounted = self._read_versions(), self._read_elements()
        _asked.append(weakref.ref(self, _asked.remove))

    def __call__(self) -> bool:
        """Whether there were any since the last question, or since the start."""
        before, self._uncounted = self._uncounted, self._read_elements()
        (samples, sums), (old_samples, old_sums) = self._uncounted, before
        return self.counted() or sums != old_sums or not all(map(torch.equal, samples, old_samples))

    def counted(self) -> bool:
        """The same without a look at the elements: whether PyTorch or an optimizer told of any."""
        stepped, self._stepped = self._stepped, False
        before, self._versions = self._versions, self._read_versions()
        return stepped or self._versions != before

    def _read_versions(self) -> list[int]:
        return list(map(_version, self._counted))

    def _read_elements(self) -> tuple[list[Tensor], list[int]]:
        samples = [*map(torch.cat, self._views), *spread(*self._apart)]
        return samples, checksums(self._tensors) if self._verify else []

    def hear_of(self, parameters: Iterable[int]) -> None:
        """An optimizer has made a step with the tensors of these ids."""
        if not self._ids.isdisjoint(parameters):
            self._stepped = True


_asked: list[weakref.ref[Writes]] = []


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling() or not _asked:
        return
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for reference in tuple(_asked):
        writes = reference()
        if writes is not None:
            writes.hear_of(parameters)


register_optimizer_step_post_hook(_after_step)


def spread(*tensors: Tensor) -> Iterator[Tensor]:
    """At least 64 elements of each tensor, or all there are, as integers of their bits, 1-D.

    They lie evenly in memory. Their distance shares no factor with the sizes, so that they are of
    many rows and columns. It is a view, unless the tensor's elements lie apart or overlap.
    """
    orders = (sorted(range(tensor.dim()), key=tensor.stride)[::-1] for tensor in tensors)
    for flat in _bits(tensor.permute(order) for tensor, order in zip(tensors, orders, strict=True)):
        count = flat.numel()
        distances = range(count // SAMPLE, 1, -1)
        yield flat[:: next((n for n in distances if math.gcd(n, count) == 1), 1)]


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """A number per tensor that any change of one element changes; one host read per device.

    The bits of element i, as an integer, times 2 i + 1, summed modulo 2^64. An odd factor has an
    inverse there, so no change of an element is lost.
    """
    sums = []
    for flat in _bits(tensors):
        odd = torch.arange(1, 2 * len(flat) + 1, 2, device=flat.device)
        sums.append((flat.long() * odd).sum())
    found = [0] * len(sums)
    for device in {value.device for value in sums}:
        places = [i for i, value in enumerate(sums) if value.device == device]
        values = torch.stack([sums[i] for i in places]).tolist()
        for i, value in zip(places, values, strict=True):
            found[i] = value
    return found


def _bits(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The elements of each in their order as integers, which compare where they are no numbers."""
    for tensor in tensors:
        flat = tensor.detach()
        flat = (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1)
        yield flat.view(_INTEGERS[flat.element_size()]) if flat.is_floating_point() else flat
