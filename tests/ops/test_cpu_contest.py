"""What a contest measures, keeps, and says; its times are made up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compilers import needs_cpu_kernels

from diffusion_fast import cores, ops
from diffusion_fast.kernels import measurements
from diffusion_fast.ops.cpu import contest, library
from diffusion_fast.ops.dispatch import known_ops

pytestmark = needs_cpu_kernels
Q = torch.randn(1, 300, 2, 64)
PREPARE, KNOWN = contest.prepare, contest.known  # before the other tests are kept from them


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, float]]:
    """Seconds that each way takes, by its name; where nothing was ever measured."""
    library.build()  # before the cache is another
    monkeypatch.setattr(library, "settle", lambda: [])
    monkeypatch.setattr(contest, "known", KNOWN)
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path))
    seconds, now = {"cpu": 2.0, "onednn": 3.0, "sdpa": 1.0}, [0.0]
    op = known_ops["attention"]

    def timed(name: str) -> object:
        def run(*args: object) -> None:
            now[0] += seconds[name]

        return run

    ways = [backend for backend in op.backends if backend.name in seconds]
    for backend in ways:
        monkeypatch.setitem(backend.__dict__, "run", timed(backend.name))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cores, "waited", lambda: 0.0)
    yield seconds
    forget()


def forget() -> None:
    """As in a new process."""
    measurements.known.clear()
    known_ops["attention"].forget()


def chosen(q: torch.Tensor = Q) -> str:
    return ops.explain("attention", q, q, q).backend


def test_the_fastest_is_taken_once_it_is_measured(clock: dict[str, float]) -> None:
    assert chosen() == "cpu"
    assert chosen(Q.bfloat16()) == "cpu"
    PREPARE()
    why = ops.explain("attention", Q, Q, Q)
    assert why.backend == "sdpa"
    assert why.rejected["cpu"] == "sdpa was measured faster for such calls here"
    clock["sdpa"] = 5.0
    PREPARE()
    assert chosen() == "sdpa"  # nothing is measured twice
    forget()
    assert chosen() == "sdpa"  # nor in another process


def test_the_first_way_stays_where_little_is_gained(clock: dict[str, float]) -> None:
    clock["sdpa"] = 1.95
    PREPARE()
    assert chosen() == "cpu"


def test_nothing_is_measured_for_a_tiny_network() -> None:
    def calls() -> list[tuple[str, tuple[object, ...]]]:
        raise AssertionError("its calls are not looked for")

    PREPARE(contest.Work("a network", calls, contest.FEW - 1))
    assert chosen() == "cpu"
    with pytest.raises(AssertionError):
        PREPARE(contest.Work("a network", calls, contest.FEW))


def test_a_way_asked_for_by_name_needs_no_contest() -> None:
    PREPARE()
    with ops.use_backend(attention="cpu"):
        assert chosen() == "cpu"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"attention": 3}'])
def test_a_damaged_file_counts_as_missing(text: str, clock: dict[str, float]) -> None:
    PREPARE()
    (file,) = (library.cache_folder() / "tuning").iterdir()
    file.write_text(text)
    forget()
    assert chosen() == "cpu"
    PREPARE()
    assert chosen() == "sdpa"
    assert '"sdpa cpu' in file.read_text()


def test_another_machine_or_number_of_threads_has_another_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    PREPARE()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        known_ops["attention"].forget()
        assert chosen() == "cpu"
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(contest, "machine", lambda: "Another CPU")
    known_ops["attention"].forget()
    assert chosen() == "cpu"


def test_another_process_goes_on_with_what_one_took(
    clock: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PREPARE()
    saved = json.loads(json.dumps(contest.taken()))
    forget()
    monkeypatch.setenv("DIFFUSION_FAST_CACHE", str(tmp_path / "another"))
    clock["cpu"] = 0.5
    PREPARE()
    assert chosen() == "cpu"
    (file,) = (library.cache_folder() / "tuning").iterdir()
    before = file.read_text()
    contest.take(saved)
    assert chosen() == "sdpa"
    assert contest.taken() == saved
    PREPARE()
    assert chosen() == "sdpa"  # nothing is measured anew
    assert file.read_text() == before  # other processes decide as before
    contest.take({**saved, "machine": "another", "ways": {}})
    contest.take({})
    assert chosen() == "sdpa"


def test_what_one_took_in_doubt_is_not_found_anew(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "waited", lambda: 0.5 * time.perf_counter())
    PREPARE()
    forget()
    assert chosen() == "sdpa"  # by a result on disk, which is in doubt
    saved = contest.taken()
    forget()
    monkeypatch.setattr(cores, "waited", lambda: 0.0)
    clock["cpu"] = 0.5
    contest.take(saved)
    PREPARE()
    assert chosen() == "sdpa"


def test_results_that_cannot_be_kept_are_used_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (library.cache_folder() / "tuning").write_text("a file in its place")
    with pytest.warns(UserWarning, match="not kept"):
        PREPARE()
    assert chosen() == "sdpa"


def test_the_random_numbers_of_a_program_are_left_alone() -> None:
    state = torch.get_rng_state()
    PREPARE()
    assert torch.equal(state, torch.get_rng_state())


def test_the_calls_of_a_network_are_looked_for_once() -> None:
    found: list[str] = []

    def calls() -> list[tuple[str, tuple[object, ...]]]:
        found.append("once")
        return []

    for name, times in (("", 2), ("a network", 1), ("another", 1)):
        found.clear()
        for _ in range(2):
            PREPARE(contest.Work(name, calls))
            forget()  # in another process the name is on disk
        assert len(found) == times


def test_a_network_whose_results_are_incomplete_is_looked_at_again() -> None:
    found: list[str] = []
    work = contest.Work("a network", lambda: found.append("once") or ())
    PREPARE(work)
    (file,) = (library.cache_folder() / "tuning").iterdir()
    results = json.loads(file.read_text())
    lost = next(key for key in results if key.startswith("attention "))
    for kept in ({key: v for key, v in results.items() if key != lost}, results | {lost: "nobody"}):
        file.write_text(json.dumps(kept))
        forget()
        found.clear()
        PREPARE(work)
        assert found == ["once"]
        assert json.loads(file.read_text())[lost] == results[lost]


def test_times_beside_other_programs_count_until_there_are_others(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cores, "waited", lambda: 0.5 * time.perf_counter())
    PREPARE()
    assert chosen() == "sdpa"
    assert "measured again next time: other programs had the cores" in capsys.readouterr().err
    clock["cpu"] = 0.5
    PREPARE()
    assert chosen() == "sdpa"  # as long as the process lives
    forget()
    assert chosen() == "sdpa"
    PREPARE()
    assert chosen(Q.bfloat16()) == chosen() == "sdpa"  # one kind was in doubt again, and no other
    forget()
    monkeypatch.setattr(cores, "waited", lambda: 0.0)
    PREPARE()
    clock["cpu"] = 2.0
    for _ in range(2):
        assert chosen() == chosen(Q.bfloat16()) == "cpu"
        assert capsys.readouterr().err == ""
        forget()
        PREPARE()


def test_a_way_is_slow_only_where_it_had_the_cores(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes 1 s; beside another program, which ends after the second turn, 5 s."""
    seconds, waits = clock, 0.0

    def waited() -> float:
        nonlocal waits
        busy = time.perf_counter() < 12
        seconds.update(cpu=5.0 if busy else 0.5, sdpa=1.0)
        waits += 2.0 * busy
        return waits

    monkeypatch.setattr(contest, "PATIENCE", 60.0)
    monkeypatch.setattr(cores, "waited", waited)
    PREPARE()
    forget()
    assert chosen() == "cpu"
