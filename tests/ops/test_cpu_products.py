"""What was measured about products and convolutions decides how weights are packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compilers import needs_cpu_kernels
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

import diffusion_fast as df
from diffusion_fast import cores, ops
from diffusion_fast.engine.loop import Loop
from diffusion_fast.kernels import measurements
from diffusion_fast.ops.cpu import contest, library, products
from diffusion_fast.ops.dispatch import known_ops

pytestmark = needs_cpu_kernels
PREPARE, KNOWN = contest.prepare, contest.known  # as they are outside of tests
LAST = torch.channels_last
X, WEIGHT = torch.randn(2, 64, 12, 12).contiguous(memory_format=LAST), torch.randn(64, 64, 3, 3)
ROWS, MATRIX = torch.randn(512, 64), torch.randn(128, 64)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    library.build()  # before the cache is another
    monkeypatch.setattr(library, "settle", lambda: [])
    monkeypatch.setattr(contest, "known", KNOWN)
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(contest, "ROUNDS", 1)
    monkeypatch.setattr(cores, "waited", lambda: 0.0)  # whatever else runs here
    yield
    forget()


def forget() -> None:
    """As in a new process."""
    measurements.known.clear()
    for name in ("linear", "conv2d", "conv2d_backward", "attention", "attention_backward"):
        known_ops[name].forget()


def known(op: str, kind: object, order: str) -> None:
    measurements.remember(contest._file(), f"{op} {kind}", order)
    known_ops[op].forget()


def conv2d_known(order: str) -> None:
    known("conv2d", products.conv2d_kind(WEIGHT, X.shape, 1, (1, 1, 1, 1)), order)


def linear_known(order: str) -> None:
    known("linear", products.linear_kind(MATRIX, len(ROWS), False), order)


def of_conv2d() -> tuple[str, str]:
    """How a weight is packed, and the backend that takes it; the result is right."""
    packed = ops.pack_conv2d(WEIGHT, tuple(X.shape), padding=1)
    residual = torch.ones(2, 64, 12, 12)
    more: dict[str, Any] = {"padding": 1, "residual": residual, "packed": packed}
    result = ops.conv2d(X, WEIGHT, **more)
    truth = F.conv2d(X.double(), WEIGHT.double(), padding=1) + 1
    assert_close(result, truth, F.conv2d(X, WEIGHT, padding=1) + 1)
    return form_of(packed), ops.explain("conv2d", X, WEIGHT, **more).backend


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("packed winograd direct", ("oneDNN's", "onednn")),
        ("winograd direct packed", ("ours", "cpu")),
        ("direct packed winograd", ("none", "onednn")),
        ("what nobody knows", ("oneDNN's", "onednn")),
    ],
)
def test_the_way_of_a_convolution(order: str, expected: tuple[str, str]) -> None:
    assert of_conv2d() == ("oneDNN's", "onednn")  # until it is measured
    conv2d_known(order)
    assert of_conv2d() == expected
    forget()
    assert of_conv2d() == expected  # in another process, from the disk


def form_of(packed: Sequence[Tensor] | None) -> str:
    return "none" if packed is None else "oneDNN's" if packed[0].is_mkldnn else "ours"


def of_linear() -> tuple[str, ops.Choice]:
    packed = ops.pack_linear(MATRIX, len(ROWS))
    result, truth = ops.linear(ROWS, MATRIX, packed=packed), ROWS.double() @ MATRIX.double().mT
    assert_close(result, truth, F.linear(ROWS, MATRIX))
    return form_of(packed), ops.explain("linear", ROWS, MATRIX, packed=packed)


@pytest.mark.parametrize(
    ("order", "form", "backend"),
    [
        ("packed reference cpu onednn", "oneDNN's", "onednn"),
        ("cpu packed reference onednn", "ours", "cpu"),
        ("onednn packed cpu reference", "none", "onednn"),
        ("reference packed cpu onednn", "none", "reference"),
    ],
)
def test_the_way_of_a_product(order: str, form: str, backend: str) -> None:
    assert of_linear()[0] == "oneDNN's"
    linear_known(order)
    found, choice = of_linear()
    assert (found, choice.backend) == (form, backend)
    if backend == "reference":
        assert choice.rejected["onednn"] == "reference was measured faster for such calls here"


def test_a_call_without_a_packed_weight_goes_the_faster_of_the_other_ways() -> None:
    linear_known("packed reference onednn")
    assert ops.explain("linear", ROWS, MATRIX).backend == "reference"
    linear_known("packed onednn reference")
    assert ops.explain("linear", ROWS, MATRIX).backend == "onednn"


def needing_gradients(*values: Tensor) -> list[Tensor]:
    return [one.clone().requires_grad_() for one in values]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("packed winograd winograd_unpacked direct", "cpu"),
        ("winograd direct packed winograd_unpacked", "reference"),
        ("what nobody knows", "reference"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_convolution_whose_weight_is_not_packed(
    order: str, expected: str, training: bool
) -> None:
    x, weight = needing_gradients(X, WEIGHT)

    def chosen() -> str:
        with torch.set_grad_enabled(training):
            return ops.explain("conv2d", x, weight, padding=1).backend

    assert chosen() == "reference"
    conv2d_known(order)
    assert chosen() == expected


def test_a_weight_need_not_be_packed_for_winograds_algorithm() -> None:
    conv2d_known("winograd_unpacked winograd packed direct")
    assert of_conv2d() == ("none", "cpu")


BACKWARD = "conv2d_backward"


def gradients_of_conv2d(trained: bool = True) -> list[Tensor]:
    x, weight = needing_gradients(X, WEIGHT)
    weight.requires_grad_(trained)
    y = ops.conv2d(x, weight, padding=1)
    return list(torch.autograd.grad(y.square().sum(), (x, weight) if trained else (x,)))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("order", "expected"), [("cpu reference", "cpu"), ("reference cpu",) * 2])
def test_the_way_of_a_convolutions_gradients(trained: bool, order: str, expected: str) -> None:
    conv2d_known("winograd_unpacked direct packed winograd")
    exact = [one.double() for one in (X, WEIGHT)]
    truth = torch.autograd.functional.vjp(
        lambda x, weight: F.conv2d(x, weight, padding=1).square().sum(), tuple(exact)
    )[1]
    gradients_of_conv2d(trained)
    assert known_ops[BACKWARD].last_ran == "reference"  # until it is measured
    kind = products.conv2d_kind(WEIGHT, X.shape, 1, (1, 1, 1, 1))
    assert kind is not None
    known(BACKWARD, (True, trained, *kind), order)
    for found, true in zip(gradients_of_conv2d(trained), truth, strict=False):
        assert_close(found, true, true.float())
    assert known_ops[BACKWARD].last_ran == expected.split()[0]


def test_products_of_training_go_the_way_that_was_measured() -> None:
    x, weight = needing_gradients(ROWS, MATRIX)
    assert ops.explain("linear", x, weight).backend == "reference"
    linear_known("packed cpu reference onednn")
    assert ops.explain("linear", x, weight).backend == "reference"
    linear_known("packed cpu onednn reference")
    assert ops.explain("linear", x, weight).backend == "onednn"
    assert ops.explain("linear", x, weight, geglu=True).backend == "onednn"  # the gate follows it
    bfloat16 = needing_gradients(ROWS.bfloat16(), MATRIX.bfloat16())
    assert ops.explain("linear", *bfloat16).backend == "reference"


@pytest.mark.parametrize("way", ["onednn", "reference"])
def test_the_products_of_a_linear_layers_gradients(way: str) -> None:
    linear_known("packed cpu onednn reference")
    rows, inner, out = len(ROWS), *MATRIX.mT.shape
    for kind in ((rows, out, inner, False, False, True), (out, rows, inner, False, True, True)):
        known("linear", kind, f"{way} {'reference' if way == 'onednn' else 'onednn'}")
    chosen: list[str] = []
    resolve = known_ops["linear"].resolve

    def watched(*args: Any) -> Any:
        found = resolve(*args)
        chosen.append(found.backend)
        return found

    x, weight = needing_gradients(ROWS, MATRIX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_ops["linear"], "resolve", watched)
        y = ops.linear(x, weight)
        cotangent = torch.randn(y.shape)
        found = torch.autograd.grad(y, (x, weight), cotangent)
    assert chosen == ["onednn", way, way]
    truth = cotangent.double() @ MATRIX.double(), cotangent.double().mT @ ROWS.double()
    plain = cotangent @ MATRIX, cotangent.mT @ ROWS
    for one, true, known_way in zip(found, truth, plain, strict=True):
        assert_close(one, true, known_way)


@pytest.mark.parametrize("best", ["cpu", "sdpa"])
def test_attention_in_training_goes_the_way_that_was_measured(best: str) -> None:
    q, k, v = needing_gradients(*torch.randn(3, 1, 128, 2, 40))
    assert ops.explain("attention", q, k, v).backend == "sdpa"  # until it is measured
    other = "sdpa" if best == "cpu" else "cpu"
    known("attention_backward", (1, 128, 128, 40), f"{best} {other}")
    known_ops["attention"].forget()
    assert ops.explain("attention", q, k, v).backend == best
    with torch.no_grad():  # another contest
        assert ops.explain("attention", q, k, v).backend == "cpu"
    found = torch.autograd.grad(ops.attention(q, k, v).square().sum(), (q, k, v))
    with ops.use_backend("reference"):
        wide = needing_gradients(q.double(), k.double(), v.double())
        truth = torch.autograd.grad(ops.attention(*wide).square().sum(), wide)
        plain = torch.autograd.grad(ops.attention(q, k, v).square().sum(), (q, k, v))
    for one, true, by_definition in zip(found, truth, plain, strict=True):
        assert_close(one, true, by_definition, factor=3)


@pytest.mark.parametrize("name", ["linear", "conv2d", BACKWARD, "attention_backward"])
def test_every_way_of_a_contest_computes_the_same(name: str) -> None:
    """Of the calls that it makes up, which are all that it knows of a kind."""
    convolution = products.conv2d_kind(WEIGHT, X.shape, 1, (1, 1, 1, 1))
    assert convolution is not None
    kinds: dict[str, list[contest.Kind]] = {
        "linear": [(512, 64, 128, False), (512, 64, 128, False, True, True), (64, 512, 128, True)],
        "conv2d": [convolution],
        BACKWARD: [(True, True, *convolution), (True, False, *convolution)],
        "attention_backward": [(1, 60, 70, 24), (1, 100, 77, 40)],
    }
    one = next(one for one in contest._contests if one.op.name == name)
    for kind in kinds[name]:
        args = one.example(*kind)
        assert one.kind_of(*args) == kind
        ways = one.ways(*args)
        assert len(ways) > 1
        assert set(ways) <= set(one.names)
        results = [run(*args) for run in ways.values()]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], atol=1e-2, rtol=1e-4)


def test_a_way_asked_for_by_name_is_taken_whatever_was_measured() -> None:
    conv2d_known("winograd packed direct")
    linear_known("reference packed onednn")
    with ops.use_backend("onednn"):
        assert of_conv2d()[0] == "oneDNN's"
        assert of_linear()[0]


def unet() -> df.UNet2DCondition:
    config = df.UNetConfig.preset("digits")
    return df.UNet2DCondition(config).eval()


def engine(model: df.UNet2DCondition) -> df.Engine:
    return df.Engine(model, df.DiffusionSchedule(), sampler="ddim", steps=2)


def sampled(one: df.Engine, noise: Tensor) -> Tensor:
    return one.sample(tuple(noise.shape), context=torch.arange(len(noise)), x_T=noise)


def test_an_engine_measures_before_its_first_step_and_never_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contest, "prepare", PREPARE)
    model, noise = unet(), torch.randn(4, 1, 32, 32)
    measured: list[object] = []
    in_step: list[bool] = []
    measure, predicted = contest.Contest._measured, Loop.predicted

    def counted(self: contest.Contest, kind: contest.Kind) -> tuple[list[str], bool]:
        assert not in_step
        if not self.always:
            measured.append((self.op.name, kind))
        return measure(self, kind)

    def step(self: Loop) -> Tensor:
        in_step.append(True)
        return predicted(self)

    monkeypatch.setattr(contest.Contest, "_measured", counted)
    monkeypatch.setattr(Loop, "predicted", step)
    first = engine(model)
    result = sampled(first, noise)
    assert {name for name, _ in measured} >= {"linear"}  # type: ignore[misc]
    assert len(measured) == len(set(measured))
    assert "measuring the ways to" in capsys.readouterr().err
    assert "linear" in first.explain()["products"]
    count = len(measured)
    assert in_step
    in_step.clear()
    assert torch.equal(sampled(first, noise), result)
    measurements.known.clear()
    assert torch.equal(sampled(engine(model), noise), result)  # as another process finds it
    assert len(measured) == count


def test_a_network_without_large_products_has_nothing_measured() -> None:
    tiny = "linear", (torch.ones(2, 8), torch.ones(4, 8), None, None, False, None, None, None, ())
    work = contest.Work("", lambda: [tiny])
    PREPARE(work)
    assert contest.told(work) == "nothing was measured"
