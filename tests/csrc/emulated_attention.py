"""Builds the attention kernels for the host and runs single calls, in processes of their own.

Binaries lie under build/emulator, named by a hash of everything that goes into them.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "emulator"
HEAD_DIMS = (32, 40, 48, 64, 80, 96, 128, 160)
DTYPES = {torch.bfloat16: "Bfloat16", torch.float16: "Half"}
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
AUTO, SHORT, TILED, HOPPER = range(4)

# (multiprocessors, shared memory per block, per multiprocessor) of the kinds of card.
H200 = (132, 227 << 10, 228 << 10)
A100 = (108, 163 << 10, 164 << 10)
CONSUMER = (82, 99 << 10, 100 << 10)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(head_dim: int, dtype: torch.dtype, csrc: Path = CSRC) -> Path:
    """The binary for one head dim and type; ``csrc`` may be a mutant's copy of the sources."""
    name = DTYPES[dtype]
    headers = _headers(csrc)
    driver = _compile("driver", HERE / "emulate.cpp", (), csrc, headers)
    define = (f"-DTYPE={name}", f"-DHEAD_DIM={head_dim}")
    headers += sorted(csrc.rglob("attention/*.cuh"))
    stem = f"attention_{head_dim}_{name}"
    instance = _compile(stem, HERE / "emulate_instance.cpp", define, csrc, headers)
    binary = instance.with_name(f"{instance.stem}_{driver.stem}")
    return _once(binary, (str(driver), str(instance)))


def build_program(name: str, options: tuple[str, ...] = ()) -> Path:
    """A program of its own among these files, ``emulator_test.cpp``."""
    headers = _headers(CSRC)
    compiled = _compile(Path(name).stem, HERE / name, options, CSRC, headers)
    return _once(compiled.with_suffix(".program"), (str(compiled),))


def _headers(csrc: Path) -> list[Path]:
    """What every program here includes; kernels come on top."""
    return sorted([*csrc.rglob("*.h"), csrc / "device.cuh", *HERE.rglob("*.h")])


def _compile(
    stem: str, source: Path, define: tuple[str, ...], csrc: Path, headers: list[Path]
) -> Path:
    digest = hashlib.sha256(f"{compiler()} {FLAGS} {define}".encode())
    for path in (source, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    target = BUILD / f"{stem}_{digest.hexdigest()[:16]}.o"
    return _once(target, (*define, f"-I{csrc}", f"-I{HERE}", "-c", str(source)))


def _once(target: Path, arguments: tuple[str, ...]) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.unfinished")
            mutant = [] if f"-I{CSRC}" in arguments else ["-w"]  # must be noticed at run time
            command = [str(compiler()), *FLAGS, *mutant, *arguments, "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            unfinished.rename(target)
    return target


class EmulatorError(AssertionError):
    """The emulator reported a race, an address out of range, a deadlock..., or crashed."""


@dataclass
class Call:
    """One launch: tensors by name (the kernels' own parameter names) and numbers."""

    tensors: dict[str, Tensor | None]
    numbers: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, int] = field(default_factory=dict)

    def run(self, binary: Path) -> None:
        """Runs the call; tensors are changed in place. Raises EmulatorError."""
        with tempfile.TemporaryDirectory() as folder:
            request = Path(folder) / "request"
            lines = [f"set {name} {value!r}" for name, value in self.numbers.items()]
            storages: dict[str, Tensor] = {}
            for name, tensor in self.tensors.items():
                if tensor is None:
                    continue
                raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                path = Path(folder) / name
                raw.numpy().tofile(path)
                storages[name] = raw
                offset = tensor.storage_offset() * tensor.element_size()
                lines.append(f"tensor {name} {path} {offset} {_strides(name, tensor)}")
            request.write_text("\n".join(lines) + "\n")
            done = subprocess.run(
                [str(binary), str(request)],
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            if done.returncode:
                raise EmulatorError(done.stdout + done.stderr or f"signal {-done.returncode}")
            for name, raw in storages.items():
                path = Path(folder) / name
                raw.copy_(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))
        for line in done.stdout.splitlines():
            _, name, value = line.split()
            self.statistics[name] = int(value)


def _strides(name: str, tensor: Tensor) -> str:
    """Batch, row and head strides of [B, S, H, D]; batch, 0 and head of the bias [B, H, 1, Sk]."""
    if tensor.dim() != 4:
        return "0 0 0"
    batch, row, head = tensor.stride(0), tensor.stride(1), tensor.stride(2)
    if name == "bias":
        row, head = 0, tensor.stride(1)
    return f"{batch} {row} {head}"


@cache
def _numbers(device: tuple[int, int, int]) -> dict[str, float]:
    names = ("multiprocessors", "shared_per_block", "shared_per_multiprocessor")
    return dict(zip(names, device, strict=True))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    kernel: int = AUTO,
    seed: int = 0,
    device: tuple[int, int, int] = H200,
    binary: Path | None = None,
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """out [B, Sq, H, D], lse [B, H, Sq] and the emulator's counters.

    ``bias`` is float32 [B, H, 1, Sk], expanded where it is broadcast; k and v likewise.
    """
    batch, queries, heads, head_dim = q.shape
    out = torch.full((batch, queries, heads, head_dim), math.nan, dtype=q.dtype)
    lse = torch.full((batch, heads, queries), math.nan)
    call = Call(
        {"q": q, "k": k, "v": v, "out": out, "lse": lse, "bias": bias, "key_lengths": key_lengths},
        {
            "backward": 0,
            "kernel": kernel,
            "seed": seed,
            "batch": batch,
            "heads": heads,
            "queries": queries,
            "keys": k.shape[1],
            "scale": head_dim**-0.5 if scale is None else scale,
            **_numbers(device),
        },
    )
    call.run(binary or build(head_dim, q.dtype))
    return out, lse, call.statistics


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    splits: int = 1,
    parts: bool = False,
    seed: int = 0,
    binary: Path | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, dict[str, int]]:
    """dq, dk, dv, dbias [B, H, 1, Sk] (None without a bias) and the emulator's counters.

    ``parts``: dk and dv by way of float sums per split, as with more than one split.
    """
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]

    def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype)

    dq = poison(batch, queries, heads, head_dim, dtype=q.dtype)
    parts = parts or splits > 1
    pair = ("dk_parts", "dv_parts") if parts else ("dk", "dv")
    shape = (splits, batch, keys, heads, head_dim) if parts else (batch, keys, heads, head_dim)
    grads = {name: poison(*shape, dtype=torch.float32 if parts else q.dtype) for name in pair}
    dbias = poison(splits, batch, heads, keys) if bias is not None else None
    inputs = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse, "bias": bias}
    workspace = {"delta": poison(batch, heads, queries), "key_lengths": key_lengths, "dq": dq}
    call = Call(
        {**inputs, **workspace, **grads, "dbias_parts": dbias},
        {
            "backward": 1,
            "splits": splits,
            "seed": seed,
            "batch": batch,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            "scale": head_dim**-0.5 if scale is None else scale,
            **_numbers(H200),
        },
    )
    call.run(binary or build(head_dim, q.dtype))
    dk, dv = (grads[name].sum(0).to(q.dtype) if parts else grads[name] for name in pair)
    if dbias is not None:
        dbias = dbias.sum(0)[:, :, None]
    return dq, dk, dv, dbias, call.statistics


def planned_splits(
    head_dim: int,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    device: tuple[int, int, int] = H200,
) -> int:
    """How many blocks would share the queries of one tile of keys in the backward pass."""
    shape = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
    call = Call({}, {"only_plan": 1, "seed": 0, **shape, **_numbers(device)})
    call.run(build(head_dim, torch.bfloat16))
    return call.statistics["splits"]
