"""The tests of the tests: every planted defect must be noticed by values or by the emulator."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import emulated_attention as emulated
import mutants
import pytest
import torch
from emulated_attention import SHORT, TILED
from mutants import Mutant
from numerics import assert_close
from torch import Tensor

from diffusion_fast.ops.attention import reference

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)"),
]

HEAD_DIM = 40  # an odd number of 16-byte pieces and an m16n8k8 tail
ONE_CARD = (1, 99 << 10, 100 << 10)  # few blocks, so that each walks over many tiles

Truth = dict[str, Tensor]


class Case:
    """A call, its truth in float64 and the error of plain bf16."""

    def __init__(self, queries: int, keys: int, lengths: tuple[int, ...], bias: bool) -> None:
        generator = torch.Generator().manual_seed(keys)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch, heads = len(lengths), 2
        shape = (batch, queries, heads, HEAD_DIM)
        self.q, self.dout = (random(*shape).bfloat16() for _ in range(2))
        self.k, self.v = (random(batch, keys, heads, HEAD_DIM).bfloat16() for _ in range(2))
        self.bias = random(batch, heads, 1, keys).bfloat16().float() if bias else None
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.allowed = self.lengths > 0  # without keys there is no truth: output and gradients 0
        if self.bias is not None:  # the last item may see none of its keys
            self.bias[-1] = -math.inf
            self.allowed[-1] = False
        self.truth, self.plain = self._compute(torch.float64), self._compute(torch.bfloat16)

    def _compute(self, dtype: torch.dtype) -> Truth:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (self.q, self.k, self.v)]
        bias = self.bias
        if bias is not None:
            bias = bias.masked_fill(~self.allowed[:, None, None, None], 0.0)
            bias = bias.to(dtype).requires_grad_()
        lengths = self.lengths.clamp(min=1).long()
        out, lse = reference(*leaves, HEAD_DIM**-0.5, bias, lengths, True)
        inputs = leaves if bias is None else [*leaves, bias]
        dout = self.dout.to(dtype) * self.allowed[:, None, None, None]
        grads = torch.autograd.grad(out, inputs, dout)
        masked = out.detach() * self.allowed[:, None, None, None]
        names = ("dq", "dk", "dv", "dbias")
        return {"out": masked, "lse": lse.detach(), **dict(zip(names, grads, strict=False))}

    def set_scores_far_below_zero(self) -> None:
        """So that 2^(0 - lse), of a key that was not masked, would be infinite."""
        self.q.fill_(-6)
        self.k.copy_(6 + 0.01 * self.k.float())
        self.truth, self.plain = self._compute(torch.float64), self._compute(torch.bfloat16)

    def check(self, name: str, value: Tensor) -> None:
        if name == "lse":
            assert (value[~self.allowed] == -math.inf).all()
            assert_close(value[self.allowed], self.truth[name][self.allowed])
        else:
            factor = 2 if name == "out" else 3
            value = value.to(self.q.dtype)
            assert_close(value, self.truth[name], self.plain[name], factor=factor)


@cache
def cases() -> dict[str, Case]:
    below = Case(20, 17, (17,), bias=False)
    below.set_scores_far_below_zero()
    return {
        "far below zero": below,
        "short": Case(330, 77, (77,), bias=False),
        "masked": Case(150, 77, (70, 0, 3, 20), bias=True),
        "many keys": Case(70, 270, (257, 129), bias=False),
    }


def run(binary: Path) -> None:
    """Raises AssertionError (EmulatorError is one) if anything is off."""
    conflicts = 0
    for name, case in cases().items():
        common = {"bias": case.bias, "key_lengths": case.lengths, "binary": binary}
        inputs = (case.q, case.k, case.v)
        for kernel in (TILED,) if name == "many keys" else (SHORT, TILED):
            for seed in (0, 1):
                out, lse, counted = emulated.forward(
                    *inputs, kernel=kernel, seed=seed, device=ONE_CARD, **common
                )
                conflicts += counted["bank_conflicts"]
                case.check("out", out)
                case.check("lse", lse)
        for splits in (1, 3):
            *grads, counted = emulated.backward(
                case.dout, *inputs, out, lse, splits=splits, seed=splits, **common
            )
            conflicts += counted["bank_conflicts"]
            for grad_name, grad in zip(("dq", "dk", "dv", "dbias"), grads, strict=True):
                if grad is not None:
                    case.check(grad_name, grad)
    assert conflicts == 0


def build_mutant(mutant: Mutant, tmp_path: Path) -> Path:
    mutant.write(tmp_path / "csrc")
    return emulated.build(HEAD_DIM, torch.bfloat16, tmp_path / "csrc")


def test_the_kernels_themselves_pass() -> None:
    run(emulated.build(HEAD_DIM, torch.bfloat16))


@pytest.mark.parametrize("mutant", mutants.SYNCHRONISATION, ids=str)
def test_defect_of_synchronisation_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    binary = build_mutant(mutant, tmp_path)
    with pytest.raises(AssertionError):
        run(binary)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.VALUES, ids=str)
def test_defect_of_values_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    binary = build_mutant(mutant, tmp_path)
    with pytest.raises(AssertionError):
        run(binary)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.HARMLESS, ids=str)
def test_harmless_change_is_harmless(mutant: Mutant, tmp_path: Path) -> None:
    run(build_mutant(mutant, tmp_path))
