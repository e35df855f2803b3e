"""``diffusion-fast bench``: whole models on this machine, beside PyTorch and diffusers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import check_folder

MODELS, BATCHES = {False: "small", True: "small,sd15,sdxl"}, {False: "1", True: "1,4,16"}


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="small, emoji, sd15, sdxl, sdxl-512 or several; sd15-controlnet, sd15-ip-adapter"
            " (a step beside the bare one). Without it small, sd15 and sdxl on a GPU, else small."
        ),
    ] = None,
    what: Annotated[
        str,
        typer.Option(
            help="unet, loop, pipeline, vae, text, training, ladder, profile (the engine's"
            " step by op, on a CPU) or several."
        ),
    ] = "unet,loop,pipeline,ladder",
    batch: Annotated[
        str | None, typer.Option(help="Images at once, such as 1,4,16; without a GPU 1.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the loop.", min=1)] = 20,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 on a GPU, else float32; or float16.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(help="torch.compile diffusers too, which takes minutes; on a GPU it is done."),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="Rows to measure, such as diffusers,openvino,engine; all by default."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="How long to measure each group of rows.", min=0)
    ] = 5.0,
    rounds: Annotated[
        int,
        typer.Option(help="Turns that each row takes at least; 1 for what takes minutes.", min=1),
    ] = 5,
    truth: Annotated[
        str,
        typer.Option(
            help="What errors are against: exact (the same in a higher precision), or a row such as"
            " engine, where that takes too long."
        ),
    ] = "exact",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; benchmarks/results/ and the device's name."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="Folder of older results: exit 1 if something became slower."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Append what was measured to this CSV file, a line for each variant."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--assert", help="Exit 1 below the speed expected on a CPU over diffusers."),
    ] = False,
) -> None:
    """Measure U-Net step, loop, pipeline and each technique, beside PyTorch and diffusers.

    All weights are random. What was measured with this code on this machine is kept, so that a run
    that was stopped goes on; another --out measures again.
    """
    run, store, report = (_part(f"models.{name}") for name in ("run", "store", "report"))
    environment, versus = _part("lib.environment"), _part("models.compare")
    gpu: bool = environment.GPU
    dtype = dtype or ("bfloat16" if gpu else "float32")
    names = {
        "--model": _several("--model", model or MODELS[gpu], _part("models.networks").KINDS),
        "--what": _several("--what", what, run.WHATS),
    }
    _several("--dtype", dtype, run.DTYPES)
    titles = _part("models.variants").TITLES
    only = None if variants is None else _several("--variants", variants, titles)
    _several("--truth", truth, (run.EXACT, *(titles if only is None else only)))
    wanted = run.groups(
        names["--model"], names["--what"], _batches(batch or BATCHES[gpu]), dtype, steps
    )
    old = None
    if compare is not None:
        if not (compare / store.JSON).is_file():
            raise ValueError(f"--compare: expected a folder with {store.JSON}, got {compare}")
        old = store.Results(compare)
    history = _part("models.history")
    if record is not None:
        history.read(record)  # a file that is no history is refused before anything is measured
    out = out or report.RESULTS / environment.folder_name()
    check_folder("--out", out)
    results = store.Results(out)
    run.run(
        wanted,
        results,
        compiles=gpu if compile is None else compile,
        only=only,
        budget=seconds,
        rounds=rounds,
        truth=truth,
        say=lambda line: typer.echo(line, err=True),
    )
    report.show(results, wanted)
    typer.echo(_drawn(results, wanted))
    if record is not None:
        typer.echo(f"recorded {history.record(record, results, wanted)} new lines in {record}")
    problems = [] if old is None else _compared(versus, old, results, wanted)
    problems += versus.missed_floors(results, wanted) if check else []
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)


def _part(name: str) -> Any:
    """A module of the benchmarks, which the tree has in a folder of its own."""
    return importlib.import_module(f"diffusion_fast.benchmarks.{name}")


def _several(option: str, text: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: expected some of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(names))


def _batches(text: str) -> list[int]:
    try:
        values = [int(value) for value in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise ValueError(f"--batch: expected positive integers such as 1,4,16, got {text!r}")
    return list(dict.fromkeys(values))


def _drawn(results: Any, wanted: list[Any]) -> str:
    try:
        count = len(_part("models.plots").draw(results, wanted))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return f"wrote {results.folder}; no plots: matplotlib is not installed"
    return f"wrote {results.folder}: results.json, results.csv and {count} plots"


def _compared(versus: Any, old: Any, results: Any, wanted: list[Any]) -> list[str]:
    found: list[str] = versus.regressions(old, results, wanted)
    rows = versus.compared(old, results, wanted)
    typer.echo(f"compared {rows} rows with {old.folder}: {len(found)} are worse")
    return found
