"""A linear layer, y = x w^T with its epilogues: see matmul.py for the formula and the kernel.

Layout: x and w are rows, each contiguous, a row's stride free; y is contiguous.
"""

from collections.abc import Sequence

from torch import Tensor

from . import launch, matmul, product
from .layer_norm import _rows


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    mean: Tensor | None,
    rstd: Tensor | None,
    sums: Tensor | None,
    packed: Sequence[Tensor],
) -> Tensor:
    """y [..., N], or [..., N / 2] with ``geglu``, contiguous."""
    columns = weight.shape[0] // (2 if geglu else 1)
    y = x.new_empty((*x.shape[:-1], columns))
    if not y.numel():
        return y
    x, stride = _rows(x)
    rows, channels = x.shape
    if residual is not None:
        residual = launch.laid_out_like(residual, y)
    epilogue = (bias, None, mean, rstd, sums)
    p = product.Product(
        x=x,
        x_strides=(0, 1, 0, stride),
        x2=None,
        x2_strides=(0, 0, 0, 0),
        w=weight,
        w_strides=(weight.stride(0), weight.stride(1), 0, 0),
        y=y,
        y_strides=(0, columns, 1),
        epilogue=tuple(None if t is None else t.contiguous() for t in epilogue),
        residual=residual,
        shape=(rows, columns, rows),
        channels=(channels, 0),
        size=(1, rows),
        out_width=rows,
        window=(1, 1),
        stride=1,
        pads=(0, 0),
        geglu=geglu,
    )
    matmul.run("linear", p)
    return y
