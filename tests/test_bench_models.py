"""The benchmarks of whole models: how they measure, keep, compare and show."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import tempfile
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_fast import ops
from diffusion_fast.benchmarks.lib import environment
from diffusion_fast.benchmarks.lib.traffic import max_error
from diffusion_fast.benchmarks.models import (
    by_op,
    compare,
    in_diffusers,
    ladder,
    learning,
    limits,
    measure,
    networks,
    plots,
    report,
    run,
    store,
    variants,
    weights,
)
from diffusion_fast.engine.rewrites.cost import Cost
from diffusion_fast.training.rehearsal import Way

GROUP = store.Group("unet", "small", "float32", 1, 1)
FACTS = {
    "device": "a CPU",
    "threads": 2,
    "source": "abc",
    "torch": "2",
    "cuda": None,
    "commit": "0123",
    "diffusers": "0.42",
}


class Time:
    """A clock that only what is measured moves, each time by a factor more: drift."""

    def __init__(self, drift: float = 1.0) -> None:
        self.now, self.factor, self.drift = 0.0, 1.0, drift
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float, value: float = 1.0) -> measure.Variant:
        def call() -> Tensor:
            self.now += seconds * self.factor
            self.factor *= self.drift
            self.calls.append(name)
            return torch.tensor([value, 2.0])

        return measure.Variant(name, lambda: call, "fake")


def measured(
    time: Time, *found: measure.Variant, budget: float = 0.0, **options: Any
) -> list[dict[str, Any]]:
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    options |= {"images": 2, "steps": 4, "budget": budget, "timer": time}
    return measure.measure(found, lambda: truth, **options)


def test_speed_of_variants() -> None:
    time = Time()
    rows = measured(
        time, time.takes("eager", 0.4), time.takes("diffusers", 0.2), time.takes("engine", 0.1, 1.5)
    )
    assert [row["variant"] for row in rows] == ["eager", "diffusers", "engine"]
    engine = rows[2]
    assert [engine[name] for name in ("p20_s", "p50_s", "p80_s")] == pytest.approx([0.1] * 3)
    assert engine["steps_per_s"] == pytest.approx(40)
    assert engine["images_per_s"] == pytest.approx(20)
    assert engine["over_eager"] == pytest.approx(4)
    assert engine["over_diffusers"] == pytest.approx(2)
    assert engine["error"] == pytest.approx(0.25)
    assert rows[0]["error"] == 0
    assert "over_eager" not in rows[0]
    assert engine["samples"] == measure.LEAST_ROUNDS


def test_joules_are_of_whole_images_only_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "energy_joules", lambda call, seconds: 12.0)
    time, truth = Time(), torch.tensor([1.0, 2.0])
    for images, wanted in ((3, 4.0), (None, None)):
        options = {"images": images, "steps": 2, "budget": 0.0, "timer": time}
        (row,) = measure.measure([time.takes("eager", 0.1)], lambda: truth, **options)
        assert row.get("joules_per_image") == wanted
        assert row["joules_per_step"] == 6.0
        assert ("images_per_s" in row) == (images is not None)


def test_variants_take_turns_and_none_is_always_first() -> None:
    time = Time()
    measured(time, time.takes("a", 1.0), time.takes("b", 1.0))
    rounds = time.calls[-2 * measure.LEAST_ROUNDS :]
    assert rounds == ["a", "b", "b", "a"] * 2 + ["a", "b"]


def test_a_machine_that_slows_down_changes_no_ratio_much() -> None:
    time = Time(drift=1.1)
    eager, engine = measured(time, time.takes("eager", 0.2), time.takes("engine", 0.1))
    assert eager["p80_s"] > 1.5 * eager["p20_s"]
    assert engine["over_eager"] == pytest.approx(2, rel=0.11)


def test_short_calls_are_repeated_and_the_budget_ends_it() -> None:
    time = Time()
    (row,) = measured(time, time.takes("eager", 0.001), budget=0.1)
    assert row["p50_s"] == pytest.approx(0.001)
    more = 0 if measure.GPU else 1  # a call after each pause
    assert len(time.calls) == 2 + (10 + more) * row["samples"]
    assert row["samples"] == pytest.approx(10, abs=1)


def fails(error: Exception) -> measure.Variant:
    def build() -> Callable[[], Tensor]:
        raise error

    return measure.Variant("engine", build)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("tried to allocate 1 TB"), "out of memory"),
        (ModuleNotFoundError("No module", name="diffusers"), "diffusers is not installed"),
        (measure.NotRun("not asked for"), "not asked for"),
        (RuntimeError("compile\nfailed"), "RuntimeError: compile failed"),
    ],
)
def test_what_cannot_run_is_a_row_that_says_why(error: Exception, reason: str) -> None:
    time = Time()
    rows = measured(time, time.takes("eager", 0.1), fails(error))
    assert rows[1] == {"variant": "engine", "reason": reason}
    assert rows[0]["p50_s"] == pytest.approx(0.1)


def test_another_shape_is_no_result() -> None:
    time, wrong = Time(), measure.Variant("engine", lambda: lambda: torch.ones(3), "fake")
    rows = measured(time, time.takes("eager", 0.1), wrong)
    assert rows[1]["reason"] == "ValueError: expected shape [2], got [3]"


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def build() -> Callable[[], Tensor]:
        kept = torch.ones(1000)

        def call() -> Tensor:
            torch.ones(5000)  # gone before the next one
            return torch.ones(2000).mul_(kept[0])

        return call

    _, _, peak, _ = measure.peak_memory(measure.Variant("x", build))
    assert 4 * 6000 <= peak < 4 * 7000


def test_a_call_that_takes_long_is_made_once_more_and_that_is_the_sample() -> None:
    time = Time()
    (row,) = measured(time, time.takes("eager", 20.0), rounds=1)
    assert row["samples"] == 1
    assert row["p20_s"] == row["p50_s"] == row["p80_s"] == pytest.approx(20)
    assert len(time.calls) == 2


def test_errors_against_a_variant() -> None:
    time = Time()
    wanted = time.takes("diffusers", 0.1, 1.5), time.takes("engine", 0.1)
    options: Any = {"images": 1, "steps": 1, "budget": 0.0, "timer": time}
    other, engine = measure.measure(wanted, "engine", **options)
    assert (other["variant"], engine["variant"]) == ("diffusers", "engine")
    assert other["error"] == pytest.approx(0.25)
    assert "error" not in engine


def test_what_is_measured_once_for_a_machine_is_so_in_a_brief_call() -> None:
    time = Time()
    long, brief = time.takes("long", 1.0), time.takes("brief", 0.1)
    measure.peak_memory(measure.Variant("engine", long.build, brief=brief.build))
    assert time.calls == ([] if measure.GPU else ["brief"]) + ["long"]


# Room ------------------------------------------------------------------------------------------


def with_room(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda: gigabytes * 1e9)


def holding(variant: measure.Variant, gigabytes: float) -> measure.Variant:
    return dataclasses.replace(variant, holds=int(gigabytes * 1e9))


@pytest.mark.parametrize(("room", "in_files", "apart"), [(5, 0, False), (3, 0, True), (5, 3, True)])
def test_variants_without_room_beside_each_other_are_measured_apart(
    monkeypatch: pytest.MonkeyPatch, room: float, in_files: float, apart: bool
) -> None:
    with_room(monkeypatch, room)
    time = Time()
    pair = holding(time.takes("eager", 2.0), 2), holding(time.takes("engine", 1.0), 2)
    eager, engine = measured(time, *pair, in_files=int(in_files * 1e9))
    turns = "".join(name[1] for name in time.calls)
    assert (turns == "a" * (len(turns) // 2) + "n" * (len(turns) // 2)) == apart
    assert engine.get("turns") == eager.get("turns") == (measure.APART if apart else None)
    assert engine["over_eager"] == pytest.approx(2)


def test_only_one_variant_that_is_measured_apart_is_there_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_room(monkeypatch, 1)
    there: weakref.WeakSet[Callable[[], Tensor]] = weakref.WeakSet()
    time, most = Time(), []

    def build() -> Callable[[], Tensor]:
        plain = time.takes("", 1.0).build()

        def call() -> Tensor:
            return plain()

        there.add(call)
        most.append(len(there))
        return call

    one = holding(measure.Variant("eager", build, "fake"), 1)
    measured(time, one, dataclasses.replace(one, name="engine"))
    assert most == [1, 1]


def test_what_does_not_fit_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, 1.5)
    time = Time()
    small, large = measured(time, time.takes("eager", 0.1), holding(time.takes("engine", 1), 12.34))
    assert large["reason"] == "needs about 12.3 GB, 1.5 are free"
    assert small["error"] == 0
    assert set(time.calls) == {"eager"}


@pytest.mark.skipif(measure.GPU, reason="room on CPUs")
@pytest.mark.parametrize("installed", [True, False])
def test_programs_that_keep_weights_of_their_own_need_room(
    small: networks.Networks, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    version = "1" if installed else "not installed"
    monkeypatch.setattr(variants.hardware, "package_version", lambda _: version)
    needs = {one.name: one.holds for one in variants.step_variants(small, 1, 1, False)}
    own = sum(one.nbytes for one in small.unet.parameters())
    assert needs["engine"] > own
    assert (needs["openvino"] > own) == (needs["onnxruntime"] > own) == installed
    assert needs["diffusers"] == needs["model"] == needs["diffusers compiled"] == 0


@torch.no_grad()
def test_the_truth_has_no_wide_copy_of_the_weights(small: networks.Networks) -> None:
    x, t, given = variants.step_input(small, 1)
    wide = copy.deepcopy(small.unet).double()
    given = {name: one.double() for name, one in given.items()}
    expected = variants.on_reference(lambda: wide(x.double(), t, **given))()
    assert torch.equal(variants.step_truth(small, 1, 1), expected)
    exact = small.exact("unet").unet
    for (name, one), own in zip(exact.named_parameters(), small.unet.parameters(), strict=True):
        assert one.dtype == torch.float64, name
        assert one.kept.data_ptr() == own.data_ptr(), name


def test_large_weights_lie_in_a_file(
    small: networks.Networks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(networks, "LARGE", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = networks.Networks(small.kind, torch.float32, torch.device("cpu"))
    for ours, plain in zip(found.unet.parameters(), small.unet.parameters(), strict=True):
        assert torch.equal(ours, plain)
        assert ours.data_ptr() % weights.ALIGNED == 0
    assert found.in_files == found.nbytes("unet") > 0
    assert list(tmp_path.iterdir()) == []  # it goes with the weights
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2e6))
    again = networks.Networks(small.kind, torch.float32, torch.device("cpu"))
    with pytest.raises(MemoryError, match=r"needs [\d.]+ GB in .*, 0.002 are free"):
        _ = again.unet


# Models and limits -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tera"), [("sd15", 1.607), ("sdxl", 13.52)])
def test_flops_of_a_step_are_counted_from_the_models_ops(name: str, tera: float) -> None:
    kind = networks.KINDS[name]
    plain = limits.step_cost(kind, torch.bfloat16, 1, "none").total
    assert plain.flops == pytest.approx(1e12 * tera, rel=2e-3)
    assert limits.step_cost(kind, torch.bfloat16, 1).total.flops < plain.flops


def test_the_limit_is_the_slower_of_products_and_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = limits.Counter()
    counter.calls = [
        ("conv2d", (), Cost(flops=100, bytes=10)),
        ("norm", (), Cost(flops=0, bytes=60)),
    ]
    monkeypatch.setattr(limits, "GPU", False)
    assert limits.limit_seconds(counter, torch.float32) is None  # no limit is invented
    monkeypatch.setattr(limits, "GPU", True)
    monkeypatch.setattr(limits, "product_rate", lambda dtype: 50.0)
    monkeypatch.setattr(limits, "copy_rate", lambda: 20.0)
    assert limits.limit_seconds(counter, torch.float32) == pytest.approx(100 / 50 + 60 / 20)


class Divisions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name == "aten::div"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def small() -> networks.Networks:
    return networks.Networks(networks.KINDS["small"], torch.float32, torch.device("cpu"))


@torch.no_grad()
def test_the_lean_unet_of_diffusers_divides_by_one_no_more(small: networks.Networks) -> None:
    x, t, given = variants.step_input(small, 1)
    plain, lean, counts, results = in_diffusers.unet(small), in_diffusers.lean_unet(small), [], []
    for model in (plain, lean):
        with Divisions() as divisions:
            results.append(model(x, t, given["context"], return_dict=False)[0])
        counts.append(divisions.count)
    assert torch.equal(*results)
    assert counts[1] == 1  # of the time embedding
    assert counts[0] > 10
    weights = {value.data_ptr() for value in small.unet.parameters()}
    assert {value.data_ptr() for value in lean.parameters()} <= weights


def test_the_ladder_adds_one_technique_after_the_other(small: networks.Networks) -> None:
    with torch.no_grad():
        rows = ladder.measure_ladder(small, 1, 2, 0.0)
    assert [row["variant"] for row in rows] == list(ladder.ROWS)
    ran = [row for row in rows if "reason" not in row]
    assert all(row["error"] < 1e-4 for row in ran)
    launches = [row["launches"] for row in ran]
    assert launches[0] == launches[1]  # other kernels, the same ops
    assert launches[2] < launches[1]
    assert launches[-1] < 0.8 * launches[0]
    product = 1.0
    for row in ran[1:]:
        product *= row["over_last"]
        assert product == pytest.approx(row["over_eager"])
    if not environment.GPU:
        assert "no CUDA device" in rows[-1]["reason"]


def test_gradients_of_all_ways_are_alike(
    small: networks.Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a bench computes, PyTorch keeps no graph by itself, which a rehearsal needs."""
    rehearsed: list[bool] = []

    def for_step(*_: Any) -> Way:
        rehearsed.append(torch.is_grad_enabled())
        return Way(1, channels_last=True)

    monkeypatch.setattr(learning, "for_step", for_step)
    wanted = learning.gradient_variants(small, 1, 1, False)
    truth = learning.gradient_truth(small, 1, 1)
    with torch.no_grad():
        found = {
            one.name: one.build()() for one in wanted if one.name in ("eager", "model", "diffusers")
        }
    assert (len(found), rehearsed) == (3, [True] * (not environment.GPU))
    for name, gradients in found.items():
        assert max_error(gradients, truth) < 1e-4, name


@pytest.mark.skipif(measure.GPU, reason="a profile of CPUs")
def test_the_profile_adds_up_to_the_step(small: networks.Networks) -> None:
    with torch.no_grad():
        rows = by_op.measure_ops(small, 1, 2, 0.0, 1)
    assert rows[0]["variant"] == by_op.STEP
    assert [one["p50_s"] for one in rows] == sorted((one["p50_s"] for one in rows), reverse=True)
    parts = {one["variant"]: one for one in rows[1:]}
    assert sum(one["share"] for one in parts.values()) == pytest.approx(1)
    assert parts["sampler_step"]["calls"] == 1
    assert "gflops_per_s" not in parts["layer_norm"]
    for name in ("linear", "conv2d", "attention"):
        assert parts[name]["gflops_per_s"] > 0
        assert parts[name]["alone_gflops_per_s"] > 0
    counted = limits.step_cost(small.kind, torch.float32, 1).by_op
    done = (one["gflops_per_s"] * one["p50_s"] for one in rows if "gflops_per_s" in one)
    assert 1e9 * sum(done) == pytest.approx(sum(one.flops for one in counted.values()), rel=0.02)
    run_once = ops.geglu(torch.randn(2, 8))  # no longer watched
    assert run_once.shape == (2, 4)


# On disk ---------------------------------------------------------------------------------------


def row(variant: str = "engine", p50: float = 0.1, **changes: Any) -> dict[str, Any]:
    speed = {"p20_s": 0.95 * p50, "p50_s": p50, "p80_s": 1.05 * p50, "steps_per_s": 1 / p50}
    return {"variant": variant, **speed, "images_per_s": 1 / p50, "error": 1e-7, **changes}


def filled(folder: Path, *rows: dict[str, Any], facts: dict[str, Any] = FACTS) -> store.Results:
    results = store.Results(folder)
    results.add(GROUP, rows, facts)
    return results


def test_rows_are_kept_with_the_machine_they_are_from(tmp_path: Path) -> None:
    other = store.Group("loop", "small", "float32", 1, 20)
    results = filled(tmp_path, row("eager"), row())
    newer = {**FACTS, "source": "def", "commit": "4567"}
    results.add(other, [row(p50=0.2)], newer)
    read = store.Results(tmp_path)
    assert read.rows == results.rows
    assert [read.facts(r)["commit"] for r in read.rows] == ["0123", "0123", "4567"]
    assert read.current(GROUP, FACTS)
    assert not read.current(GROUP, newer)
    assert not read.current(other, FACTS)
    with (tmp_path / store.CSV).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["commit"] for line in lines] == ["0123", "0123", "4567"]
    assert lines[2]["p50_s"] == "0.2"
    read.add(GROUP, [row(p50=0.3)], newer)  # in the place of both rows of the older code
    assert [r["p50_s"] for r in read.rows] == [0.2, 0.3]
    assert len(read.environments) == 1


def test_another_file_is_no_results(tmp_path: Path) -> None:
    (tmp_path / store.JSON).write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="expected results of"):
        store.Results(tmp_path)


# Comparison ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        (row(p50=0.2), "2.00 times as long"),
        (row(p50=0.05), None),
        (row(p50=0.104), None),  # under 5 %
        (row(p50=0.12, p20_s=0.1), None),  # its samples are among the old ones
        ({"variant": "engine", "reason": "out of memory"}, "ran before, now: out of memory"),
        (row("model", 0.9), None),  # there was none before
    ],
)
def test_regressions(tmp_path: Path, now: dict[str, Any], worse: str | None) -> None:
    old, new = filled(tmp_path / "old", row()), filled(tmp_path / "new", now)
    found = compare.regressions(old, new, [GROUP])
    assert len(found) == (worse is not None)
    assert worse is None or worse in found[0]
    assert not compare.regressions(old, new, [])


def test_other_machines_are_not_compared(tmp_path: Path) -> None:
    old = filled(tmp_path / "old", row(), facts={**FACTS, "device": "another"})
    with pytest.raises(ValueError, match="--compare: expected results of the same device, a CPU"):
        compare.regressions(old, filled(tmp_path / "new", row()), [GROUP])


def test_floors(tmp_path: Path) -> None:
    group = store.Group("loop", "small", "float32", 1, 20)
    results = store.Results(tmp_path)
    results.add(group, [row(over_diffusers=1.6), row("model", over_diffusers=0.5)], FACTS)
    assert compare.missed_floors(results, [group]) == []
    results.add(group, [row(over_diffusers=1.4)], FACTS)
    assert (
        "1.40 times as fast as diffusers, expected 1.5"
        in compare.missed_floors(results, [group])[0]
    )
    results.add(group, [row()], FACTS)
    assert "not known: diffusers did not run" in compare.missed_floors(results, [group])[0]
    with pytest.raises(ValueError, match="--assert: expected a run of"):
        compare.missed_floors(results, [GROUP])


# Tables ----------------------------------------------------------------------------------------

README = "# A\n<!-- bench:cpu/unet -->\nold\n<!-- /bench:cpu/unet -->\nafter\n"


def test_a_readme_is_rewritten_between_markers(tmp_path: Path) -> None:
    filled(tmp_path / "cpu", row("eager"), {"variant": "diffusers", "reason": "not installed"})
    once = report.rewrite(README, tmp_path)
    assert once.startswith("# A\n<!-- bench:cpu/unet -->\n\n")
    assert once.endswith("\n<!-- /bench:cpu/unet -->\nafter\n")
    assert "| variant | ms | p20 to p80 | steps/s | error |\n| --- | ---: |" in once
    assert "\n| eager | 100 | 95 to 105 | 10 | 1.0e-07 |\n" in once
    assert "- not run: diffusers: not installed\n" in once
    assert "random weights; 1 image with guidance, float32; CPU, no GPU: a CPU, 2 threads" in once
    assert "old" not in once
    assert report.rewrite(once, tmp_path) == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:cpu/unet -->\n", "its end after it"),
        ("<!-- bench:cpu -->\n<!-- /bench:cpu -->", "expected <!-- bench:FOLDER/PART -->"),
        (README.replace("unet", "speed"), "expected one of unet, loop"),
        (README.replace("unet", "loop"), "expected results of loop, found none"),
    ],
)
def test_markers_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    filled(tmp_path / "cpu", row())
    with pytest.raises(ValueError, match=message):
        report.rewrite(text, tmp_path)


def test_the_readme_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path / "cpu", row())
    readme = tmp_path / "README.md"
    readme.write_text(README)
    arguments = ["report", "--readme", str(readme), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    for said in ("rewritten", "up to date"):
        report.main()
        assert capsys.readouterr().out.endswith(f"{said}\n")
    assert "| engine | 100 |" in readme.read_text()


def test_what_is_not_as_it_is_elsewhere_is_said() -> None:
    rows = [row(truth="float64"), row("eager", truth="float64", turns=measure.APART)]
    assert report.notes([rows[0]]) == []
    assert report.notes(rows) == [
        "measured one after the other: there was no memory for all of them at once"
    ]
    against = [row("engine", truth="engine", error=None), row("diffusers", truth="engine")]
    assert report.notes(against) == ["errors are differences from the result of: engine"]


def test_throttling_is_flagged() -> None:
    about = {**row(throttled=True), "what": "unet"}
    assert report.table([about])[1][0][0] == "engine (throttled)"


def test_plots(tmp_path: Path) -> None:
    results = filled(
        tmp_path, row("eager"), row(limit_steps_per_s=20.0), {"variant": "x", "reason": ""}
    )
    (path,) = plots.draw(results, [GROUP, store.Group("loop", "small", "float32", 1, 20)])
    assert path.read_bytes().startswith(b"\x89PNG")


# The GPU's state -------------------------------------------------------------------------------


class FakeNVML:
    nvmlClocksEventReasonGpuIdle, nvmlClocksEventReasonNone = 1, 0
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 0, 1, 0
    NVMLError = RuntimeError
    reasons, millijoules = 4, 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1000

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int:
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        return self.millijoules


@pytest.mark.parametrize(("reasons", "throttled"), [(0, False), (1, False), (4, True), (5, True)])
def test_state_and_energy(monkeypatch: pytest.MonkeyPatch, reasons: int, throttled: bool) -> None:
    lib = FakeNVML()
    lib.reasons = reasons
    monkeypatch.setattr(environment, "_nvml", lambda: (lib, None))

    def call() -> None:
        lib.millijoules += 500

    state = environment.state_of_gpu(call)
    assert state["throttled"] is throttled
    assert state["power_W"] == 1.0
    assert environment.energy_joules(call, 0.01) == pytest.approx(0.5)


def test_errors_of_nvml_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lib = FakeNVML()
    monkeypatch.setattr(environment, "_nvml", lambda: (lib, None))

    def fails(*_: Any) -> None:
        raise lib.NVMLError("not supported")

    assert environment._read(fails) == {"nvml": "not read: not supported"}


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", absent)
    assert environment._commit() is None


def test_the_environment_says_what_ran() -> None:
    facts = environment.environment()
    assert facts["torch"] == torch.__version__
    assert facts["device"]
    assert environment.identity(facts) == environment.identity(dict(facts))
    assert environment.identity(facts) != environment.identity({**facts, "source": "other"})
    assert set(environment.IDENTITY) <= facts.keys()


def test_groups() -> None:
    found = run.groups(["small"], ["unet", "loop"], [1, 4], "float32", 20)
    assert [str(group) for group in found] == [
        "unet, small, float32, batch 1",
        "loop, small, float32, batch 1, 20 steps",
        "unet, small, float32, batch 4",
        "loop, small, float32, batch 4, 20 steps",
    ]
