"""Every method's files on a disk that takes no more."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import run, write_images

WORD = {"method": "embedding", "word": "<toy>", "prompt": "a {}", "vectors": 40}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("sd15", {"targets": ("all",)}),
    "full": ("sd15", {"method": "full"}),
    "embedding": ("sd15", WORD),
    "embedding, sdxl": ("sdxl", WORD),
    "controlnet": ("sd15", {"method": "controlnet"}),
}


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A write beyond that many bytes fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_half_written(
    case: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, options = CASES[case]
    images = write_images(tmp_path / "images", ((64, 64),))
    if options is WORD:
        (images / "0.txt").unlink()
    if case == "controlnet":
        options = options | {"conditioning": write_images(tmp_path / "hints", ((64, 64),))}
    made = run(tiny_folder(kind), images, tmp_path / "out", **options)
    weights = {name: value.detach() for name, value in made.network.named_parameters()}
    (tmp_path / "out").mkdir()
    for file in made.files():
        file.write_text("before")
    match = f"^{re.escape(str(tmp_path / 'out'))}: can't be written: "
    with files_of_at_most(4000), pytest.raises(OSError, match=match) as error:
        made.write(weights)
    assert "\n" not in str(error.value)
    found = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == set(made.files())
    assert {file.read_text() for file in found} == {"before"}
    assert {path.name for path in tmp_path.iterdir()} <= {"images", "hints", "out"}
    made.write(weights)
    assert all(file.stat().st_size > 6 for file in made.files())
