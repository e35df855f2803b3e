"""The run on a GPU, without one: parts that fail, hang, lack something or run out of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import rows, runner, small_calls  # noqa: E402
from benchmarks.gpu.identity import identity  # noqa: E402
from benchmarks.gpu.parts import MINUTES, all_parts  # noqa: E402
from benchmarks.gpu.runner import Part, Record, State, run, table  # noqa: E402
from diffusion_fast.ops.dispatch import known_ops  # noqa: E402

# Writes where its child is, and waits for ever; the child too.
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def python(name: str, code: str, limit: float = 60, least: float = 1, always: bool = False) -> Part:
    return Part(name, (sys.executable, "-c", code), limit, least, always=always)


def count(folder: Path, name: str, then: str = "") -> str:
    """Code that leaves a line behind each time it runs."""
    return f"open({str(folder / name)!r}, 'a').write('ran\\n'); {then}"


def ran(folder: Path, name: str) -> int:
    path = folder / name
    return len(path.read_text().splitlines()) if path.exists() else 0


def go(
    folder: Path,
    parts: Sequence[Part],
    *,
    budget: float = 1000,
    identity: str = "this code",
    redo: bool = False,
) -> tuple[dict[str, Record], list[str]]:
    said: list[str] = []
    found = run(parts, folder / "out", identity, budget=budget, redo=redo, say=said.append)
    return found, said


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def child_of(log: Path) -> int | None:
    """The number that HANGS wrote."""
    lines = log.read_text().splitlines() if log.exists() else []
    return next((int(line) for line in lines if line.isdecimal()), None)


def gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 1.0)


def test_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    parts = [
        python("good", "print('hello')"),
        python("bad", "print('a reason'); raise SystemExit(3)"),
        Part("absent", ("/no/such/program",)),
        python("last", "pass"),
    ]
    found, said = go(tmp_path, parts)
    assert [record.status for record in found.values()] == ["passed", "failed", "failed", "passed"]
    assert found["bad"].why == "exit code 3"
    assert "/no/such/program" in found["absent"].why
    assert any("a reason" in line for line in said)
    log = (tmp_path / "out" / "logs" / "good.log").read_text().splitlines()
    assert log[0].startswith("$ ")
    assert log[1:] == ["hello"]


def test_what_passed_is_not_run_again(tmp_path: Path) -> None:
    parts = [
        python("once", count(tmp_path, "once")),
        python("bad", count(tmp_path, "bad", "raise SystemExit(1)")),
        python("always", count(tmp_path, "always"), always=True),
    ]
    for _ in range(2):
        found, said = go(tmp_path, parts)
    assert found["once"].status == "passed"
    assert "once: passed before" in said
    assert [ran(tmp_path, name) for name in ("once", "bad", "always")] == [1, 2, 2]
    go(tmp_path, parts[:1], identity="other code")
    assert ran(tmp_path, "once") == 2
    go(tmp_path, parts[:1], identity="other code", redo=True)
    assert ran(tmp_path, "once") == 3


@pytest.mark.usefixtures("_impatient")
def test_a_part_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    parts = [python("hangs", HANGS, limit=2), python("next", "pass")]
    found, _ = go(tmp_path, parts)
    assert (found["hangs"].status, found["hangs"].why) == ("timed out", "after 2 s")
    assert 2 <= found["hangs"].seconds < 30
    assert found["next"].status == "passed"
    child = child_of(tmp_path / "out" / "logs" / "hangs.log")
    assert child is not None
    assert gone(child)


@pytest.mark.usefixtures("_impatient")
def test_a_part_that_ignores_the_wish_to_stop_is_killed(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(2, signal.SIG_IGN); import time; time.sleep(600)"
    found, _ = go(tmp_path, [python("deaf", deaf, limit=2)])
    assert found["deaf"].status == "timed out"
    assert found["deaf"].seconds < 30


def test_a_part_may_write_what_it_has_when_its_time_is_up(tmp_path: Path) -> None:
    code = f"""
import time
import tomllib
try:
    time.sleep(600)
except KeyboardInterrupt:
    open({str(tmp_path / "partial")!r}, "w").write("rows")
"""
    found, _ = go(tmp_path, [python("slow", code, limit=2)])
    assert found["slow"].status == "timed out"
    assert (tmp_path / "partial").read_text() == "rows"


@pytest.mark.usefixtures("_impatient")
def test_the_budget_is_kept_and_the_next_start_goes_on(tmp_path: Path) -> None:
    parts = [
        python("first", count(tmp_path, "first")),
        python("slow", count(tmp_path, "slow", "import time; time.sleep(600)"), limit=300),
        python("later", count(tmp_path, "later"), least=10),
    ]
    start = time.monotonic()
    found, _ = go(tmp_path, parts, budget=5)
    assert time.monotonic() - start < 8
    assert [record.status for record in found.values()] == ["passed"] + ["no time left"] * 2
    assert ran(tmp_path, "later") == 0
    found, _ = go(tmp_path, [parts[0], parts[2]])
    assert [record.status for record in found.values()] == ["passed", "passed"]
    assert [ran(tmp_path, name) for name in ("first", "later")] == [1, 1]


def test_what_a_part_lacks_is_named(tmp_path: Path) -> None:
    part = Part("part", ("true",), packages=("json", "no_such_package"), tools=("sh", "no-tool"))
    found, _ = go(tmp_path, [part])
    assert found["part"].status == "not possible"
    assert found["part"].why == "needs no_such_package, no-tool"


INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from benchmarks.gpu import runner
from benchmarks.gpu.runner import Part, run
runner.GRACE = 1.0
import signal
signal.signal(signal.SIGTERM, signal.default_int_handler)
hangs = (sys.executable, "-c", sys.argv[3])
parts = [Part("first", ("true",)), Part("hangs", hangs, 600), Part("last", ("true",))]
found = run(parts, Path(sys.argv[2]), "this code", budget=1000)
print([(name, record.status) for name, record in found.items()])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle(number: signal.Signals, tmp_path: Path) -> None:
    """Whatever ends it, the state is whole, and the part that ran is run again."""
    command = [sys.executable, "-c", INTERRUPTED, str(ROOT), str(tmp_path), HANGS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    log, end = tmp_path / "logs" / "hangs.log", time.monotonic() + 60
    while (child := child_of(log)) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert State(tmp_path).records["hangs"].status == "running"
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    status = State(tmp_path).records["hangs"].status
    if number == signal.SIGKILL:
        os.killpg(os.getpgid(child), signal.SIGKILL)
        assert status == "running"
    else:
        assert gone(child)
        assert status == "interrupted"
        assert "('first', 'passed'), ('hangs', 'interrupted')]" in printed
    parts = [Part("first", ("false",)), Part("hangs", ("true",)), Part("last", ("true",))]
    found = run(parts, tmp_path, "this code", budget=1000, say=lambda line: None)
    assert [record.status for record in found.values()] == ["passed"] * 3


def test_the_state_is_whole_when_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(tmp_path)
    state.put("part", Record("passed", "this code"))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        state.put("part", Record("failed", "this code"))
    assert State(tmp_path).records == {"part": Record("passed", "this code")}
    assert [path.name for path in tmp_path.iterdir()] == [runner.STATE]


@pytest.mark.parametrize("text", ["{}", '{"parts": 1}', '{"parts": {"a": {"status": 1}}}', "[1"])
def test_another_file_in_the_place_of_the_state(text: str, tmp_path: Path) -> None:
    (tmp_path / runner.STATE).write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        State(tmp_path)


def test_table(tmp_path: Path) -> None:
    parts = [python("good", "pass"), Part("lacks", (), tools=("no-tool",))]
    found, _ = go(tmp_path, parts)
    lines = table(["good", "lacks", "other"], found, tmp_path / "out").splitlines()
    assert lines[0].split() == ["part", "status", "seconds", "log"]
    assert lines[1].split()[:2] == ["good", "passed"]
    assert lines[1].endswith("good.log")
    assert lines[2].split() == ["lacks", "not", "possible", "0.0", "needs", "no-tool"]
    assert lines[3].split() == ["other", "not", "reached", "0.0"]


def test_identity_sees_every_edit(tmp_path: Path) -> None:
    names = ("diffusion_fast/a.py", "kernels/b.py", "csrc/x/c.cuh", "tests/d.py", "benchmarks/e.py")
    for name in (*names, "docs/f.py", "benchmarks/results/g.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    facts = {"device": "one", "time": "now"}
    seen = {identity(facts, tmp_path), identity(facts | {"device": "other"}, tmp_path)}
    for name in names:
        (tmp_path / name).write_text("2")
        seen.add(identity(facts, tmp_path))
    assert len(seen) == 2 + len(names)
    (tmp_path / "docs" / "f.py").write_text("2")
    (tmp_path / "benchmarks" / "results" / "g.json").write_text("2")
    assert identity(facts | {"time": "later"}, tmp_path) in seen


# The command -----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: expected a CUDA device")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """As if there were one, with these parts to run."""
    parts = [python("good", "pass"), python("bad", "raise SystemExit(1)"), python("slow", HANGS)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "environment", dict)
    monkeypatch.setattr(command, "all_parts", lambda folder: parts)
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return parts


@pytest.mark.usefixtures("on_a_gpu")
def test_choosing_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert command.main([*out, "--only", "good"]) == 0
    assert command.main([*out, "--only", "good", "bad"]) == 1
    last = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in last] == ["part", "good", "bad"]
    assert command.main([*out, "--only", "wrong", "good"]) == 2
    assert "no part wrong" in capsys.readouterr().err
    assert command.main([*out, "--only", "slow", "--minutes", "0"]) == 0
    assert "start again to go on" in capsys.readouterr().out


def test_ctrl_c(tmp_path: Path, on_a_gpu: list[Part]) -> None:
    ctrl_c = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(600)"
    on_a_gpu[0] = python("good", ctrl_c)
    assert command.main(["--out", str(tmp_path), "--only", "good", "bad"]) == 130
    assert State(tmp_path).records.keys() == {"good"}


# The parts themselves --------------------------------------------------------------------------

PARTS = {part.name: part for part in all_parts(Path("out"))}


def with_module(name: str) -> list[Part]:
    return [part for part in PARTS.values() if name in part.command]


def test_names_and_limits() -> None:
    assert len(PARTS) == len(all_parts(Path("out")))
    for part in PARTS.values():
        # A part that needs more than one start of five minutes could never pass.
        assert 0 <= part.least <= part.limit <= 60 * MINUTES - 2 * runner.GRACE, part.name


def test_a_machine_that_is_lent_for_minutes_shows_whole_models_first() -> None:
    parts = list(PARTS.values())
    names = [part.name for part in parts]
    first = parts[: names.index("model-sd15") + 1]
    assert sum(part.limit for part in first) <= 60 * MINUTES - runner.GRACE
    tests = [name for name in names if name.startswith("tests-")]
    assert names.index("model-sdxl") < names.index("ops-attention") < names.index(tests[0])
    needed = {package for part in first for package in part.packages}
    assert not needed  # nothing but what the package itself depends on


BARE = """
import runpy, sys
for name in ("diffusers", "platformdirs", "pynvml", "pytest", "pybind11"):
    sys.modules[name] = None
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A module of a checkout that nobody installed, with what the package depends on alone."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *packages])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-S", "-c", BARE, *arguments]  # -S: no editable installation
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_bare_checkout_reaches_the_point_where_a_device_is_asked_for() -> None:
    doctor = bare("diffusion_fast", "doctor")
    assert doctor.returncode == 0, doctor.stderr
    assert "group_norm_silu" in doctor.stdout
    build, run = bare("benchmarks.gpu.build"), bare("benchmarks.gpu")
    assert build.returncode == 2
    assert build.stdout.startswith("error: expected a GPU of compute capability 8.0")
    assert run.returncode == 2
    assert run.stderr.startswith("error: expected a CUDA device"), run.stderr


TESTS = [part for part in with_module("pytest") if not part.name.startswith("ops-")]


@pytest.mark.parametrize("part", TESTS, ids=lambda part: part.name)
def test_selections_find_tests(part: Part, tmp_path: Path) -> None:
    options = [word.replace("out/", f"{tmp_path}/") for word in part.command[3:]]
    if "-n" in options:  # several processes don't collect alike
        del options[options.index("-n") :][:2]
    command = [*part.command[:3], "--collect-only", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_benchmarks_of_all_ops(tmp_path: Path) -> None:
    parts = [part for part in with_module("pytest") if part.name.startswith("ops-")]
    files = [next(word for word in part.command if word.endswith(".py")) for part in parts]
    assert all((ROOT / file).is_file() for file in files)
    known = {op.removesuffix("_backward").removesuffix("_philox") for op in known_ops}
    assert {Path(file).stem.removeprefix("bench_") for file in files} == known


@pytest.mark.parametrize("part", with_module("diffusion_fast"), ids=lambda part: part.name)
def test_commands_are_spelt_right(part: Part) -> None:
    import typer

    from diffusion_fast.cli import app

    name, *options = part.command[part.command.index("diffusion_fast") + 1 :]
    group = typer.main.get_command(app)
    found = group.get_command(None, name)  # type: ignore[attr-defined]
    context = found.make_context(name, options)
    for value in ("what", "model"):
        if value in context.params:
            from diffusion_fast.benchmarks.models import networks, run

            known = {"what": run.WHATS, "model": networks.KINDS}[value]
            assert set(context.params[value].split(",")) <= set(known)


def test_modules_of_parts_exist() -> None:
    for part in PARTS.values():
        script = part.command[1]
        if script.endswith(".py"):
            assert (ROOT / script).is_file(), script
            continue
        module = part.command[part.command.index("-m") + 1]
        assert runner.importlib.util.find_spec(module) is not None, module


def test_all_triton_kernels_are_called() -> None:
    """In a process of its own, where triton is the interpreter."""
    code = """
import torch
from diffusion_fast import ops
from benchmarks.gpu import small_calls
for name, call in small_calls.calls("cpu"):
    if " 61 " not in name:  # which takes long here
        with ops.use_backend("triton"):
            call()
for choice in ops.explain():
    if choice.last_ran != "triton":
        print(choice.op)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == {"attention", "attention_backward", "conv2d_backward"}


def test_every_config_runs() -> None:
    seen: list[int] = []
    assert small_calls.every_config("kernel", (), [3, 1, 2], seen.append, "cpu") == 3
    assert seen == [3, 1, 2]


def test_rows(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    for op, info in (("geglu", {"cold_us": {"p50": 2.0}}), ("linear", {"device": "one"})):
        benchmark = {"name": f"test_{op}[a]", "stats": {"median": 0.5}, "extra_info": info}
        (tmp_path / "ops" / f"{op}.json").write_text(json.dumps({"benchmarks": [benchmark]}))
    assert rows.write(tmp_path) == 2
    assert (tmp_path / rows.NAME).read_text().splitlines() == [
        "op,benchmark,wall_s,cold_us_p50,device",
        "geglu,test_geglu[a],0.5,2.0,",
        "linear,test_linear[a],0.5,,one",
    ]
    (tmp_path / "ops" / "linear.json").write_text("{")
    with pytest.raises(ValueError, match=r"linear\.json"):
        rows.write(tmp_path)
    assert len((tmp_path / rows.NAME).read_text().splitlines()) == 3


def test_a_gpu_images_pytest_is_new_enough() -> None:
    """Images that hold PyTorch hold pytest 8; one that is too old would end every part."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    least = settings["tool"]["pytest"]["ini_options"]["minversion"]
    assert int(least.split(".")[0]) <= 8
