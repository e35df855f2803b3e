"""``diffusion-fast sample``: images into one PNG, or many into a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ..images import file_format, read_settings, save_picture
from ..ops import checks
from ..training import local_device
from .common import check_folder
from .sample_classes import ClassDrawing
from .sample_many import read_prompts
from .sample_prompts import PromptDrawing

KINDS = {kind.KIND: kind for kind in (PromptDrawing, ClassDrawing)}


def sample(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to draw; several prompts in one picture.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The picture to write: .png, .jpg or .webp.")
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(help="A folder for one PNG of each image, made by all processes of torchrun."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with a prompt in each line.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A Stable Diffusion folder, single file or hub id; emoji (the default, a small"
            " model that comes with this package); tiny (random weights); or a folder that `train`"
            " wrote."
        ),
    ] = None,
    again: Annotated[
        Path | None, typer.Option(help="Make this picture of `sample` again, from its settings.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    metadata: Annotated[
        bool, typer.Option(help="Write the settings, with paths as given, into the picture.")
    ] = True,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed of the first image, the next has the next; default 0."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images of each prompt.", min=1)] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT or one number, multiples of 8.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, dpmpp_2m, euler, heun, unipc ...; the model's own.")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Default the model's own, or 20. A list (5,10,20) makes a column of each."
        ),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            help="How closely to follow prompt or class, 1 and less: as trained; default the"
            " model's own, or 7.5 for prompts, 1.5 for classes. A list makes a column of each."
        ),
    ] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="LOW,HIGH: guide at these noise levels (sigma) only.")
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="Bring guided contrast back to normal, up to 1.")
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="Layers of the text encoder to leave out at its end.", min=0)
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="Noise of samplers that have it (ddim): 0 none, 1 as ddpm."),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            help="Timesteps: leading, trailing, linspace, karras, or another schedule such as"
            " sgm_uniform."
        ),
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="A grid of one's own: 900,500,20, a step each.")
    ] = None,
    sigmas: Annotated[
        str | None, typer.Option(help="The same in noise levels: 9,3,0.5,0, one more than steps.")
    ] = None,
    s_noise: Annotated[
        float | None, typer.Option(help="A factor of the noise that a step adds.")
    ] = None,
    s_churn: Annotated[
        float | None, typer.Option(help="Noise to add before each step (Karras et al. 2022).")
    ] = None,
    s_tmin: Annotated[
        float | None, typer.Option(help="The lowest noise level of --s-churn.")
    ] = None,
    s_tmax: Annotated[float | None, typer.Option(help="The highest one.")] = None,
    order: Annotated[
        int | None, typer.Option(help="How many calls a multistep sampler looks at, 1 to 4.")
    ] = None,
    steps_offset: Annotated[
        int | None, typer.Option(help="Added to each timestep of leading spacing.", min=0)
    ] = None,
    final_alpha: Annotated[
        str | None, typer.Option(help="Noise after the last step: one (none), or first (of t = 0).")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Start from this image.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Draw where this is white.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much to change the image, up to 1.")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="A ControlNet or T2I-Adapter: folder, file or hub id; as often as you like."
        ),
    ] = None,
    control_image: Annotated[
        list[Path] | None, typer.Option(help="What it reads; one for each --control, in order.")
    ] = None,
    control_scale: Annotated[
        str | None,
        typer.Option(help="How strongly it acts, default 1; one number or one each (1,0.5)."),
    ] = None,
    control_start: Annotated[
        str | None, typer.Option(help="From which part of the steps on, 0 to 1; also one each.")
    ] = None,
    control_end: Annotated[
        str | None, typer.Option(help="Until which part of the steps, 0 to 1; also one each.")
    ] = None,
    guess_mode: Annotated[
        bool | None,
        typer.Option("--guess-mode", help="ControlNets act on the half with the prompt alone."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA, FILE or FILE=SCALE; as often as you like.")
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            help="A textual inversion embedding, FILE or FILE=NAME; as often as you like."
        ),
    ] = None,
    ip_adapter: Annotated[
        list[str] | None,
        typer.Option(help="An IP-Adapter, FILE or FILE=SCALE; as often as you like."),
    ] = None,
    ip_adapter_image: Annotated[
        list[Path] | None, typer.Option(help="The image for each IP-Adapter, in their order.")
    ] = None,
    ip_adapter_mask: Annotated[
        list[Path] | None, typer.Option(help="Where that image counts (white), for each of them.")
    ] = None,
    image_encoder: Annotated[
        Path | None,
        typer.Option(help="CLIP's vision tower; default the image_encoder beside the adapter."),
    ] = None,
    refiner: Annotated[
        str | None, typer.Option(help="SDXL's refiner, which draws the last part of the steps.")
    ] = None,
    refiner_start: Annotated[
        float | None, typer.Option(help="From which part on, 0 to 1; default 0.8.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="Another autoencoder, also a tiny one (TAESD).")
    ] = None,
    preview: Annotated[
        str | None,
        typer.Option(
            help="A tiny autoencoder (TAESD): draws OUT.preview.png (or .jpg, .webp) at each step."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the tokenizer, for single files.")
    ] = None,
    prediction_type: Annotated[
        str | None,
        typer.Option(help="epsilon or v_prediction, for single files of SD 2.x, which don't tell."),
    ] = None,
    safety_checker: Annotated[
        bool | None, typer.Option(help="Use the safety checker that some models have; default on.")
    ] = None,
    zero_snr: Annotated[
        bool | None, typer.Option(help="Scale the noise schedule to end in pure noise, or don't.")
    ] = None,
    graph: Annotated[str | None, typer.Option(help="CUDA graphs: auto, loop, step or off.")] = None,
    rewrites: Annotated[
        str | None,
        typer.Option(help="Rewrites of the U-Net: all (exact), none or names; all,int8 is lossy."),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Which weights, such as fp16.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes such as 0-9 or 3,1,4, a column each; default all.")
    ] = None,
    per_class: Annotated[int | None, typer.Option(help="Images of each class.", min=1)] = None,
    scale: Annotated[int | None, typer.Option(help="Pixels per pixel of classes.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda ...")] = None,
) -> None:
    """Draw prompts (or classes) into one PNG, or many into a folder. Files carry their settings."""
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("out", "out_dir", "again", "metadata", "preview"):
        given.pop(name, None)

    if (out is None) == (out_dir is None):
        checks.fail("--out", "a file to write, such as out.png (or --out-dir)", out)
    if out_dir is not None:
        check_folder("--out-dir", out_dir)
        if again is not None:
            checks.fail("--again", "no --out-dir beside it", out_dir)
        if not metadata:
            expected = "no --out-dir beside it, where a restart compares the settings in the files"
            checks.fail("--no-metadata", expected, out_dir)
        if preview is not None:
            checks.fail("--preview", "no --out-dir beside it", out_dir)
        _new(given).draw_many(out_dir)
        return
    assert out is not None
    if out.is_dir():
        checks.fail("--out", "a file to write, such as out.png", f"the folder {out}")
    try:
        file_format(out)
    except ValueError as error:
        raise ValueError(f"--out: {error}") from error
    check_folder("--out", out.parent)
    if again is not None and given:
        names = ", ".join(sorted(given))
        checks.fail("--again", "no other option but --out: the picture holds them all", names)
    drawing = read_drawing(again) if again is not None else _new(given)
    if isinstance(drawing, PromptDrawing):
        picture, settings, done = drawing.draw(out, preview)
    elif preview is None:
        picture, settings, done = drawing.draw()
    else:
        checks.fail("--preview", f"nothing for {drawing.KIND}", preview)
    save_picture(picture, out, {"kind": drawing.KIND, **settings} if metadata else None)
    typer.echo(f"wrote {out}: {done}")


Drawing = PromptDrawing | ClassDrawing


def _new(given: dict[str, Any]) -> Drawing:

    if "model" not in given and "classes" not in given and "per_class" not in given:
        given["model"] = "emoji"
    if "model" not in given:
        checks.fail("--model", "a folder that `train` wrote", None)
    if "prompts" in given:
        given["prompt"] = [*given.get("prompt", []), *read_prompts(given.pop("prompts"))]
    if given.get("device") == "cuda":
        given["device"] = str(local_device())
    folder = Path(given["model"])
    classes = folder.is_dir() and not (folder / "model_index.json").is_file()
    classes = classes and ((folder / "unet").is_dir() or "prompt" not in given)
    kind = ClassDrawing if classes else PromptDrawing
    fields = {field.name for field in dataclasses.fields(kind)}
    for name in given.keys() - fields:
        option = name.upper() if name == "prompt" else f"--{name.replace('_', '-')}"
        checks.fail(option, f"nothing for {kind.KIND} (model {folder})", given[name])
    paths: dict[str, Any] = {n: str(value) for n, value in given.items() if isinstance(value, Path)}
    for name, value in given.items():
        if isinstance(value, list):
            paths[name] = [str(one) for one in value]
    return kind(**{**given, **paths})


def read_drawing(path: Path) -> Drawing:
    """The drawing that made a picture, by the settings in its file.

    Raises:
        ValueError: no settings, or others than those of a drawing.
    """
    settings = read_settings(path)
    kind = KINDS.get(str(settings.get("kind")))
    if kind is None or "model" not in settings:
        checks.fail("--again", "a picture of `sample --out`, or of prompts and --out-dir", path)
    if isinstance(settings.get("prompt"), str):  # --out-dir: one prompt a file
        settings["prompt"] = [settings["prompt"]]
    hints = get_type_hints(kind)
    own = {f.name: settings[f.name] for f in dataclasses.fields(kind) if f.name in settings}
    for name, value in own.items():  # somebody may have edited them
        if not _fits(value, hints[name]):
            checks.fail("--again", f"{path} with settings of `sample`", f"{name}={value!r:.60}")
    return kind(**own)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the type of a drawing's field."""
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if isinstance(value, (list, dict)):
        items = value.items() if isinstance(value, dict) else ((one,) for one in value)
        kinds = get_args(hint)
        return type(value) is get_origin(hint) and all(
            _fits(one, kind) for item in items for one, kind in zip(item, kinds, strict=True)
        )
    return type(value) is hint
