"""Damaged files of a run: an error that names them or what they held, and nothing half-read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutations import mutated, mutated_json, mutated_json_text, survives
from PIL import Image
from safetensors.torch import save_file
from tiny import STEPS, full_trainer

from diffusion_fast.cli.sample_many import read_prompts
from diffusion_fast.files import CheckpointError
from diffusion_fast.training import CsvLog, ImageFolder, Progress
from diffusion_fast.training.checkpoint import MARK, STATE
from diffusion_fast.training.latent_cache import LatentData

SEEDS = 150


@pytest.fixture(
    params=[pytest.param(range(4), id="few"), pytest.param(range(4, SEEDS), marks=pytest.mark.slow)]
)
def seeds(request: pytest.FixtureRequest) -> range:
    found: range = request.param
    return found


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_captions(tmp_path: Path, seeds: range) -> None:
    entries = [{"file_name": f"{i}.png", "text": f"caption {i}\u2028é"} for i in range(3)]
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    file = tmp_path / "metadata.jsonl"
    text = "\n".join(json.dumps(entry) for entry in entries)
    for seed in seeds:
        lines = [json.dumps(mutated_json(entry, seed + i)) for i, entry in enumerate(entries)]
        for data in (mutated(text.encode(), seed), "\n".join(lines).encode()):
            file.write_bytes(data)
            found = survives(
                lambda: ImageFolder(tmp_path, 4, encode=lambda text: torch.zeros(1)).captions,
                *((ValueError,), (file, "metadata.jsonl"), seed),
            )
            assert found is None or all(isinstance(text, str) for text in found)
            assert file.read_bytes() == data


def test_prompts(tmp_path: Path, seeds: range) -> None:
    file = tmp_path / "prompts.txt"
    for seed in seeds:
        file.write_bytes(mutated("a cat\na dog\u2028in the rain\r\né\n".encode(), seed))
        found = survives(lambda: read_prompts(file), (ValueError,), [file], seed)
        assert found is None or all(prompt.strip() for prompt in found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    full_trainer(folder, decay="constant").fit(5)
    return folder / "step_00000005"


def resume(checkpoint: Path) -> Callable[[], int]:
    def run() -> int:
        trainer = full_trainer(None, decay="constant")
        step = trainer.resume(checkpoint)
        assert len(trainer.fit(step + 1)) == step + 1
        return step

    return run


def test_bytes_of_a_checkpoint(saved: Path, tmp_path: Path, seeds: range) -> None:
    files = sorted(path.name for path in saved.iterdir())
    for seed in seeds:
        copy = tmp_path / str(seed)
        shutil.copytree(saved, copy)
        file = copy / files[seed % len(files)]
        file.write_bytes(mutated(file.read_bytes(), seed))
        before = everything(copy)
        assert survives(resume(copy), (CheckpointError,), [file], seed) in (None, 5)
        assert everything(copy) == before


def test_the_state_of_a_checkpoint(saved: Path, tmp_path: Path, seeds: range) -> None:
    """Values that no checksum vouches for, as in checkpoints of the first format."""
    state = json.loads((saved / STATE).read_text())
    mark = json.loads((saved / MARK).read_text())
    for seed in seeds:
        copy = tmp_path / str(seed)
        shutil.copytree(saved, copy)
        text = json.dumps(mutated_json(state, seed))
        (copy / STATE).write_text(text)
        sizes = mark["files"] | {STATE: len(text)}
        (copy / MARK).write_text(json.dumps({"files": sizes, "validation_loss": None}))
        survives(resume(copy), (ValueError,), [copy], seed)


def test_the_mark_of_a_checkpoint(saved: Path, tmp_path: Path, seeds: range) -> None:
    mark = json.loads((saved / MARK).read_text())
    old = {"files": mark["files"], "validation_loss": None}
    for seed in seeds:
        copy = tmp_path / str(seed)
        shutil.copytree(saved, copy)
        (copy / MARK).write_bytes(mutated_json_text(json.dumps(mark if seed % 2 else old), seed))
        assert survives(resume(copy), (CheckpointError,), [copy], seed) in (None, 5)


def test_a_log(tmp_path: Path, seeds: range) -> None:
    log = tmp_path / "log.csv"
    losses = [0.5, 0.25, 0.125]
    CsvLog(log)(Progress(3, STEPS, losses[-1], losses, 0.1))
    whole = log.read_bytes()
    for seed in seeds:
        damaged = mutated(whole, seed)
        log.write_bytes(damaged)
        written = survives(
            lambda: CsvLog(log)(Progress(2, STEPS, losses[1], losses[:2])) or True,
            *((ValueError,), [log], seed),
        )
        assert written or log.read_bytes() == damaged
        assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_a_cache_of_latents(tmp_path: Path, seeds: range) -> None:
    latents, null = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"latents": torch.ones(4, 2, 2)}, latents)
    save_file({"context": torch.ones(7, 6)}, null)
    for file in (latents, null):
        whole = file.read_bytes()
        for seed in seeds:
            file.write_bytes(mutated(whole, seed))
            data = survives(
                lambda: LatentData([latents], [null], null, (8, 8))[0],
                *((CheckpointError,), [file], seed),
            )
            assert data is None or isinstance(data[0], torch.Tensor)
        file.write_bytes(whole)
