"""Workflows, constraints and what a release needs: read and checked here, as they run elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name

import diffusion_fast as df
from benchmarks.tools import constraints

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def steps() -> list[dict[str, Any]]:
    jobs = [job for path in WORKFLOWS for job in load(path)["jobs"].values()]
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_whole(path: Path) -> None:
    workflow = load(path)
    assert True in workflow or "on" in workflow  # YAML 1.1 reads on as true
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "runs-on" in job, name
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), (name, step)
        for known in re.findall(r"matrix\.(\w+)", str(job)):
            matrix = job["strategy"]["matrix"]
            assert known in matrix or all(known in row for row in matrix["include"]), known


def test_workflows_run_what_exists() -> None:
    """Targets of make, and files that commands name."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [step["run"] for step in steps() if "run" in step]
    for target in {name for text in commands for name in re.findall(r"^make ([\w-]+)", text)}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for text in commands:
        for name in re.findall(r"(?<!\S)(?:tests|\.github|constraints)[\w./-]*", text):
            assert (ROOT / name).exists(), name


def test_every_python_that_we_promise_is_tested() -> None:
    matrix = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = re.findall(r"Python :: (3\.\d+)", text)
    assert matrix["python"] == promised
    oldest = re.search(r'"torch>=(\d+\.\d+)"', text)
    assert oldest is not None
    assert any(f"torch=={oldest[1]}.*" in str(job) for job in [load(WORKFLOWS[0])])


def test_constraints_cover_what_is_asked_for() -> None:
    lines = constraints.FILE.read_text(encoding="utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    again = "run: python -m benchmarks.tools.constraints"
    for requirement in constraints.asked_for():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{requirement} is not in constraints.txt; {again}"
        assert requirement.specifier.contains(pins[name]), f"{requirement}, {pins[name]}; {again}"


def test_a_tag_must_be_the_version() -> None:
    script = ROOT / ".github" / "check_tag.py"
    spec = importlib.util.spec_from_file_location("check_tag", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.problem("v1.2", "1.2", "# C\n\n## 1.2\n") is None
    assert "expected v1.2" in module.problem("v1.3", "1.2", "## 1.2\n")
    assert "a section '## 1.2'" in module.problem("v1.2", "1.2", "## 1.2.1\n")
    done = subprocess.run(
        [sys.executable, script, "v0.0.0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"expected v{df.__version__}" in done.stderr


def test_the_citation_has_the_version() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert str(citation["version"]) == df.__version__
    assert citation["license"] == "Apache-2.0"
