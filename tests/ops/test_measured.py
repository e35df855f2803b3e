"""Which of Triton and the reference is taken for a call: a clock that is made up decides."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.ops import dispatch
from diffusion_fast.ops.dispatch import measured, triton

measurements = pytest.importorskip("diffusion_fast.kernels.measurements")
tuning = pytest.importorskip("diffusion_fast.kernels.tuning")
CUDA = torch.device("cuda", 0)
X = torch.ones(4, 6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> dict[str, Any]:
    """Seconds of each way, whether a graph is being captured, and what was measured."""
    state: dict[str, Any] = {"triton": 1.0, "reference": 2.0, "capturing": False, "measured": []}

    def measure(names: Any, run: Callable[[str], None], device: Any) -> list[float]:
        for name in names:
            run(name)
        return [state[name] for name in names]

    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning.launch, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_measure", measure)
    monkeypatch.setattr(tuning, "_gpu", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    forget()
    yield state
    forget()


def forget() -> None:
    """As in a new process."""
    measured._answers.clear()
    measurements.known.clear()


def ask(state: dict[str, Any], *args: Any) -> list[str]:
    def way(name: str) -> Callable[..., None]:
        def run(*given: Any) -> None:
            assert not torch.is_grad_enabled()  # what is timed keeps nothing for a backward pass
            assert given == args
            state["measured"].append(name)

        return run

    return measured.ask("op", args, way("triton"), way("reference"), CUDA)


def test_the_faster_one_is_taken(clock: dict[str, Any]) -> None:
    assert ask(clock, X, 1) == []
    clock["triton"] = 3.0
    assert ask(clock, X, 2) == [measured.SLOWER]
    assert clock["measured"] == ["reference", "triton"] * 2


def test_each_shape_is_measured_once_and_kept_on_disk(clock: dict[str, Any]) -> None:
    for _ in range(3):
        ask(clock, X, [X, X], None)
    assert len(clock["measured"]) == 2
    forget()
    clock["triton"] = 3.0  # asked of the disk, not of the clock
    assert measured.known("op", (X, [X, X], None), CUDA) == []
    assert ask(clock, X, [X, X], None) == []
    assert measured.known("op", (X, X), CUDA) is None
    assert len(clock["measured"]) == 2


@pytest.mark.parametrize(
    "other",
    [X[:3], X.double(), torch.ones(6, 4).mT, [X], None],
    ids=["shape", "dtype", "strides", "list", "none"],
)
def test_what_a_shape_is(clock: dict[str, Any], other: Any) -> None:
    ask(clock, X)
    ask(clock, other)
    assert len(clock["measured"]) == 4


def test_a_capture_measures_nothing_and_the_process_stays_with_that(clock: dict[str, Any]) -> None:
    clock["capturing"] = True
    assert ask(clock, X) == [measured.CAPTURED]
    clock["capturing"] = False
    assert ask(clock, X) == [measured.CAPTURED]
    assert not clock["measured"]
    forget()
    assert ask(clock, X) == []
    forget()
    clock["capturing"] = True  # what the disk knows is used in a capture as well
    assert ask(clock, X) == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, clock: dict[str, Any]) -> dict[str, Any]:
    """As if the tensors were on a GPU, with a kernel that gives a sum of its own."""
    linear = dispatch.known_ops["linear"]

    def kernel(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        clock["measured"].append("kernel")
        return linear.reference(x, weight, *rest)

    kernels = SimpleNamespace(linear=kernel)
    plain = [backend for backend in linear.backends if backend.name == "reference"]
    monkeypatch.setattr(linear, "backends", plain)
    monkeypatch.setattr(triton, "machine", lambda: [])
    monkeypatch.setattr(triton, "tensors_fit", lambda op, args: [])
    monkeypatch.setattr(measured, "_key", lambda op, args, device: (op, CUDA, *map(str, args)))
    known, choose = tuning.known, tuning.choose
    monkeypatch.setattr(tuning, "known", lambda name, key, device: known(name, key, CUDA))
    monkeypatch.setattr(
        tuning, "choose", lambda name, key, ways, run, device: choose(name, key, ways, run, CUDA)
    )
    triton.add(linear, lambda: kernels, measured=True)  # type: ignore[arg-type,return-value]
    linear.forget()
    yield clock
    linear.forget()


def test_the_clock_is_asked_at_the_first_call_only(gpu: dict[str, Any]) -> None:
    later = ops.explain("linear", X, X)
    assert later.backend == "decided at the first call"
    assert set(later.rejected) >= {"triton", "reference"}
    assert not gpu["measured"]
    for _ in range(3):
        ops.linear(X, X)
    assert gpu["measured"] == ["kernel"] * 4  # one of them timed
    assert ops.explain("linear", X, X).backend == "triton"


def test_the_faster_way_is_kept_until_the_kind_of_call_changes(gpu: dict[str, Any]) -> None:
    gpu["triton"] = 3.0
    ops.linear(X, X)
    choice = ops.explain("linear", X, X)
    assert choice.backend == choice.last_ran == "reference"
    assert choice.rejected["triton"] == measured.SLOWER
    gpu["triton"] = 1.0
    ops.linear(X[:2], X)
    assert ops.explain("linear").last_ran == "triton"


def test_only_auto_asks_the_clock(gpu: dict[str, Any]) -> None:
    """By name the kernel runs whatever the clock would say."""
    with ops.use_backend(linear="triton"):
        assert ops.explain("linear", X, X).backend == "triton"
        ops.linear(X, X)
    assert gpu["measured"] == ["kernel"]


def test_a_gradient_stays_with_pytorch(gpu: dict[str, Any]) -> None:
    weight = torch.ones(6, 6, requires_grad=True)
    assert ops.explain("linear", X, weight).rejected["triton"] == measured.GRADIENT
    assert ops.linear(X, weight).requires_grad
    assert not gpu["measured"]
    with torch.no_grad():
        ops.linear(X, weight)
    assert ops.explain("linear").last_ran == "triton"
