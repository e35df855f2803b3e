"""What holds for the sources of csrc as text: the kernels must not escape the emulator's checks."""

from __future__ import annotations

import re

import mutants
import pytest
from emulated_attention import CSRC, HEAD_DIMS
from mutants import Mutant

KERNELS = sorted((CSRC / "attention").glob("*.cuh"))
EVERYWHERE = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp"))


def code(text: str) -> str:
    """Without comments."""
    return re.sub(r"//[^\n]*", "", text)


def test_there_are_kernels() -> None:
    assert len(KERNELS) >= 5


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
@pytest.mark.parametrize(
    "pattern, why",
    [
        (r"__shared__", "shared memory is addresses, checked access by access"),
        (r"__cvta|shared_ptr|generic_to_shared", "no raw pointers to shared memory"),
        (r"\basm\b", "instructions are wrapped once, in device.cuh"),
        (r"__CUDA_ARCH__|__CUDACC__", "the one #if is in device.cuh"),
        (r"<cuda|<<<|cuda[A-Z]\w+\(", "the runtime is called in device.cuh and library.cu only"),
        (r"__syncwarp\(\w|__shfl_(?!xor)", "full-warp collectives only"),
        (r"\btorch\b", "torch is known to binding.cpp only"),
    ],
)
def test_kernels_use_only_what_the_emulator_checks(path: object, pattern: str, why: str) -> None:
    found = re.search(pattern, code(path.read_text()))  # type: ignore[attr-defined]
    assert found is None, f"{found[0]}: {why}"


def test_one_switch_between_device_and_host() -> None:
    switches = [p.name for p in EVERYWHERE if "__CUDACC__" in code(p.read_text())]
    assert switches == ["device.cuh"]


def test_torch_is_known_to_one_file() -> None:
    users = [p.name for p in EVERYWHERE if "torch/" in code(p.read_text())]
    assert users == ["binding.cpp"]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_has_its_instance(head_dim: int) -> None:
    text = (CSRC / "instances" / f"attention_{head_dim}.cu").read_text()
    assert f"attention_entry<{head_dim}>" in text
    assert f"X({head_dim})" in (CSRC / "library.h").read_text()


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda p: p.name)
def test_files_stay_short(path: object) -> None:
    assert len(path.read_text().splitlines()) <= 400  # type: ignore[attr-defined]


MUTANTS = (
    *(mutants.SYNCHRONISATION + mutants.VALUES + mutants.HARMLESS),
    *(mutants.HOPPER_SYNCHRONISATION + mutants.HOPPER_VALUES + mutants.EXPONENTIAL),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_finds_its_place(mutant: Mutant) -> None:
    """What compiles the mutants runs less often than the kernels are edited."""
    path, text = mutant.source()
    assert text != path.read_text()


def test_no_marker_without_a_mutant() -> None:
    assert {name for name, _, _ in mutants.stretches()} == {m.marker for m in MUTANTS}
