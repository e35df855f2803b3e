"""Runs parts one after the other, whatever becomes of each, and remembers on disk what passed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffusion_fast.files import read_json, write_json

STATE = "run.json"
PASSED, FAILED, TIMED_OUT, RUNNING = "passed", "failed", "timed out", "running"
INTERRUPTED, NO_TIME, LACKS = "interrupted", "no time left", "not possible"
BAD = (FAILED, TIMED_OUT, INTERRUPTED)
GRACE = 10.0  # seconds between asking a part to stop, so that it writes what it has, and killing it
TAIL = 12  # lines of the log of a part that failed


@dataclass(frozen=True)
class Part:
    """A command and what it needs.

    Attributes:
        name: to choose it by, and of its log.
        command: program and arguments.
        limit: seconds that it may take.
        least: seconds without which it isn't worth starting.
        packages, tools: modules of Python and programs that it can't do without.
        variables: of its environment.
        always: whether it runs again although it passed.
    """

    name: str
    command: Sequence[str]
    limit: float = 60.0
    least: float = 15.0
    packages: Sequence[str] = ()
    tools: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    always: bool = False

    def lacking(self) -> list[str]:
        """What of it this machine doesn't have."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return absent + [name for name in self.tools if shutil.which(name) is None]


@dataclass(frozen=True)
class Record:
    """What became of a part; ``identity`` names the code and the machine."""

    status: str
    identity: str
    seconds: float = 0.0
    why: str = ""


class State:
    """The records of a folder. The file is whole at every moment.

    Raises:
        ValueError: a file that holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATE
        self.records: dict[str, Record] = {}
        if self.path.exists():
            try:
                parts = read_json(self.path)["parts"].items()
                self.records = {name: Record(**record) for name, record in parts}
            except (AttributeError, KeyError, TypeError) as error:
                message = f"{self.path}: expected the state of a run, got something else"
                raise ValueError(message) from error

    def put(self, name: str, record: Record) -> None:
        self.records[name] = record
        write_json({"parts": {n: asdict(r) for n, r in self.records.items()}}, self.path)


def run(
    parts: Iterable[Part],
    folder: Path,
    identity: str,
    *,
    budget: float,
    redo: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Record]:
    """Run what hasn't passed yet; a part that fails or takes too long doesn't stop the others.

    Args:
        parts: in this order.
        folder: of the state and the logs.
        identity: of code and machine; what passed under another one is run again.
        budget: seconds for all parts. A part gets what is left of it, if that is less than its
            limit, and isn't started when that is less than its least.
        redo: run what passed as well.
        say: called with lines about the progress.

    Returns:
        The records of ``parts``. After Ctrl-C the part that ran has one, later ones have none.
    """
    state, end = State(folder), time.monotonic() + budget
    done: dict[str, Record] = {}
    for part in parts:
        known = state.records.get(part.name)
        again = redo or part.always
        if known and (known.status, known.identity) == (PASSED, identity) and not again:
            done[part.name] = known
            say(f"{part.name}: passed before")
            continue
        left = end - time.monotonic() - GRACE
        if lacking := part.lacking():
            record = Record(LACKS, identity, why=f"needs {', '.join(lacking)}")
        elif left < part.least:
            record = Record(NO_TIME, identity, why="start again to go on")
        else:
            say(f"{part.name} ...")
            state.put(part.name, Record(RUNNING, identity))
            record = _executed(part, folder, identity, left)
        say(f"{part.name}: {record.status}{f' ({record.why})' if record.why else ''}")
        if record.status in (FAILED, TIMED_OUT):
            say("\n".join(f"    {line}" for line in tail(log_file(folder, part.name))))
        done[part.name] = record
        state.put(part.name, record)
        if record.status == INTERRUPTED:
            break
    return done


def log_file(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def tail(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]


def _executed(part: Part, folder: Path, identity: str, left: float) -> Record:
    path = log_file(folder, part.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with path.open("w", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(part.command)}\n")
        log.flush()
        status, why = _status(part, log.fileno(), min(part.limit, left), left)
    return Record(status, identity, round(time.monotonic() - start, 1), why)


def _status(part: Part, log: int, limit: float, left: float) -> tuple[str, str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.variables}
    try:
        # A group of its own, so that what the part starts is stopped with it.
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            process_group=0,
        )
    except OSError as error:
        return FAILED, str(error)
    with _stopped(process):
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            if limit < part.limit:
                return NO_TIME, "stopped; start again to go on"
            return TIMED_OUT, f"after {limit:.0f} s"
        except KeyboardInterrupt:
            return INTERRUPTED, ""
    return (PASSED, "") if code == 0 else (FAILED, f"exit code {code}")


@contextlib.contextmanager
def _stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ask a process to stop at the end of the block if it runs on, and kill its group."""
    try:
        yield
    finally:
        try:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def table(names: Iterable[str], records: Mapping[str, Record], folder: Path) -> str:
    """Part, status, seconds, log and reason; a part without a record wasn't reached."""
    lines = [("part", "status", "seconds", "log", "")]
    for name in names:
        record = records.get(name, Record("not reached", ""))
        log = log_file(folder, name)
        shown = str(log) if log.exists() else ""
        lines.append((name, record.status, f"{record.seconds:.1f}", shown, record.why))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justified = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in justified)
