"""The sampler kernel against the reference: rows on the host and on the device, every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, close
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels import sampler_step as kernel
from diffusion_fast.ops.sampler_step import COLUMNS

NAN = float("nan")
SHAPE = (2, 3, 7, 5)
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


def table(rows: int = 3, at: int = 1, **row: float) -> Tensor:
    """NaN but for row ``at``, which has 0 where nothing is given."""
    values = dict.fromkeys(COLUMNS, 0.0) | {"clip": float("inf"), "guidance": 1.0, "e_0": 1.0} | row
    whole = torch.full((rows, len(COLUMNS)), NAN, dtype=torch.float64)
    whole[at] = torch.tensor(list(values.values()), dtype=torch.float64)
    return whole


def full_row(rescale: float = 0.0) -> dict[str, float]:
    numbers = torch.randn(len(COLUMNS), dtype=torch.float64).tolist()
    row = dict(zip(COLUMNS, numbers, strict=True))
    return row | {"clip": 0.7, "guidance": 2.5, "rescale": rescale}


def tensors(
    dtype: torch.dtype, model: torch.dtype, halves: int = 2, layout: str = "contiguous"
) -> dict[str, Tensor]:
    """Everything a step can have; the model's tensors in the other layout than the state's."""
    last = torch.channels_last
    values = {n: torch.randn(SHAPE, dtype=dtype) for n in ("x", "noise", "y", "h1", "h2", "h3")}
    output = torch.randn(halves * SHAPE[0], *SHAPE[1:]).to(model)
    if layout == "channels_last":
        values = {n: v.contiguous(memory_format=last) for n, v in values.items()}
    else:
        output = output.contiguous(memory_format=last)
    values |= {"model_output": output, "model_input": torch.full_like(output, NAN)}
    return {n: v.to(DEVICE) for n, v in (values | {"peak": torch.zeros(3, dtype=dtype)}).items()}


def step(backend: str, rows: Tensor, on_device: bool, values: dict[str, Any], **more: Any) -> dict:
    """What a step leaves in its tensors."""
    now = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
    where: Any = torch.tensor([1], device=DEVICE) if on_device else 1
    rows = rows.to(DEVICE) if on_device else rows
    with ops.use_backend(backend):
        ops.sampler_step(table=rows, step=where, **now, **more)
    assert ops.explain("sampler_step").last_ran == backend
    return {n: v for n, v in now.items() if isinstance(v, Tensor)}


def check(rows: Tensor, on_device: bool, values: dict[str, Any], **more: Any) -> None:
    truth = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in values.items()
    }
    results = step("triton", rows, on_device, values, **more)
    plains = step("reference", rows, on_device, values, **more)
    truths = step("reference", rows, on_device, truth, **more)
    for name, result in results.items():
        if name == "peak":
            assert torch.equal(result.isfinite(), plains[name].isfinite())
        finite = truths[name].isfinite()
        assert torch.equal(result.isfinite(), finite), name
        close(result[finite], truths[name][finite], plains[name][finite])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(("dtype", "model"), DTYPES)
@pytest.mark.parametrize("rescale", [0.0, 0.6])
def test_a_full_row(
    on_device: bool, halves: int, dtype: torch.dtype, model: torch.dtype, rescale: float
) -> None:
    check(table(**full_row(rescale)), on_device, tensors(dtype, model, halves))


@pytest.mark.parametrize("on_device", [False, True])
def test_a_channels_last_state(on_device: bool) -> None:
    values = tensors(torch.float32, torch.bfloat16, layout="channels_last")
    check(table(**full_row(0.3)), on_device, values)


def places(*of: list[int]) -> dict[str, Tensor]:
    names = ("step", "cond", "uncond")
    return {n: torch.tensor(v, device=DEVICE) for n, v in zip(names, of, strict=True)}


@pytest.mark.parametrize(
    ("dtype", "model", "philox"), [*((*one, False) for one in DTYPES), (*DTYPES[1], True)]
)
def test_a_row_for_each_image(dtype: torch.dtype, model: torch.dtype, philox: bool) -> None:
    """Rows of one half and of two, with outputs anywhere among NaN of others."""
    values = tensors(dtype, model, 2)
    values["model_output"][1] = NAN
    values["model_input"] = values["model_input"][: SHAPE[0]]
    if philox:
        streams = torch.tensor([[2**35 + 1, 40], [5, -2]], device=DEVICE)
        values["noise"] = ops.Philox.for_images(streams)
    rows = torch.cat([table(1, 0, **full_row(rescale)) for rescale in (0.4, 0.0, 0.6)]).to(DEVICE)
    rows[1, COLUMNS.index("e_x") : COLUMNS.index("e_m") + 1] = 0.0  # the history stays
    where = places([2, 1], [3, 2], [0, 2])
    truth = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in values.items()
    }

    def run(backend: str, given: dict[str, Any]) -> dict[str, Tensor]:
        now = {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}
        with ops.use_backend(backend):
            ops.sampler_step(table=rows, **where, **now)
        assert ops.explain("sampler_step").last_ran == backend
        return {n: v for n, v in now.items() if isinstance(v, Tensor) and n != "model_output"}

    plain, exact = run("reference", values), run("reference", truth)
    for name, result in run("triton", values).items():
        close(result, exact[name], plain[name])


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 5, 3), (1, 2, 3, 4, 5), (2, 1, 40, 31)])
def test_shapes(shape: tuple[int, ...]) -> None:
    values = {n: torch.randn(shape, device=DEVICE) for n in ("x", "model_output", "noise")}
    check(table(a=0.5, b=-2.0, c_0=0.3, c_m=0.2, s=0.7), True, values)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", [c for c in COLUMNS if c[1:2] == "_" or c in "abs"])
def test_a_term_with_coefficient_zero_is_not_read(on_device: bool, name: str) -> None:
    """Everything but the term's own tensor is NaN, and the sum is finite."""
    source = {"a": "x", "b": "model_output", "s": "noise", "x": "x", "1": "h1", "2": "h2"}
    source |= {"3": "h3", "y": "y", "m": "model_output", "u": "model_output"}
    read = source.get(name[-1])
    values = tensors(torch.float32, torch.float32, halves=1)
    values = {n: torch.full_like(v, NAN) for n, v in values.items() if n != "peak"}
    if read is not None:
        values[read].fill_(2.0)
    result = step("triton", table(**{name: 3.0}), on_device, values)
    expected = 0.0 if read is None else 6.0  # x0 is computed: 0 here
    kept = {"c": "x", "s": "x", "d": "y", "a": "h1", "b": "h1", "e": "h1"}[name[0]]
    assert (result[kept] == expected).all()
    if name[0] != "c" and name != "s":
        assert (result["x"] == 0).all()


@pytest.mark.parametrize("on_device", [False, True])
def test_the_history_stays_where_nothing_enters_it(on_device: bool) -> None:
    check(table(c_1=2.0, b=1.0, e_0=0.0), on_device, tensors(torch.float32, torch.float32))


@pytest.mark.parametrize("on_device", [False, True])
def test_only_what_is_needed_is_given(on_device: bool) -> None:
    values = tensors(torch.float32, torch.float32)
    for kept in (
        (),
        ("y",),
        ("h1",),
        ("h1", "h2"),
        ("h1", "h2", "h3"),
        ("model_input",),
        ("peak",),
    ):
        names = {"x", "model_output", *kept}
        check(table(a=0.4, b=0.3, c_x=1.0, c_0=0.5), on_device, {n: values[n] for n in names})


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_peak_shows_the_first_step_that_is_not_finite(value: float, dtype: torch.dtype) -> None:
    values = tensors(dtype, dtype, halves=1)
    rows = torch.cat([table(1, 0, c_x=1.0)] * 3)
    peak = torch.zeros(3, dtype=dtype, device=DEVICE)
    largest = values["model_output"].abs().max()
    for i in range(3):
        if i == 1:
            values["model_output"][1, 2, 3, 4] = value
            values["model_output"][0, 0, 0, 0] = float("inf")
        with ops.use_backend("triton"):
            ops.sampler_step(values["x"], values["model_output"], rows, i, peak=peak)
    assert peak[0] == largest
    assert not peak[1:].isfinite().any()
    assert peak.isnan().tolist() == [False] + [value != value] * 2


def test_a_negative_nan_reaches_the_peak() -> None:
    """The peak is a maximum of bits, where a sign would make NaN the smallest."""
    x, peak = torch.zeros(SHAPE, device=DEVICE), torch.zeros(1, device=DEVICE)
    output = torch.ones(SHAPE, device=DEVICE)
    output.view(torch.int32)[0, 0, 0, 0] = -0x400000  # a quiet NaN with its sign set
    with ops.use_backend("triton"):
        ops.sampler_step(x, output, table(1, 0), 0, peak=peak)
    assert peak.isnan().all()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_table_of_noise_needs_a_row_for_every_row(on_device: bool) -> None:
    values = tensors(torch.float32, torch.float32)
    values["noise"] = values["noise"][None].expand(2, *SHAPE)
    with pytest.raises(ValueError, match="noise: expected a row for each of the table's 3, got 2"):
        step("triton", table(s=1.0), on_device, values)


@pytest.mark.parametrize("on_device", [False, True])
def test_noise_from_a_row_of_a_table(on_device: bool) -> None:
    values = tensors(torch.float32, torch.float32)
    noise = torch.full((3, *SHAPE), NAN, device=DEVICE)
    noise[1] = values["noise"]
    rows = table(**full_row())
    results = step("triton", rows, on_device, values | {"noise": noise})
    expected = step("triton", rows, on_device, values)
    assert torch.equal(results["x"], expected["x"])
    check(rows, on_device, values | {"noise": noise})


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("where", ["cpu", DEVICE])
def test_noise_drawn_in_the_kernel(on_device: bool, layout: str, where: str) -> None:
    """The stream of (seed, offset + step), whatever the layout of the state."""
    values = tensors(torch.float32, torch.float32, layout=layout)
    philox = ops.Philox(2**35 + 1, 40, where)
    rows = table(s=1.0)
    result = step("triton", rows, on_device, values | {"noise": philox})
    truth = ops.Philox(2**35 + 1, 41).normal(SHAPE, device=DEVICE)
    torch.testing.assert_close(result["x"], truth, rtol=6 * 2.0**-23, atol=0)
    check(table(**full_row()), on_device, values | {"noise": philox})


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_a_constant_image_survives(on_device: bool, rescale: float) -> None:
    values = {"x": torch.zeros(SHAPE), "model_output": torch.ones(4, *SHAPE[1:])}
    values = {n: v.to(DEVICE) for n, v in values.items()}
    rows = table(b=1.0, c_0=1.0, guidance=3.0, rescale=rescale)
    assert (step("triton", rows, on_device, values)["x"] == 1).all()


def test_statistics_are_launched_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = kernel.launch.launch

    def count(program: Any, *args: Any, **options: Any) -> None:
        launched.append(program.fn.__name__)
        launch(program, *args, **options)

    monkeypatch.setattr(kernel.launch, "launch", count)
    values = tensors(torch.float32, torch.float32)
    step("triton", table(**full_row(0.0)), False, values)
    step("triton", table(**full_row(0.0)), True, values, rescale=False)
    assert launched == ["_sampler_step"] * 2
    step("triton", table(**full_row(0.5)), False, values)
    step("triton", table(**full_row(0.5)), True, values)
    assert launched[2:] == ["_deviations", "_sampler_step"] * 2


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_rescaling_a_large_mean(scale: float) -> None:
    values = tensors(torch.float32, torch.float32)
    values["model_output"] = values["model_output"] * scale + 1e3 * scale
    check(table(b=1.0, c_0=1.0, guidance=4.0, rescale=0.7), True, values)


def test_rescaling_a_large_image() -> None:
    """Parts of several tiles, whose means differ by more than their deviations."""
    slope = torch.linspace(-9, 9, 80, device=DEVICE)[:, None]
    values = {"x": torch.randn(1, 4, 80, 80, device=DEVICE)}
    values["model_output"] = torch.randn(2, 4, 80, 80, device=DEVICE) + slope
    check(table(b=1.0, c_0=1.0, guidance=4.0, rescale=0.7), True, values)


def test_operator() -> None:
    values = tensors(torch.float64, torch.float64)
    names = ("noise", "y", "h1", "h2", "h3", "model_input", "peak")
    rows, where = table(**full_row(0.4)).to(DEVICE), torch.tensor([1], device=DEVICE)
    args = (values["x"], values["model_output"], rows, where, *(values[n] for n in names))
    op = torch.ops.diffusion_fast.sampler_step.default
    checks = ("test_schema", "test_faketensor")  # the others need values that may run twice
    with ops.use_backend("triton"):
        rest = None, True, True, None, None, [], 0, []
        torch.library.opcheck(op, (*args, *rest), test_utils=checks)
        torch.library.opcheck(op, (*args[:4], *[None] * 7, *rest), test_utils=checks)


@pytest.mark.parametrize("philox", [False, True])
def test_compiles_and_exports_whole(philox: bool) -> None:
    """A step that reads its row on the device, with everything it changes, in one graph."""
    values = tensors(torch.float32, torch.float32)
    rows, where = table(**full_row(0.4)).to(DEVICE), torch.tensor([1], device=DEVICE)
    noise = ops.Philox(2, 3, DEVICE) if philox else values["noise"]

    class Step(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor, h1: Tensor, output: Tensor) -> Tensor:
            ops.sampler_step(x, output, rows, where, noise=noise, y=y, h1=h1)
            return x + 1

    def run(call: Any) -> list[Tensor]:
        now = [values[n].clone() for n in ("x", "y", "h1", "model_output")]
        return [call(*now), *now]

    with ops.use_backend("triton"):
        compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")
        for a, b in zip(run(compiled), run(Step()), strict=True):
            assert torch.equal(a, b)
        arguments = tuple(values[n].clone() for n in ("x", "y", "h1", "model_output"))
        assert "sampler_step" in str(torch.export.export(Step(), arguments).graph)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"x": torch.zeros(2, 3, 7, 10, device=DEVICE)[..., ::2]},
            "x is neither contiguous nor channels_last",
        ),
        ({"h1": torch.zeros(2, 7, 5, 3).permute(0, 3, 1, 2)}, "h1 has other strides"),
        (
            {"model_input": torch.zeros(2, 3, 7, 10, device=DEVICE)[..., :5]},
            "the image dimensions of model_input",
        ),
        (
            {"peak": torch.zeros(6, device=DEVICE)[::2]},
            "peak has another dtype or device than x, or gaps",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(change: dict[str, Tensor], reason: str) -> None:
    values = {"x": torch.zeros(SHAPE), "model_output": torch.zeros(SHAPE)} | change
    values = {n: v.to(DEVICE) for n, v in values.items()}
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match=reason):
        ops.sampler_step(table=table(), step=1, **values)


@pytest.mark.parametrize(
    ("name", "column", "given"),
    [
        ("noise", "s", ()),
        ("h1", "c_1", ()),
        ("y", "c_y", ()),
        ("h2", "d_2", ("y", "h1")),
        ("h3", "c_3", ("h1", "h2")),
    ],
)
def test_a_row_that_reads_what_is_missing(name: str, column: str, given: tuple[str, ...]) -> None:
    """The kernel refuses what the reference refuses."""
    values = {n: torch.zeros(SHAPE, device=DEVICE) for n in ("x", "model_output", *given)}
    for backend in ("triton", "reference"):
        with ops.use_backend(backend), pytest.raises(ValueError, match=f"{name}: expected a tens"):
            ops.sampler_step(table=table(**{column: 1.0}), step=1, **values)
