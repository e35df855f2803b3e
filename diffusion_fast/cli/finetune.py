"""``diffusion-fast finetune``: teach a Stable Diffusion something by a few pictures."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from ..finetuning import Settings, read_toml
from ..finetuning.settings import OPTIONS_OF
from .common import check_device, check_folder


def _run(**given: Any) -> None:
    config, dry_run = given.pop("config"), given.pop("dry_run")
    values = {} if config is None else read_toml(config)
    values |= {name: value for name, value in given.items() if value not in (None, [])}
    settings = Settings.of(values)
    check_device(settings.device)
    check_folder("--out", settings.out)

    from ..finetuning.plan import plan  # imports Pillow
    from ..finetuning.run import Finetuning
    from ..training.threads import take_threads

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    run = Finetuning(settings, tell)
    if dry_run:
        for line in plan(run):
            typer.echo(line)
        return
    if settings.device == "cpu" and run.newest is not None:
        tell(take_threads(run.newest))
    try:
        run.train(progress=True)
    except KeyboardInterrupt as interruption:
        typer.echo(f"{str(interruption) or 'interrupted'} with --resume", err=True)
        raise typer.Exit(130) from interruption
    typer.echo(f"wrote {', '.join(map(str, run.files()))}")


def _option(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """An option for a field of the settings; None, or an empty list, where it isn't given."""
    if isinstance(hint, types.UnionType):
        hint = next(one for one in typing.get_args(hint) if one is not types.NoneType)
    kind: Any = hint | None
    default: Any = None
    if typing.get_origin(hint) is tuple:
        kind, default = list[str] if field.name != "data" else list[Path], []
    shown = field.default
    if shown in (None, "", (), Path()) or isinstance(shown, bool):
        shown = False if not isinstance(shown, bool) else ("on" if shown else "off")
    elif isinstance(shown, tuple):
        shown = " ".join(shown)
    text = field.metadata["help"]
    if choices := field.metadata.get("choices"):
        text += f" One of: {', '.join(choices)}."
    single = {several: option for option, several in OPTIONS_OF.items()}.get(field.name)
    name = single and f"--{single.replace('_', '-')}"
    option = typer.Option(
        *filter(None, [name]), help=text, show_default=str(shown) if shown else False
    )
    annotation: Any = Annotated[kind, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=default, annotation=annotation)


def _command() -> Any:
    """The command, with an option for each setting."""
    hints = typing.get_type_hints(Settings)
    options = [_option(field, hints[field.name]) for field in dataclasses.fields(Settings)]
    config = Annotated[
        Path | None, typer.Option(help="TOML file with any of these settings; options replace it.")
    ]
    dry_run = Annotated[
        bool,
        typer.Option("--dry-run", help="Check model, data and settings; print the plan."),
    ]
    for name, annotation, default in (("config", config, None), ("dry_run", dry_run, False)):
        keyword = inspect.Parameter.KEYWORD_ONLY
        options.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))

    def finetune(**given: Any) -> None:
        """Fine-tune a Stable Diffusion on a folder of images, and write what was trained.

        A folder holds images with captions: metadata.jsonl, or a .txt beside each image. Under
        torchrun, all processes train together.
        """
        _run(**given)

    finetune.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    finetune.__annotations__ = {one.name: one.annotation for one in options}
    return finetune


finetune = _command()
