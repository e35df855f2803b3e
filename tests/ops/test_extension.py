"""Building, caching and loading the CUDA library, without a GPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from compilers import needs_nvcc

from diffusion_fast.ops import building
from diffusion_fast.ops.cuda import build as extension

ROOT = Path(__file__).resolve().parents[2]

# A build that says when it starts, takes a while and leaves more than it is asked for.
BUILDER = """
import sys, time
from pathlib import Path
from diffusion_fast.ops.building import build_once

target, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def build(scratch):
    (scratch / target.name).write_text("half")
    with log.open("a") as file:
        file.write("start\\n")
    time.sleep(seconds)
    (scratch / target.name).write_text("whole")

print(build_once(target, build).read_text())
"""


def start_builder(target: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(target), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for(log: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not log.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_build_once(tmp_path: Path) -> None:
    target, log = tmp_path / "cache" / "library.so", tmp_path / "log"
    processes = [start_builder(target, log, 0.5) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == ["whole", "whole"]
    assert log.read_text() == "start\n"
    assert not list(target.parent.glob("*.building"))


def test_killed_build_leaves_the_cache_good(tmp_path: Path) -> None:
    target, log = tmp_path / "cache" / "library.so", tmp_path / "log"
    killed = start_builder(target, log, 600)
    wait_for(log, killed)
    waiting = start_builder(target, log, 0.1)  # starts while the other holds the lock
    time.sleep(0.2)
    assert not target.exists()
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert waiting.communicate(timeout=120)[0].strip() == "whole"
    assert target.read_text() == "whole"
    assert not list(target.parent.glob("*.building"))


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "library.so"

    def build(scratch: Path) -> None:
        (scratch / target.name).write_text("half")
        raise extension.BuildError("no")

    with pytest.raises(extension.BuildError):
        extension.build_once(target, build)
    assert not target.exists()
    assert not list(tmp_path.glob("*.building"))


@pytest.fixture
def fresh_toolchain() -> object:
    extension.toolchain.cache_clear()
    yield
    extension.toolchain.cache_clear()


def test_without_nvcc_the_reason_says_what_to_install(
    fresh_toolchain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "find_nvcc", lambda: None)
    reason = extension.toolchain()
    assert isinstance(reason, str)
    assert "nvcc" in reason
    assert "install" in reason
    with pytest.raises(extension.BuildError, match="install"):
        extension.build_library([40], ["80"])


def test_broken_nvcc_is_reported(
    fresh_toolchain: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(extension, "find_nvcc", lambda: str(broken))
    assert "does not run" in str(extension.toolchain())


@pytest.mark.parametrize("error", [ImportError("no module x"), OSError("x"), RuntimeError("x")])
def test_what_a_build_lacks_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention then runs elsewhere; the call does not fail."""

    def fails(head_dim: int) -> Path:
        raise error

    monkeypatch.setattr(extension, "failures", {})
    monkeypatch.setattr(extension, "_library_for", fails)
    with pytest.warns(UserWarning, match="attention, head dim 40"):
        assert extension.load(40) == [f"the kernels could not be built or loaded: {error}"]
    assert len(extension.load(40)) == 1  # it isn't tried, or warned of, again


def test_cuda_home_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert extension.find_nvcc() == str(nvcc)


@pytest.mark.parametrize(
    "capability, name", [((8, 0), "80"), ((8, 6), "86"), ((9, 0), "90a"), ((12, 0), "120")]
)
def test_architecture(capability: tuple[int, int], name: str) -> None:
    assert extension.architecture(capability) == name


@pytest.mark.parametrize(
    "capability, runs",
    [((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 3), True), ((7, 5), False)],
)
def test_a_prebuilt_library_serves_its_own_generation(
    capability: tuple[int, int], runs: bool
) -> None:
    assert extension.serves([800, 900, 1000], capability) is runs
    assert not extension.serves([890], (8, 6))


def test_embedded_gpus_run_their_own_code_only() -> None:
    assert not extension.serves([800, 1000], (8, 7))
    assert not extension.serves([800, 1000], (10, 1))
    assert extension.serves([800, 870], (8, 7))


def test_key_depends_on_sources_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = extension._key("-O3")
    assert first == extension._key("-O3")
    assert first != extension._key("-O2")
    with monkeypatch.context() as changed:
        changed.setenv("NVCC_APPEND_FLAGS", "-G")
        assert first != extension._key("-O3")
    (tmp_path / "device.cuh").write_text("// other\n")
    monkeypatch.setattr(extension, "sources", lambda: tmp_path)
    monkeypatch.setattr(building, "sources", lambda: tmp_path)
    assert first != extension._key("-O3")


def test_compiler_errors_are_shown() -> None:
    with pytest.raises(extension.BuildError, match="exit 7 loudly"):
        extension.run(["sh", "-c", "echo exit 7 loudly >&2; exit 7"])


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real library, built as on first use, for one head dim."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("DIFFUSION_FAST_CACHE")
    os.environ["DIFFUSION_FAST_CACHE"] = str(folder)
    try:
        made = extension.build_library([40], ["80"], jobs=2)
        stamp = made.stat().st_mtime_ns
        assert extension.build_library([40], ["80"]) == made
        assert made.stat().st_mtime_ns == stamp
        return made
    finally:
        if before is None:
            del os.environ["DIFFUSION_FAST_CACHE"]
        else:
            os.environ["DIFFUSION_FAST_CACHE"] = before


def in_new_process(code: str, *arguments: object) -> str:
    """What a fresh interpreter prints: the library's ops can be registered once per process."""
    command = [sys.executable, "-c", "import sys, torch\n" + textwrap.dedent(code)]
    command += [str(argument) for argument in arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_nvcc
def test_library_loads_and_registers_its_ops(library: Path) -> None:
    code = """
        from diffusion_fast.ops.cuda import build as extension
        torch.ops.load_library(sys.argv[1])
        for name in ("forward", "backward", "splits"):
            op = getattr(torch.ops.diffusion_fast_cuda, f"attention_{name}_40").default
            print(op._schema)
        print(extension.built_architectures(sys.argv[1]))
    """
    printed = in_new_process(code, library)
    assert "attention_forward_40(Tensor q, Tensor k" in printed
    assert "Tensor(a!) out" in printed
    assert printed.endswith("[800]\n")


@needs_nvcc
def test_library_for_other_gpus_is_replaced_and_a_driver_too_old_is_told(
    library: Path, tmp_path: Path
) -> None:
    """The prebuilt one must stay closed: the same ops twice would end the process."""
    built = shutil.copy(library, tmp_path / "built.so")
    code = """
        from pathlib import Path
        from diffusion_fast.ops.cuda import build as extension
        extension.prebuilt = lambda: Path(sys.argv[1])
        extension.local_capabilities = lambda: [(9, 0)]
        extension.build_library = lambda head_dims, architectures: Path(sys.argv[2])
        print(extension.load(40))
        print(any("built.so" in line for line in open("/proc/self/maps")))
    """
    reason, loaded = in_new_process(code, library, built).splitlines()
    assert loaded == "True"
    if torch.cuda.is_available():
        assert reason == "None"
    else:
        assert "CUDA driver" in reason


@needs_nvcc
def test_wrong_calls_of_the_library_are_errors(library: Path) -> None:
    code = """
        torch.ops.load_library(sys.argv[1])
        q = torch.zeros(1, 8, 1, 40, dtype=torch.float16)
        forward = torch.ops.diffusion_fast_cuda.attention_forward_40
        try:
            forward(q, q, q, None, None, q, torch.zeros(8), 1.0, 0, 0)
        except RuntimeError as error:
            print(error)
    """
    assert "q: expected a CUDA tensor" in in_new_process(code, library)


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_calls_without_a_gpu_are_errors(library: Path) -> None:
    code = """
        torch.ops.load_library(sys.argv[1])
        try:
            torch.ops.diffusion_fast_cuda.attention_splits_40(8, 64, 64, 0)
        except RuntimeError as error:
            print(error)
    """
    assert "attention (CUDA): CUDA driver" in in_new_process(code, library)


@needs_nvcc
def test_info_module(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("pybind11")
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path_factory.mktemp("info")))
    code = """
        from diffusion_fast.ops.cuda import build as extension
        info = extension.info()
        assert extension.info() is info
        print(info.build(sys.argv[1]))
        other = torch.__path__[0] + "/lib/libc10.so"
        for question in (info.build, info.kernels):
            for path in ("none.so", other, sys.argv[1]):
                try:
                    print(len(question(path)) > 0)
                except RuntimeError as error:
                    print(error)
    """
    printed = in_new_process(code, library)
    assert '"head_dims": [40], "architectures": [800]' in printed
    assert printed.count("cannot load none.so") == 2
    assert printed.count("not a library of this package") == 2
    if not torch.cuda.is_available():
        assert "CUDA cannot describe the kernels: CUDA driver" in printed


@needs_nvcc
@pytest.mark.slow
def test_ahead_of_time_build(tmp_path: Path) -> None:
    """DIFFUSION_FAST_CUDA=1, through torch's BuildExtension, with whatever torch is here."""
    pytest.importorskip("pybind11")
    for name in ("csrc", "kernels", "diffusion_fast"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {
        "DIFFUSION_FAST_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "8.0",
        "MAX_JOBS": "2",
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    code = """
        import os
        os.chdir(sys.argv[1])
        sys.path.insert(0, sys.argv[1])
        from diffusion_fast.ops.cuda import build as extension
        made = extension.prebuilt()
        assert made.is_relative_to(sys.argv[1])
        torch.ops.load_library(str(made))
        for dim in extension.HEAD_DIMS:
            getattr(torch.ops.diffusion_fast_cuda, f"attention_backward_{dim}").default
        print(extension.built_architectures(made), "head_dims" in extension.info().build(str(made)))
    """
    assert in_new_process(code, tmp_path) == "[800] True\n"
