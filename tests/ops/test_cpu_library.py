"""When the kernels for CPUs are compiled, loaded and used, and what is said where they can't be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from compilers import needs_cpu_kernels

from diffusion_fast import ops
from diffusion_fast.ops.cpu import library

ROOT = Path(__file__).resolve().parents[2]
# Imports once, then runs each program in a fork that has decided nothing yet.
DRIVER = """
import json, os, sys
import torch, warnings
from diffusion_fast import ops
from diffusion_fast.ops.cpu import library
x = torch.ones(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
CALL = x, 4, x[0, :, 0, 0], x[0, :, 0, 0]
def ran():
    ops.group_norm_silu(*CALL)
    return ops.explain("group_norm_silu").last_ran
for name, (code, environment) in json.load(open(sys.argv[1])).items():
    child = os.fork()
    if not child:
        for stream, to in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[2]}/{name}.{to}", os.O_CREAT | os.O_WRONLY), stream)
        os.environ.update(environment)
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""
FAILS = """
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    library.settle(), library.settle()
print(len(told), ran())
print(str(told[0].message).replace("\\n", " "))
with ops.use_backend("cpu"):
    try:
        ran()
    except ops.BackendError as error:
        print(str(error).replace("\\n", " "))
"""
BACKGROUND = """
print(ran(), library.LATER in str(ops.explain("group_norm_silu", *CALL)))
while "compiled on first use" in library.state():
    pass
print(ran())
print(library.settle(), ran())
"""
NO_AVX2 = """
torch.backends.cpu.get_cpu_capability = lambda: "DEFAULT"
print(library.settle(), ran())
"""
NAMED = """
with ops.use_backend("cpu"):
    print(ran())
"""


def compiler(folder: Path, name: str, does: str) -> str:
    """A program that answers as a compiler does, and then ``does``; $made is its output."""
    path = folder / f"{name}.sh"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && made=$2; shift; done\n' + does
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def built() -> Path:
    return library.build()  # the session's own, which is there by now


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What each program printed, on standard output and error."""
    folder = tmp_path_factory.mktemp("cpu")
    (folder / "file").write_text("in the place of a folder")
    works = "exit 3" if library.machine() else f"sleep 0.1; cp {library.build()} $made"
    programs = {
        "background": (BACKGROUND, "cache", f"{works}; echo x >> {folder}/log"),
        "next": ("print(ran())", "cache", "exit 3"),
        "named": (NAMED, "other", works),
        "compiler": (FAILS, "a", "echo no such luck >&2; exit 3"),
        "library": (FAILS, "b", "echo nonsense > $made"),
        "folder": (FAILS, "file", works),
        "no_compiler": ("print(library.state()); print(library.settle(), ran())", "c", None),
        "no_avx2": (NO_AVX2, "d", "exit 3"),
    }
    told = {}
    for name, (code, cache, does) in programs.items():
        cxx = str(folder / "none") if does is None else compiler(folder, name, does)
        told[name] = (code, {"DIFFUSION_FAST_CACHE": str(folder / cache), "CXX": cxx})
    (folder / "programs.json").write_text(json.dumps(told))
    command = [sys.executable, "-c", DRIVER, str(folder / "programs.json"), str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    found = {
        name: tuple((folder / f"{name}.{to}").read_text() for to in ("out", "err"))
        for name in programs
    }
    return found | {"log": ((folder / "log").read_text(), "")}


@needs_cpu_kernels
def test_a_process_compiles_in_the_background_and_the_next_uses_it(outcomes: Any) -> None:
    out, err = outcomes["background"]
    assert out == "reference True\nreference\n[] cpu\n"
    assert err.count("compiling kernels for this CPU") == 1
    files = sum(1 for _ in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    assert outcomes["log"][0] == "x\n" * (files + 1)  # and the link
    assert outcomes["next"] == ("cpu\n", "")
    assert outcomes["named"][0] == "cpu\n"


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("cause", "expected"),
    [("compiler", "no such luck"), ("library", "could not be loaded"), ("folder", "File exists")],
)
def test_a_build_that_fails_is_told_once(cause: str, expected: str, outcomes: Any) -> None:
    count, told, named = outcomes[cause][0].splitlines()
    assert count == "1 reference"
    assert expected in told
    assert "PyTorch's own are used" in told
    assert "backend 'cpu' was asked for and can't run: the kernels for this CPU" in named
    assert expected in named


def test_without_a_compiler_the_reason_says_what_to_install(outcomes: Any) -> None:
    out, err = outcomes["no_compiler"]
    assert "install g++, or set CXX" in out
    assert out.endswith("reference\n")
    assert not err


def test_a_cpu_without_avx2_keeps_pytorchs_own(outcomes: Any) -> None:
    out, _ = outcomes["no_avx2"]
    assert "the CPU has no AVX2 (PyTorch found DEFAULT)" in out
    assert out.endswith("reference\n")


@needs_cpu_kernels
def test_the_key_depends_on_sources_and_instructions(
    built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = library._target()
    assert library.build() == first == built
    monkeypatch.setattr(library, "level", lambda: "AVX2" if "AVX512" in first.name else "AVX512")
    assert library._target() != first
    monkeypatch.undo()
    shutil.copytree(library.sources(), tmp_path / "csrc")
    (tmp_path / "csrc" / "cpu" / "vector.h").write_text("// other\n")
    monkeypatch.setattr(library, "sources", lambda: tmp_path / "csrc")
    monkeypatch.setattr("diffusion_fast.ops.building.sources", lambda: tmp_path / "csrc")
    assert library._target() != first


@needs_cpu_kernels
@pytest.mark.compiles
@pytest.mark.skipif(library.level() == "AVX2", reason="the other tests use these instructions")
def test_the_narrower_instructions_compute_the_same() -> None:
    tests = [str(path) for path in sorted((ROOT / "tests" / "ops").glob("test_*_cpu.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", *tests]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("AMX" in line or "AVX512-BF16" in line for line in skipped), skipped


@needs_cpu_kernels
def test_calls_from_two_threads_at_once() -> None:
    x = torch.randn(2, 32, 24, 24).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(32)
    with ops.use_backend("cpu"), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: ops.group_norm_silu(x, 8, weight, weight), range(20)))
    assert all(torch.equal(found[0], other) for other in found)
