"""Planted defects in the Hopper kernel: the values or the emulator must notice each one."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import emulated_attention as emulated
import pytest
import torch
from emulated_attention import HOPPER
from test_mutants import HEAD_DIM, Case, build_mutant

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)"),
]

KERNEL = "attention_hopper.cuh"

# (name, text, replacement): the first occurrence is replaced.
SYNCHRONISATION = (
    ("tile not waited for", "ptx::mbarrier_wait(memory.full(ring.slot), ring.round);", ""),
    ("queries not waited for", "ptx::mbarrier_wait(memory.queries(group), 0);", ""),
    ("slot taken while in use", "ptx::mbarrier_wait(memory.empty(ring.slot), ring.round ^ 1);", ""),
    (
        "K released too early",
        "ptx::wgmma_wait<1>();\n      pin_scores();\n      release(slot_k);",
        "release(slot_k);\n      ptx::wgmma_wait<1>();",
    ),
    (
        "V released too early",
        "ptx::wgmma_wait<0>();\n      pin_values();\n      release(slot_v);",
        "release(slot_v);\n      ptx::wgmma_wait<0>();",
    ),
    ("scores not waited for", "ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
    ("no proxy fence", "  ptx::proxy_fence();\n", ""),
    ("no barrier after clearing", "ptx::named_barrier(1, Shape::kGroups * kWarpgroup);", ""),
    ("no barrier before outputs", "ptx::named_barrier(2 + group, kWarpgroup);", ""),
    ("no barrier after mbarriers", "    __syncthreads();\n", ""),
)

OTHERS = (
    ("first round waits", "ring.round ^ 1);", "ring.round);"),
    (
        "values not waited for",
        "ptx::wgmma_wait<0>();\n      pin_values();",
        "ptx::wgmma_wait<1>();",
    ),
    ("barriers not shown", "      ptx::mbarrier_init_fence();\n", ""),
    ("one warp releases for all", "Shape::kGroups * 4);", "Shape::kGroups);"),
    (
        "warps release twice",
        "if (lane == 0) ptx::mbarrier_arrive",
        "if (lane < 2) ptx::mbarrier_arrive",
    ),
    ("bytes announced", "rows * Shape::kColumns * 2);", "rows * Shape::kColumns);"),
    ("swizzle mode", "kSwizzle == 64 ? 2 : 3;", "kSwizzle == 64 ? 3 : 2;"),
    ("stride of rows", "kStride = 8 * kSwizzle;", "kStride = 16 * kSwizzle;"),
    (
        "span of values",
        "Shape::kKeys * Shape::kSwizzle));",
        "Shape::kKeys * Shape::kSwizzle / 2));",
    ),
    ("step of values", "v + step * 16 * Shape::kSwizzle", "v + step * 8 * Shape::kSwizzle"),
    ("box of queries", "q + box * Shape::kGroupRows", "q + box * Shape::kKeys"),
    ("box of keys", "k + box * Shape::kKeys", "k + box * Shape::kGroupRows"),
    ("scores kept", "step > 0);", "true);"),
    ("box column", "box * Shape::kBoxColumns, row", "box * 8, row"),
    (
        "group's queries",
        "place.part * Shape::kRows + group * Shape::kGroupRows,\n",
        "place.part * Shape::kRows,\n",
    ),
    ("heads mixed", "strides.head == 0 ? 0 : place.head", "strides.head == 0 ? 0 : 0"),
    ("batch mixed", "strides.batch == 0 ? 0 : place.batch", "place.batch * 0"),
    ("last tile not masked", "(tile + 1) * Shape::kKeys > keys)", "false)"),
    ("mask of the wrong tile", "softmax(tile + 1);", "softmax(tile);"),
    ("output not rescaled", "outputs[i] *= shrink[i >> 1 & 1];", ";"),
    ("rescaled by the other row", "shrink[i >> 1 & 1]", "shrink[i & 1]"),
    ("sum not rescaled", "sum[0][r] *= shrink[r];", ""),
    ("values past the length kept", "keys < p.keys && tiles * Shape::kKeys > keys", "false"),
    (
        "a value too many cleared",
        "keys - (tiles - 1) * Shape::kKeys,",
        "keys - (tiles - 1) * Shape::kKeys - 1,",
    ),
    ("clearing leaves a box out", "i < Shape::kBoxes * words", "i < words"),
    ("K of the same tile", "p.k_strides, tile + 1);", "p.k_strides, tile);"),
    ("sum of a lane", "rows.sum[0][r] = row_sum(rows.sum[0][r]);", ";"),
    ("warps' outputs", "group * Shape::kGroupRows + warp * 16;", "group * Shape::kGroupRows;"),
    ("lse past the end", "if (at < p.queries) p.lse", "p.lse"),
)

POLYNOMIAL = (
    ("not a number lost", "ptx::max_or_nan(x, -127.f)", "fmaxf(x, -127.f)"),
    ("hidden keys count", "max_or_nan(x, -127.f)", "max_or_nan(x, -126.f)"),
    ("a coefficient", "0.240247443318367f", "0.250247443318367f"),
)


@cache
def cases() -> tuple[Case, ...]:
    long = Case(130, 900, (900,), bias=False)
    ragged = Case(70, 300, (0, 200, 140), bias=True)
    for item, length in enumerate(ragged.lengths):  # what lies past the length must not matter
        ragged.v[item, length:] = math.nan
    return long, ragged


def run(binary: Path) -> None:
    """Raises AssertionError (EmulatorError is one) if anything is off."""
    for case in cases():
        for seed in (0, 1, 2):
            out, lse, _ = emulated.forward(
                case.q,
                case.k,
                case.v,
                bias=case.bias,
                key_lengths=case.lengths,
                kernel=HOPPER,
                seed=seed,
                binary=binary,
            )
            case.check("out", out)
            case.check("lse", lse)
    q, k, v = (x.clone() for x in (cases()[0].q, cases()[0].k[:, :140], cases()[0].v[:, :140]))
    k[0, 3, 0, 0] = math.nan  # a key of the polynomial exponential
    out, _, _ = emulated.forward(q, k, v, kernel=HOPPER, binary=binary)
    assert out[:, :, 0].isnan().all()
    assert out[:, :, 1].isfinite().all()


def test_the_kernel_itself_passes() -> None:
    run(emulated.build(HEAD_DIM, torch.bfloat16))


def _check(tmp_path: Path, file: str, text: str, replacement: str) -> None:
    binary = build_mutant(tmp_path, file, text, replacement)
    with pytest.raises(AssertionError):
        run(binary)


@pytest.mark.parametrize(
    "text, replacement", [pytest.param(*m[1:], id=m[0]) for m in SYNCHRONISATION]
)
def test_defect_of_synchronisation_is_noticed(text: str, replacement: str, tmp_path: Path) -> None:
    _check(tmp_path, KERNEL, text, replacement)


@pytest.mark.slow
@pytest.mark.parametrize("text, replacement", [pytest.param(*m[1:], id=m[0]) for m in OTHERS])
def test_other_defect_is_noticed(text: str, replacement: str, tmp_path: Path) -> None:
    _check(tmp_path, KERNEL, text, replacement)


@pytest.mark.slow
@pytest.mark.parametrize("text, replacement", [pytest.param(*m[1:], id=m[0]) for m in POLYNOMIAL])
def test_wrong_exponential_is_noticed(text: str, replacement: str, tmp_path: Path) -> None:
    _check(tmp_path, "exponential.cuh", text, replacement)
