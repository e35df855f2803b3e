"""``diffusion-fast bench`` on the small model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from diffusion_fast.benchmarks.lib.environment import GPU
from diffusion_fast.benchmarks.models import run as work
from diffusion_fast.benchmarks.models import store
from diffusion_fast.benchmarks.models.variants import NOT_COMPILED, TITLES

SHORT = ("--seconds", 0, "--steps", 2, "--model", "small", "--dtype", "float32", "--batch", 1)
MISSING = ("openvino", "onnxruntime")
PEERS = ["diffusers compiled", *MISSING]
ALL = [name for name in TITLES if not name.startswith("bare")]
WANTED = {
    "unet": ALL,
    "loop": ALL,
    "pipeline": ALL,
    "vae": [name for name in ALL if name != "diffusers lean"],
    "text": ["diffusers", *PEERS],
    "training": ["eager", "model", "diffusers"],
}


def bench(out: Path, *options: object) -> Any:
    return run("bench", *SHORT, "--no-compile", "--out", out, *options)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "results"
    with pytest.MonkeyPatch.context() as patch:
        for name in MISSING:
            patch.setitem(sys.modules, name, None)
        done = bench(folder, "--what", "unet,loop,pipeline,vae,text,training")
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stdout
    assert GPU or "CPU, no GPU" in done.stdout
    assert f"not run: diffusers compiled: {NOT_COMPILED}" in done.stdout
    return folder


def test_every_variant_computes_the_same(out: Path) -> None:
    results = store.Results(out)
    for what, wanted in WANTED.items():
        rows = [row for row in results.rows if row["what"] == what]
        assert [row["variant"] for row in rows] == wanted
        for row in rows:
            if row["variant"] == "diffusers compiled":
                assert row["reason"] == NOT_COMPILED
                continue
            if row["variant"] in MISSING:
                name = row["variant"]
                assert row["reason"] == (
                    "a peer on CPUs alone" if GPU else f"{name} is not installed"
                )
                continue
            assert row["error"] < 1e-4, row
            assert row["truth"] == "float64"
            assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
            assert row["peak_bytes"] > 0
            assert ("limit_steps_per_s" in row) == (GPU and what in ("unet", "loop"))
    backends = {row["variant"]: row.get("backend") for row in results.rows}
    assert backends["eager"].startswith("reference: ")
    assert ";" not in backends["eager"]
    assert backends["diffusers"] == "torch"


def test_a_finished_part_is_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "measure", None)
    before = store.Results(out).rows
    history = out.parent / "history.csv"
    done = bench(out, "--what", "unet", "--compare", out, "--record", history)
    assert done.returncode == 0, done.stderr
    assert "recorded 5 new lines" in done.stdout
    assert history.read_text().count("unet") == 5
    assert "kept" in done.stderr
    assert "compared 5 rows" in done.stdout
    assert store.Results(out).rows == before


def test_what_became_slower_ends_with_1(out: Path, tmp_path: Path) -> None:
    old = store.Results(tmp_path)
    for group in dict.fromkeys(map(store.group_of, store.Results(out).rows)):
        rows = store.Results(out).of(group)
        faster = [
            {k: v / 3 if k.startswith("p") and k.endswith("_s") else v for k, v in row.items()}
            for row in rows
        ]
        old.add(group, faster, store.Results(out).facts(rows[0]))
    done = bench(out, "--what", "unet", "--compare", tmp_path)
    assert done.returncode == 1
    assert "unet, small, float32, batch 1, engine: 3.00 times as long" in done.stderr


def test_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    done = bench(tmp_path, "--what", "unet")
    assert done.returncode == 0, done.stderr
    assert "diffusers is not installed" in " ".join(done.stdout.split())
    rows = {row["variant"]: row for row in store.Results(tmp_path).rows}
    assert rows["engine"]["over_eager"] > 0
    assert "over_diffusers" not in rows["engine"]


def test_a_model_that_cannot_be_made_is_rows_that_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(work.Networks, "unet", property(fail))
    done = bench(tmp_path, "--what", "unet,ladder")
    assert done.returncode == 0, done.stderr
    rows = store.Results(tmp_path).rows
    assert {row["reason"] for row in rows} == {"MemoryError: no room"}
    assert {row["variant"] for row in rows} >= {*TITLES, "shared_prefix"}


def test_variants_that_are_asked_for(tmp_path: Path) -> None:
    kept = []
    for names in ("diffusers,engine", "engine", "model,engine,bare engine"):
        done = bench(tmp_path, "--what", "vae", "--variants", names)
        assert done.returncode == 0, done.stderr
        kept.append("kept" in done.stderr)
    assert kept == [False, True, False]
    model, engine, bare = store.Results(tmp_path).rows
    assert (model["variant"], engine["variant"], bare["variant"]) == (
        "model",
        "engine",
        "bare engine",
    )
    assert bare["reason"] == work.NO_WAY
    assert "over_diffusers" not in engine


@pytest.mark.skipif(GPU, reason="a profile of CPUs")
def test_a_profile_and_one_turn_against_the_engine(tmp_path: Path) -> None:
    done = bench(
        tmp_path,
        *("--what", "profile,loop", "--variants", "diffusers,engine"),
        *("--rounds", 1, "--truth", "engine"),
    )
    assert done.returncode == 0, done.stderr
    assert "the engine's step by op" in done.stdout
    assert "errors are differences from the result of: engine" in done.stdout
    rows = store.Results(tmp_path).rows
    assert {row["samples"] for row in rows} == {1}
    profile = [row for row in rows if row["what"] == "profile"]
    assert {"whole step", "linear", "sampler_step"} <= {row["variant"] for row in profile}
    diffusers, engine = (row for row in rows if row["what"] == "loop")
    assert diffusers["error"] < 1e-4
    assert "error" not in engine


def test_the_truth_is_a_row_that_is_measured(tmp_path: Path) -> None:
    done = bench(tmp_path, "--variants", "diffusers", "--truth", "engine")
    assert done.returncode != 0
    assert "--truth: expected some of exact, diffusers, got 'engine'" in done.stderr


@pytest.mark.parametrize("steering", ["controlnet", "ip-adapter"])
def test_a_steered_step_beside_the_bare_one(steering: str, tmp_path: Path) -> None:
    names = "diffusers,engine,bare diffusers,bare engine"
    done = bench(tmp_path, "--model", f"small-{steering}", "--variants", names)
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in store.Results(tmp_path).rows}
    assert ",".join(rows) == names
    assert all(row["what"] == "unet" and row["error"] < 1e-4 for row in rows.values())
    ratio = rows["engine"]["over_diffusers"] / rows["bare engine"]["over_diffusers"]
    assert rows["engine"]["of_bare"] == pytest.approx(ratio)
    assert "of the bare ratio" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--what", "nothing"), "--what: expected some of unet, loop, pipeline, vae, text,"),
        (("--model", "sd9"), "--model: expected some of small, emoji, sd15, sdxl, sdxl-512,"),
        (("--batch", "1,0"), "--batch: expected positive integers such as 1,4,16, got '1,0'"),
        (("--variants", "ours"), "--variants: expected some of eager, model, diffusers,"),
        (("--model", "small-controlnet", "--what", "vae"), "--what: expected unet for a steered"),
        (("--dtype", "int8"), "--dtype: expected some of float32, bfloat16, float16"),
        (("--compare", "missing"), "--compare: expected a folder with results.json, got missing"),
        (("--what", "unet", "--assert"), "--assert: expected a run of"),
    ],
)
def test_options_that_are_wrong(out: Path, options: tuple[str, ...], message: str) -> None:
    done = bench(out, *options)
    assert done.returncode == 1
    assert message in done.stderr
