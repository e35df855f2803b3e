"""``diffusion-fast sample``: images into one PNG."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import SCHEDULER, check_device, check_folder

if TYPE_CHECKING:
    from ..schedule import DiffusionSchedule


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

    from ..engine import Engine
    from ..images import grid, save_png
    from ..models import UNet2DCondition
    from ..models.checkpoints import read_json
    from ..ops import checks

    check_device(device)
    if out.is_dir():
        checks.fail("--out", "a file to write, such as out.png", f"the folder {out}")
    check_folder("--out", out.parent)
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


def _schedule(model: Path, config: dict[str, Any]) -> DiffusionSchedule:
    from ..schedule import DiffusionSchedule

    try:
        return DiffusionSchedule.from_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{model / SCHEDULER}: {error}") from error


def _classes(text: str, count: int) -> list[int]:
    """``0-9`` or ``3,1,4`` as a list."""
    from ..ops import checks

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
