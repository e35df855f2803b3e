"""The number of threads where a run goes on, and steps that leave no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import run
from tiny import full_trainer

from diffusion_fast.cores import THREADS
from diffusion_fast.training import Checkpoints
from diffusion_fast.training.threads import take_threads

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine of four cores."""
    monkeypatch.delenv(THREADS, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_the_variable_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(THREADS, "4")
    torch.set_num_threads(1)
    full_trainer(tmp_path).fit(5)
    newest = Checkpoints(tmp_path).newest()
    assert newest is not None
    assert take_threads(newest) == f"threads: 1, as {THREADS} says"
    torch.set_num_threads(4)
    assert take_threads(newest).startswith(f"threads: 4, as {THREADS} says (1 in ")
    assert torch.get_num_threads() == 4


def test_a_resumed_run_has_the_threads_of_its_checkpoint(tmp_path: Path) -> None:
    torch.set_num_threads(3)
    full_trainer(tmp_path).fit(5)
    torch.set_num_threads(4)
    newest = Checkpoints(tmp_path).newest()
    assert newest is not None
    assert take_threads(newest) == f"threads: 3, as in {newest}"
    assert torch.get_num_threads() == 3


def test_a_checkpoint_without_them_or_with_nonsense(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text("{}")
    assert take_threads(tmp_path).startswith("threads: 4")
    for value in (0, "2", True):
        file.write_text(json.dumps({"threads": value}))
        with pytest.raises(ValueError, match=r"state\.json: threads: expected a positive integer"):
            take_threads(tmp_path)
        assert torch.get_num_threads() == 4


def test_the_command_goes_on_with_it_and_says_so(tmp_path: Path) -> None:
    short = ("--steps", 4, "--batch-size", 4, "--checkpoint-every", 2)
    torch.set_num_threads(2)
    run("train", "--out", tmp_path, *short)
    saved = json.loads((tmp_path / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert saved["threads"] == 2
    torch.set_num_threads(4)
    done = run("train", "--out", tmp_path, *short, "--resume")
    assert done.stderr.count(f"threads: 2, as in {tmp_path}") == 1
    assert torch.get_num_threads() == 2


TRAIN = """
import sys, time
sys.path.insert(0, "examples")
import digits
start = time.perf_counter()
digits.train(digits.load_digits()[0], 30, 64, 1000, digits.Clock(60))
print(time.perf_counter() - start)
"""


@pytest.mark.slow  # trains twice
def test_the_demo_beside_another_program() -> None:
    """A core less does not bring it to a stand."""

    def seconds() -> float:
        command = [sys.executable, "-c", TRAIN]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return float(done.stdout)

    quiet = min(seconds() for _ in range(2))
    others = max(1, (os.cpu_count() or 2) - 1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        assert seconds() < 4 * quiet
    finally:
        for process in busy:
            process.kill()
            process.wait()
