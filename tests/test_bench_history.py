"""The history of benchmark results: appended to, never twice, drawn on the site."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.models import history, store
from benchmarks.models.store import Group, Results

ROOT = Path(__file__).parents[1]
GROUP = Group("unet", "small", "float32", 1, 1)
FACTS = {
    **{"time": "2026-01-01T00:00:00Z", "commit": "abc1234", "device": "a CPU"},
    **{"threads": 2, "torch": "2.13.0", "source": "x"},
}


def results(folder: Path, time: str = FACTS["time"]) -> Results:  # type: ignore[assignment]
    made = Results(folder)
    ran = {"variant": "engine", "p20_s": 1.0, "p50_s": 2.0, "p80_s": 3.0}
    made.add(GROUP, [ran, {"variant": "eager", "reason": "no"}], {**FACTS, "time": time})
    return made


def test_lines_are_appended_once(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    assert history.record(path, results(tmp_path), [GROUP]) == 1  # eager did not run
    assert history.record(path, results(tmp_path), [GROUP]) == 0
    assert history.record(path, results(tmp_path, "2026-01-02T00:00:00Z"), [GROUP]) == 1
    lines = history.read(path)
    assert [line["time"][:10] for line in lines] == ["2026-01-01", "2026-01-02"]
    assert lines[0]["commit"] == "abc1234"
    assert float(lines[0]["p50_s"]) == 2.0
    other = Group("loop", "small", "float32", 1, 20)
    assert history.record(path, results(tmp_path), [other]) == 0


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns time, commit"):
        history.record(path, results(tmp_path), [GROUP])
    assert path.read_text() == "a,b\n1,2\n"


def test_the_history_has_what_the_results_have() -> None:
    lines = history.read(ROOT / "benchmarks" / "results" / "history.csv")
    known = {tuple(line[name] for name in ("time", *store.GROUP, "variant")) for line in lines}
    assert len(known) == len(lines) > 0
    for line in lines:
        assert 0 < float(line["p20_s"]) <= float(line["p50_s"]) <= float(line["p80_s"])
        assert line["commit"]
