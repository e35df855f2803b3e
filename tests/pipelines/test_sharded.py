"""Many images by several processes: each made once, the same whoever makes it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from many import CLASSES, draw_all
from PIL import Image

from diffusion_fast import images
from diffusion_fast.cli.sample_many import many_prompts, read_prompts
from diffusion_fast.images import SETTINGS
from diffusion_fast.pipelines.sharded import Job, Made, jobs_for, make_missing, place, share

HERE = Path(__file__).parent


def draw(jobs: Sequence[Job]) -> list[Image.Image]:
    return [Image.new("L", (4, 4), job.seed) for job in jobs]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(jobs=st.integers(0, 30), count=st.integers(1, 7), batch_size=st.integers(1, 5))
def test_every_job_is_made_once(jobs: int, count: int, batch_size: int) -> None:
    everything = jobs_for([{"class": i} for i in range(jobs)], seed=5)
    units = [u for rank in range(count) for u in share(everything, rank, count, batch_size)]
    names = [tuple(job.name for job in unit) for unit in units]
    assert Counter(itertools.chain(*names)) == Counter(f"{i:05d}" for i in range(jobs))
    whole = share(everything, 0, 1, batch_size)  # what is drawn together stays together
    assert sorted(names) == [tuple(job.name for job in unit) for unit in whole]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, HERE / "many.py", folder],
        **{"capture_output": True, "text": True, "check": False, "timeout": 120},
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "process 0 of 2: wrote 4 images" in done.stdout
    assert "process 1 of 2: wrote 3 images" in done.stdout
    return folder


@pytest.mark.parametrize(("name", "batch_size"), [("single", 1), ("pairs", 2)])
def test_images_do_not_depend_on_the_number_of_processes(
    by_two: Path, tmp_path: Path, name: str, batch_size: int
) -> None:
    """Bit for bit, by DDIM with noise in every step."""
    draw_all(tmp_path, batch_size)
    images = contents(tmp_path)
    assert images == contents(by_two / name)
    pixels = {Image.open(path).tobytes() for path in tmp_path.iterdir()}
    assert len(pixels) == len(images) == len(CLASSES)


def test_an_image_depends_on_its_own_job_alone(by_two: Path, tmp_path: Path) -> None:
    """Number 3 of a list from seed 7 is number 0 of a list from seed 10 that begins there."""
    draw_all(tmp_path, classes=CLASSES[3:4], seed=10)
    assert contents(tmp_path)["00000.png"] == contents(by_two / "single")["00003.png"]
    found = json.loads(Image.open(tmp_path / "00000.png").text[SETTINGS])
    assert found == {"sampler": "ddim", "steps": 3, "class": 1, "seed": 10}


def test_a_restart_makes_what_is_missing(tmp_path: Path) -> None:
    jobs = jobs_for([{"prompt": f"number {i}"} for i in range(7)])
    assert make_missing(jobs, tmp_path, draw, {}, batch_size=2) == Made(7, 0)
    before = contents(tmp_path)
    for name in ("00002.png", "00005.png"):
        (tmp_path / name).unlink()
    (tmp_path / ".00002.png.123.tmp").write_bytes(b"half")  # left by kill -9
    (tmp_path / "notes.tmp").write_bytes(b"the user's")
    drawn: list[str] = []

    def seen(unit: Sequence[Job]) -> list[Image.Image]:
        drawn.extend(job.name for job in unit)
        return draw(unit)

    assert make_missing(jobs, tmp_path, seen, {}, batch_size=2) == Made(2, 5)
    assert drawn == ["00002", "00003", "00004", "00005"]  # whole units
    assert contents(tmp_path) == before | {"notes.tmp": b"the user's"}
    assert make_missing(jobs, tmp_path, seen, {}, batch_size=2) == Made(0, 7)


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    jobs = jobs_for([{"prompt": "a cat"}, {"prompt": "a dog"}])
    make_missing(jobs, tmp_path, draw, {"steps": 20})
    before = contents(tmp_path)
    others = jobs_for([{"prompt": "a cat"}, {"prompt": "a bird"}])
    with pytest.raises(
        ValueError, match=r"00001.png: expected an image with the settings"
    ) as error:
        make_missing(others, tmp_path, draw, {"steps": 20})
    assert "prompt: 'a dog' there, 'a bird' asked for" in str(error.value)
    with pytest.raises(ValueError, match="steps: 20 there, 30 asked for"):
        make_missing(jobs, tmp_path, draw, {"steps": 30})
    assert contents(tmp_path) == before
    (tmp_path / "00000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"00000.png: expected a picture that carries"):
        make_missing(jobs, tmp_path, draw, {"steps": 20})


def test_an_error_keeps_what_was_made(tmp_path: Path) -> None:
    jobs = jobs_for([{"class": 0}, {"class": 1}])

    def broken(unit: Sequence[Job]) -> list[Image.Image]:
        if unit[0].subject["class"] == 1:
            raise RuntimeError("out of memory")
        return draw(unit)

    with pytest.raises(RuntimeError):
        make_missing(jobs, tmp_path, broken, {})
    assert sorted(contents(tmp_path)) == ["00000.png"]
    assert make_missing(jobs, tmp_path, draw, {}) == Made(1, 1)


def test_files_are_written_while_the_next_unit_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    writing, second = threading.Event(), threading.Event()
    before = images.save_picture

    def save(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
        writing.set()
        assert second.wait(20), "the second unit waits for the files of the first"
        assert len(drawn) <= int(path.stem) + 2, "more than one unit waits to be written"
        before(image, path, settings)

    def seen(unit: Sequence[Job]) -> list[Image.Image]:
        if drawn:
            assert writing.wait(20)
            second.set()
        drawn.append(unit[0].name)
        return draw(unit)

    monkeypatch.setattr(images, "save_picture", save)
    jobs = jobs_for([{"class": i} for i in range(4)])
    assert make_missing(jobs, tmp_path, seen, {}) == Made(4, 0)
    assert len(contents(tmp_path)) == len(drawn) == 4


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    def save(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(images, "save_picture", save)
    jobs = jobs_for([{"class": i} for i in range(count)])
    with pytest.raises(OSError, match="no space left"):
        make_missing(jobs, tmp_path, draw, {})
    assert not contents(tmp_path)


def test_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  ein Löwe \n", encoding="utf-8")
    prompts = read_prompts(file)
    assert prompts == ["a cat", "ein Löwe"]
    asked = []

    def pipeline(prompt: str, seed: int) -> Image.Image:
        asked.append((prompt, seed))
        return Image.new("RGB", (8, 8))

    many_prompts(pipeline, prompts, tmp_path / "out", seed=3, settings={"steps": 2})
    assert asked == [("a cat", 3), ("ein Löwe", 4)]
    found = json.loads(Image.open(tmp_path / "out" / "00001.png").text[SETTINGS])
    assert found == {"steps": 2, "prompt": "ein Löwe", "seed": 4}
    assert "wrote 2 images" in capsys.readouterr().out
    elsewhere = {"steps": 2, "device": "cuda:1"}  # of whichever process made it
    many_prompts(pipeline, [*prompts, "a dog"], tmp_path / "out", seed=3, settings=elsewhere)
    assert "wrote 1 images" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe\xfa"])
def test_files_without_prompts(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"--prompts: expected a .*a\.txt"):
        read_prompts(tmp_path / "a.txt")


def test_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert place() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert place() == (1, 4)
    with pytest.raises(ValueError, match="rank: expected one of 2 processes, from 0, got 2"):
        share([], 2, 2)
