"""The kernels' Philox stream against its definition in ops/philox.py."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE

from diffusion_fast import ops
from diffusion_fast.kernels import launch, philox
from diffusion_fast.ops.philox import words


@triton.jit
def _draw(
    words_ptr, four_ptr, one_ptr, seed: tl.int64, offset: tl.int64, first: tl.int64, N: tl.constexpr
):
    seed, offset, first = seed.to(tl.int64), offset.to(tl.int64), first.to(tl.int64)
    block = first + tl.arange(0, N)
    w0, w1, w2, w3 = philox.bits(seed, offset, block)
    index = tl.arange(0, N)
    tl.store(words_ptr + index, w0.to(tl.int64))
    tl.store(words_ptr + N + index, w1.to(tl.int64))
    tl.store(words_ptr + 2 * N + index, w2.to(tl.int64))
    tl.store(words_ptr + 3 * N + index, w3.to(tl.int64))
    element = tl.arange(0, 4 * N)
    tl.store(four_ptr + element, philox.normal4(seed, offset, block))
    tl.store(one_ptr + element, philox.normal(seed, offset, first * 4 + element))


@pytest.mark.parametrize("first", [0, 2**31 - 5, 2**33 + 7])
@pytest.mark.parametrize(
    ("seed", "offset"), [(0, 0), (1234567, 1), (2**40 + 17, 2**35 + 3), (2**63 - 1, 2**63 - 1)]
)
def test_the_stream(seed: int, offset: int, first: int) -> None:
    n = 256
    bits = torch.zeros(4, n, dtype=torch.int64, device=DEVICE)
    four, one = torch.zeros(2, 4 * n, device=DEVICE)
    launch.launch(_draw, (1,), bits, four, one, seed, offset, first, n, device=bits.device)
    state = torch.tensor([seed, offset])
    expected = torch.stack(words(state, first + torch.arange(n)))
    assert torch.equal(bits.cpu(), expected)
    assert torch.equal(four, one)
    if first == 0:
        truth = ops.Philox(seed, offset).normal((4 * n,))
        ulp = torch.nextafter(truth.abs(), torch.tensor(float("inf"))) - truth.abs()
        assert ((four.cpu() - truth).abs() <= 6 * ulp).all()


@triton.jit
def _pairs(first_ptr, second_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    first = tl.load(first_ptr + index).to(tl.uint32)
    second = tl.load(second_ptr + index).to(tl.uint32)
    c, s = philox.normal_pair(first, second)
    tl.store(out_ptr + index, c)
    tl.store(out_ptr + N + index, s)


def test_normals_of_extreme_words() -> None:
    """Words near 0, 2^32 and the quadrants' borders, where series and signs change."""
    corners = torch.tensor(
        [
            *(0, 1, 2**29 - 1, 2**29, 2**29 + 1, 2**30 - 1, 2**30, 2**30 + 1),
            *(2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30 - 1, 3 * 2**30, 3 * 2**30 + 1),
            *(2**32 - 2**29, 2**32 - 1),
        ]
    )
    first, second = (v.flatten() for v in torch.meshgrid(corners, corners, indexing="ij"))
    out = torch.zeros(2, 256, device=DEVICE)
    words_ = first.to(DEVICE), second.to(DEVICE)
    launch.launch(_pairs, (1,), *words_, out, 256, device=out.device)
    u = (first.float() * 2.0**-32 + 2.0**-33).double()
    radius, angle = (-2 * u.log()).sqrt(), second.double() * (2 * torch.pi / 2**32)
    for result, truth in ((out[0], radius * angle.cos()), (out[1], radius * angle.sin())):
        # 1e-15: what cos(pi / 2) is in float64, where the true value is 0
        allowed = 6 * 2.0**-24 * truth.abs() + 1e-14
        assert ((result.cpu().double() - truth).abs() <= allowed).all()
