"""The ways of a step are measured for fine-tuning too: with adapters, with text encoders."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compilers import needs_cpu_kernels
from small_runs import run

from diffusion_fast.kernels import measurements
from diffusion_fast.ops.cpu import contest, library, step_contest

pytestmark = needs_cpu_kernels
# As they are outside of tests.
PREPARE, KNOWN, WAY_OF_STEP = contest.prepare, contest.known, step_contest.way_of_step
TEXT = {"train_text": True, "text_learning_rate": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {**TEXT, "targets": ("all",), "dora": True},
    "checkpointing": {**TEXT, "gradient_checkpointing": True},
    "full": {**TEXT, "method": "full", "ema_decay": 0.9},
    "embedding": {"method": "embedding", "word": "cat", "init_word": "red", "vectors": 2},
    "controlnet": {"method": "controlnet"},
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, list[Any]]]:
    """The kinds that a run has measured, by the ops' names, of which nothing was known."""
    found: dict[str, list[Any]] = {}

    def sure(self: contest.Contest, kind: contest.Kind) -> bool:
        found.setdefault(self.op.name, []).append(kind)
        return True

    monkeypatch.setattr(library, "_final", True)
    monkeypatch.setattr(library, "settle", lambda: [])
    monkeypatch.setattr(contest, "known", KNOWN)
    monkeypatch.setattr(contest, "prepare", PREPARE)
    monkeypatch.setattr(step_contest, "way_of_step", WAY_OF_STEP)
    monkeypatch.setattr(contest.Contest, "measure", sure)
    monkeypatch.setattr(contest, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(contest, "ROUNDS", 1)
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path / "cache"))
    yield found
    measurements.known.clear()


@pytest.mark.parametrize("method", METHODS)
def test_each_methods_step_is_measured(
    tiny_folder: Callable[[str], Path],
    images: Path,
    tmp_path: Path,
    measured: dict[str, list[Any]],
    method: str,
) -> None:
    options = METHODS[method]
    if method == "controlnet":
        shutil.copytree(images, tmp_path / "hints")
        options = options | {"conditioning": tmp_path / "hints"}
    made = run(tiny_folder("sd15"), images, tmp_path / "out", steps=2, **options)
    made.train()
    linear = [kind for kind in measured["linear"] if len(kind) > 4]
    assert linear  # products of gradients
    if method in ("full", "controlnet"):
        assert any(kind[4] for kind in linear)  # by a weight
        assert (True, True) in {kind[:2] for kind in measured["conv2d_backward"]}
    if method == "embedding":
        assert {kind[:2] for kind in measured["conv2d_backward"]} == {(True, False)}
    assert "attention_backward" in measured
    assert any(key.startswith("layout") for key in contest.known())
