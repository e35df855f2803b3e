"""The command line, one file per command."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Annotated

import typer

from ..cores import limit_threads
from .bench import bench
from .comfyui import comfyui
from .common import in_options, options_of
from .doctor import doctor
from .finetune import finetune
from .sample import sample
from .serve import serve
from .train import train
from .vae_check import vae_check
from .warm import warm

app = typer.Typer(
    help="Train and sample diffusion models, and see what runs on this machine.\n\n"
    "Start with: diffusion-fast train --out model, then"
    " diffusion-fast sample --model model -o out.png",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
MOST_LINES = 6  # of an error that lists what is wrong, such as the tensors of a checkpoint


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """What every command shares; ``--debug`` itself is read in :func:`main`."""
    if line := limit_threads():
        typer.echo(line, err=True)


for command in (train, finetune, sample, serve, bench, warm, vae_check, comfyui, doctor):
    app.command()(command)


def main() -> None:
    """Run the command line; an error is one line, with ``--debug`` a traceback before it.

    Errors and warnings name options, such as --steps, where Python's name arguments.
    """
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    group = typer.main.get_command(app)
    options = options_of(group, arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: typer.echo(
                f"warning: {in_options(str(message), options)}", err=True
            )
            group(args=arguments, prog_name="diffusion-fast")
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        if debug:
            traceback.print_exc()
        message = in_options(str(error) or type(error).__name__, options)
        lines = message.splitlines()
        if len(lines) > MOST_LINES and not debug:
            lines[MOST_LINES:] = [f"  and {len(lines) - MOST_LINES} more, --debug shows them"]
        typer.echo("error: " + "\n".join(lines), err=True)
        sys.exit(1)
