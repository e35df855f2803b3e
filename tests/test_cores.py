"""How many cores a control group grants, and what is done about threads beyond them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import diffusion_fast as df
from diffusion_fast import cores, hardware
from diffusion_fast.cores import THREADS, core_limit


def write(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V1 = "4:cpu,cpuacct:/docker/ab\n3:memory:/docker/ab"
CASES: dict[str, tuple[str, dict[str, str], int | None]] = {
    "none": ("0::/", {}, None),
    "no limit": ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, None),
    "whole": ("0::/", {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
    "rounded up": ("0::/", {"sys/fs/cgroup/cpu.max": "250000 100000"}, 3),
    "less than one": ("0::/", {"sys/fs/cgroup/cpu.max": "5000 100000"}, 1),
    "its own": ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "400000 100000"}, 4),
    "a parent's": (
        "0::/a/b",
        {
            "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            "sys/fs/cgroup/a/cpu.max": "300000 100000",
            "sys/fs/cgroup/cpu.max": "max 100000",
        },
        3,
    ),
    "the host's path": ("0::/../../host/ab", {"sys/fs/cgroup/cpu.max": "100000 50000"}, 2),
    "version 1": (
        V1,
        {
            "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_period_us": "100000",
        },
        2,
    ),
    "version 1, in the container": (
        V1,
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "10000",
        },
        5,
    ),
    "version 1, no limit": (
        V1,
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    "another controller's": ("3:memory:/ab", {"sys/fs/cgroup/cpu.max": "100000 100000"}, None),
    "damaged": ("0::/", {"sys/fs/cgroup/cpu.max": "much"}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_limit(case: str, tmp_path: Path) -> None:
    groups, files, expected = CASES[case]
    assert core_limit(write(tmp_path, groups, files)) == expected


def test_no_such_system(tmp_path: Path) -> None:
    assert core_limit(tmp_path) is None


@pytest.fixture
def _four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four threads, and two cores granted."""
    monkeypatch.delenv(THREADS, raising=False)
    for module in (cores, hardware):
        monkeypatch.setattr(module, "core_limit", lambda: 2)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_four")
def test_a_program_takes_no_more() -> None:
    said = cores.limit_threads()
    assert said is not None
    assert said.startswith("PyTorch uses 4 threads, and this container may use 2 cores at once")
    assert torch.get_num_threads() == 2
    assert cores.limit_threads() is None


@pytest.mark.usefixtures("_four")
def test_the_library_warns_and_changes_nothing() -> None:
    with pytest.warns(UserWarning, match=f"may use 2 cores at once.*{THREADS}") as caught:
        df.Engine(lambda x, t: x, df.DiffusionSchedule(), steps=2)
    assert caught[0].filename == __file__
    assert torch.get_num_threads() == 4
    assert "2 at once, by the control group's quota" in hardware.processor()["cores"]


@pytest.mark.usefixtures("_four")
def test_what_the_user_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, "4")
    assert cores.limit_threads() is None
    assert torch.get_num_threads() == 4


def test_the_wait_for_cores_is_that_of_all_threads(tmp_path: Path) -> None:
    for thread, text in {"1": "900 1500000000 3", "2": "7 500000000 1"}.items():
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(text + "\n")
    (tmp_path / "3").mkdir()  # has ended
    assert cores.waited(tmp_path) == 2.0
    assert cores.waited(tmp_path / "none") == 0.0
    assert cores.waited() >= 0.0
