"""ops.sampler_step: the formula of one row, with the row on the host and on the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_fast import ops
from diffusion_fast.ops.sampler_step import COLUMNS

OP = torch.ops.diffusion_fast.sampler_step.default
SHAPE = (3, 2, 5, 4)
NAN = float("nan")
STATE = ("noise", "y", "h1", "h2", "h3")


def table(**row: float) -> Tensor:
    values = dict.fromkeys(COLUMNS, 0.0) | {"clip": float("inf"), "guidance": 1.0, "e_0": 1.0} | row
    filler = torch.full((1, len(COLUMNS)), float("nan"), dtype=torch.float64)
    return torch.cat((filler, torch.tensor([list(values.values())], dtype=torch.float64)))


def full_row() -> dict[str, float]:
    return {name: float(v) for name, v in zip(COLUMNS, torch.randn(len(COLUMNS)), strict=True)} | {
        "clip": 0.7,
        "guidance": 2.5,
        "rescale": 0.6,
    }


def state(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.randn(SHAPE, dtype=dtype) for name in ("x", *STATE)}


def expected(row: dict[str, float], now: dict[str, Tensor], output: Tensor) -> dict[str, Tensor]:
    """The formula of the module's docstring, in float64."""
    r, s = row, {k: v.double().clone() for k, v in now.items()}
    m = output.double()
    u = m[: len(s["x"])]
    if m.shape[0] == 2 * s["x"].shape[0]:
        uncond, cond = m.chunk(2)
        m = uncond + r["guidance"] * (cond - uncond)
        rescaled = m * cond.flatten(1).std(1).view(-1, 1, 1, 1)
        rescaled = rescaled / m.flatten(1).std(1).view(-1, 1, 1, 1)
        m = r["rescale"] * rescaled + (1 - r["rescale"]) * m
    x0 = (r["a"] * s["x"] + r["b"] * m).clamp(-r["clip"], r["clip"])
    x = r["c_x"] * s["x"] + r["c_0"] * x0 + r["c_1"] * s["h1"] + r["c_2"] * s["h2"]
    x = x + r["c_3"] * s["h3"] + r["c_y"] * s["y"] + r["c_m"] * m + r["s"] * s["noise"]
    y = r["d_x"] * s["x"] + r["d_0"] * x0 + r["d_1"] * s["h1"] + r["d_2"] * s["h2"]
    y = y + r["d_3"] * s["h3"] + r["d_y"] * s["y"] + r["d_u"] * u
    h1 = r["e_x"] * s["x"] + r["e_0"] * x0 + r["e_m"] * m + r["e_u"] * u
    history = {"h1": h1, "h2": s["h1"], "h3": s["h2"]}
    return {"x": x + r["c_u"] * u, "y": y, **history, "peak": m.abs().max()}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "model_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_a_full_row(
    on_device: bool, halves: int, dtype: torch.dtype, model_dtype: torch.dtype
) -> None:
    row, now = full_row(), state(dtype)
    output = torch.randn(halves * SHAPE[0], *SHAPE[1:], dtype=model_dtype)
    model_input = torch.full_like(output, float("nan"), memory_format=torch.channels_last)
    peak = torch.full((2,), -1.0, dtype=dtype)
    truth = expected(row, now, output)
    step = torch.tensor([1]) if on_device else 1
    x = now.pop("x")
    ops.sampler_step(x, output, table(**row), step, **now, model_input=model_input, peak=peak)
    for name, value in {"x": x, "peak": peak[1], **now}.items():
        if name != "noise":
            # One rounding per term of a sum of nine: plain PyTorch does the same.
            assert_close(value, truth[name], truth[name].to(dtype), factor=10)
    assert torch.equal(model_input, torch.cat([x] * halves).to(model_dtype))
    assert model_input.is_contiguous(memory_format=torch.channels_last)
    assert peak[0] == -1


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", [c for c in COLUMNS if c[1:2] == "_" or c in "abs"])
def test_a_term_with_coefficient_zero_is_not_read(on_device: bool, name: str) -> None:
    """Every other tensor is NaN and still the sum is finite."""
    source = {"a": "x", "b": "m", "s": "noise", "x": "x", "0": "x0", "1": "h1", "2": "h2"}
    source |= {"3": "h3", "y": "y", "m": "m", "u": "m"}
    read = source[name[-1]]
    if read == "x0":
        return  # x0 is computed, not read
    now = {k: torch.full(SHAPE, float("nan")) for k in ("x", *STATE)}
    output = torch.full(SHAPE, float("nan"))
    (output if read == "m" else now[read]).fill_(2.0)
    x = now.pop("x")
    step = torch.tensor([1]) if on_device else 1
    ops.sampler_step(x, output, table(**{name: 3.0}), step, **now)
    if name[0] == "c" or name == "s":
        assert (x == 6.0).all()
    elif name[0] == "d":
        assert (now["y"] == 6.0).all()
        assert (x == 0).all()
    else:
        assert (now["h1"] == 6.0).all()
        assert (x == 0).all()


@pytest.mark.parametrize("on_device", [False, True])
def test_the_history_stays_where_nothing_enters_it(on_device: bool) -> None:
    now = state(torch.float64)
    before = {name: value.clone() for name, value in now.items()}
    step = torch.tensor([1]) if on_device else 1
    rows = table(c_x=0.5, c_1=2.0, c_2=-1.0, b=1.0, e_0=0.0)
    ops.sampler_step(now.pop("x"), torch.randn(SHAPE).double(), rows, step, **now)
    assert torch.equal(now["h1"], before["h1"])
    assert torch.equal(now["h2"], before["h2"])
    assert torch.equal(now["h3"], before["h3"])


@pytest.mark.parametrize("on_device", [False, True])
def test_the_unconditional_output_is_read_before_guidance(on_device: bool) -> None:
    output = torch.cat((torch.full(SHAPE, 2.0), torch.full(SHAPE, NAN)))
    x, h1 = torch.zeros(SHAPE), torch.zeros(SHAPE)
    step = torch.tensor([1]) if on_device else 1
    ops.sampler_step(x, output, table(c_u=3.0, e_0=0.0, e_u=-1.0), step, h1=h1)
    assert (x == 6.0).all()
    assert (h1 == -2.0).all()


def test_a_constant_image_survives_rescaling() -> None:
    output = torch.ones(2 * SHAPE[0], *SHAPE[1:])
    for rescale, step in itertools.product((0.0, 0.6), (1, torch.tensor([1]))):
        x = torch.zeros(SHAPE)
        rows = table(b=1.0, c_0=1.0, guidance=3.0, rescale=rescale)
        ops.sampler_step(x, output, rows, step)
        assert (x == 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_peak_shows_what_is_not_finite(value: float, on_device: bool) -> None:
    output, peak = torch.randn(SHAPE), torch.zeros(2)
    output[1, 1, 2, 3] = value
    step = torch.tensor([1]) if on_device else 1
    ops.sampler_step(torch.randn(SHAPE), output, table(c_x=1.0), step, peak=peak)
    assert peak[0] == 0
    assert not peak[1].isfinite()


class Allocations(TorchDispatchMode):
    """Counts what would read the device on the host, and every new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.new = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        known = {
            a.untyped_storage().data_ptr()
            for a in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(a, Tensor)
        }
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.reads.append(str(func))
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self.new += value.numel() > 1
        return out


def test_a_host_row_allocates_nothing() -> None:
    row, now = full_row() | {"rescale": 0.0}, state(torch.float32)
    output, x = torch.randn(2 * SHAPE[0], *SHAPE[1:]), now.pop("x")
    buffers = {"model_input": torch.empty_like(output), "peak": torch.zeros(2)}
    scratch, rows = torch.empty(4, *SHAPE).unbind(), table(**row).tolist()
    with Allocations() as seen:
        ops.sampler_step(x, output, rows, 1, **now, **buffers, scratch=scratch)
    assert seen.new == 0
    assert not seen.reads


def test_a_device_row_is_never_read_on_the_host() -> None:
    row, now = full_row(), state(torch.float32)
    output, x = torch.randn(2 * SHAPE[0], *SHAPE[1:]), now.pop("x")
    with Allocations() as seen:
        ops.sampler_step(x, output, table(**row), torch.tensor([1]), **now, peak=torch.zeros(2))
    assert not seen.reads


def test_operator() -> None:
    now = state(torch.float64)
    output = torch.randn(2 * SHAPE[0], *SHAPE[1:], dtype=torch.float64)
    args = [now["x"], output, table(**full_row()), torch.tensor([1])]
    args += [now[name] for name in STATE] + [torch.empty_like(output), torch.zeros(2).double()]
    rest = None, True, True, None, None, [], 0, []
    torch.library.opcheck(OP, (*args, *rest))
    torch.library.opcheck(OP, (*args[:4], *[None] * 7, *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_output": torch.ones(3, 2, 5, 5)}, r"model_output: expected shape \[3, 2, 5, 4\]"),
        ({"model_output": torch.ones(9, 2, 5, 4)}, r"model_output: .*got \[9, 2, 5, 4\]"),
        (
            {"model_output": torch.ones(SHAPE).int()},
            "model_output: expected a floating point dtype",
        ),
        ({"model_output": torch.ones(SHAPE, device="meta")}, "model_output: expected the device"),
        ({"x": torch.ones(SHAPE).bfloat16()}, "x: expected dtype torch.float32 or torch.float64"),
        ({"noise": torch.ones(1, 2, 5, 4)}, r"noise: expected shape of x = \[3, 2, 5, 4\], got"),
        ({"noise": torch.ones(2, 3, 2, 5, 3)}, r"noise: expected shape of x"),
        ({"y": torch.ones(SHAPE).double()}, "y: expected the dtype of x"),
        ({"h1": torch.ones(3, 2, 5, 5)}, "h1: expected shape of x"),
        ({"h2": torch.ones(SHAPE, device="meta")}, "h2: expected the device of x"),
        ({"h2": torch.ones(SHAPE)}, "h2: expected None, because h1 is"),
        ({"h1": torch.ones(SHAPE), "h3": torch.ones(SHAPE)}, "h3: expected None, because h2 is"),
        ({"model_input": torch.ones(3, 1, 5, 4)}, r"model_input: expected shape \[3, 2, 5, 4\]"),
        ({"peak": torch.ones(1)}, r"peak: expected torch.float32 \[N\] = \[2\]"),
        ({"table": torch.ones(2, 3).double()}, r"table: expected float64 \[N, 25\]"),
        ({"table": table().float()}, r"table: expected float64"),
        ({"table": table().to("meta")}, "table: expected a table on the host for an int step"),
        ({"step": 2}, r"step: expected an index in \[0, 2\), got 2"),
        (
            {"step": torch.tensor([1.0])},
            r"step: expected an int, or torch.int64 \[1\], got torch.f",
        ),
        ({"step": torch.tensor(1)}, r"step: expected an int, or torch.int64 \[1\], got .* \[\]"),
        ({"step": torch.tensor([1]).to("meta")}, "step: expected the device of x"),
        (
            {"noise": torch.ones(1, *SHAPE), "step": torch.tensor([1])},
            "noise: expected a row for each of the table's 2, got 1",
        ),
        ({"table": table(s=1.0)}, "noise: expected a tensor, because this row of the table reads"),
        ({"table": table(c_1=1.0)}, "h1: expected a tensor"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    call = {"x": torch.ones(SHAPE), "model_output": torch.ones(SHAPE), "table": table(), "step": 1}
    with pytest.raises(ValueError, match=message):
        ops.sampler_step(**(call | change))


# A row for each image.
ROWS = 6


def rows_of(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """A table of full rows, and what three images of two halves, one half and idle read."""
    numbers = torch.randn(ROWS, len(COLUMNS), dtype=torch.float64)
    column = {name: numbers[:, i] for i, name in enumerate(COLUMNS)}
    column["clip"][:] = 0.7
    column["guidance"][:] = torch.tensor([2.5, 4.0, 1.0, 0.5, 3.0, 7.0])
    column["rescale"][:] = torch.tensor([0.6, 0.0, 0.3, 0.0, 0.2, 0.0])
    for name in ("e_x", "e_0", "e_m"):
        column[name][4] = 0.0  # the history stays
    numbers[5] = 0.0
    column["c_x"][5], column["clip"][5] = 1.0, float("inf")
    places = {"step": [4, 2, 5], "cond": [3, 1, 0], "uncond": [2, 1, 0]}
    return numbers, {name: torch.tensor(value) for name, value in places.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_image_reads_its_own_row(dtype: torch.dtype) -> None:
    """What it would be alone, by one row on the host; an idle one stays, NaN beside it or not."""
    rows, places = rows_of(dtype)
    now, output = state(dtype), torch.randn(5, *SHAPE[1:], dtype=dtype)
    now["y"][2], output[4] = 0.0, float("nan")
    before = {name: value.clone() for name, value in now.items()}
    model_input, peak = torch.full(SHAPE, float("nan")).to(dtype), torch.zeros(ROWS, dtype=dtype)
    x = now.pop("x")
    step = places.pop("step")
    kept = {"model_input": model_input, "peak": peak}
    ops.sampler_step(x, output, rows, step, **now, **places, **kept)
    for i, row in enumerate(step.tolist()):
        alone = {name: value[i : i + 1].clone() for name, value in before.items()}
        halves = [int(places["uncond"][i]), int(places["cond"][i])]
        own = output[halves if i == 0 else halves[1:]]
        one, single = torch.zeros(ROWS, dtype=dtype), alone.pop("x")
        ops.sampler_step(single, own, rows, row, **alone, peak=one)
        assert_close(x[i : i + 1], single, factor=8)
        for name in ("y", "h1", "h2"):
            assert_close(now[name][i : i + 1], alone[name], factor=8)
        assert_close(peak[row], one[row])
    assert torch.equal(x[2], before["x"][2])
    assert torch.equal(model_input, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 1}, r"step: expected torch.int64 \[B\] = \[3\], as each .* own row, got None"),
        ({"step": torch.tensor([1])}, r"step: expected torch.int64 \[B\] = \[3\].* got .* \[1\]"),
        ({"uncond": None}, "uncond: expected torch.int64"),
        ({"cond": torch.zeros(3)}, "cond: expected torch.int64 .* got torch.float32"),
        ({"model_output": torch.ones(3, 2, 5, 5)}, r"model_output: expected shape \[R, ...\]"),
        ({"noise": torch.ones(2, *SHAPE)}, "noise: expected noise like x"),
        ({"noise": ops.Philox.for_images(torch.zeros(2, 2).long())}, "noise: expected one Philox"),
    ],
)
def test_bad_rows_of_images(change: dict[str, object], message: str) -> None:
    call = {"x": torch.ones(SHAPE), "model_output": torch.ones(5, *SHAPE[1:]), "table": table()}
    call |= dict.fromkeys(("step", "cond", "uncond"), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        ops.sampler_step(**(call | change))


def test_each_image_draws_its_own_stream() -> None:
    """Elements are counted within the image, and the row is added to its own offset."""
    x, zeros = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    streams = ops.Philox.for_images(torch.tensor([[7, 3], [9, -1]]))
    rows = torch.cat((table(s=1.0), table(s=1.0)))
    step = torch.tensor([1, 3])
    ops.sampler_step(x, x.clone(), rows, step, cond=zeros, uncond=zeros, noise=streams)
    for i, one in enumerate((ops.Philox(7, 4), ops.Philox(9, 2))):
        assert torch.equal(x[i], one.normal((3, 4, 4)))
    assert torch.equal(streams.normal(x.shape)[:1], ops.Philox(7, 3).normal((1, 3, 4, 4)))
