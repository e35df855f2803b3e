"""The GroupNorm kernels: whole groups per program, split statistics, every option and layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, check, close, randn
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels import group_norm_silu as kernel
from diffusion_fast.kernels import group_norm_silu_backward as backward
from diffusion_fast.kernels import group_tiles as tiles

EXTRAS = ("add", "scale", "shift")


@pytest.fixture(params=["fused", "split"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "split":
        force_split(monkeypatch)
    return request.param


def force_split(monkeypatch: pytest.MonkeyPatch, tile: int = 32) -> None:
    """Small tiles, so that small images have many chunks and a last one that is cut short."""
    split = kernel.Config(fused=False, run=4, tile=tile, warps=4)
    monkeypatch.setattr(kernel, "configs", lambda *_: [split])


def inputs(
    dtype: torch.dtype,
    extras: tuple[str, ...] = EXTRAS,
    size: tuple[int, ...] = (2, 6, 5, 5),
    second: int = 0,
    layout: str = "contiguous",
) -> dict[str, Tensor]:
    values = {"x": randn(*size, dtype=dtype, layout=layout)}
    if second:
        values["x2"] = randn(size[0], second, *size[2:], dtype=dtype, layout=layout)
    channels = size[1] + second
    values |= {name: randn(channels, dtype=dtype) for name in ("weight", "bias")}
    return values | {name: randn(size[0], channels, dtype=dtype) for name in extras}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_values_and_gradients(dtype: torch.dtype, layout: str, path: str) -> None:
    values = inputs(dtype, layout=layout)
    check(lambda **v: ops.group_norm_silu(num_groups=2, **v), values, list(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_silu(dtype: torch.dtype, path: str) -> None:
    values = inputs(dtype, ())
    check(lambda **v: ops.group_norm_silu(num_groups=2, silu=False, **v), values, list(values))


def test_the_same_bits_every_time(path: str) -> None:
    values = inputs(torch.float32)
    check(lambda **v: ops.group_norm_silu(num_groups=2, **v), values, list(values), repeat=True)


@pytest.mark.parametrize(
    "extras", [e for n in range(3) for e in itertools.combinations(EXTRAS, n)], ids="+".join
)
def test_options(extras: tuple[str, ...], path: str) -> None:
    values = inputs(torch.float32, extras)
    check(lambda **v: ops.group_norm_silu(num_groups=3, **v), values, list(values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("first", "second", "groups"), [(4, 2, 3), (3, 5, 2)])
def test_two_sources(
    dtype: torch.dtype, layout: str, first: int, second: int, groups: int, path: str
) -> None:
    """The seam between x and x2 may run through a group."""
    values = inputs(dtype, EXTRAS, (1, first, 5, 3), second, layout)
    check(lambda **v: ops.group_norm_silu(num_groups=groups, **v), values, list(values))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_chunks_of_several_tiles(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slope across the image, so that the tiles' means differ by more than their deviations."""
    force_split(monkeypatch)
    monkeypatch.setattr(kernel, "CHUNKS", 2)
    monkeypatch.setattr(backward, "CHUNKS", 2)
    values = inputs(torch.float32, EXTRAS, (2, 4, 9, 7), layout=layout)
    values["x"] = values["x"] + torch.linspace(-9, 9, 9, device=DEVICE)[:, None]
    check(lambda **v: ops.group_norm_silu(num_groups=2, **v), values, list(values))


@pytest.mark.parametrize("second", [0, 3])
def test_64_bit_offsets(second: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tensor of 2^31 elements takes, on a small one."""
    monkeypatch.setattr(kernel.launch, "wide", lambda *_: True)
    values = inputs(torch.float32, EXTRAS, (2, 3, 5, 5), second)
    check(lambda **v: ops.group_norm_silu(num_groups=3, **v), values, list(values))


@pytest.mark.parametrize("expanded", [False, True])
def test_offsets_are_as_wide_as_the_result_needs(
    expanded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sources, or an expanded one, of less than 2^31 elements, and a result of more."""
    seen: list[tuple[str, bool]] = []

    def record(program: Any, _: object, options: dict[str, Any]) -> None:
        seen.append((program.fn.__name__, options["WIDE"]))

    monkeypatch.setattr(kernel.launch, "recorder", record)
    x = torch.empty(1, 32, 4096, 9000, device="meta", dtype=torch.bfloat16)
    x2, one = (None, 32) if expanded else (x, 64)
    if expanded:
        x = x[..., :1].expand(1, 32, 4096, 17000)
    weight = torch.empty(one, device="meta", dtype=torch.bfloat16)
    args = x, 32, weight, weight, 1e-5, True, None, None, None, x2
    y = kernel.group_norm_silu(*args)
    backward.group_norm_silu_backward(y[..., :1].expand(y.shape), *args)
    names = ("_statistics", "_normalize", "_sums", "_parameters", "_gradient")
    assert set(seen) == {(name, True) for name in names}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("images", "second"), [(1, 0), (2, 0), (2, 2)])
def test_a_row_of_tables(
    dtype: torch.dtype, layout: str, images: int, second: int, path: str
) -> None:
    """The row is picked in the kernel, from tables that are parts of a wider one."""
    values = inputs(dtype, (), (2, 4, 5, 5), second, layout)
    whole = randn(3, images, 3 * 8 + 5, dtype=dtype)
    for i, name in enumerate(EXTRAS):
        values[name] = whole[..., 8 * i : 8 * i + 4 + second]
    for row in ([2], [2, 0]):
        at = torch.tensor(row, device=DEVICE)
        check(lambda at=at, **v: ops.group_norm_silu(num_groups=2, row=at, **v), values)


def test_gradients_of_tables(path: str) -> None:
    values = inputs(torch.float32, ()) | {n: randn(3, 1, 6, dtype=torch.float32) for n in EXTRAS}
    for rows in ([1], [2, 2]):
        row = torch.tensor(rows, device=DEVICE)
        check(
            lambda row=row, **v: ops.group_norm_silu(num_groups=2, row=row, **v),
            values,
            list(values),
        )


def test_tables_are_read_in_place() -> None:
    whole = torch.randn(7, 2, 30)
    table, strides = tiles._table(whole[..., 5:9])
    assert table.data_ptr() == whole[..., 5:].data_ptr()
    assert strides == (60, 30)
    assert tiles._table(whole[:, :1, :4])[1] == (60, 0)  # one for all images
    assert tiles._table(whole[3, :1, :4].expand(5, -1))[1][1] == 0
    assert tiles._table(whole[..., ::2])[0].is_contiguous()


@pytest.mark.parametrize(("row", "stride"), [(None, 0), ([1], 0), ([1, 2], 1)])
def test_rows_of_tables_are_one_or_one_for_each_image(row: list[int] | None, stride: int) -> None:
    x, weight = torch.empty(2, 4, 3, 3), torch.empty(4)
    at = None if row is None else torch.tensor(row)
    p = tiles.operands(x, 2, weight, weight, torch.empty(3, 1, 4), None, None, None, at)
    assert p.source_strides[3] == p.table_strides[2] == stride


def test_sources_of_different_layouts(path: str) -> None:
    values = inputs(torch.float32, ("add",), (2, 3, 5, 4), 5, "channels_last")
    values["x2"] = values["x2"].contiguous()
    check(lambda **v: ops.group_norm_silu(num_groups=2, **v), values, list(values))


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    width=st.integers(1, 9),
    space=st.lists(st.integers(1, 7), max_size=3).filter(lambda s: 1 < torch.Size(s).numel() < 50),
    split=st.booleans(),
)
def test_any_shape(batch: int, groups: int, width: int, space: list[int], split: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if split:
            force_split(patch, 16)
        values = inputs(torch.float32, (), (batch, groups * width, *space))
        check(lambda **v: ops.group_norm_silu(num_groups=groups, **v), values, list(values))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_images_larger_than_a_group_that_fits(layout: str) -> None:
    """The true threshold between one launch and split statistics, with the true tile sizes."""
    last = layout == "channels_last"
    form = torch.channels_last if last else torch.contiguous_format
    sizes = ((64, 128), (91, 101)) if last else ((64, 64), (64, 65))
    for size, fused in (((1, 4, *sizes[0]), True), ((1, 4, *sizes[1]), False)):
        p = operands_of(torch.empty(size, device="meta", memory_format=form), 1)
        assert kernel.configs(p, 1, torch.device(DEVICE))[0].fused == fused
        values = inputs(torch.float32, (), size, 0, layout)
        check(lambda **v: ops.group_norm_silu(num_groups=1, **v), values, list(values))


@pytest.mark.parametrize(
    ("mean", "deviation"), [(1e4, 1.0), (-3e3, 1e-1), (0.0, 1e-18), (1e15, 1e12)]
)
def test_extreme_magnitudes(mean: float, deviation: float, path: str) -> None:
    values = inputs(torch.float32, (), (1, 4, 12, 12))
    values["x"] = values["x"] * deviation + mean
    check(lambda **v: ops.group_norm_silu(num_groups=2, silu=False, **v), values)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_view_whose_space_does_not_collapse(channels_last: bool, path: str) -> None:
    x = torch.randn(1, 4, 10, 12, device=DEVICE)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    values = inputs(torch.float32, ()) | {"x": x[:, :, 1::2, 3:10]}
    values |= {"weight": torch.ones(4, device=DEVICE), "bias": torch.zeros(4, device=DEVICE)}
    check(lambda **v: ops.group_norm_silu(num_groups=2, **v), values, ("x", "weight", "bias"))


def test_channels_of_a_larger_tensor_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice over channels has its own batch stride and needs no copy."""
    x = torch.randn(2, 16, 6, 5, device=DEVICE)
    values = inputs(torch.float32, (), (2, 8, 6, 5)) | {"x": x[:, 3:11]}
    strided = tiles.strided(values["x"])
    assert strided[0].data_ptr() == values["x"].data_ptr()
    assert strided[1] == (16 * 30, 30, 1)
    check(lambda **v: ops.group_norm_silu(num_groups=2, **v), values, ("x", "weight", "bias"))


def test_empty_batch() -> None:
    values = inputs(torch.float32, (), (0, 8, 3, 3))
    with ops.use_backend("triton"):
        leaf = values["x"].requires_grad_()
        y = ops.group_norm_silu(num_groups=2, **values)
        assert y.shape == leaf.shape
        assert torch.autograd.grad(y.sum(), leaf)[0].shape == leaf.shape


def operands_of(x: Tensor, groups: int, x2: Tensor | None = None) -> tiles.Operands:
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    weight = torch.empty(channels, dtype=x.dtype, device="meta")
    return tiles.operands(x, groups, weight, weight, None, None, None, x2, None)


def image(channels: int, side: int, last: bool = True, batch: int = 2) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    size, kind = (batch, channels, side, side), torch.bfloat16
    return torch.empty(size, device="meta", dtype=kind, memory_format=layout)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_split_statistics_fill_the_gpu(batch: int, last: bool) -> None:
    """Every norm that does not fit has a program for each SM of an H200."""
    device = torch.device("cpu")
    for channels, side in ((320, 64), (640, 64), (960, 64), (320, 128), (1920, 32)):
        p = operands_of(image(channels, side, last, batch), 32)
        config = kernel.configs(p, 1, device)[0]
        assert not config.fused
        q = kernel.tiling(config, p, device)
        assert q.runs * q.chunks >= 132
        assert q.runs * q.tiles >= 132
        assert q.chunks <= kernel.CHUNKS
        assert (q.chunks - 1) * q.chunk < q.tiles <= q.chunks * q.chunk


# Every width of a group in SD1.5, SDXL and their decoders.
@pytest.mark.parametrize("channels", [128, 256, 320, 512, 640, 960, 1280, 1920, 2560])
@pytest.mark.parametrize("most", [64, 128])
@pytest.mark.parametrize("second", [0, 320])
def test_runs_begin_where_16_bytes_do(channels: int, most: int, second: int) -> None:
    """Several groups of 10 channels of 2 bytes do, one does not."""
    if second >= channels:
        second = 0
    x2 = image(second, 16) if second else None
    p = operands_of(image(channels - second, 16), 32, x2)
    config = kernel.Config(False, most, 8192, 8)
    q = kernel.tiling(config, p, torch.device("cpu"))
    assert p.walk(q)["VEC"] == p.walk(q)["ALIGN"] == 8
    assert q.each * channels // 32 <= q.R <= 128
    assert 2 * q.each * channels // 32 >= q.R  # at most half of it is padding
    assert q.runs == 2 * -(-32 // q.each)


@pytest.mark.parametrize(
    ("x", "x2", "vector"),
    [
        (image(320, 5), None, 8),
        (image(36, 8), None, 4),
        (image(64, 8), image(60, 8), 2),  # runs of 62 channels
        (image(64, 8)[:, 3:35], None, 8),  # the address is the JIT's to look at
        (image(64, 8)[..., ::2], None, 8),
        (image(8, 8).as_strided((2, 8, 8, 8), (1026, 1, 128, 16)), None, 2),
        (image(320, 8, last=False), None, 8),
        (image(320, 6, last=False), None, 4),
        (image(320, 5, last=False), None, 1),
        (image(64, 8, last=False), image(64, 8), 8),
    ],
)
def test_what_is_read_at_once_divides_every_offset(
    x: Tensor, x2: Tensor | None, vector: int
) -> None:
    p = operands_of(x, 4, x2)
    q = kernel.tiling(kernel.configs(p, 1, torch.device("cpu"))[0], p, torch.device("cpu"))
    assert p.walk(q)["VEC"] == vector


def test_operator_and_export(path: str) -> None:
    values = inputs(torch.float64, EXTRAS, (1, 3, 3, 2), 1)
    for value in values.values():
        value.requires_grad_()
    x, x2, weight, bias, *extras = values.values()
    args = (x, 2, weight, bias, 1e-5, True, *extras, x2)
    with ops.use_backend("triton"):
        torch.library.opcheck(torch.ops.diffusion_fast.group_norm_silu.default, args)

        class Norm(torch.nn.Module):
            def forward(self, x: Tensor, x2: Tensor) -> Tensor:
                return ops.group_norm_silu(x, 2, weight.detach(), bias.detach(), x2=x2)

        x, x2 = x.detach(), x2.detach()
        compiled = torch.compile(Norm(), fullgraph=True, backend="aot_eager")(x, x2)
        assert torch.equal(compiled, Norm()(x, x2))
        assert "group_norm_silu" in str(torch.export.export(Norm(), (x, x2)).graph)
    close(compiled, Norm()(x, x2), compiled)


def test_a_group_too_wide_for_a_block_is_refused() -> None:
    x, one = torch.ones(1, 8200, 2, device=DEVICE), torch.ones(8200, device=DEVICE)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="more than 8192"):
        ops.group_norm_silu(x, 1, one, one)
    assert ops.group_norm_silu(x, 1, one, one).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x2": torch.ones(2, 8, 5)}, "x2: expected 4 dimensions, as x has, got 3"),
        ({"x2": torch.ones(2, 8, 5, 4)}, r"x2: expected shape \[B, C2, ...\] = \[2, 8, 5, 5\]"),
        ({"x2": torch.ones(2, 8, 5, 5).half()}, "x2: expected the dtype of x"),
        ({"x2": torch.ones(2, 8, 5, 5)}, r"weight: expected shape \[C\] = \[14\], got \[6\]"),
    ],
)
def test_bad_second_source(change: dict[str, Tensor], message: str) -> None:
    cpu = {k: v.cpu() for k, v in inputs(torch.float32, ()).items()}
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(num_groups=2, **(cpu | change))
