"""What is built is what is in the tree: sdist and wheel, used from another directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = [f"benchmarks/{room}/" for room in ("lib", "models", "peers")]
USE = """
import sys
import torch
import diffusion_fast as df
import diffusion_fast.kernels
from pathlib import Path
home = Path(df.__file__).parent
print(home)
assert (home / "py.typed").is_file()
assert {p.name for p in (home / "kernels").glob("*.py")} == {kernels}
x = df.sample(lambda x, t: x, df.DiffusionSchedule(), (2, 1, 4, 4), sampler="unipc", steps=3)
assert x.shape == (2, 1, 4, 4)
"""


def tracked() -> list[str]:
    """The files of the source tree, without what is ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ of a copy of the tree, so that nothing is left here; the wheel comes from the sdist."""
    work = tmp_path_factory.mktemp("build")
    for name in tracked():
        (work / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, work / "tree" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist")]
    done = subprocess.run(command, cwd=work / "tree", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "dist"


def sources(folder: str, *suffixes: str) -> set[str]:
    return {n for n in tracked() if n.startswith(folder) and n.endswith(suffixes)}


def test_the_sdist_holds_the_sources(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = sources("diffusion_fast/", "") | sources("kernels/", "") | sources("csrc/", "")
    wanted |= {name for room in BENCHMARKS for name in sources(room, "")}
    missing = (wanted | {"README.md", "LICENSE", "setup.py", "CHANGELOG.md"}) - names
    assert not missing


def test_the_wheel_holds_the_package_only(built: Path) -> None:
    (path,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    assert sources("diffusion_fast/", ".py", "py.typed") <= names
    kernels = sources("kernels/", ".py") | sources("csrc/", "")
    assert {f"diffusion_fast/{name}" for name in kernels} <= names
    bench = {name for room in BENCHMARKS for name in sources(room, ".py")}
    assert {f"diffusion_fast/{name}" for name in bench} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"diffusion_fast"}


def test_an_index_would_take_them(built: Path) -> None:
    """Names, metadata and the README as a page."""
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_works_installed_from_another_directory(built: Path, tmp_path: Path) -> None:
    (path,) = built.glob("*.whl")
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(path)], check=True)
    kernels = {Path(name).name for name in sources("kernels/", ".py")}
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", USE.replace("{kernels}", repr(kernels))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "diffusion_fast"
    script = subprocess.run(
        [site / "bin" / "diffusion-fast", "doctor"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "group_norm_silu" in script.stdout, script.stderr


def in_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light() -> None:
    heavy = ("triton", "diffusers", "transformers", "matplotlib", "sklearn", "rich", "typer", "PIL")
    code = (
        "import sys, torch; before = set(sys.modules); import diffusion_fast;"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    assert in_process(code).strip() == "[]"


def test_the_folder_kernels_does_not_disturb_diffusers() -> None:
    """The root is first on the path here, and transformers and diffusers probe for `kernels`."""
    code = (
        "import kernels; assert kernels.__version__ == '0';"
        "from diffusers import StableDiffusionPipeline; print(StableDiffusionPipeline.__name__)"
    )
    assert in_process(code).strip() == "StableDiffusionPipeline"
