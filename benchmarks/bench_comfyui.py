"""The node inside ComfyUI: how far its latents are from ComfyUI's own, and how much faster it is.

    python benchmarks/bench_comfyui.py COMFYUI                   # every case, small random models
    python benchmarks/bench_comfyui.py COMFYUI --full --rounds 3 --latents 64   # times, SD 1.5

COMFYUI is a checkout of github.com/Comfy-Org/ComfyUI; the Python has its requirements and this
package. Models are random and float32 on a CPU. A case runs a few steps of ComfyUI's own sampler on
its bare model and with the node; "moves" is how far the case itself is from a run without it, so
that no error is that of something without effect. Exit status 1 if an error is above the limit.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.lib.environment import environment
from diffusion_fast.files import whole
from diffusion_fast.integrations.comfyui import DiffusionFastPatch
from diffusion_fast.integrations.comfyui.unet import UNetCalls

LIMIT = 1e-4  # of max|ours - theirs| / max|theirs| after the steps, float32
STEPS = 3
FACTS = ("comfyui", "commit", "torch", "device", "threads", "time", "command")
COLUMNS = ("model", "case", "order", "moves", "error", "ours", "theirs", "why")
TIMES = ("model", "latents", "variant", "seconds", "least", "most", "times as fast", "error")
VARIANTS: dict[str, dict[str, bool]] = {
    "ComfyUI": {},
    "op patches": {"attention": True, "norms": True, "graphs": False, "unet": False},
    "whole U-Net": {"attention": True, "norms": True, "graphs": False, "unet": True},
}
# What the kinds have apart from each other, as ComfyUI's U-Net takes it.
KINDS: dict[str, dict[str, Any]] = {
    "SD15": {
        "num_heads": 8,
        "context_dim": 768,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
    "SD20": {
        "num_head_channels": 64,
        "context_dim": 1024,
        "use_linear_in_transformer": True,
        "adm_in_channels": None,
    },
    "SDXL": {
        "num_head_channels": 64,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "num_res_blocks": [2, 2, 2],
        "channel_mult": (1, 2, 4),
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    },
}
COMMON: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4),
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_checkpoint": False,
    "legacy": False,
    "dtype": torch.float32,
}
FULL, SMALL = 320, 64  # channels of the first level
SMALL_DEPTH = 2  # of SDXL's transformers

Patcher = Any
Conditions = list[Any]


class Case(NamedTuple):
    """Something that users put on a model, or on its conditions.

    Attributes:
        model: a patched clone; None where only conditions change.
        conditions: of positive and negative conditions, others.
    """

    model: Callable[[Patcher], Patcher] | None = None
    conditions: Callable[[Conditions, Conditions], tuple[Conditions, Conditions]] | None = None


class ComfyUI:
    """A checkout, imported; its modules stand below as attributes of their names.

    Args:
        path: its folder.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "comfy" / "model_patcher.py").is_file():
            raise SystemExit(f"error: {path}: expected a checkout of ComfyUI")
        sys.path.insert(0, str(path))
        sys.argv = ["main.py", "--cpu"]
        importlib.import_module("comfy.options").enable_args_parsing()
        self.version = importlib.import_module("comfyui_version").__version__

    def __getattr__(self, name: str) -> Any:
        return importlib.import_module(f"comfy.{name}")

    def model(self, kind: str, width: int) -> Patcher:
        """A random model of a kind, in a ``ModelPatcher``."""
        config = COMMON | {"num_heads": -1, "num_head_channels": -1} | KINDS[kind]
        config |= {"model_channels": width}
        if width != FULL and kind == "SDXL":
            config = {name: _shallow(value) for name, value in config.items()}
        described = getattr(self.supported_models, kind)(dict(config))
        described.unet_config = config
        model = described.get_model({})
        randomize(model.diffusion_model)
        cpu = torch.device("cpu")
        return self.model_patcher.ModelPatcher(model, cpu, cpu)

    def sample(
        self, model: Patcher, positive: Conditions, negative: Conditions, side: int, steps: int
    ) -> Tensor:
        noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
        start = torch.zeros_like(noise)
        torch.manual_seed(0)  # some nodes draw numbers
        given = (noise, steps, 7.5, "dpmpp_2m", "karras", positive, negative, start)
        return self.sampling(model, *given, disable_pbar=True, seed=0)

    @property
    def sampling(self) -> Any:
        return importlib.import_module("comfy.sample").sample


def _shallow(value: Any) -> Any:
    if isinstance(value, list):
        return [_shallow(one) for one in value]
    return SMALL_DEPTH if value == 10 else value


def randomize(model: nn.Module) -> None:
    """Weights that keep the size of what passes; no layer starts at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(0, 0.05, generator=generator)
                parameter.add_(name.endswith("weight"))
    model.eval().requires_grad_(False)


def prompt(seed: int, width: int) -> Conditions:
    """A condition as ComfyUI's text nodes make it."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 1280, generator=generator)
    return [[torch.randn(1, 77, width, generator=generator), {"pooled_output": pooled}]]


def cases(comfyui: ComfyUI, kind: str, width: int, side: int) -> Iterator[tuple[str, Case]]:
    """What is tried on a kind of model, by name."""
    context = KINDS[kind]["context_dim"]
    yield "alone", Case()
    yield "LoRA", Case(model=lambda model: with_lora(comfyui, model))
    yield "regions", Case(conditions=lambda p, n: (regions(context, side), n))
    yield "a prompt for some of the steps", Case(conditions=lambda p, n: (by_time(p, context), n))
    control = control_of(comfyui, kind, width)
    yield (
        "ControlNet",
        Case(conditions=lambda p, n: (with_control(p, control), with_control(n, control))),
    )
    if kind != "SDXL":
        adapter = adapter_of(comfyui, width)
        yield "T2I-Adapter", Case(conditions=lambda p, n: (with_control(p, adapter), n))
    nodes = (
        ("RescaleCFG", "nodes_model_advanced", (0.7,)),
        ("FreeU_V2", "nodes_freelunch", (1.3, 1.4, 0.9, 0.2)),
        ("HyperTile", "nodes_hypertile", (64, 2, 0, False)),
        ("SelfAttentionGuidance", "nodes_sag", (0.5, 2.0)),
        ("PerturbedAttentionGuidance", "nodes_pag", (3.0,)),
        ("TomePatchModel", "nodes_tomesd", (0.3,)),
        (
            "PatchModelAddDownscale",
            "nodes_model_downscale",
            (3, 2.0, 0.0, 0.35, True, *["bicubic"] * 2),
        ),
    )
    for name, module, arguments in nodes:
        if kind == "SDXL" and name == "PatchModelAddDownscale":
            continue  # the block that it names has no place there
        yield name, Case(model=node(name, module, *arguments))


def node(name: str, module: str, *arguments: Any) -> Callable[[Patcher], Patcher]:
    """One of ComfyUI's own nodes."""

    def patch(model: Patcher) -> Patcher:
        cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        made: Any = cls()
        call = cls.execute if hasattr(cls, "execute") else getattr(made, cls.FUNCTION)
        done = call(model, *arguments)
        return done[0] if isinstance(done, tuple) else done.result[0]

    return patch


def with_lora(comfyui: ComfyUI, model: Patcher) -> Patcher:
    """A random LoRA of attention, projections and convolutions, in the names of kohya-ss."""
    ends = ("to_q", "to_k", "to_out.0", "proj_in", "in_layers.2")
    lora: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.model.state_dict().items():
        stem = name.removeprefix("diffusion_model.").removesuffix(".weight")
        if not name.endswith(".weight") or not stem.endswith(ends):
            continue
        key = "lora_unet_" + stem.replace(".", "_")
        rest = weight.shape[1:]
        down = torch.randn(4, *rest, generator=generator) * rest.numel() ** -0.5
        up = torch.randn(len(weight), 4, *[1] * (weight.dim() - 2), generator=generator) / 4
        lora |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        lora[f"{key}.alpha"] = torch.tensor(4.0)
    names = comfyui.lora.model_lora_keys_unet(model.model, {})
    patched = model.clone()
    patched.add_patches(comfyui.lora.load_lora(lora, names), 0.7)
    return patched


def regions(context: int, side: int) -> Conditions:
    """Two places of one size, one of another, and the whole."""
    half, third = side // 2, side // 3
    areas = [(half, half, 0, 0), (half, half, half, half), (third, side, half, 0), None]
    found = []
    for seed, area in enumerate(areas, 10):
        [[text, more]] = prompt(seed, context)
        found.append([text, {**more, "area": area, "strength": 1.0} if area else more])
    return found


def by_time(positive: Conditions, context: int) -> Conditions:
    """A prompt in the first half of the run, another one in the second."""
    [[text, more]], [[later, others]] = positive, prompt(20, context)
    return [
        [text, {**more, "start_percent": 0.0, "end_percent": 0.5}],
        [later, {**others, "start_percent": 0.5, "end_percent": 1.0}],
    ]


def control_of(comfyui: ComfyUI, kind: str, width: int) -> Any:
    """A random ControlNet."""
    model = comfyui.model(kind, width).model.model_config.unet_config
    config = {name: value for name, value in model.items() if name != "out_channels"}
    config |= {"hint_channels": 3, "operations": comfyui.ops.disable_weight_init}
    depths = config.pop("transformer_depth_output")
    assert depths  # a ControlNet has no way up
    net = importlib.import_module("comfy.cldm.cldm").ControlNet(**config, device="cpu")
    randomize(net)
    return comfyui.controlnet.ControlNet(net, load_device=torch.device("cpu"))


def adapter_of(comfyui: ComfyUI, width: int) -> Any:
    """A random T2I-Adapter."""
    adapters = importlib.import_module("comfy.t2i_adapter.adapter")
    widths = [width, 2 * width, 4 * width, 4 * width]
    net = adapters.Adapter(
        channels=widths, nums_rb=2, cin=3 * 64, ksize=1, sk=True, use_conv=False, xl=False
    )
    randomize(net)
    return comfyui.controlnet.T2IAdapter(net, 3, 8, "nearest-exact", torch.device("cpu"))


def with_control(conditions: Conditions, control: Any) -> Conditions:
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    steering = control.copy().set_cond_hint(hint, 0.8, (0.0, 1.0))
    return [
        [text, {**more, "control": steering, "control_apply_to_uncond": False}]
        for text, more in conditions
    ]


def put_on(model: Patcher, **switches: bool) -> Patcher:
    return DiffusionFastPatch().patch(model, **switches)[0] if switches else model


def calls_of(model: Patcher) -> UNetCalls:
    calls: UNetCalls = model.model_options["model_function_wrapper"]
    return calls


def error(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).abs().max() / truth.abs().max()).item()


def check(comfyui: ComfyUI, kind: str, width: int, side: int) -> Iterator[dict[str, Any]]:
    """A row for each case and order of nodes."""
    model, context = comfyui.model(kind, width), KINDS[kind]["context_dim"]
    positive, negative = prompt(1, context), prompt(2, context)
    bare = comfyui.sample(model, positive, negative, side, STEPS)
    switches = VARIANTS["whole U-Net"]
    for name, case in cases(comfyui, kind, width, side):
        given = (positive, negative)
        if case.conditions is not None:
            given = case.conditions(*given)
        orders = ["node behind"] if case.model is None else ["node behind", "node before"]
        for order in orders:
            row: dict[str, Any] = {"model": kind, "case": name, "order": order}
            change = case.model or (lambda one: one)
            try:
                theirs = comfyui.sample(change(model), *given, side, STEPS)
                before = order == "node before"
                patched = (
                    change(put_on(model, **switches))
                    if before
                    else put_on(change(model), **switches)
                )
                got = comfyui.sample(patched, *given, side, STEPS)
                calls = calls_of(patched)
            except Exception as failure:  # one row says so, the others are still measured
                why = f"failed: {type(failure).__name__}: {failure}"
                yield row | {"moves": "", "error": "nan", "ours": "", "theirs": "", "why": why}
                continue
            yield row | {
                "moves": f"{error(theirs, bare):.2g}",
                "error": f"{error(got, theirs):.1e}",
                "ours": calls.calls,
                "theirs": calls.others.total(),
                "why": "; ".join(calls.others),
            }
    again = comfyui.sample(model, positive, negative, side, STEPS)
    if not torch.equal(again, bare):
        raise SystemExit("error: the bare model draws otherwise after the node ran on it")


def timed(
    comfyui: ComfyUI, kind: str, width: int, side: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Seconds of a guided step of one image; all variants take turns."""
    model, context = comfyui.model(kind, width), KINDS[kind]["context_dim"]
    given = prompt(1, context), prompt(2, context)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    latents: dict[str, Tensor] = {}
    variants = {name: put_on(model, **switches) for name, switches in VARIANTS.items()}
    for turn in range(rounds + 1):  # the first warms up
        for name, patched in variants.items():
            start = time.perf_counter()
            latents[name] = comfyui.sample(patched, *given, side, 1)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        yield {
            "model": kind,
            "latents": f"{side} x {side}",
            "variant": name,
            "seconds": f"{middle[name]:.2f}",
            "least": f"{min(times):.2f}",
            "most": f"{max(times):.2f}",
            "times as fast": f"{middle['ComfyUI'] / middle[name]:.2f}",
            "error": f"{error(latents[name], latents['ComfyUI']):.1e}",
        }


def write(file: Path, rows: list[dict[str, Any]], lines: list[str], facts: dict[str, Any]) -> None:
    """The rows as CSV, and their table for the documentation."""
    where = ", ".join(f"{name} {facts[name]}" for name in ("torch", "device", "threads", "commit"))
    caption = f"ComfyUI {facts['comfyui']}, {where}, {facts['time']}: `{facts['command']}`"
    text = "\n".join([*lines, "", caption, ""])
    table = file.with_suffix(".csv")
    with whole(table, file.with_suffix(".md")) as (values, shown):
        shown.write_text(text, encoding="utf-8")
        with values.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


@torch.inference_mode()  # as ComfyUI runs its nodes
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--full", action="store_true", help="real widths, SD 1.5 alone")
    parser.add_argument("--latents", type=int, help="height and width of the latents")
    parser.add_argument("--rounds", type=int, default=0, help="time so many rounds, no cases")
    parser.add_argument("--out", type=Path, help="a folder for the rows")
    options = parser.parse_args(arguments)
    folders = {str(options.comfyui): "COMFYUI", str(options.out): "OUT"}
    given = [folders.get(one, one) for one in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/bench_comfyui.py", *given])
    comfyui = ComfyUI(options.comfyui.resolve())
    logging.disable(logging.WARNING)  # each case tells in its row why it fell back
    facts = environment() | {"comfyui": comfyui.version, "command": command}
    facts = {name: facts[name] for name in FACTS}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    kinds = ["SD15"] if options.full else options.kinds
    width, side = (FULL, options.latents or 64) if options.full else (SMALL, options.latents or 24)
    columns = TIMES if options.rounds else COLUMNS
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    print("\n".join(lines))
    rows = []
    for kind in kinds:
        found = (
            timed(comfyui, kind, width, side, options.rounds)
            if options.rounds
            else check(comfyui, kind, width, side)
        )
        for row in found:
            lines.append("| " + " | ".join(str(row[name]) for name in columns) + " |")
            print(lines[-1], flush=True)
            rows.append(row | facts)
    if options.out:
        file = options.out / ("times" if options.rounds else "errors")
        write(file, rows, lines, facts)
    return int(any(not float(row["error"]) <= LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
