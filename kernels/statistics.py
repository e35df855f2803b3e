"""Merging means and sums of squared deviations of parts (Chan, Golub & LeVeque 1983)."""

import triton
import triton.language as tl


@triton.jit
def merge(count, mean, m2, AXIS: tl.constexpr):
    """Mean, sum of squared deviations and count of a whole from those of its parts along AXIS.

    Parts of count 0 add nothing. No difference of large squares is taken anywhere.
    """
    total = tl.sum(count, AXIS)
    whole = tl.sum(count * mean, AXIS) / total
    deviation = mean - tl.expand_dims(whole, AXIS)
    return whole, tl.sum(m2 + count * deviation * deviation, AXIS), total
