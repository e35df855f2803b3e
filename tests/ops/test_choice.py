"""Which of Triton and PyTorch's own is taken for a product: a clock that is made up decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_fast.ops import backend, choice

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
    choice._answers.clear()
    tuning._chosen.clear()
    tuning._loaded.clear()


def ask(state: dict[str, Any], *args: Any) -> str | None:
    def way(name: str) -> Callable[..., None]:
        def run(*given: Any) -> None:
            assert not torch.is_grad_enabled()  # what is timed keeps nothing for a backward pass
            assert given == args
            state["measured"].append(name)

        return run

    return choice.why_not_triton("op", args, way("triton"), way("reference"), CUDA)


def test_the_faster_one_is_taken(clock: dict[str, Any]) -> None:
    assert ask(clock, X, 1) is None
    clock["triton"] = 3.0
    assert ask(clock, X, 2) == choice.SLOWER
    assert clock["measured"] == ["reference", "triton"] * 2


def test_each_shape_is_measured_once_and_kept_on_disk(clock: dict[str, Any]) -> None:
    for _ in range(3):
        ask(clock, X, [X, X], None)
    assert len(clock["measured"]) == 2
    forget()
    clock["triton"] = 3.0  # asked of the disk, not of the clock
    assert ask(clock, X, [X, X], None) is None
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
    assert ask(clock, X) == choice.CAPTURED
    clock["capturing"] = False
    assert ask(clock, X) == choice.CAPTURED
    assert not clock["measured"]
    forget()
    assert ask(clock, X) is None
    forget()
    clock["capturing"] = True  # what the disk knows is used in a capture as well
    assert ask(clock, X) is None


def test_a_gradient_stays_with_pytorch(clock: dict[str, Any]) -> None:
    weight = torch.ones(2, requires_grad=True)
    assert ask(clock, X, weight) == choice.GRADIENT
    with torch.no_grad():
        assert ask(clock, X, weight) is None


def test_only_auto_asks_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name the kernel runs whatever the clock says, and explain() has the clock's reason."""
    from diffusion_fast.ops import triton_backend

    known = backend.known_ops["linear"]
    args: tuple[Tensor | bool | None, ...] = (X, X, None, None, False, None, None, None, None)
    monkeypatch.setattr(triton_backend, "unavailable", lambda: None)
    monkeypatch.setattr(triton_backend, "_unsupported", lambda op, args: None)
    monkeypatch.setattr(choice, "why_not_triton", lambda *_: choice.SLOWER)
    triton = next(i for i in known.implementations if i.backend == "triton")
    assert triton.unsupported(*args) == choice.SLOWER
    with backend.use_backend(linear="triton"):
        assert triton.unsupported(*args) is None
