from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    done = run("train", "--out", folder, "--steps", 12, "--batch-size", 16)
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder}" in done.stdout
    assert "12/12" in done.stderr
    return folder
