"""``diffusion-fast warm``: compiles a model's kernels before its first image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

MODELS = {"sd15": ("sd15", "sd"), "sdxl": ("sdxl", "sdxl"), "digits": ("digits", None)}
DTYPES = ("bfloat16", "float16", "float32")


def warm(
    model: Annotated[str, typer.Option(help="sd15, sdxl or digits: its shapes count.")],
    size: Annotated[
        int | None, typer.Option(help="Side of the image, a multiple of 64; the model's own.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at once.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Of the sampler.", min=1)] = 20,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    arch: Annotated[
        int | None, typer.Option(help="Such as 90 for sm_90; this machine's GPU.", min=80)
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="How many compile; the cores, 16 at most.", min=1)
    ] = None,
    attention: Annotated[
        bool, typer.Option(help="Build the attention kernels too, where nvcc is.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the kernels, to be carried to another machine."),
    ] = None,
) -> None:
    """Compile a model's kernels, all candidates of a measurement included, so that its first image
    waits for none.

    What is compiled is found without the model's weights and without a GPU. It serves every
    machine with the same architecture and versions: copy --out there, run the same command, which
    finds it, and set DIFFUSION_FAST_CACHE to it and TRITON_CACHE_DIR to the folder "triton" in it.
    """
    if model not in MODELS:
        raise ValueError(f"--model: expected one of {', '.join(MODELS)}, got {model!r}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET: expected it unset, because kernels are compiled, got 1")
    if out is not None:
        os.environ["DIFFUSION_FAST_CACHE"] = str(out.absolute())
        os.environ["TRITON_CACHE_DIR"] = str(out.absolute() / "triton")
    import torch

    from ..engine import ahead
    from ..models import UNetConfig, VAEConfig

    arch = _this_gpu() if arch is None else arch
    unet, vae = MODELS[model]
    config = UNetConfig.preset(unet)
    decoder = None if vae is None else VAEConfig.preset(vae)
    scale = 1 if decoder is None else 2 ** (len(decoder.block_out_channels) - 1)
    side = config.sample_size if size is None else size // scale
    if size is not None and (size < 1 or size % (8 * scale)):
        raise ValueError(f"--size: expected a positive multiple of {8 * scale}, got {size}")
    assert isinstance(side, int)  # of every preset
    found = ahead.calls(
        config,
        decoder,
        getattr(torch, dtype),
        batch=batch,
        size=(side, side),
        steps=steps,
    )
    _compile(ahead.launches(found, arch), arch, processes)
    if attention:
        _build(list(ahead.head_dims(found)), arch)


def _this_gpu() -> int:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--arch: expected an architecture such as 90, because there is no GPU")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _compile(launches: list[object], arch: int, processes: int | None) -> None:
    from rich.console import Console
    from rich.progress import track

    from ..kernels import ahead

    ahead.move_in(ahead.cache_folder())
    programs = ahead.programs(launches, arch)
    bar = track(
        ahead.compile_all(programs, arch, processes),
        description=f"kernels for sm_{arch}",
        total=len(programs),
        console=Console(stderr=True),
    )
    done = sum(1 for _ in bar)
    typer.echo(f"{done} programs of Triton for sm_{arch} in {ahead.cache_folder()}")


def _build(head_dims: list[int], arch: int) -> None:
    from ..ops.cuda import build

    dims = [dim for dim in head_dims if dim in build.HEAD_DIMS]
    tools = build.toolchain()
    if isinstance(tools, str):
        typer.echo(f"attention: {tools}")
        return
    for dim in dims:
        library = build.build_library([dim], [build.architecture(divmod(arch, 10))])
        typer.echo(f"attention, head dim {dim}: {library}")
