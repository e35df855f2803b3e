"""Which attention is taken on a GPU: a clock that is made up decides."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.ops.cuda import attention as attention_cuda
from diffusion_fast.ops.cuda import contest as contests
from diffusion_fast.ops.cuda.contest import Contest

measurements = pytest.importorskip("diffusion_fast.kernels.measurements")
tuning = pytest.importorskip("diffusion_fast.kernels.tuning")
module: Any = importlib.import_module("diffusion_fast.ops.attention")
CUDA = torch.device("cuda", 0)
SECONDS = {"own": 3.0, "hopper": 2.0, "cudnn": 1.0, "flash": 2.5}


class OnCuda(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def args(keys: int = 5, save_lse: bool = False) -> tuple[Any, ...]:
    q, k, v = (torch.randn(1, n, 2, 8).as_subclass(OnCuda) for n in (4, keys, keys))
    return q, k, v, 0.5, None, None, save_lse


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[dict[str, Any]]:
    """Seconds of each way, whether a graph is being captured, and what was measured."""
    state: dict[str, Any] = SECONDS | {"capturing": False, "measured": []}

    def measure(names: Any, run: Callable[[str], None], device: Any) -> list[float]:
        assert device == CUDA
        for name in names:
            run(name)
        state["measured"].append(tuple(names))
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
    module._WAYS.forget()
    module._OP.forget()
    measurements.known.clear()


def way(*given: Any) -> tuple[Tensor, Tensor]:
    assert not torch.is_grad_enabled()
    return given[0].as_subclass(Tensor) * 2, torch.empty(0)


def wrong(*given: Any) -> tuple[Tensor, Tensor]:
    return way(*given)[0] * 1.2, torch.empty(0)


def not_a_number(*given: Any) -> tuple[Tensor, Tensor]:
    return way(*given)[0] * torch.nan, torch.empty(0)


def missing(*given: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("No available kernel")


def contest(**others: Any) -> Contest:
    return Contest("attention", dict.fromkeys(SECONDS, way) | others)


def test_the_fastest_is_taken_and_kept_for_each_shape(clock: dict[str, Any]) -> None:
    one = contest()
    assert one.known(args()) is None
    assert [one.choose(args()) for _ in range(3)] == ["cudnn"] * 3
    assert one.known(args()) == "cudnn"
    clock["flash"] = 0.5
    assert one.choose(args(keys=7)) == "flash"
    assert clock["measured"] == [tuple(SECONDS)] * 2
    forget()
    assert [contest().choose(args(keys)) for keys in (5, 7)] == ["cudnn", "flash"]  # of the disk
    assert len(clock["measured"]) == 2


def test_other_kernels_are_measured_anew(
    clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    contest().choose(args())
    monkeypatch.setattr(contests.build, "version", lambda: "other sources")
    assert contest().known(args()) is None


def test_a_way_that_is_gone_is_measured_anew(clock: dict[str, Any]) -> None:
    contest().choose(args())
    one = Contest("attention", {"own": way, "flash": way})
    assert one.known(args()) is None
    assert one.choose(args()) == "flash"


def test_only_what_runs_takes_part(clock: dict[str, Any]) -> None:
    one = contest(cudnn=missing)
    assert one.choose(args()) == "hopper"
    assert clock["measured"] == [("own", "hopper", "flash")]
    with pytest.raises(RuntimeError, match="No available kernel"):
        contest(own=missing).choose(args(keys=6))


@pytest.mark.parametrize("bad", [wrong, not_a_number])
def test_a_way_with_other_results_is_not_taken(clock: dict[str, Any], bad: Any) -> None:
    with pytest.warns(UserWarning, match="attention: cudnn differs from own by"):
        assert contest(cudnn=bad).choose(args()) == "hopper"


def test_nothing_is_measured_in_a_capture(clock: dict[str, Any]) -> None:
    one = contest()
    clock["capturing"] = True
    assert one.choose(args()) == "own"
    assert one.known(args()) is None
    clock["capturing"] = False
    assert one.choose(args()) == "cudnn"
    clock["capturing"] = True
    assert one.choose(args()) == "cudnn"


def test_nothing_is_measured_without_triton(
    clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contests, "_has_triton", lambda: False)
    assert contest().choose(args()) == "own"
    assert not clock["measured"]


def test_calls_with_a_gradient_or_statistics_have_no_rival() -> None:
    assert module._contested(*args())
    assert not module._contested(*args(save_lse=True))
    assert not module._contested(*(x.as_subclass(Tensor) for x in args()[:3]), 0.5, None, None, 0)
    q, *rest = args()
    assert not module._contested(q.requires_grad_(), *rest)
    with torch.no_grad():
        assert module._contested(q, *rest)
    with ops.use_backend(attention="cuda"):
        assert not module._contested(*args())


@pytest.fixture
def ways(clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU on which everything runs, as far as the op can tell; the ways that were called."""
    called: list[str] = []

    def stand_in(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(*given: Any) -> tuple[Tensor, Tensor]:
            called.append(name)
            return module.reference(*given)

        return run

    monkeypatch.setattr(module._WAYS, "ways", {name: stand_in(name) for name in SECONDS})
    monkeypatch.setattr(attention_cuda, "ready", lambda *given: [])
    monkeypatch.setattr(attention_cuda, "foresee", lambda *given: [])
    monkeypatch.setattr(module, "_contested", lambda *given: not given[-1])
    known, choose = module._WAYS.known, module._WAYS.choose
    monkeypatch.setattr(module._WAYS, "known", lambda given: known(on_cuda(given)))
    monkeypatch.setattr(module._WAYS, "choose", lambda given: choose(on_cuda(given)))
    backends = [
        dataclasses.replace(one, machine=None, supports=None) if one.name == "cuda" else one
        for one in module._OP.backends
        if one.name in ("cuda", "sdpa", "reference")
    ]
    monkeypatch.setattr(module._OP, "backends", backends)
    return called


def on_cuda(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.as_subclass(OnCuda) if isinstance(x, Tensor) else x for x in given)


@pytest.mark.parametrize("best", SECONDS)
def test_the_op_runs_what_won(ways: list[str], clock: dict[str, Any], best: str) -> None:
    clock[best] = 0.1
    q, k, v = (torch.randn(1, n, 2, 8) for n in (4, 5, 5))
    told = ops.explain("attention", q, k, v)
    assert "cuda" in str(told)
    truth = ops.attention(q, k, v)
    ways.clear()
    assert torch.equal(ops.attention(q, k, v), truth)
    assert ways == [best]
    told = ops.explain("attention", q, k, v)
    assert told.backend == ("cuda" if best in ("own", "hopper") else "sdpa")
    if best == "cudnn":
        assert "cudnn was measured faster at this shape" in str(told)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (SimpleNamespace(returncode=0, stderr=""), None),
        (SimpleNamespace(returncode=1, stderr="first\nan illegal address\n"), "an illegal address"),
        (SimpleNamespace(returncode=-11, stderr=""), "exit code -11"),
        (subprocess.TimeoutExpired("python", 120), "the smallest call does not end"),
    ],
    ids=["works", "error", "crash", "hangs"],
)
def test_the_hopper_kernel_is_tried_in_another_process_once(
    clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch, outcome: Any, expected: str | None
) -> None:
    asked = []

    def run(*given: Any, **options: Any) -> Any:
        asked.append(given)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for _ in range(2):
        attention_cuda.hopper_fails.cache_clear()
        assert attention_cuda.hopper_fails(CUDA) == expected
    assert len(asked) == 1
    attention_cuda.hopper_fails.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RuntimeError, match=r"compute capability 9\.0"):
        attention_cuda.hopper(*args())
    attention_cuda.hopper_fails.cache_clear()
