"""When the Triton backend is there, when it isn't, and what it says then."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from diffusion_fast import ops
from diffusion_fast.ops.dispatch import known_ops, triton

BACKWARD = {f"{name}_backward" for name in known_ops} & set(known_ops)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """The machine is asked once per process; these tests change its answers."""
    triton._interpreted.cache_clear()
    triton.machine.cache_clear()
    for op in known_ops.values():
        op.forget()
    yield
    triton._interpreted.cache_clear()
    triton.machine.cache_clear()
    for op in known_ops.values():
        op.forget()


def test_every_op_but_those_of_libraries_has_kernels_forward_and_backward() -> None:
    """Attention has CUDA's, and a convolution's gradients are PyTorch's on a GPU."""
    others = {"attention", "attention_backward", "conv2d_backward"}
    with_kernels = {
        name
        for name, op in known_ops.items()
        if "triton" in {backend.name for backend in op.backends}
    }
    assert with_kernels == set(known_ops) - others
    assert BACKWARD - others <= with_kernels


def test_importing_the_package_does_not_import_triton() -> None:
    """Nor does an op on the CPU."""
    code = (
        "import sys, torch, diffusion_fast as df\n"
        "df.ops.geglu(torch.ones(2, 4))\n"
        "print('triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    assert "pip install triton" in ops.explain("geglu").rejected["triton"]
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="pip install triton"):
        ops.geglu(torch.ones(2, 4))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "no CUDA device" in ops.explain("geglu").rejected["triton"]
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="no CUDA device"):
        ops.geglu(torch.ones(2, 4))


def test_cpu_tensors_reach_a_kernel_only_by_name() -> None:
    x = torch.ones(2, 4)
    ops.geglu(x)
    assert ops.explain("geglu").last_ran == "reference"
    assert ops.explain("geglu", x).rejected["triton"] == "the tensors are on the CPU"
    if not torch.cuda.is_available():
        with ops.use_backend(geglu="triton"):
            ops.geglu(x)
        assert ops.explain("geglu").last_ran == "triton"


def test_other_devices_are_refused() -> None:
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="tensors are on meta"):
        ops.geglu(torch.ones(2, 4, device="meta"))
