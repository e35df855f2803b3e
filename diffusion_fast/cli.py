"""The command line: train, sample, doctor."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .ops.backend import Choice

if TYPE_CHECKING:
    from .models import UNetConfig
    from .schedule import DiffusionSchedule

app = typer.Typer(
    help="Train and sample diffusion models, and see what runs on this machine.\n\n"
    "Start with: diffusion-fast train --out model, then diffusion-fast sample model -o out.png",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
SCHEDULER = Path("scheduler") / "scheduler_config.json"
MOST_LINES = 6  # of an error that lists what is wrong, such as the tensors of a checkpoint


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """What every command shares; ``--debug`` itself is read in :func:`main`."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    data: Annotated[
        str,
        typer.Option(
            help="What to train on: digits (1,797 real scans, 8x8 pixels), or a folder with a"
            " subfolder of images for each class."
        ),
    ] = "digits",
    image_size: Annotated[
        int, typer.Option(help="Height and width of the images of a folder.", min=8)
    ] = 32,
    broken: Annotated[
        str, typer.Option(help="Files of a folder that can't be read: refuse or skip.")
    ] = "refuse",
    steps: Annotated[int, typer.Option(help="Batches to train on.", min=1)] = 800,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 64,
    accumulate: Annotated[
        int, typer.Option(help="Parts to cut each batch into, to save memory.", min=1)
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-3,
    prediction_type: Annotated[
        str, typer.Option(help="What the network predicts: epsilon, v_prediction or sample.")
    ] = "epsilon",
    loss_weighting: Annotated[
        str, typer.Option(help="How much each noise level counts: none, p2 or min_snr.")
    ] = "none",
    timestep_sampling: Annotated[
        str, typer.Option(help="Timesteps to train on: uniform, importance or logit_normal.")
    ] = "uniform",
    precision: Annotated[
        str, typer.Option(help="float32, or bfloat16 for mixed precision.")
    ] = "float32",
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Run the network through torch.compile.")
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints, in OUT/checkpoints; none by default.", min=1),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    log: Annotated[Path | None, typer.Option(help="CSV file for the loss of every step.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and noise.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1 ...")] = "cpu",
) -> None:
    """Train a small class-conditional U-Net, and write a folder that `sample` reads.

    About a minute on two CPU cores with the defaults. Under torchrun, all processes train together.
    """
    import torch

    from .models import UNet2DCondition
    from .models.checkpoints import staged, write_json
    from .ops import checks
    from .schedule import DiffusionSchedule
    from .training import (
        P2,
        Batches,
        Checkpoints,
        CsvLog,
        ImportanceSampler,
        LogitNormalSampler,
        MinSNR,
        Trainer,
        UniformSampler,
        local_device,
    )
    from .training.progress import show_progress

    weightings = {"none": None, "p2": P2(), "min_snr": MinSNR()}
    samplers = {
        "uniform": UniformSampler,
        "importance": ImportanceSampler,
        "logit_normal": LogitNormalSampler,
    }
    checks.one_of("--loss-weighting", loss_weighting, weightings)
    checks.one_of("--timestep-sampling", timestep_sampling, samplers)
    if resume and checkpoint_every is None:
        checks.fail("--checkpoint-every", "a number of steps, because of --resume", None)
    if device == "cuda":
        device = str(local_device())
    _check_device(device)
    _check_folder("--out", out)
    dataset, config = _training_data(data, image_size, broken)
    if batch_size > len(dataset):
        checks.fail("--batch-size", f"at most the {len(dataset)} images", batch_size)
    batches = Batches(dataset, batch_size, seed=seed, flip=data != "digits")
    checkpoints = None
    if checkpoint_every is not None:
        checkpoints = Checkpoints(out / "checkpoints", checkpoint_every)
    torch.manual_seed(seed)
    model = UNet2DCondition(config).to(device)
    schedule = DiffusionSchedule()
    trainer = Trainer(
        model,
        batches,
        schedule,
        null_context=torch.tensor([model.null_class]),
        timestep_sampler=samplers[timestep_sampling](schedule.timesteps),
        checkpoints=checkpoints,
        condition_dropout=0.1,
        learning_rate=learning_rate,
        warmup_steps=min(50, steps // 10),
        decay="cosine",
        gradient_clip=1.0,
        accumulate=accumulate,
        ema_decay=0.99,
        prediction_type=prediction_type,
        loss_weighting=weightings[loss_weighting],
        precision=precision,
        compile=compile_model,
        seed=seed,
    )
    done = trainer.resume() if resume else 0
    if not trainer.processes.first:
        trainer.fit(steps)
        return
    with show_progress(steps, batch_size, done) as show:
        try:
            trainer.fit(steps, [show, CsvLog(log)] if log else show)
        except KeyboardInterrupt as interruption:
            how = " with --resume" if checkpoint_every else ""
            typer.echo(f"{str(interruption) or 'interrupted'}{how}", err=True)
            raise typer.Exit(130) from interruption
    assert trainer.ema is not None
    with trainer.ema.applied(), staged(out) as folder:
        model.save_pretrained(folder / "unet")
        write_json(schedule.to_config(prediction_type), folder / SCHEDULER)
    typer.echo(f"wrote {out}; next: diffusion-fast sample {out} -o digits.png")


def _training_data(data: str, size: int, broken: str) -> tuple[Any, UNetConfig]:
    """A data set of images and classes, and the shape of a network for them."""
    from torch.utils.data import TensorDataset

    from .models import UNetConfig
    from .ops import checks
    from .training import ImageFolder
    from .training.data import load_digits

    if data == "digits":
        digits, _ = load_digits()
        return TensorDataset(digits.images, digits.labels), UNetConfig.preset("digits")
    if not Path(data).is_dir():
        checks.fail("--data", "digits or a folder", repr(data))
    images = ImageFolder(data, size, broken=broken)
    if images.classes is None:
        checks.fail("--data", "a folder with a subfolder for each class", repr(data))
    shape = {"sample_size": size, "in_channels": 3, "out_channels": 3}
    return images, UNetConfig.preset("digits", num_classes=len(images.classes), **shape)


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="A folder that `train` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")],
    classes: Annotated[
        str, typer.Option(help="Classes to draw, such as 0-9 or 3,1,4; one column each.")
    ] = "0-9",
    per_class: Annotated[int, typer.Option(help="Images of each class.", min=1)] = 4,
    sampler: Annotated[
        str, typer.Option(help="ddpm, ddim, dpmpp_2m, euler, heun, unipc ...")
    ] = "dpmpp_2m",
    steps: Annotated[
        int | None, typer.Option(help="Steps; all of the schedule for ddpm, else 20 by default.")
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="1: as trained; higher: more typical, less varied; 0: no class.")
    ] = 1.5,
    eta: Annotated[float, typer.Option(help="Noise of ddim: 0 none, 1 as much as ddpm.")] = 0.0,
    spacing: Annotated[
        str, typer.Option(help="Timesteps: leading, trailing, linspace or karras.")
    ] = "leading",
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.")] = 0,
    scale: Annotated[int, typer.Option(help="Pixels per pixel in the PNG.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="Where to sample: cpu, cuda ...")] = "cpu",
) -> None:
    """Draw images of every class asked for into one PNG. The file carries its settings."""
    import torch

    from .engine import Engine
    from .images import grid, save_png
    from .models import UNet2DCondition
    from .models.checkpoints import read_json
    from .ops import checks

    _check_device(device)
    if out.is_dir():
        checks.fail("--out", "a file to write, such as out.png", f"the folder {out}")
    _check_folder("--out", out.parent)
    unet = UNet2DCondition.from_pretrained(model).to(device)
    if unet.config.num_classes is None:
        checks.fail("MODEL", "a class-conditional model", f"one without classes ({model})")
    config = read_json(model / SCHEDULER)
    columns = _classes(classes, unet.config.num_classes)
    if steps is None and sampler != "ddpm":
        steps = 20
    engine = Engine(
        unet,
        _schedule(model, config),
        device=device,
        progress=sys.stderr.isatty(),
        sampler=sampler,
        steps=steps,
        eta=eta,
        timestep_spacing=spacing,
        prediction_type=config.get("prediction_type", "epsilon"),
        guidance_scale=guidance,
    )
    labels = torch.tensor(columns * per_class, device=device)
    side = unet.config.sample_size or 8
    height, width = side if isinstance(side, tuple) else (side, side)
    images = engine.sample(
        (len(labels), unet.config.out_channels, height, width),
        context=labels,
        null_context=torch.tensor([unet.null_class], device=device),
        generator=torch.Generator().manual_seed(seed),
    )
    settings: dict[str, object] = {
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "eta": eta,
    }
    settings |= {"spacing": spacing, "seed": seed, "classes": columns, "per_class": per_class}
    save_png(grid(images, len(columns), scale), out, settings)
    typer.echo(f"wrote {out}: {len(labels)} images")


@app.command()
def doctor() -> None:
    """Show what this machine has, which backend each op runs on, and why not the others."""
    from . import hardware, ops

    console = Console()
    facts = Table("what", "found", title="This machine", title_justify="left")
    for part in (hardware.versions, hardware.processor, hardware.gpus, hardware.compilers):
        for name, value in part().items():
            facts.add_row(name, value)
    console.print(facts)
    backends = Table("op", "runs on", "why not the others", title="Ops", title_justify="left")
    for (backend, reasons), names in _grouped(ops.explain()).items():
        backends.add_row("\n".join(names), backend, reasons)
    console.print(backends)


def _grouped(choices: list[Choice]) -> dict[tuple[str, str], list[str]]:
    """Ops with the same backend and the same reasons, told once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        reasons: dict[str, list[str]] = {}
        for name, why in choice.rejected.items():
            reasons.setdefault(why, []).append(name)
        text = "\n".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        groups.setdefault((choice.backend, text), []).append(choice.op)
    return groups


def _check_device(name: str) -> None:
    """Fail before any work if PyTorch can't use the device."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected one that works, got {name!r}: {reason}") from error


def _check_folder(option: str, folder: Path) -> None:
    """Fail before any work if files can't be written to a folder that may not exist yet."""
    import tempfile

    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as error:
        expected = f"{option}: expected a folder that can be written, got {folder}"
        raise ValueError(f"{expected}: {error.strerror}") from error


def _schedule(model: Path, config: dict[str, Any]) -> DiffusionSchedule:
    from .schedule import DiffusionSchedule

    try:
        return DiffusionSchedule.from_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{model / SCHEDULER}: {error}") from error


def _classes(text: str, count: int) -> list[int]:
    """``0-9`` or ``3,1,4`` as a list."""
    from .ops import checks

    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            checks.fail("--classes", "numbers and ranges such as 0-9 or 3,1,4", repr(text))
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            checks.fail("--classes", "ranges that go up, such as 0-9", repr(part))
        found += numbers
    if not found or max(found) >= count:
        checks.fail("--classes", f"classes in [0, {count})", repr(text))
    return found


def main() -> None:
    """Run the command line; an error is one line, with ``--debug`` a traceback before it."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="diffusion-fast")
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        if debug:
            traceback.print_exc()
        lines = str(error).splitlines() or [type(error).__name__]
        if len(lines) > MOST_LINES and not debug:
            lines[MOST_LINES:] = [f"  and {len(lines) - MOST_LINES} more, --debug shows them"]
        typer.echo("error: " + "\n".join(lines), err=True)
        sys.exit(1)
