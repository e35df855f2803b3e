"""Noise by seed, offset and element: a stream that a kernel can draw where it needs it.

A ``torch.Generator`` hands out numbers in the order of calls; a kernel that draws its own noise
needs a number that depends on the element's place only. Philox4x32-10 (Salmon et al. 2011) gives
that, and this file is its definition: kernels draw the same integers bit for bit, and normals that
differ by a few roundings of float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import checks

_MASK = 0xFFFFFFFF


class Philox:
    """Stands for standard normal noise that is not drawn yet; ops take it in place of a tensor.

    Args:
        seed: number of the stream.
        offset: number of an independent stream of the same seed, such as a training step, to which
            a sampler adds its own step.
        device: device that seed and offset live on. On the CPU (the default) kernels get them as
            launch arguments; on a GPU they are read there, so that a captured graph draws anew
            after ``philox.set(...)``.

    Raises:
        ValueError: seed or offset is not an integer in [0, 2^63).

    Examples:
        >>> philox = df.ops.Philox(seed=0)
        >>> schedule = df.DiffusionSchedule()
        >>> x_0, t = torch.zeros(1, 4, 8, 8), torch.tensor([500])
        >>> tables = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        >>> _, drawn = df.ops.add_noise(x_0, philox, t, *tables)
        >>> torch.equal(drawn, philox.normal(x_0.shape))
        True
    """

    def __init__(
        self, seed: int, offset: int = 0, device: torch.device | str | None = None
    ) -> None:
        words = _checked(seed, offset)
        self.state = torch.tensor(words, dtype=torch.int64, device=device or "cpu")

    @classmethod
    def for_images(cls, streams: Tensor) -> Philox:
        """A stream for each image of a batch, whose elements are counted within the image.

        Args:
            streams: int64 [B, 2], seed and offset of each, read where they are whenever the noise
                is drawn; an offset may be negative where what is added to it makes up for that.
        """
        if streams.dtype != torch.int64 or streams.dim() != 2 or streams.shape[1] != 2:
            checks.fail("streams", "int64 [B, 2]", f"{streams.dtype} {list(streams.shape)}")
        self = cls.__new__(cls)
        self.state = streams
        return self

    def set(self, seed: int, offset: int = 0) -> None:
        """Change seed and offset in place."""
        self.state.copy_(torch.tensor(_checked(seed, offset), dtype=torch.int64))

    def normal(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The noise as a tensor: what a kernel given this descriptor draws."""
        return normal(self.state, shape, dtype, device)

    def __repr__(self) -> str:
        if self.state.dim() > 1:
            return f"Philox.for_images({self.state.tolist()})"
        seed, offset = self.state.tolist()
        return f"Philox(seed={seed}, offset={offset}, device={str(self.state.device)!r})"


def _checked(seed: Any, offset: Any) -> list[int]:
    words, expected = (("seed", seed), ("offset", offset)), "an integer in [0, 2^63)"
    for name, value in words:
        if checks.whole(name, value, expected) >= 2**63:
            checks.fail(name, expected, repr(value))
    return [int(value) for _, value in words]


def check_device(argument: str, state: Tensor, x: Tensor) -> None:
    """A Philox's state lies on the CPU or on the device of x."""
    device = state.device
    if device.type != "cpu" and device != x.device:
        checks.fail(argument, f"a Philox on the cpu or on {x.device}", device)


def words(state: Tensor, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words per counter, as int64.

    Args:
        state: int64 [2]: seed (the key) and offset (the counter's high half).
        counters: int64, the counter's low half.
    """
    seed, offset = state[0], state[1]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = counters & _MASK, (counters >> 32) & _MASK
    zero = torch.zeros_like(c0)
    c2, c3 = zero + (offset & _MASK), zero + ((offset >> 32) & _MASK)
    for _ in range(10):
        # A product of two 32-bit words wraps into int64, whose bits are the right ones.
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p2 >> 32) & _MASK) ^ c1 ^ k0,
            p2 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _normal_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Box and Muller (1958), in float64 but for u, which is float32 by definition."""
    u = first.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = (-2 * u.double().log()).sqrt()
    angle = second.double() * (2 * math.pi / 2**32)
    return radius * angle.cos(), radius * angle.sin()


def normal(
    state: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise of this shape: element i in row-major order is value i of the stream.

    Values are made in float32 (two words of 32 bits carry no more) and then converted. A state
    [B, 2] has a stream for each image of [B, ...], which is value 0 and on of its own stream.
    """
    state = state.to(device or state.device)
    if state.dim() > 1:
        if state.shape[0] != shape[0]:
            checks.fail("streams", f"one for each of {shape[0]} images", state.shape[0])
        return torch.stack([normal(one, shape[1:], dtype) for one in state])
    count = math.prod(shape)
    counters = torch.arange((count + 3) // 4, dtype=torch.int64, device=state.device)
    w0, w1, w2, w3 = words(state, counters)
    values = torch.stack((*_normal_pair(w0, w1), *_normal_pair(w2, w3)), dim=-1)  # [N, 4]
    return values.reshape(-1)[:count].reshape(tuple(shape)).to(torch.float32).to(dtype)
