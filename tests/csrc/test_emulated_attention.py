"""The CUDA attention kernels' own source, run on the host over the emulator.

Every call runs with the race detector on, on slices of larger tensors full of NaN, into outputs
full of NaN, and may not have a single bank conflict of ldmatrix.
"""

from __future__ import annotations

import math

import emulated_attention as emulated
import pytest
import torch
from emulated_attention import AUTO, HEAD_DIMS, SHORT, TILED
from numerics import assert_close
from torch import Tensor

from diffusion_fast.ops.attention import reference

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)")

KEYS = (1, 15, 16, 17, 77, 154, 231, 256, 257, 1000)
QUERIES = dict(zip(KEYS, (1, 17, 33, 65, 131, 63, 100, 64, 129, 31), strict=True))


def _grid() -> list[object]:
    return [
        pytest.param(dtype, head_dim, keys, id=f"{str(dtype)[6:]}-{head_dim}-{keys}")
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim in HEAD_DIMS
        for keys in KEYS
    ]


def strided(*shape: int, dtype: torch.dtype = torch.bfloat16, gain: float = 1.0) -> Tensor:
    """Random [B, S, H, D] inside a larger tensor of NaN, no two strides as in a dense one."""
    batch, rows, heads, head_dim = shape
    storage = torch.full((batch, rows + 1, heads + 1, head_dim + 8), math.nan, dtype=dtype)
    view = storage[:, 1:, 1:, 8:]
    return view.copy_(torch.randn(shape) * gain)


def inputs(
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    heads: int = 2,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    q = strided(batch, queries, heads, head_dim, dtype=dtype, gain=gain)
    k, v = (strided(batch, keys, heads, head_dim, dtype=dtype) for _ in range(2))
    return q, k, v


def check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor, dict[str, int]]:
    out, lse, counted = emulated.forward(q, k, v, bias=bias, key_lengths=key_lengths, **options)
    scale = q.shape[-1] ** -0.5
    lengths = None if key_lengths is None else key_lengths.long()
    double = (x.double() for x in (q, k, v))
    wide = None if bias is None else bias.double()
    truth, true_lse = reference(*double, scale, wide, lengths, True)
    plain, _ = reference(q, k, v, scale, bias, lengths, True)
    assert_close(out, truth, plain)
    assert_close(lse, true_lse)
    assert counted["bank_conflicts"] == 0
    return out, lse, counted


def check_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    **options: object,
) -> tuple[Tensor | None, ...]:
    lengths = None if key_lengths is None else key_lengths.long()
    scale = q.shape[-1] ** -0.5
    dout = strided(*q.shape, dtype=q.dtype)
    out, lse, _ = emulated.forward(q, k, v, bias=bias, key_lengths=key_lengths)
    *grads, counted = emulated.backward(
        dout, q, k, v, out, lse, bias=bias, key_lengths=key_lengths, **options
    )

    def autograd(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).detach().clone().requires_grad_() for x in (q, k, v)]
        wide = None if bias is None else bias.to(dtype).clone()
        if wide is not None:
            leaves.append(wide.requires_grad_())
        result, _ = reference(*leaves[:3], scale, wide, lengths, False)
        return torch.autograd.grad(result, leaves, dout.to(dtype))

    for grad, truth, plain in zip(grads, autograd(torch.float64), autograd(q.dtype), strict=False):
        # Plain PyTorch takes the bias in the dtype of q; the values are such that nothing is lost.
        assert_close(grad.to(q.dtype), truth, plain, factor=3)
    assert counted["bank_conflicts"] == 0
    return tuple(grads)


@pytest.mark.parametrize("dtype, head_dim, keys", _grid())
def test_forward(dtype: torch.dtype, head_dim: int, keys: int) -> None:
    q, k, v = inputs(QUERIES[keys], keys, head_dim, dtype)
    check_forward(q, k, v, kernel=SHORT if keys <= 256 else TILED)
    if keys <= 256:
        check_forward(q, k, v, kernel=TILED, seed=1)


@pytest.mark.parametrize("dtype, head_dim, keys", _grid())
def test_backward(dtype: torch.dtype, head_dim: int, keys: int) -> None:
    check_backward(*inputs(QUERIES[keys], keys, head_dim, dtype), seed=keys % 3)


@pytest.mark.parametrize("kernel", (SHORT, TILED))
@pytest.mark.parametrize("head_dim", (40, 64, 80, 160))
def test_key_lengths_bias_and_broadcast(head_dim: int, kernel: int) -> None:
    """One prompt for three images of different lengths, with a bias per head."""
    heads, keys = 2, 77
    lengths = torch.tensor([77, 64, 3], dtype=torch.int32)
    q = strided(3, 70, heads, head_dim)
    k, v = (strided(1, keys, heads, head_dim).expand(3, -1, -1, -1) for _ in range(2))
    bias = torch.randn(1, heads, 1, keys).bfloat16().float()
    bias[..., 5] = -math.inf
    bias = bias.expand(3, -1, -1, -1)
    check_forward(q, k, v, bias, lengths, kernel=kernel)
    *_, dbias = check_backward(q, k, v, bias, lengths)
    assert dbias is not None
    assert not dbias[2, :, :, 3:].any()


@pytest.mark.parametrize("kernel", (SHORT, TILED))
def test_keys_past_the_length_are_not_read(kernel: int) -> None:
    q, k, v = inputs(70, 154, 40)
    lengths = torch.tensor([100], dtype=torch.int32)
    dout = strided(*q.shape)
    results = []
    for filler in (0.0, math.nan):
        k[:, 100:] = filler
        v[:, 100:] = filler
        out, lse, _ = emulated.forward(q, k, v, key_lengths=lengths, kernel=kernel)
        *grads, _ = emulated.backward(dout, q, k, v, out, lse, key_lengths=lengths)
        results.append((out, lse, *grads[:3]))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert second.isfinite().all()


@pytest.mark.parametrize("head_dim", (40, 128))
def test_backward_split_among_blocks(head_dim: int) -> None:
    q, k, v = inputs(300, 77, head_dim, batch=2)
    bias = torch.randn(2, 2, 1, 77).bfloat16().float()
    lengths = torch.tensor([77, 20], dtype=torch.int32)
    torch.manual_seed(1)
    whole = check_backward(q, k, v, bias, lengths)
    check_backward(q, k, v, bias, lengths, splits=3)
    torch.manual_seed(1)
    summed = check_backward(q, k, v, bias, lengths, parts=True)
    for one, other in zip(whole, summed, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", (SHORT, TILED))
def test_fused_projection_is_read_in_place(kernel: int) -> None:
    fused = torch.randn(2, 50, 3, 4, 40, dtype=torch.bfloat16)
    q, k, v = fused.unbind(2)
    check_forward(q, k, v, kernel=kernel)
    check_backward(q, k, v)


@pytest.mark.parametrize("kernel", (SHORT, TILED))
def test_query_tiles_shared_by_few_blocks(kernel: int) -> None:
    """One multiprocessor: a block walks over many query tiles, its two buffers taking turns."""
    q, k, v = inputs(64 * 7 + 5, 77, 40)
    _, _, counted = check_forward(q, k, v, kernel=kernel, device=(1, 99 << 10, 100 << 10))
    if kernel == SHORT:
        assert counted["blocks"] == 4


@pytest.mark.parametrize("kernel", (SHORT, TILED))
@pytest.mark.parametrize("gain", (1e-3, 300.0))
def test_extreme_scores(kernel: int, gain: float) -> None:
    q, k, v = inputs(40, 70, 64, gain=gain)
    check_forward(q, k, v, kernel=kernel)


def test_backward_where_every_score_is_far_below_zero() -> None:
    """Masked columns have score 0 there, and 2^(0 - lse) would be infinite."""
    q, k, v = inputs(20, 17, 40)
    k.copy_(torch.full(k.shape, 6.0) + torch.rand(k.shape) * 0.01)
    q.copy_(torch.full(q.shape, -6.0))
    check_backward(q, k, v)


@pytest.mark.parametrize("kernel", (SHORT, TILED))
def test_no_allowed_key_gives_zeros(kernel: int) -> None:
    q, k, v = inputs(20, 30, 40, batch=3)
    lengths = torch.tensor([30, 0, 30], dtype=torch.int32)
    bias = torch.zeros(3, 1, 1, 30)
    bias[2] = -math.inf
    bias = bias.expand(-1, 2, -1, -1)
    out, lse, _ = emulated.forward(q, k, v, bias=bias, key_lengths=lengths, kernel=kernel)
    assert not out[1:].any()
    assert (lse[1:] == -math.inf).all()
    assert lse[0].isfinite().all()
    dq, dk, dv, dbias, _ = emulated.backward(
        strided(*q.shape), q, k, v, out, lse, bias=bias, key_lengths=lengths
    )
    for grad in (dq, dk, dv, dbias):
        assert grad is not None
        assert not grad[1:].any()
        assert grad[0].isfinite().all()


@pytest.mark.parametrize("kernel", (SHORT, TILED))
def test_nan_stays_in_its_row(kernel: int) -> None:
    q, k, v = inputs(70, 77, 40)
    q[0, 37, 1] = math.nan
    out, lse, _ = emulated.forward(q, k, v, kernel=kernel)
    assert out[0, 37, 1].isnan().all()
    assert lse[0, 1, 37].isnan()
    out[0, 37, 1] = 0
    lse[0, 1, 37] = 0
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_any_order_of_threads_gives_the_same_bits() -> None:
    q, k, v = inputs(130, 90, 80)
    dout = strided(*q.shape)
    results = []
    for seed in (0, 1, 2):
        out, lse, _ = emulated.forward(q, k, v, seed=seed, kernel=TILED)
        *grads, _ = emulated.backward(dout, q, k, v, out, lse, splits=2, seed=seed)
        results.append((out, lse, *grads[:3]))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_short_kernel_does_no_padded_work(head_dim: int) -> None:
    """Keys are padded to 16 and the head dim not at all: D = 40 ends in an m16n8k8."""
    q, k, v = inputs(64, 77, head_dim, heads=1)
    _, _, counted = check_forward(q, k, v, kernel=SHORT)
    warps, key_tiles = 4, 5
    scores = 2 * math.ceil(head_dim / 16)  # two m16n8 per 16 keys, the tail being m16n8k8
    values = head_dim // 8
    assert counted["mma"] == warps * key_tiles * (scores + values)


@pytest.mark.parametrize("device", (emulated.H200, emulated.A100, emulated.CONSUMER))
@pytest.mark.parametrize("head_dim, keys", [(40, 256), (64, 256), (128, 80), (160, 80), (160, 256)])
def test_plan_fits_the_card(head_dim: int, keys: int, device: tuple[int, int, int]) -> None:
    q, k, v = inputs(16, keys, head_dim, heads=1)
    *_, counted = emulated.forward(q, k, v, kernel=AUTO, device=device)
    assert counted["shared_bytes"] <= device[1]
    row = (head_dim // 8 | 1) * 16
    short_bytes = (2 * math.ceil(keys / 16) * 16 + 128) * row
    if keys <= 80 or 2 * (short_bytes + 1024) <= device[2]:
        assert counted["shared_bytes"] == short_bytes
    else:
        assert counted["shared_bytes"] != short_bytes


def test_short_kernel_refuses_what_does_not_fit() -> None:
    q, k, v = inputs(16, 256, 160, heads=1)
    with pytest.raises(emulated.EmulatorError, match="do not fit"):
        emulated.forward(q, k, v, kernel=SHORT, device=emulated.CONSUMER)


@pytest.mark.parametrize(
    "head_dim, queries, keys, splits",
    [
        (40, 4096, 77, 8),  # 16 heads, 2 tiles of keys: 32 blocks on 132 multiprocessors
        (40, 4096, 4096, 1),  # the keys alone fill the device
        (160, 64, 77, 1),  # two tiles of queries are not worth a second pass
        (160, 256, 77, 2),
    ],
)
def test_backward_plan(head_dim: int, queries: int, keys: int, splits: int) -> None:
    assert emulated.planned_splits(head_dim, 2, 8, queries, keys) == splits
