"""What a program has set around a call changes nothing of it: default dtype and device, gaps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compilers import needs_cpu_kernels
from numerics import assert_close
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from diffusion_fast import ops
from diffusion_fast.ops import int8
from diffusion_fast.ops.cpu import attention, library, products

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


X, WEIGHT, BIAS = drawn(2, 64, 16, 16), drawn(64, 64, 3, 3, seed=1), drawn(64, seed=2)
ROWS, MATRIX, Q = drawn(512, 256), drawn(256, 256, seed=1), drawn(2, 64, 4, 40)


def of_attention() -> tuple[Tensor, ...]:
    leaves = [Q.clone().requires_grad_() for _ in range(3)]
    with torch.enable_grad():
        y = ops.attention(*leaves)
    return (y, *torch.autograd.grad(y.sum(), leaves))


def of_norm() -> tuple[Tensor, ...]:
    x = X.clone().requires_grad_()
    with torch.enable_grad():
        y = ops.group_norm_silu(x, 4, BIAS, BIAS)
    return y, *torch.autograd.grad(y.sum(), x)


def of_linear(**more: Any) -> Tensor:
    packed = ops.pack_linear(MATRIX, len(ROWS), **more)
    return ops.linear(ROWS, MATRIX, packed=packed, **more)


def of_conv2d(packs: bool = True) -> Tensor:
    packed = ops.pack_conv2d(WEIGHT, (2, 64, 16, 16), padding=1) if packs else None
    return ops.conv2d(X, WEIGHT, BIAS, padding=1, packed=packed)


CALLS: dict[str, Callable[[], Any]] = {
    "linear": of_linear,
    "linear with a gate": lambda: of_linear(geglu=True),
    "linear in int8": lambda: int8.linear(ROWS, MATRIX, None, packed=int8.pack_linear(MATRIX, 512)),
    "conv2d": of_conv2d,
    "conv2d, not packed": lambda: of_conv2d(packs=False),
    "attention": of_attention,
    "group_norm_silu": of_norm,
    "geglu": lambda: ops.geglu(ROWS),
    "layer_norm": lambda: ops.layer_norm(ROWS, MATRIX[0], MATRIX[1]),
}


@pytest.fixture(params=["auto", "kernels"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """As usual, or by the kernels for a CPU wherever an op has one."""
    if request.param == "auto":
        yield
        return
    if library.settle():
        pytest.skip("no kernels for this CPU")
    names = ("linear", "conv2d", "attention", "attention_backward", "group_norm_silu", "geglu")
    with ops.use_backend(**dict.fromkeys(names, "cpu")):
        yield


@pytest.fixture
def _default(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.usefixtures("_backend", "_default")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_default_dtype_is_the_users(name: str, dtype: torch.dtype) -> None:
    expected = tensors(CALLS[name]())
    torch.set_default_dtype(dtype)
    for one, other in zip(tensors(CALLS[name]()), expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("name", CALLS)
def test_so_is_the_default_device(name: str) -> None:
    expected = tensors(CALLS[name]())
    with torch.device("meta"):
        found = tensors(CALLS[name]())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_default")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_measured_has_dtypes_of_its_own(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    kind = 1, 16, 8, 8, 16, 3, 3, 1, 1, 1, 1, 1
    for made in (
        products.linear_example(8, 64, 32, False),
        products.linear_example(8, 64, 32, False, True, True),
        products.conv2d_example(*kind),
        products.conv2d_backward_example(True, True, *kind),
        attention.example("torch.float32", 40, True),
        attention.training_example(2, 64, 64, 40),
    ):
        found = [one for one in made if isinstance(one, Tensor)]
        assert {(one.dtype, one.device.type) for one in found} == {(torch.float32, "cpu")}


GAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": lambda bias: torch.stack((bias, -bias), 1)[:, 0],
    "expanded": lambda bias: bias[:1].expand(len(bias)),
    "reversed twice": lambda bias: torch.stack((-bias, bias), 1).flatten()[1::2],
}


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("gaps", GAPS)
def test_a_bias_with_gaps_of_a_linear_layer(gaps: str, geglu: bool, packs: bool) -> None:
    bias = GAPS[gaps](drawn(256, seed=3))
    packed = ops.pack_linear(MATRIX, len(ROWS), geglu=geglu) if packs else None
    found = ops.linear(ROWS, MATRIX, bias, geglu=geglu, packed=packed)
    with ops.use_backend("reference"):
        truth = ops.linear(ROWS.double(), MATRIX.double(), bias.double(), geglu=geglu)
        assert_close(found, truth, ops.linear(ROWS, MATRIX, bias.contiguous(), geglu=geglu))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("window", "size"), [(3, 16), (3, 3), (1, 16)])
@pytest.mark.parametrize("gaps", GAPS)
def test_a_bias_with_gaps_of_a_convolution(
    gaps: str, window: int, size: int, residual: bool, packs: bool
) -> None:
    bias = GAPS[gaps](BIAS)
    x = drawn(1, 64, size, size).contiguous(memory_format=torch.channels_last)
    weight, pads = drawn(64, 64, window, window, seed=1), window // 2
    added = x if residual else None
    packed = ops.pack_conv2d(weight, (1, 64, size, size), padding=pads) if packs else None
    found = ops.conv2d(x, weight, bias, padding=pads, residual=added, packed=packed)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=pads)
    plain = F.conv2d(x, weight, bias.contiguous(), padding=pads)
    if residual:
        truth, plain = truth + x, plain + x
    assert_close(found, truth, plain)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm_silu": lambda x: ops.group_norm_silu(x, 4, BIAS.to(x), BIAS.to(x)),
    "geglu": lambda x: ops.geglu(x.flatten(2)),
    "conv2d": lambda x: ops.conv2d(x, WEIGHT.to(x), padding=1),
    "linear": lambda x: ops.linear(x.flatten(2), MATRIX.to(x)),
    "attention": lambda x: ops.attention(*[x.view(2, 64, 16, 16)] * 3),
    "layer_norm": lambda x: ops.layer_norm(x.flatten(2), MATRIX[0].to(x), MATRIX[1].to(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_has_its_tangents(name: str) -> None:
    function, tangent = FUNCTIONS[name], drawn(2, 64, 16, 16, seed=5)
    function(X)  # what is decided for plain tensors is not for dual ones
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(X, tangent))).tangent
    with ops.use_backend("reference"):
        _, plain = torch.func.jvp(function, (X,), (tangent,))
        _, truth = torch.func.jvp(function, (X.double(),), (tangent.double(),))
    assert_close(found, truth, plain)


@needs_cpu_kernels
@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"layer_norm"}))
def test_a_kernel_that_is_asked_for_refuses_dual_tensors(name: str) -> None:
    library.settle()
    with forward_ad.dual_level(), ops.use_backend(**{name: "cpu"}):
        dual = forward_ad.make_dual(X, X)
        with pytest.raises(ops.BackendError, match="forward-mode AD"):
            FUNCTIONS[name](dual)


@needs_cpu_kernels
@pytest.mark.parametrize("size", [(0, 64), (64, 0)])
def test_an_empty_weight_is_not_for_the_kernel(size: tuple[int, int]) -> None:
    weight = torch.empty(size)
    x = torch.ones(8, size[1])
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    library.settle()
    with ops.use_backend(linear="cpu"):
        packed = ops.pack_linear(weight, 8)
        with pytest.raises(ops.BackendError, match="a tensor is empty"):
            ops.linear(x, weight, packed=packed)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(
    ("size", "gates"), [((256, 256), True), ((512, 256), False), ((256, 128), False)]
)
def test_weights_packed_for_another_layer_are_refused(size: tuple[int, int], gates: bool) -> None:
    packed = ops.pack_linear(drawn(*size), 512, geglu=gates)
    if packed is None:
        pytest.skip("nothing is packed here")
    with pytest.raises(ValueError, match=r"packed: expected what is made of a weight \[256, 256\]"):
        ops.linear(ROWS, MATRIX, packed=packed)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("size", [(64, 32, 3, 3), (32, 64, 3, 3), (64, 64, 5, 5)])
def test_weights_packed_for_another_convolution_are_refused(size: tuple[int, ...]) -> None:
    packed = ops.pack_conv2d(drawn(*size), (2, size[1], 16, 16), padding=1)
    if packed is None:
        pytest.skip("nothing is packed here")
    with pytest.raises(ValueError, match="packed: expected what is made of a weight"):
        ops.conv2d(X, WEIGHT, padding=1, packed=packed)


def test_an_input_smaller_than_the_window_is_not_packed_for() -> None:
    with pytest.raises(ValueError, match=r"size: expected at least the window \[3, 3\]"):
        ops.pack_conv2d(WEIGHT, (1, 64, 16, 2))
    assert ops.pack_conv2d(WEIGHT, (1, 64, 16, 1), padding=1) != ()


FIRST = """
import sys, torch, diffusion_fast as df
from diffusion_fast.ops.cpu import contest, library, products
from diffusion_fast.kernels import measurements
weight, matrix = torch.ones(64, 64, 3, 3), torch.ones(256, 256)
size = (1, 64, 16, 16)
kinds = {
    f"linear {products.linear_kind(matrix, 512, False)}": "cpu packed onednn reference",
    f"conv2d {products.conv2d_kind(weight, size, 1, (1, 1, 1, 1))}": "winograd packed direct",
}
for kind, order in kinds.items():
    measurements.remember(contest._file(), kind, order)
assert not hasattr(library, "kernels")
packed = getattr(df.ops, "pack_" + sys.argv[1])
made = packed(matrix, 512) if sys.argv[1] == "linear" else packed(weight, size, padding=1)
print(made[0].dim(), hasattr(library, "kernels"))
"""


@needs_cpu_kernels
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_packing_may_be_the_first_call_of_a_process(name: str, tmp_path: Path) -> None:
    shutil.copy(library.build(), tmp_path)
    environment = os.environ | {"DIFFUSION_FAST_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", FIRST, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["3", "True"], done.stderr


SCARCE = """
import resource, sys, torch, diffusion_fast as df
from diffusion_fast.ops.cpu import attention, library, linear, winograd
torch.set_num_threads(2)
library.settle()
q = torch.randn(1, 40000, 2, 64)
lse = torch.zeros(1, 2, 40000)
last = {"memory_format": torch.channels_last}
x, weight = torch.randn(1, 512, 128, 128).to(**last), torch.randn(512, 512, 3, 3)
calls = {
    "attention": lambda: attention.backward(q, q, q, q, q, lse, 0.1, None, None),
    "winograd": lambda: winograd.forward(x, weight, None, 1, [1] * 4, None, None, None, ()),
    "winograd gradient": lambda: winograd.backward(x, x, weight, 1, [1] * 4, [0, 1, 0]),
}
small = torch.randn(1, 32, 16, 16)
winograd.forward(small, torch.randn(32, 32, 3, 3), None, 1, [1] * 4, None, None, None, ())
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize"))
limit = used * 1024 + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    calls[sys.argv[1]]()
    print("done")
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__)
"""


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("name", "mebibytes", "expected"),
    [  # what the result takes is there in each case
        ("attention", 60, "MemoryError"),
        ("winograd", 42, "MemoryError"),
        ("winograd gradient", 18, "MemoryError"),
        *((name, 2000, "done") for name in ("attention", "winograd", "winograd gradient")),
    ],
)
def test_memory_that_runs_out_in_a_kernel(name: str, mebibytes: int, expected: str) -> None:
    command = [sys.executable, "-c", SCARCE, name, str(mebibytes)]
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": str(2**17)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == expected, done.stderr
