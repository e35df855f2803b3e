"""Planted defects in the Hopper kernel: the values or the emulator must notice each one."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import emulated_attention as emulated
import mutants
import pytest
import torch
from emulated_attention import HOPPER
from mutants import Mutant
from test_mutants import HEAD_DIM, Case, build_mutant

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)"),
]


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


@pytest.mark.parametrize("mutant", mutants.HOPPER_SYNCHRONISATION, ids=str)
def test_defect_of_synchronisation_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    binary = build_mutant(mutant, tmp_path)
    with pytest.raises(AssertionError):
        run(binary)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.HOPPER_VALUES + mutants.EXPONENTIAL, ids=str)
def test_defect_of_values_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    binary = build_mutant(mutant, tmp_path)
    with pytest.raises(AssertionError):
        run(binary)
