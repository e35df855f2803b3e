from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_fast.pipelines import StableDiffusion, make_tiny

sys.path.append(str(Path(__file__).parents[1] / "models"))  # for compvis_files, control_parity


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
def pipe(tiny_folder: Callable[[str], Path]) -> StableDiffusion:
    return StableDiffusion.from_pretrained(tiny_folder("sd15"))
