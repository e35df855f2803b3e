"""Random bits and normals by seed, offset and element, inside a kernel (Salmon et al. 2011).

Element i takes lane i % 4 of the four normals made from one Philox4x32-10 block:

    key     = seed                                        (64 bits, low word first)
    counter = (i // 4, offset)                            (64 bits each, low words first)
    u       = float32(w) * 2^-32 + 2^-33                  (in (0, 1]; rounded twice, all alike)
    z       = sqrt(-2 log u_0) * cos(2 pi w_1 2^-32), the same with sin, both again with w_2, w_3

so a stream is a function of the element's place in the row-major tensor and of nothing else: not of
the block size, the grid, the layout or the GPU. The logarithm, sine and cosine are polynomials of
their own, because the GPU's fast ones are off by far more than a rounding.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def bits(seed, offset, block):
    """Four uint32 words per counter; seed and offset are int64 scalars, block an int64 tensor."""
    zero = (block * 0).to(tl.uint32)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    offset_low = (offset & 0xFFFFFFFF).to(tl.uint32)
    offset_high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, zero + offset_low, zero + offset_high)


@triton.jit
def _log(u):
    """ln u for normal float32 in (0, 1]: u = 2^e m with m in [sqrt(1/2), sqrt(2))."""
    pattern = u.to(tl.int32, bitcast=True)
    # 0x3F3504F3 is sqrt(1/2): subtracting it lets the exponent change there.
    exponent = (pattern - 0x3F3504F3) >> 23
    m = (pattern - (exponent << 23)).to(tl.float32, bitcast=True)
    # ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172
    s = tl.div_rn(m - 1.0, m + 1.0)
    q = s * s
    series = q * (0.33333334 + q * (0.2 + q * (0.14285715 + q * 0.11111111)))
    return exponent.to(tl.float32) * 0.6931471805599453 + (2.0 * s + 2.0 * s * series)


@triton.jit
def _cos_sin(word):
    """cos and sin of 2 pi word / 2^32, by quadrant and Taylor series on [-pi/4, pi/4]."""
    quadrant = (word + 0x20000000) >> 30
    rest = (word - (quadrant << 30)).to(tl.int32, bitcast=True)
    # 2 pi / 2^32
    a = rest.to(tl.float32) * 1.4629180792671596e-09
    q = a * a
    sine = a + a * q * (-0.16666667 + q * (0.008333334 + q * (-0.00019841270 + q * 2.7557319e-06)))
    cosine = 1.0 + q * (
        -0.5 + q * (0.041666668 + q * (-0.0013888889 + q * (2.4801588e-05 - q * 2.7557319e-07)))
    )
    swap = (quadrant & 1) == 1
    c = tl.where(swap, sine, cosine)
    s = tl.where(swap, cosine, sine)
    # cos is negative in quadrants 1 and 2, sin in 2 and 3
    c = tl.where(((quadrant + 1) & 2) == 2, -c, c)
    return c, tl.where((quadrant & 2) == 2, -s, s)


@triton.jit
def normal_pair(first, second):
    """Two normals from two words (Box and Muller 1958), float32."""
    u = first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt_rn(-2.0 * _log(u))
    c, s = _cos_sin(second)
    return radius * c, radius * s


@triton.jit
def normal4(seed, offset, block):
    """Normals of elements 4 block, 4 block + 1, ...: [N] counters give [4 N] values in order."""
    w0, w1, w2, w3 = bits(seed, offset, block)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def normal(seed, offset, element):
    """The normal of each element, for elements in any order (four times the work of normal4)."""
    w0, w1, w2, w3 = bits(seed, offset, element >> 2)
    low = (element & 2) == 0
    c, s = normal_pair(tl.where(low, w0, w2), tl.where(low, w1, w3))
    return tl.where((element & 1) == 0, c, s)


@triton.jit
def stream(state_ptr, seed, offset, ON_DEVICE: tl.constexpr):
    """Seed and offset as int64 scalars: from memory for graphs, else the launch's arguments."""
    if ON_DEVICE:
        seed = tl.load(state_ptr)
        offset = tl.load(state_ptr + 1)
    return seed.to(tl.int64), offset.to(tl.int64)


def arguments(state: Tensor) -> tuple[Tensor | None, int, int, bool]:
    """(state_ptr, seed, offset, ON_DEVICE) for :func:`stream`, from an int64 tensor [2].

    A state on the CPU is read here, which costs no transfer; one on a GPU never comes to the host.
    """
    if state.device.type == "cpu" and not state.is_meta:
        seed, offset = state.tolist()
        return None, seed, offset, False
    return state, 0, 0, True
