"""The product's kernel by descriptors: values, boxes, which calls it takes, what compiles of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import HALF, check, randn
from torch import Tensor
from torch.nn import functional as F

from diffusion_fast import ops
from diffusion_fast.kernels import ahead, conv2d, hopper, launch, linear, matmul, product

Launched = list[hopper.Persistent]
OTHER_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9
pytestmark = pytest.mark.skipif(OTHER_GPU, reason="needs a GPU of compute capability 9.0, or none")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Small tiles by descriptors, of which each of two blocks has several; those launched."""
    found: Launched = []
    before = hopper.launch_product

    def noted(p: product.Product, config: hopper.Persistent) -> None:
        found.append(config)
        before(p, config)

    monkeypatch.setattr(launch, "capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(hopper, "launch_product", noted)
    use(monkeypatch, hopper.Persistent(16, 16, 16, 8, 3))
    return found


def use(patch: pytest.MonkeyPatch, config: hopper.Persistent) -> None:
    """This tile for every product that fits."""
    plain = matmul.Config(16, 16, 16, 4, 2)
    patch.setattr(matmul, "configs", lambda p: [] if hopper.fits(p) else [plain])
    patch.setattr(hopper, "configs", lambda p: [config._replace(parts=1) if p.geglu else config])


def linear_case(kind: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    rows, inner, out = 37, 24, 24
    values = {"x": randn(rows, inner, dtype=dtype), "weight": randn(out, inner, dtype=dtype)}
    values["bias"] = randn(out, dtype=dtype)
    if "residual" in kind:
        width = out // 2 if "geglu" in kind else out
        values["residual"] = randn(rows, width, dtype=dtype)
    if "norm" in kind:
        mean, rstd = randn(2, rows, dtype=torch.float32)
        values |= {"mean": mean, "rstd": rstd.exp(), "sums": values["weight"].float().sum(1)}

    def call(x: Tensor, weight: Tensor, bias: Tensor, **more: Tensor) -> Tensor:
        norm = tuple(more[n] for n in ("mean", "rstd", "sums")) if "mean" in more else None
        residual = more.get("residual")
        return ops.linear(x, weight, bias, geglu="geglu" in kind, norm=norm, residual=residual)

    return call, values


@pytest.mark.parametrize(("dtype", "parts"), zip(HALF, (1, 2), strict=True))
@pytest.mark.parametrize("kind", ["bias", "residual", "norm", "geglu", "geglu residual norm"])
def test_linear(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, parts: int
) -> None:
    use(monkeypatch, hopper.Persistent(16, 16, 16, 8, 3, parts))
    check(*linear_case(kind, dtype))
    assert launched


def conv_case(
    dtype: torch.dtype, size: tuple[int, ...], window: tuple[int, int], padding: Any, epilogue: bool
) -> tuple[Any, dict[str, Tensor]]:
    """``size``: images, channels, height, width and channels of the result."""
    (images, channels, height, width, out), (rows, columns) = size, window
    left, right, top, bottom = (padding,) * 4 if isinstance(padding, int) else padding
    after = height + top + bottom - rows + 1, width + left + right - columns + 1
    values = {
        "x": randn(images, channels, height, width, dtype=dtype, layout="channels_last"),
        "weight": randn(out, channels, rows, columns, dtype=dtype, layout="channels_last"),
    }
    if epilogue:
        values |= {
            "bias": randn(out, dtype=dtype),
            "add": randn(images, out, dtype=dtype),
            "residual": randn(images, out, *after, dtype=dtype, layout="channels_last"),
        }

    def call(x: Tensor, weight: Tensor, **more: Tensor) -> Tensor:
        return ops.conv2d(x, weight, padding=padding, **more)

    return call, values


@pytest.mark.parametrize(("m", "parts"), [(16, 4), (64, 1)])
@pytest.mark.parametrize(
    ("size", "window", "padding"),
    [
        ((2, 24, 5, 7, 20), (3, 3), 1),
        ((3, 16, 8, 8, 32), (3, 3), 1),
        ((2, 8, 4, 6, 12), (1, 1), 0),
        ((1, 40, 3, 9, 8), (2, 4), (1, 0, 0, 2)),
    ],
    ids=str,
)
def test_convolutions(
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, ...],
    window: tuple[int, int],
    padding: Any,
    m: int,
    parts: int,
) -> None:
    use(monkeypatch, hopper.Persistent(m, 16, 16, 8, 3, parts))
    check(*conv_case(torch.bfloat16, size, window, padding, epilogue=m == 16))
    assert launched


@settings(deadline=None, max_examples=6)
@given(
    size=st.tuples(
        st.integers(1, 3),
        st.integers(1, 3).map(lambda n: 8 * n),
        st.integers(1, 6),
        st.integers(1, 6),
        st.integers(1, 20),
    ),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(1, 2)] * 4),
    m=st.sampled_from((16, 32)),
    parts=st.integers(1, 4),
)
def test_any_shape(
    size: tuple[int, ...], window: tuple[int, int], padding: Any, m: int, parts: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "capability", lambda device: (9, 0))
        patch.setattr(launch, "multiprocessors", lambda device: 1)
        use(patch, hopper.Persistent(m, 16, 16, 4, 3, parts))
        check(*conv_case(torch.float16, size, window, padding, epilogue=True))


SHAPES = {  # a linear layer, gated, and convolutions of several boxes an image and images a box
    "linear": ((2048, 640), (640, 640), False),
    "geglu": ((2048, 640), (5120, 640), True),
    "conv 64": ((2, 320, 64, 64), (320, 320, 3, 3), False),
    "conv 8": ((2, 1280, 8, 8), (1280, 1280, 3, 3), False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALF)
def test_every_candidate_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, shape: str, dtype: torch.dtype
) -> None:
    size, weights, geglu = SHAPES[shape]
    layout = "channels_last" if len(size) == 4 else "contiguous"
    x, weight = (randn(*n, dtype=dtype, layout=layout) for n in (size, weights))
    weight *= x[0].numel() ** -0.5
    if len(size) == 4:
        call: Any = lambda x, weight: ops.conv2d(x, weight, padding=1)  # noqa: E731
    else:
        call = lambda x, weight: ops.linear(x, weight, geglu=geglu)  # noqa: E731
    candidates: set[hopper.Persistent] = set()
    before = hopper.configs

    def noted(p: product.Product) -> list[hopper.Persistent]:
        found: list[hopper.Persistent] = before(p)
        candidates.update(found)
        return found

    monkeypatch.setattr(hopper, "configs", noted)
    with ops.use_backend("triton"):
        call(x, weight)
    assert candidates
    for config in candidates:
        use(monkeypatch, config)
        check(call, {"x": x, "weight": weight})


def test_steps_behind_the_last_one_add_nothing(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps in parts of two, and a part of the image that is not finite."""
    use(monkeypatch, hopper.Persistent(16, 16, 16, 8, 3, parts=3))
    x, weight = randn(1, 80, 4, 8, dtype=torch.float16, layout="channels_last"), None
    weight = randn(16, 80, 1, 1, dtype=torch.float16, layout="channels_last")
    x[:, :, 2:] = torch.inf
    with ops.use_backend("triton"):
        y = ops.conv2d(x, weight)
    truth = F.conv2d(x[:, :, :2].double(), weight.double())
    assert (y[:, :, :2].double() - truth).abs().max() <= 2**-9 * truth.abs().max()
    assert launched == [hopper.Persistent(16, 16, 16, 8, 3, parts=3)]


def test_what_does_not_fit_keeps_the_form_with_pointers(launched: Launched) -> None:
    """Strides that are no multiple of 16 bytes, two sources, a window with a stride, float32."""

    def image(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return randn(*size, dtype=dtype, layout="channels_last")

    wide = randn(33, 40, dtype=torch.bfloat16)
    eight, four, weight = image(1, 8, 4, 4), image(1, 4, 4, 4), image(8, 8, 3, 3)
    with ops.use_backend("triton"):
        ops.conv2d(four, image(8, 4, 3, 3), padding=1)
        ops.conv2d(eight, weight, padding=1, stride=2)
        ops.conv2d(eight, image(8, 16, 3, 3), padding=1, x2=eight)
        ops.conv2d(eight, weight.contiguous(), padding=1)
        ops.conv2d(eight.float(), weight.float(), padding=1)
        ops.linear(wide[:, :36], wide[:, :36])  # 72 bytes of channels
        ops.linear(wide[:, 4:36], wide[:, :32])  # an address between two lines
        assert not launched
        ops.linear(wide[:, 8:40], wide[:, :32])
        ops.conv2d(eight, weight, padding=1)
    assert len(launched) == 2


def meta(*size: int, last: bool = False) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=torch.bfloat16, device="meta", memory_format=layout)


CALLS: dict[str, Any] = {
    "linear": lambda: linear.linear(
        meta(8192, 320), meta(320, 320), meta(320), meta(8192, 320), False, *[None] * 4
    ),
    "geglu": lambda: linear.linear(
        meta(2048, 640), meta(5120, 640), meta(5120), None, True, *[meta(2048).float()] * 3, None
    ),
    "conv2d": lambda: conv2d.conv2d(
        meta(2, 640, 32, 32, last=True), meta(640, 640, 3, 3, last=True), meta(640), 1, [1] * 4,
        None, meta(2, 640), meta(2, 640, 32, 32, last=True), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_candidates_of_a_measurement(arch: int) -> None:
    """Both forms on Hopper, the one with pointers elsewhere."""
    with ahead.recording(arch) as found:
        for call in CALLS.values():
            call()
    forms = {one.kernel for one in found}
    assert forms == {"_product", "_reduce"} | ({"_persistent"} if arch == 90 else set())


@pytest.mark.parametrize(
    ("size", "m", "expected"),
    [
        ((2, 64, 64), 128, (1, 2, 64)),
        ((2, 16, 16), 256, (1, 16, 16)),
        ((2, 8, 8), 128, (2, 8, 8)),
        ((1, 96, 96), 128, (1, 4, 32)),
        ((1, 1, 8192), 256, (1, 1, 256)),
    ],
    ids=str,
)
def test_boxes_leave_few_tiles(
    size: tuple[int, int, int], m: int, expected: tuple[int, int, int]
) -> None:
    images, height, width = size
    shape = images * height * width, 64, height * width
    fields: dict[str, Any] = dict.fromkeys(product.Product._fields)
    p = product.Product(**fields | {"shape": shape, "out_width": width})
    assert hopper.box(p, m) == expected


# The loop that multiplies must store too: the tiles' loop is flat, and the next tile's loads are
# on their way while a tile is written.
CODE = """
import sys
from pathlib import Path
sys.path[:0] = ["tests/kernels", "tests"]
import test_hopper_kernel as tests
from diffusion_fast.kernels import ahead
with ahead.recording(90) as found:
    tests.CALLS[sys.argv[1]]()
ahead._begin(90)
for number, one in enumerate(ahead.programs(found, 90)):
    if one.kernel == "_persistent":
        compiled = tests.compiled(one)
        for kind in ("sass", "ttgir"):
            Path(sys.argv[2], f"{number}.{kind}").write_text(compiled.asm[kind])
"""


def compiled(one: ahead.Launch) -> Any:
    ahead._begin(90)
    return getattr(hopper, one.kernel).warmup(*one.args, grid=(1,), **one.options)


def loop_of(text: str, what: str) -> str:
    """The innermost loop around a line of MLIR, by its indentation."""
    lines = text.splitlines()
    depths = [len(line) - len(line.lstrip()) for line in lines]
    at = first = next(i for i, line in enumerate(lines) if what in line)
    while "scf.for" not in lines[first] or depths[first] >= depths[at]:
        first -= 1
    last = next(i for i in range(at, len(lines)) if depths[i] <= depths[first])
    return "\n".join(lines[first:last])


@pytest.mark.compiles
@pytest.mark.timeout(300)
@pytest.mark.parametrize("call", CALLS)
def test_what_compiles_for_hopper(call: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", CODE, call, str(tmp_path)]
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 0, run.stderr[-3000:]
    programs = sorted(tmp_path.glob("*.sass"))
    assert programs
    for file in programs:
        sass = file.read_text()
        assert "HGMMA" in sass
        assert not re.search(r"HMMA|LDL|STL", sass.replace("HGMMA", ""))  # no spills
        assert sass.count("UTMALDG") >= 6  # two operands, three stages at least
        stores = re.findall(r"STG\.E(?:\.\d+)?", sass)
        assert set(stores) == {"STG.E.128"}
        loop = loop_of(file.with_suffix(".ttgir").read_text(), "warp_group_dot")
        assert "async_tma_copy_global_to_local" in loop
        assert "tt.store" in loop
        assert "local_load" not in loop.split("tt.store")[0].split("scf.if")[0]
