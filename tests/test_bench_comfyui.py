"""The benchmark inside ComfyUI, as far as it goes without ComfyUI."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_comfyui as bench

FACTS = dict.fromkeys(bench.FACTS, "x")


def test_another_folder_is_no_comfyui(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected a checkout of ComfyUI"):
        bench.ComfyUI(tmp_path)


def test_no_weight_is_zero_and_activations_keep_their_size() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.GroupNorm(8, 256), nn.Linear(256, 256))
    nn.init.zeros_(model[2].weight)
    bench.randomize(model)
    assert all(value.any() and not value.requires_grad for value in model.parameters())
    assert 0.5 < model(torch.randn(64, 256)).std() < 2


def test_small_sdxl_has_shallow_transformers() -> None:
    assert bench._shallow([0, [2, 10], 10]) == [0, [2, bench.SMALL_DEPTH], bench.SMALL_DEPTH]


def test_regions_are_of_two_sizes_and_the_whole() -> None:
    areas = [more.get("area") for _, more in bench.regions(8, 24)]
    assert areas == [(12, 12, 0, 0), (12, 12, 12, 12), (8, 24, 12, 0), None]
    for area in areas[:3]:
        assert area[0] + area[2] <= 24 and area[1] + area[3] <= 24  # noqa: PT018


def test_two_prompts_share_a_run() -> None:
    first, second = bench.by_time(bench.prompt(1, 8), 8)
    assert first[1]["end_percent"] == second[1]["start_percent"] == 0.5
    assert not torch.equal(first[0], second[0])


class Clocked:
    """A ComfyUI whose models are names, and which takes a second, or less with the node."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, []

    def model(self, kind: str, width: int) -> str:
        return kind

    def sample(self, model: str, *_: Any) -> Tensor:
        slow = len(self.ran) < len(bench.VARIANTS)  # the first round
        self.ran.append(model)
        self.now += 100.0 if slow else {"SD15": 1.0}.get(model, 0.5)
        return torch.tensor([1.0, 2.0 + 1e-6 * len(model)])


def test_variants_take_turns_and_the_first_round_warms_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comfyui: Any = Clocked()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: comfyui.now)

    def put(model: str, **switches: bool) -> str:
        return model + "".join(map(str, switches.values()))

    monkeypatch.setattr(bench, "put_on", put)
    rows = list(bench.timed(comfyui, "SD15", bench.SMALL, 16, 3))
    assert [row["variant"] for row in rows] == list(bench.VARIANTS)
    assert [row["seconds"] for row in rows] == ["1.00", "0.50", "0.50"]
    assert [row["times as fast"] for row in rows] == ["1.00", "2.00", "2.00"]
    assert all(tuple(row) == bench.TIMES for row in rows)
    assert comfyui.ran == comfyui.ran[: len(rows)] * 4
    assert float(rows[0]["error"]) == 0 < float(rows[1]["error"]) < 1e-4


def test_rows_name_the_version_and_the_machine(tmp_path: Path) -> None:
    facts = FACTS | {"comfyui": "0.3", "command": "run it", "device": "a CPU", "threads": "2"}
    row = {"model": "SD15", "error": "1e-06"} | facts
    bench.write(tmp_path / "errors", [row], ["| model |", "| --- |", "| SD15 |"], facts)
    with (tmp_path / "errors.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [row]
    shown = (tmp_path / "errors.md").read_text()
    assert shown.startswith("| model |\n| --- |\n| SD15 |\n\nComfyUI 0.3, ")
    assert "device a CPU, threads 2" in shown
    assert shown.endswith("`run it`\n")
