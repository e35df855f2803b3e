"""The emulator's instructions of sm_90a: it names each kind of defect."""

from __future__ import annotations

import subprocess

import emulated_attention as emulated
import pytest

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)"),
]

DEFECTS = {
    "barrier_not_shown": "has not been shown the mbarrier",
    "barrier_before_it_was_made": "mbarrier",
    "no_barrier_there": "not an mbarrier",
    "too_many_arrivals": "too many arrivals",
    "other_parity": "wgmma while a copy is in flight",
    "more_bytes_announced": "deadlock",
    "box_not_waited_for": "wgmma while a copy is in flight",
    "box_over_box": "write while a copy is in flight",
    "box_over_barrier": "box copy over an mbarrier",
    "box_off_its_pattern": "start of its swizzle pattern",
    "no_fence": "without wgmma.fence",
    "product_not_waited_for": "exits with wgmma in flight",
    "product_not_committed": "exits with wgmma in flight",
    "accumulators_written": "accumulators of a wgmma in flight were written",
    "registers_overwritten": "A registers of a wgmma in flight were overwritten",
    "operand_overwritten": "write where a wgmma may still read",
    "operand_released_early": "write where a wgmma may still read",
    "no_proxy_fence": "store without proxy fence",
    "no_barrier_after_proxy_fence": "race, wgmma after write",
    "operand_off_its_pattern": "operand off its swizzle pattern",
    "a_warp_left_out": "different numbers of wgmma",
    "warps_differ": "issue different wgmma",
    "named_barrier_alone": "deadlock",
}


@pytest.fixture(scope="module")
def binary() -> str:
    return str(emulated.build_program("emulator_hopper_test.cpp"))


def run(binary: str, name: str) -> list[str]:
    done = subprocess.run([binary, name], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_named(binary: str, name: str) -> None:
    lines = run(binary, name)
    assert any(DEFECTS[name] in line for line in lines), lines


def test_clean_kernel_computes_the_product(binary: str) -> None:
    assert run(binary, "clean") == ["product 1"]


def test_named_barrier_orders(binary: str) -> None:
    assert run(binary, "named_barrier_orders") == ["product 0"]  # part of the tile was cleared
