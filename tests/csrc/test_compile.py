"""nvcc compiles and links the kernels for every architecture, and nothing spills that did not.

benchmarks/results/compile/attention.csv is the record; `python -m
benchmarks.tools.attention_resources` writes it anew.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compilers import needs_nvcc

from benchmarks.tools import attention_resources as resources
from benchmarks.tools.occupancy import LIMITS, SYSTEM_SHARED
from diffusion_fast.ops.cuda import build as extension

# Spills that remain, and why. Empty: there are none.
KNOWN_SPILLS: dict[tuple[str, str, int, int], str] = {}


def _spills(kernels: list[resources.Kernel]) -> list[resources.Kernel]:
    return [k for k in kernels if k.spill_store_bytes or k.spill_load_bytes]


def test_the_record_is_complete_and_explains_its_spills() -> None:
    recorded = resources.read_table()
    per_head_dim = 2 * (3 + 4)  # types; short-key kernels and the others
    expected = len(resources.ARCHITECTURES) * len(extension.HEAD_DIMS) * per_head_dim
    assert len(set(recorded)) == expected
    for k in _spills(recorded):
        assert (k.architecture, k.kernel, k.head_dim, k.keys) in KNOWN_SPILLS, k
    for k in recorded:
        limit = LIMITS[k.architecture]
        if k.kernel == "short" and k.keys > 80:
            continue  # where it does not fit, the tiled kernel runs
        assert k.blocks_per_multiprocessor >= 1, k
        assert k.shared_bytes + SYSTEM_SHARED <= limit.shared_bytes, k


@needs_nvcc
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize("head_dim", extension.HEAD_DIMS)
def test_compiles_without_new_spills(head_dim: int, architecture: str) -> None:
    compiled = resources.compile_kernels(head_dim, architecture)
    recorded = {
        (k.kernel, k.type, k.keys): k
        for k in resources.read_table()
        if (k.head_dim, k.architecture) == (head_dim, architecture)
    }
    assert {(k.kernel, k.type, k.keys) for k in compiled} == set(recorded)
    for k in compiled:
        before = recorded[k.kernel, k.type, k.keys]
        assert k.spill_store_bytes <= before.spill_store_bytes, (k, before)
        assert k.spill_load_bytes <= before.spill_load_bytes, (k, before)
        assert k.shared_bytes == before.shared_bytes, (k, before)


# One instruction of each kind in the machine code, and how often at least.
HOPPER_CODE = {
    "HGMMA": 10,  # wgmma
    "UTMALDG": 4,  # the copy engine: queries, first and next K, V
    "USETMAXREG": 2,
    "MUFU.EX2": 1,
    "SYNCS.PHASECHK": 1,  # mbarrier waits
}


@needs_nvcc
@pytest.mark.parametrize("head_dim", extension.HEAD_DIMS)
def test_hopper_kernel_compiles_without_spills_and_waits(head_dim: int) -> None:
    """ptxas neither spills nor warns that it ran wgmma one by one (C7510) or ignored setmaxnreg
    (C7508), nor adds a fence of its own (C7519)."""
    log = _compiled(head_dim, "90a")
    entries = re.findall(
        r"Compiling entry function '\w*attention_hopperI\w*'.*?\n.*?\n"
        r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers",
        log.read_text(),
    )
    assert entries == [("0", "0", "0", "168")] * 2  # 65536 for 384 threads, before setmaxnreg
    assert not re.findall(r"\(C75\d\d\).*", log.read_text())
    code = _machine_code(log, "attention_hopper")
    for instruction, least in HOPPER_CODE.items():
        assert code.count(f" {instruction}") >= 2 * least, instruction  # two types
    assert " LDL" not in code
    assert " STL" not in code


@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "100"])
def test_hopper_kernel_is_empty_elsewhere(architecture: str) -> None:
    """And takes too few threads to be started by mistake."""
    code = _machine_code(_compiled(40, architecture), "attention_hopper")
    assert not re.search(r" (HGMMA|UTMALDG|LDG|STG)", code)


def _compiled(head_dim: int, architecture: str) -> Path:
    """The log of :func:`resources.compile_kernels`; the machine code lies beside it."""
    resources.compile_kernels(head_dim, architecture)
    tools = extension.toolchain()
    assert not isinstance(tools, str)
    key = extension._key(extension.COMMON_FLAGS, tools.version, "verbose")
    return resources.BUILD / f"attention_{head_dim}_{architecture}_{key}.log"


def _machine_code(log: Path, kernel: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [str(tool), "-sass", f"{log}.cubin"], capture_output=True, text=True, check=True
    ).stdout
    functions = re.split(r"\n\s*Function : ", text)[1:]
    chosen = [f for f in functions if kernel in f.split("\n", 1)[0]]
    assert len(chosen) == 2, [f[:80] for f in functions]
    return "".join(chosen)


@needs_nvcc
def test_all_of_it_links_for_all_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path))
    library = extension.build_library(extension.HEAD_DIMS, resources.ARCHITECTURES, jobs=2)
    code = (
        "import sys, torch\n"
        "from diffusion_fast.ops.cuda import build as extension\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "for dim in extension.HEAD_DIMS:\n"
        "    getattr(torch.ops.diffusion_fast_cuda, f'attention_forward_{dim}').default\n"
        "print(extension.built_architectures(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[800, 900, 1000, 1200]\n"


def test_ptxas_output_is_understood() -> None:
    log = """
ptxas info    : Compiling entry function '_ZN14diffusion_fast15attention_shortINS_4HalfELi40ELi5EEEvNS_13ForwardParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 102 registers, used 1 barriers, 8 bytes cumulative stack size
"""  # noqa: E501
    (kernel,) = resources.parse("90a", log)
    assert (kernel.kernel, kernel.type, kernel.head_dim, kernel.keys) == ("short", "fp16", 40, 80)
    assert (kernel.registers, kernel.stack_bytes) == (102, 8)
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (4, 12)
    assert kernel.shared_bytes == (2 * 80 + 128) * 80
    assert kernel.blocks_per_multiprocessor == 4


@pytest.mark.parametrize(
    "registers, shared, blocks", [(128, 0, 4), (96, 0, 5), (32, 0, 16), (64, 113 << 10, 2)]
)
def test_blocks_per_multiprocessor(registers: int, shared: int, blocks: int) -> None:
    assert resources.blocks_per_multiprocessor("90a", registers, shared) == blocks
