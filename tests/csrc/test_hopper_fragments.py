"""The Hopper kernel's building blocks: swizzled boxes, descriptors, wgmma fragments.

On the emulator they are held to the layouts' definition. On an sm_90 GPU the same source must give
the same bits: of all checks this one says most about what is wrong when the kernel is.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulated_attention as emulated
import pytest
import torch
from compilers import needs_nvcc

from diffusion_fast.ops.cuda import build as extension

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler (g++)"),
]

HEAD_DIMS = (40, 32, 160, 64, 128)
QUERIES, KEYS, HEADS, TILE = 50, 120, 2, 128


def _run(program: Path) -> dict[int, torch.Tensor]:
    """Words [n, 128 threads] per head dim."""
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = torch.tensor([int(word) for word in done.stdout.split()]).view(-1, 2)
    return {dim: rows[rows[:, 0] == dim, 1].view(-1, 128) for dim in HEAD_DIMS}


@pytest.fixture(scope="module")
def fragments() -> dict[int, torch.Tensor]:
    return _run(emulated.build_program("hopper_fragments.cu", ("-x", "c++")))


def _inputs(head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The program's q, k and v, with zeros where rows or columns end."""
    small = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 1.0])
    count, state, values = KEYS * HEADS * head_dim, head_dim, []
    for _ in range(3 * count):
        state = (state * 1664525 + 1013904223) % 2**32
        values.append(state >> 29)
    x = small[torch.tensor(values)].view(3, KEYS, HEADS, head_dim)
    q, k, v = (torch.zeros(rows, head_dim) for rows in (64, TILE, TILE))
    q[:QUERIES], k[:KEYS], v[:KEYS] = x[0, :QUERIES, 1], x[1, :, 1], x[2, :, 0]
    return q, k, v


def _matrix(sums: torch.Tensor) -> torch.Tensor:
    """[n / 2, 128 threads] accumulators as the 64 x n matrix (PTX ISA, wgmma fragments)."""
    n = 2 * sums.shape[0]
    i, t = torch.meshgrid(torch.arange(n // 2), torch.arange(128), indexing="ij")
    matrix = torch.empty(64, n)
    row = t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8
    matrix[row, i // 4 * 8 + t % 4 * 2 + i % 2] = sums
    return matrix


def _probabilities() -> torch.Tensor:
    """What the program holds in registers, as a 64 x 128 matrix."""
    p = torch.empty(64, TILE)
    for t in range(128):
        for i in range(32):
            row = t // 32 * 16 + t % 32 // 4 + i % 2 * 8
            column = i // 4 * 16 + t % 4 * 2 + i % 4 // 2 * 8
            p[row, column], p[row, column + 1] = (t + i) % 5, i % 3
    return p


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_emulator_follows_the_definition(
    fragments: dict[int, torch.Tensor], head_dim: int
) -> None:
    words = fragments[head_dim]
    columns = (head_dim + 15) // 16 * 16
    sums = words[: 64 + columns // 2].to(torch.int32).view(torch.float32)
    q, k, v = _inputs(head_dim)
    assert torch.equal(_matrix(sums[:64]), q @ k.T)
    got = _matrix(sums[64:])
    assert torch.equal(got[:, :head_dim], _probabilities() @ v)
    assert not got[:, head_dim:].any()


def _compile_for_the_gpu(folder: Path) -> Path:
    tools = extension.toolchain()
    assert not isinstance(tools, str)
    program = folder / "hopper_fragments"
    flags = ["-std=c++17", "-O3", *extension.generate_code(["90a"]), f"-I{emulated.CSRC}"]
    source = str(emulated.HERE / "hopper_fragments.cu")
    command = [tools.nvcc, *flags, source, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@needs_nvcc
def test_compiles_for_the_gpu(tmp_path: Path) -> None:
    assert _compile_for_the_gpu(tmp_path).exists()


@pytest.mark.gpu
@needs_nvcc
def test_the_gpu_gives_the_same_bits(tmp_path: Path, fragments: dict[int, torch.Tensor]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm_90 GPU")
    hardware = _run(_compile_for_the_gpu(tmp_path))
    for head_dim, expected in fragments.items():
        boxes = 64 + (head_dim + 15) // 16 * 8
        got = hardware[head_dim]
        assert torch.equal(got[boxes:], expected[boxes:]), f"{head_dim}: boxes in shared memory"
        assert torch.equal(got[:64], expected[:64]), f"{head_dim}: Q K^T"
        assert torch.equal(got[64:boxes], expected[64:boxes]), f"{head_dim}: P V"
