"""``diffusion-fast comfyui``: one file comes and goes, and nothing else is touched."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from command_line import run

from diffusion_fast.integrations.comfyui import NODE_CLASS_MAPPINGS, install


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI"
    for name in ("main.py", "nodes.py", "comfy/model_patcher.py", "custom_nodes/other.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_node_comes_and_goes(comfyui: Path) -> None:
    before = contents(comfyui)
    done = run("comfyui", comfyui)
    assert done.returncode == 0, done.stderr
    file = comfyui / "custom_nodes" / install.NAME
    assert str(file) in done.stdout
    assert contents(comfyui).keys() - before.keys() == {f"custom_nodes/{install.NAME}"}
    assert run("comfyui", comfyui).returncode == 0  # again: a new version in the place of an old
    done = run("comfyui", comfyui, "--remove")
    assert done.returncode == 0, done.stderr
    assert contents(comfyui) == before
    done = run("comfyui", comfyui, "--remove")
    assert done.returncode == 1
    assert "PATH: expected a ComfyUI folder with the node in it" in done.stderr


def test_comfyui_finds_the_node_in_the_file(comfyui: Path) -> None:
    """It imports the file under the file's own name, which must not hide the package."""
    file = install.install(comfyui)
    assert file.stem not in sys.modules
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == NODE_CLASS_MAPPINGS.keys()


@pytest.mark.parametrize("missing", ["main.py", "comfy/model_patcher.py"])
@pytest.mark.parametrize("remove", [False, True])
def test_another_folder_is_refused(comfyui: Path, missing: str, remove: bool) -> None:
    (comfyui / missing).unlink()
    before = contents(comfyui)
    with pytest.raises(ValueError, match=rf"path: expected a ComfyUI folder, .* without {missing}"):
        (install.remove if remove else install.install)(comfyui)
    assert contents(comfyui) == before


def test_a_file_of_anothers_stays(comfyui: Path) -> None:
    (comfyui / "custom_nodes" / install.NAME).write_text("# mine\n")
    before = contents(comfyui)
    for change in (install.install, install.remove):
        with pytest.raises(ValueError, match=f"path: expected no file {install.NAME} of another's"):
            change(comfyui)
    assert contents(comfyui) == before


def test_a_full_disk_leaves_nothing(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(comfyui)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="can't be written"):
        install.install(comfyui)
    assert contents(comfyui) == before
