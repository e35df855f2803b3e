"""``diffusion-fast train``: a small class-conditional model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import SCHEDULER, check_device, check_folder

if TYPE_CHECKING:
    from ..models import UNetConfig


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
        str, typer.Option(help="float32, or bfloat16 or float16 for mixed precision.")
    ] = "float32",
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Run the network through torch.compile.")
    ] = False,
    sharding: Annotated[
        str,
        typer.Option(
            help="What processes under torchrun share: ddp the batches, fsdp the model as well."
        ),
    ] = "ddp",
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints, in OUT/checkpoints; none by default.", min=1),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    log: Annotated[Path | None, typer.Option(help="CSV file for the loss of every step.")] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder of a TensorBoard log (needs that package).")
    ] = None,
    samples_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between grids of samples, in OUT/samples; none by default.", min=1
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and noise.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1 ...")] = "cpu",
) -> None:
    """Train a small class-conditional U-Net, and write a folder that `sample` reads.

    One to a few minutes on two CPU cores with the defaults; the time left is shown. Under torchrun,
    all processes train together.
    """
    import torch

    from ..files import staged, write_json
    from ..models import UNet2DCondition
    from ..ops import checks
    from ..schedule import DiffusionSchedule
    from ..training import (
        P2,
        Batches,
        Checkpoints,
        CsvLog,
        ImportanceSampler,
        LogitNormalSampler,
        MinSNR,
        SampleGrids,
        TensorBoardLog,
        Trainer,
        UniformSampler,
        local_device,
    )
    from ..training.threads import take_threads
    from ..training.watch import show_progress

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
    check_device(device)
    check_folder("--out", out)
    dataset, config = _training_data(data, image_size, broken)
    if batch_size > len(dataset):
        checks.fail("--batch-size", f"at most the {len(dataset)} images", batch_size)
    batches = Batches(dataset, batch_size, seed=seed, flip=data != "digits")
    checkpoints = None
    if checkpoint_every is not None:
        checkpoints = Checkpoints(out / "checkpoints", checkpoint_every)
    schedule = DiffusionSchedule()
    newest = checkpoints.newest() if checkpoints and resume else None
    if device == "cpu" and newest is not None:
        typer.echo(take_threads(newest), err=True)
    torch.manual_seed(seed)
    model = UNet2DCondition(config).to(device)
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
        sharding=sharding,
        seed=seed,
    )
    done = trainer.resume() if resume else 0
    first = trainer.processes.first
    board = TensorBoardLog(tensorboard, after=done) if tensorboard else None
    callbacks: list[Any] = [CsvLog(log)] if log else []
    if board:
        callbacks.append(board)
    if samples_every:
        classes = min(config.num_classes or 0, 10)
        callbacks.append(
            SampleGrids(
                *(trainer, out / "samples", (4 * classes, *dataset[0][0].shape)),
                every=samples_every,
                context=torch.arange(classes, device=device).repeat(4),
                columns=classes,
                on_drawn=board.picture if board else None,
            )
        )
    with show_progress(steps, batch_size, done) if first else contextlib.nullcontext() as show:
        try:
            trainer.fit(steps, [show, *callbacks] if show else callbacks)
        except KeyboardInterrupt as interruption:
            how = " with --resume" if checkpoint_every else ""
            typer.echo(f"{str(interruption) or 'interrupted'}{how}", err=True)
            raise typer.Exit(130) from interruption
    weights = trainer.weights()  # by all processes, which may each have a part only
    if not first:
        return
    trained = UNet2DCondition(config)
    trained.load_state_dict(weights)
    with staged(out) as folder:
        trained.save_pretrained(folder / "unet")
        write_json(schedule.to_config(prediction_type), folder / SCHEDULER)
    typer.echo(f"wrote {out}; next: diffusion-fast sample --model {out} -o digits.png")


def _training_data(data: str, size: int, broken: str) -> tuple[Any, UNetConfig]:
    """A data set of images and classes, and the shape of a network for them."""
    from torch.utils.data import TensorDataset

    from ..models import UNetConfig
    from ..ops import checks
    from ..training import ImageFolder
    from ..training.data import load_digits

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
