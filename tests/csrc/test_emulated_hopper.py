"""The Hopper kernel's own source (wgmma, TMA, warp specialisation) on the emulator.

As test_emulated_attention.py: the race detector is on, inputs are slices of larger tensors full of
NaN, outputs start as NaN. Tiles have 128 keys, blocks 128 queries, 64 for each of two warpgroups.
"""

from __future__ import annotations

import math
import subprocess

import emulated_attention as emulated
import pytest
import torch
from emulated_attention import HEAD_DIMS, HOPPER
from test_emulated_attention import check_forward, inputs, strided

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)"),
]

# One tile and less, its edges, more tiles than the six (or four) that fit on chip.
KEYS = (1, 77, 127, 128, 129, 256, 1000)
QUERIES = dict(zip(KEYS, (1, 64, 65, 128, 129, 63, 200), strict=True))


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_forward(head_dim: int, keys: int) -> None:
    check_forward(*inputs(QUERIES[keys], keys, head_dim), kernel=HOPPER, seed=keys % 3)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_half_precision(head_dim: int) -> None:
    check_forward(*inputs(100, 300, head_dim, torch.float16), kernel=HOPPER, seed=1)


@pytest.mark.parametrize("head_dim", (40, 64, 80, 160))
def test_key_lengths_bias_and_broadcast(head_dim: int) -> None:
    """One prompt for three images of different lengths, with a bias per head."""
    heads, keys = 2, 300
    lengths = torch.tensor([300, 129, 3], dtype=torch.int32)
    q = strided(3, 70, heads, head_dim)
    k, v = (strided(1, keys, heads, head_dim).expand(3, -1, -1, -1) for _ in range(2))
    bias = torch.randn(1, heads, 1, keys).bfloat16().float()
    bias[..., 5] = -math.inf
    check_forward(q, k, v, bias.expand(3, -1, -1, -1), lengths, kernel=HOPPER, seed=2)


@pytest.mark.parametrize("head_dim", (40, 64, 80))
def test_keys_past_the_length_do_not_matter(head_dim: int) -> None:
    """They are on chip, in the last tile: not a number there may reach the output."""
    q, k, v = inputs(70, 300, head_dim)
    lengths = torch.tensor([200], dtype=torch.int32)
    results = []
    for filler in (0.0, math.nan):
        k[:, 200:] = filler
        v[:, 200:] = filler
        results.append(emulated.forward(q, k, v, key_lengths=lengths, kernel=HOPPER))
    for first, second in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(first, second)
        assert second.isfinite().all()


def test_rows_without_keys() -> None:
    """Output 0 and log-sum-exp -inf: without any key, and with none that the bias allows."""
    q, k, v = inputs(70, 140, 40, batch=2)
    bias = torch.zeros(2, 2, 1, 140)
    bias[1] = -math.inf
    lengths = torch.tensor([0, 140], dtype=torch.int32)
    out, lse, _ = emulated.forward(q, k, v, bias=bias, key_lengths=lengths, kernel=HOPPER)
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("row", (5, 69))
def test_nan_stays_in_its_row(row: int) -> None:
    q, k, v = inputs(70, 140, 40)
    expected, expected_lse, _ = emulated.forward(q, k, v, kernel=HOPPER)
    q[0, row, 1, 7] = math.nan
    out, lse, _ = emulated.forward(q, k, v, kernel=HOPPER)
    assert out[0, row, 1].isnan().all()
    assert lse[0, 1, row].isnan()
    out[0, row, 1], lse[0, 1, row] = expected[0, row, 1], expected_lse[0, 1, row]
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("column", range(8))
def test_nan_in_a_key_reaches_every_row(column: int) -> None:
    """Of eight neighbouring keys two take the polynomial exponential; it keeps NaN too."""
    q, k, v = inputs(70, 140, 40)
    k[0, column, 1, 3] = math.nan
    out, lse, _ = emulated.forward(q, k, v, kernel=HOPPER)
    assert out[:, :, 1].isnan().all()
    assert lse[:, 1].isnan().all()
    assert out[:, :, 0].isfinite().all()


@pytest.mark.parametrize("gain", (1e-3, 30.0))
def test_flat_and_sharp_scores(gain: float) -> None:
    check_forward(*inputs(70, 300, 40, gain=gain), kernel=HOPPER)


def test_fused_projection_is_read_in_place() -> None:
    fused = torch.randn(2, 150, 3, 4, 40, dtype=torch.bfloat16)
    check_forward(*fused.unbind(2), kernel=HOPPER)


def test_same_bits_in_any_order() -> None:
    q, k, v = inputs(130, 1000, 80)
    results = [emulated.forward(q, k, v, seed=seed, kernel=HOPPER)[:2] for seed in range(4)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_never_chosen_unasked() -> None:
    q, k, v = inputs(100, 1000, 64)
    assert emulated.forward(q, k, v)[2]["ldmatrix"] > 0
    assert emulated.forward(q, k, v, kernel=HOPPER)[2]["ldmatrix"] == 0


def test_refuses_what_it_cannot_do() -> None:
    q, k, v = inputs(16, 20, 160, heads=1)
    with pytest.raises(emulated.EmulatorError, match="needs more shared memory"):
        emulated.forward(q, k, v, kernel=HOPPER, device=emulated.CONSUMER)
    one_key = k[:, :1].expand(-1, 20, -1, -1)
    with pytest.raises(emulated.EmulatorError, match="rows of stride 0"):
        emulated.forward(q, one_key, v, kernel=HOPPER)


@pytest.mark.parametrize("head_dim", (40, 64, 160))
def test_no_padded_work_but_whole_steps(head_dim: int) -> None:
    """wgmma takes 16 values of the head dim at a time; 40 becomes 48."""
    q, k, v = inputs(128, 128, head_dim, heads=1)
    _, _, counted = check_forward(q, k, v, kernel=HOPPER)
    warps, keys = 8, 128
    assert counted["mma"] == warps * (math.ceil(head_dim / 16) + keys // 16)


def test_polynomial_exponential() -> None:
    """2^x by FMAs against float64, over its range and at its edges."""
    program = str(emulated.build_program("exponential.cpp"))
    x = torch.cat([torch.linspace(-130, 1, 200_001), torch.linspace(-0.6, 0.6, 50_001)])
    edges = [-math.inf, -1e30, -127.0, -126.4, -126.0, -0.5, 0.5, 0.0, 1.0, math.nan]
    x = torch.cat([x, torch.tensor(edges)]).float()
    text = " ".join(map(str, (x.view(torch.int32).long() & 0xFFFFFFFF).tolist()))
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    bits = torch.tensor([int(word) for word in done.stdout.split()])
    got = bits.to(torch.int32).view(torch.float32).double()
    truth = torch.exp2(x.double())
    assert got[-1].isnan()
    assert (got[x <= -126.6] == 0).all()
    normal = x >= -126.4
    assert ((got - truth).abs() / truth)[normal].max() <= 2.8e-6
    assert (got[:-1] >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keys", (1, 63, 128, 385, 1000, 1500))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_more_interleavings(dtype: torch.dtype, head_dim: int, keys: int, seed: int) -> None:
    q, k, v = inputs(130, keys, head_dim, dtype, batch=2)
    lengths = torch.tensor([keys, keys // 2], dtype=torch.int32)
    out, lse, _ = check_forward(q[:1], k[:1], v[:1], kernel=HOPPER, seed=seed)
    other, other_lse, _ = emulated.forward(
        q, k, v, key_lengths=lengths, kernel=HOPPER, seed=seed + 5
    )
    assert torch.equal(other[:1], out)
    assert torch.equal(other_lse[:1], lse)
