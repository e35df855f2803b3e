"""Every Triton launch as on a GPU, without one: triton's JIT and launcher over a stub of libcuda.

    python -m benchmarks.tools.rehearse             # launches at the models' shapes, for sm_90
    python -m benchmarks.tools.rehearse --only linear layer_norm

What arrives in the driver's last call, grid, block, shared memory and each of the kernel's
parameters, is compared with what the launcher said. It needs a C compiler, as triton itself does.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diffusion_fast.kernels import ahead, launch, tuning

from . import edge_cases, launch_cases

SOURCE = Path(__file__).with_name("libcuda_stub.c")
ARCH = 90
# By their names in PTX: bytes of a parameter, and how its value is packed.
PACKED = {"u64": "q", "u32": "i", "u16": "h", "u8": "b", "s64": "q", "s32": "i", "s8": "b"}
PACKED |= {"f32": "f", "f64": "d", "b8": "q"}  # of a tensor map the address, with which it begins
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+)(?: \.ptr [^,\n]*?)? \w+_param_\d+")
MOST, BYTES = 128, 8  # of the stub


class Wrong(Exception):
    """What reached the driver is not what the launcher said."""


class Stub:
    """The stub as this process's libcuda.so.1, for whatever opens that later.

    Raises:
        RuntimeError: the C compiler's words, where it fails.
    """

    def __init__(self, folder: Path) -> None:
        name = "libcuda.so.1"
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
        command += [f"-Wl,-soname,{name}", str(SOURCE), "-o", str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        # A library that is loaded under this name is what dlopen finds by it.
        self.library = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    def expect(self, widths: list[int]) -> None:
        if len(widths) > MOST:
            raise Wrong(f"{len(widths)} parameters, more than the stub's {MOST}")
        self.library.stub_expect(len(widths), (ctypes.c_int * len(widths))(*widths))

    def launches(self) -> int:
        return int(self.library.stub_launches())

    def limit_shared(self, bytes_: int) -> None:
        self.library.stub_limit_shared(bytes_)

    def last(self) -> tuple[tuple[int, ...], tuple[int, ...], int, list[bytes]]:
        """Grid, block, bytes of shared memory and parameters of the last launch."""
        sizes = (ctypes.c_uint * 7)()
        values = (ctypes.c_ubyte * (MOST * BYTES))()
        self.library.stub_config(sizes)
        self.library.stub_values(values)
        raw = bytes(values)
        parts = [raw[i : i + BYTES] for i in range(0, len(raw), BYTES)]
        return tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6], parts


class Driver(ahead.Ahead):
    """An architecture whose launches go to the stub."""

    def __init__(self, arch: int) -> None:
        super().__init__(arch)
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_device = lambda: 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return str(nvidia.ty_to_cpp(ty))


class Address(MockTensor):
    """A tensor's dtype and an address that no other tensor has."""

    count = 0

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        Address.count += 1
        self.place = (0x7F << 40) + 4096 * Address.count

    def data_ptr(self) -> int:
        return self.place


class Rehearsal:
    """Launches that are checked on their way; ``programs`` has the compiled kernels' hashes."""

    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        self.programs: set[str] = set()
        self.launches = 0

    def launch(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any
    ) -> None:
        """In the place of :func:`launch.launch`, with an address for each tensor.

        Raises:
            Wrong: something else arrived.
        """
        if 0 in grid:
            return
        placed = _placed(args)
        compiled = kernel.warmup(*placed, grid=grid, **options)
        kinds = parameters(compiled.asm["ptx"])
        self.stub.expect([struct.calcsize(PACKED[kind]) for kind in kinds])
        before = self.stub.launches()
        kernel[grid](*placed, **options)
        if self.stub.launches() != before + 1:
            raise Wrong(f"{self.stub.launches() - before} launches, expected 1")
        self._compare(compiled, kinds, grid, placed)
        self.programs.add(compiled.hash)
        self.launches += 1

    def _compare(
        self, compiled: Any, kinds: list[str], grid: tuple[int, ...], args: tuple[Any, ...]
    ) -> None:
        said = list(_passed(list(compiled.src.signature.values()), args))
        # Behind the launcher's own parameters, the addresses of two buffers that nothing uses.
        said += [0] * (len(kinds) - len(said))
        meta = compiled.metadata
        expected = (
            (*grid, 1, 1)[:3],
            (32 * meta.num_warps, 1, 1),
            meta.shared,
            [
                struct.pack(PACKED[kind], value).ljust(BYTES, b"\0")
                for kind, value in zip(kinds, said, strict=True)
            ],
        )
        *sizes, values = self.stub.last()
        got = (*sizes, values[: len(kinds)])
        for name, a, b in zip(
            ("grid", "block", "shared", "parameters"), got, expected, strict=True
        ):
            if a != b:
                raise Wrong(f"{meta.name}: {name}: expected {b}, got {a}")


def parameters(ptx: str) -> list[str]:
    """The types of a kernel's parameters, in order."""
    head = ptx[ptx.index(".entry") :]
    return _PARAMETER.findall(head[: head.index("{")])


def _placed(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_placed, value))
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=_placed(value.base))
    return Address(value.dtype) if isinstance(value, torch.Tensor) else value


def _passed(signature: Any, values: Any) -> Iterator[int | float]:
    """The values that a kernel gets: tuples one after the other, constants left out."""
    for kind, value in zip(signature, values, strict=False):
        if isinstance(kind, tuple | list):
            yield from _passed(kind, value)
        elif isinstance(value, TensorDescriptor):
            yield from (value.base.data_ptr(), *value.shape, *value.strides)
        elif kind != "constexpr":
            yield value.data_ptr() if hasattr(value, "data_ptr") else value


def begin(stub: Stub, arch: int = ARCH) -> Rehearsal:
    """Make this process's launches rehearsals, every candidate of a measurement included."""
    driver.set_active(Driver(arch))
    rehearsal = Rehearsal(stub)
    launch.launch = rehearsal.launch
    tuning.choose = ahead.every_candidate
    return rehearsal


def calls(only: list[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and calls: the models' shapes, then odd ones in every dtype."""
    for op, name, call in [*launch_cases.cases(quick=False), *edge_cases.cases()]:
        if not only or op in only:
            yield f"{op} {name}", call


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="these ops")
    given = parser.parse_args(arguments)
    if launch.INTERPRETED:
        print("error: TRITON_INTERPRET: expected it unset, got 1", file=sys.stderr)
        return 2
    failed = 0
    with tempfile.TemporaryDirectory() as folder, launch.planned_for(divmod(ARCH, 10)):
        rehearsal = begin(Stub(Path(folder)))
        for name, call in calls(given.only):
            try:
                call()
            except Exception as error:  # whatever triton raises, the others are tried too
                failed += 1
                print(f"{name}: {type(error).__name__}: {str(error)[:500]}")
    seen = f"{rehearsal.launches} launches, {len(rehearsal.programs)} programs, {failed} failed"
    print(f"triton {triton.__version__}, sm_{ARCH}: {seen}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
