"""The tuning helper: what it measures, keeps, shares and survives. Its times are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from diffusion_fast.kernels import launch, measurements, tuning

CUDA = torch.device("cuda", 0)
CONFIGS = ("first", "slow", "best")
SECONDS = {"first": 2.0, "slow": 3.0, "best": 1.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine with a GPU, as far as the helper can tell; the names of what was measured."""
    log: list[str] = []

    def measure(configs: tuple[str, ...], run: Callable[[str], object], _: object) -> list[float]:
        log.extend(configs)
        return [SECONDS[c] for c in configs]

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_measure", measure)
    monkeypatch.setattr(tuning, "_gpu", lambda device: "NVIDIA H200-sm90")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield log
    forget()


def forget() -> None:
    """As in a new process."""
    measurements.known.clear()


def choose(shape_class: tuple[object, ...] = (1,), configs: tuple[str, ...] = CONFIGS) -> str:
    return tuning.choose("op", shape_class, configs, lambda config: None, CUDA)


def test_the_fastest_is_kept_in_memory_and_on_disk(measured: list[str], tmp_path: Path) -> None:
    assert choose() == "best"
    assert choose() == "best"
    assert measured == list(CONFIGS)
    forget()
    assert choose() == "best"
    assert measured == list(CONFIGS)
    (file,) = (tmp_path / "tuning").iterdir()  # no temporary file is left
    assert json.loads(file.read_text()) == {"op (1,)": "'best'"}
    assert file.name.startswith("NVIDIA_H200-sm90-torch")


def test_each_shape_class_is_measured_once(measured: list[str]) -> None:
    for _ in range(2):
        choose((1,))
        choose((2,))
    assert len(measured) == 2 * len(CONFIGS)


def test_processes_add_to_one_file(measured: list[str]) -> None:
    choose((1,))
    forget()
    choose((2,))
    assert set(json.loads(tuning.cache_file(CUDA).read_text())) == {"op (1,)", "op (2,)"}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[1]", "null", "7", '{"op (1,)": 3}', '{"op (1,)": "gone"}']
)
def test_a_damaged_or_outdated_file_is_measured_again(measured: list[str], content: str) -> None:
    file = tuning.cache_file(CUDA)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    odd = "gone" not in content
    with pytest.warns(UserWarning, match="expected tuning results") if odd else nullcontext():
        assert choose() == "best"
    assert measured == list(CONFIGS)
    assert json.loads(file.read_text())["op (1,)"] == "'best'"


def test_another_version_has_another_file(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tuning.cache_file(CUDA)
    monkeypatch.setattr(tuning, "_version", lambda: "torch9-triton9-0")
    assert tuning.cache_file(CUDA) != before


def test_a_folder_that_cannot_be_written_costs_a_warning(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(blocked))
    with pytest.warns(UserWarning, match="tuning results are not kept"):
        assert choose() == "best"
    assert choose() == "best"  # in memory


def test_nothing_is_measured_in_a_capture(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == "first"
    assert not measured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose() == "best"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == "best"  # what is known is used in a capture as well


def test_nothing_is_measured_where_it_cannot_be(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(configs=("first",)) == "first"
    assert tuning.choose("op", (1,), CONFIGS, print, torch.device("cpu")) == "first"
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert choose() == "first"
    assert not measured


def test_launches_are_measured_with_other_data_in_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    written = torch.Tensor.zero_

    def zero(tensor: torch.Tensor) -> torch.Tensor:
        done.append(f"{tensor.numel()} bytes")
        return written(tensor)

    monkeypatch.setattr(torch.Tensor, "zero_", zero)
    monkeypatch.setattr(tuning, "_l2", lambda device: 64)
    events = iter(range(100))
    event = lambda **_: SimpleNamespace(  # noqa: E731
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: next(events)
    )
    fakes = {name: mock.MagicMock() for name in ("device", "Stream", "CUDAGraph", "graph")}
    for name, fake in (fakes | {"synchronize": mock.Mock(), "Event": event}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    tuning._stream.cache_clear()
    tuning._measure(("first", "best"), done.append, torch.device("cpu"))
    for config in ("first", "best"):
        assert done[:1] == [config]  # which compiles it
        assert done[1 : 1 + 2 * tuning.REPEATS] == ["128 bytes", config] * tuning.REPEATS
        del done[: 1 + 2 * tuning.REPEATS]
    assert not done
    tuning._stream.cache_clear()  # of a fake


def test_all_captures_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps megabytes for each stream, and PyTorch hands out 32 in turn."""
    made = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "Stream", made)
    tuning._stream.cache_clear()
    assert tuning._stream(CUDA) is tuning._stream(CUDA)
    assert made.call_count == 1
    tuning._stream.cache_clear()
