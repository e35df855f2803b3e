from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import write_images

from diffusion_fast.pipelines import make_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models, by kind, each made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_tiny(tmp_path_factory.mktemp("tiny") / kind, kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captioned images of three shapes."""
    return write_images(tmp_path_factory.mktemp("images"))
