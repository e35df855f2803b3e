"""The emulator itself: it names each kind of defect, and its 16-bit floats are PyTorch's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulated_attention as emulated
import pytest
import torch
from compilers import needs_nvcc

from diffusion_fast.ops.cuda import build as extension

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)")

DEFECTS = {
    "no_barrier": "race, read",
    "syncwarp_across_warps": "race, read",
    "write_after_read": "race, write after read",
    "never_written": "read of memory never written",
    "out_of_range": "out of range",
    "misaligned": "misaligned",
    "divergent": "divergent warp",
    "deadlock": "deadlock",
    "two_barriers": "__syncthreads at two lines",
    "copy_not_waited_for": "read while a copy is in flight",
    "copy_never_waited_for": "exits with cp.async in flight",
    "copy_not_committed": "exits with cp.async in flight",
    "copy_seen_by_another": "race, read after write",
    "copy_from_odd_address": "cp.async source misaligned",
}


@pytest.fixture(scope="module")
def binary() -> str:
    return str(emulated.build_program("emulator_test.cpp"))


def run(binary: str, name: str, text: str = "") -> list[str]:
    done = subprocess.run([binary, name], capture_output=True, text=True, check=True, input=text)
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_named(binary: str, name: str) -> None:
    assert any(DEFECTS[name] in line for line in run(binary, name))


def test_clean_kernel_has_no_report(binary: str) -> None:
    assert run(binary, "clean") == ["conflicts 0"]


def test_bank_conflicts_are_counted(binary: str) -> None:
    assert run(binary, "bank_conflicts") == [f"conflicts {7 * 4 * 2}"]


def test_sixteen_bit_floats(binary: str) -> None:
    """Every pattern has PyTorch's value and rounds back to itself."""
    for name, dtype in (("Half", torch.float16), ("Bfloat16", torch.bfloat16)):
        rows = [line.split() for line in run(binary, "floats") if line.startswith(f"{name} ")]
        assert len(rows) == 65536
        table = torch.tensor([[int(x) for x in row[1:]] for row in rows])
        truth = table[:, 0].to(torch.int32).to(torch.int16).view(dtype).float()
        value = table[:, 1].to(torch.int64).to(torch.int32).view(torch.float32)
        number = ~truth.isnan()
        assert torch.equal(value[number], truth[number])
        assert value[~number].isnan().all()
        assert torch.equal(table[number, 2], table[number, 0])


def test_rounding(binary: str) -> None:
    """To nearest, ties to even, overflow to infinity, subnormals kept: as PyTorch rounds."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    near = torch.arange(0x33000000, 0x48000000, 0x800 * 37).to(torch.int32)  # fp16's range and ties
    bits = torch.cat([random, near, near + 0x1000, near | 0x1FFF])
    floats = bits.view(torch.float32)
    floats = floats[~floats.isnan()]
    text = " ".join(str(b & 0xFFFFFFFF) for b in floats.view(torch.int32).tolist())
    got = torch.tensor([[int(x) for x in line.split()] for line in run(binary, "round", text)[:-1]])
    for column, dtype in enumerate((torch.float16, torch.bfloat16)):
        truth = floats.to(dtype).view(torch.int16).int() & 0xFFFF
        assert torch.equal(got[:, column].int(), truth)


@pytest.fixture(scope="module")
def emulated_fragments() -> torch.Tensor:
    """[64, 32] words: what the emulator's warp computes in fragments.cu."""
    return _fragments(str(emulated.build_program("fragments.cu", ("-x", "c++"))))


def _fragments(program: str) -> torch.Tensor:
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.tensor([int(word) for word in done.stdout.split()]).view(64, 32)


def test_fragments_run_clean(emulated_fragments: torch.Tensor) -> None:
    results = emulated_fragments[:40]
    assert (results.count_nonzero(1) > 0).sum() == 40 - 2  # the two words of zero fill
    assert not emulated_fragments[40:].any()


def _compile_for_the_gpu(folder: Path, architecture: str) -> Path:
    tools = extension.toolchain()
    assert not isinstance(tools, str)
    program = folder / "fragments"
    target = extension.generate_code([architecture])
    source = str(emulated.HERE / "fragments.cu")
    command = [tools.nvcc, "-std=c++17", "-O1", *target, f"-I{emulated.CSRC}", source]
    subprocess.run([*command, "-o", str(program)], check=True, capture_output=True)
    return program


@needs_nvcc
def test_fragments_compile_for_the_gpu(tmp_path: Path) -> None:
    assert _compile_for_the_gpu(tmp_path, "80").exists()


@pytest.mark.gpu
@needs_nvcc
def test_the_gpu_computes_the_same_fragments(
    tmp_path: Path, emulated_fragments: torch.Tensor
) -> None:
    """Moves bit for bit; sums to one step of the 16-bit type they are rounded to."""
    name = extension.architecture(torch.cuda.get_device_capability())
    hardware = _fragments(str(_compile_for_the_gpu(tmp_path, name)))
    sums = [0, 1, 2, 3, 17, 18, 19, 20]
    exact = [row for row in range(64) if row not in (*sums, 39)]
    assert torch.equal(hardware[exact], emulated_fragments[exact])
    for row in (*sums, 39):
        for shift in (0, 16):
            pair = [(x[row] >> shift) & 0xFFFF for x in (hardware, emulated_fragments)]
            assert ((pair[0] - pair[1]).abs() <= 1).all(), (row, pair)
