"""The ways to compute a U-Net step, a whole loop and a whole pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

import diffusion_fast as df
from diffusion_fast import hardware
from diffusion_fast.engine.buffers import Clock
from diffusion_fast.engine.rewrites.controlled import prepare
from diffusion_fast.engine.rewrites.plan import Rewritable
from diffusion_fast.ops.cpu import contest, step_contest, threads
from diffusion_fast.pipelines.parts import Parts
from diffusion_fast.pipelines.stable_diffusion import StableDiffusion

from ..lib.environment import GPU
from ..lib.environment import PEERS as PACKAGES
from ..lib.timing import captured
from ..peers import PEERS
from . import in_diffusers
from .measure import Call, NotRun, Variant
from .networks import GUIDANCE, SETTINGS, Inputs, Networks

T = 500  # the timestep of a single step
PROMPT = "a photo of a cat"
NOT_COMPILED = "not asked for: --compile (compiling takes minutes)"
TITLES = {
    "eager": "plain eager PyTorch: our model on the reference ops",
    "model": "our model on our ops, without the engine",
    "diffusers": "diffusers, eager",
    "diffusers lean": "diffusers without divisions by 1.0 and dropout",
    "diffusers compiled": "that, channels_last, compiled: max-autotune, or frozen on a CPU",
    "openvino": "that, converted by OpenVINO",
    "onnxruntime": "that, exported to ONNX Runtime",
    "engine": "our engine",
    "bare diffusers": "diffusers without what steers the U-Net",
    "bare engine": "our engine without it",
}
BARE = "bare"  # in front of a name: the same without what steers the U-Net
MakeUNet = Callable[[Networks], Any]
Build = Callable[[], Call]
UNETS: dict[str, MakeUNet] = {
    "diffusers": in_diffusers.unet,
    "diffusers lean": in_diffusers.lean_unet,
    **{name: functools.partial(in_diffusers.ServedUNet, peer=peer) for name, peer in PEERS.items()},
}


def on_reference(call: Call) -> Call:
    """Every op by its definition in plain PyTorch."""

    def run() -> Tensor:
        with df.use_backend("reference"):
            return call()

    return run


def variants(
    builds: Mapping[str, Build],
    networks: Networks,
    compiles: bool,
    *parts: str,
    brief: Mapping[str, Build] | None = None,
) -> list[Variant]:
    """Those that can be built, in the order of :data:`TITLES`.

    Args:
        builds: what makes the call of each, by name.
        networks: what they compute.
        compiles: whether torch.compile is among them.
        parts: names of the networks that are called.
        brief: see :class:`.measure.Variant`, by name.
    """
    size = 0 if GPU else networks.nbytes(*parts)

    def build(name: str) -> Call:
        why = _refused(name, networks.dtype, compiles)
        if why:
            raise NotRun(why)
        return builds[name]()

    def holds(name: str) -> int:
        absent = name in PACKAGES and hardware.package_version(name) == "not installed"
        runs = not absent and _refused(name, networks.dtype, compiles) is None
        return int(COPIES.get(name, 0) * size) if runs else 0

    return [
        Variant(
            name,
            functools.partial(build, name),
            BACKENDS.get(name),
            name in PEERS,
            BARE if name.startswith(BARE) else "",
            holds(name),
            (brief or {}).get(name),
        )
        for name in TITLES
        if name in builds
    ]


# How many times the weights' bytes a program takes for itself at most, on a CPU: as its own layout
# has them, and what becomes of them on the way there. Of the first three that was measured with
# SD1.5, the others are guesses.
COPIES = {"engine": 1.6, f"{BARE} engine": 1.6, "openvino": 1.9}
COPIES |= {"onnxruntime": 2.5, "diffusers compiled": 1.5}
BACKENDS = {"diffusers": "torch", "diffusers lean": "torch", **{name: name for name in PEERS}}
BACKENDS |= {"diffusers compiled": "inductor", f"{BARE} diffusers": "torch"}


def _refused(name: str, dtype: torch.dtype, compiles: bool) -> str | None:
    """Why a peer is not run."""
    if name not in PEERS or name == "diffusers compiled":
        return NOT_COMPILED if name in PEERS and not compiles else None
    if GPU:
        return "a peer on CPUs alone"
    return None if dtype == torch.float32 else "a peer in float32 alone"


def with_unets(theirs: Callable[[MakeUNet], Call]) -> dict[str, Build]:
    """The call with each of diffusers' U-Nets."""
    return {name: functools.partial(theirs, make) for name, make in UNETS.items()}


# U-Net step ------------------------------------------------------------------------------------


def step_variants(networks: Networks, images: int, steps: int, compiles: bool) -> list[Variant]:
    """One call of the U-Net; ``steps`` is 1."""
    x, t, given = step_input(networks, images)

    def plain() -> Call:
        model = networks.unet
        return lambda: model(x, t, **given)

    def theirs(make: MakeUNet) -> Call:
        model, options = make(networks), in_diffusers.unet_options(given)
        return lambda: model(x, t, **options)[0]

    ours: dict[str, Build] = {
        "eager": lambda: on_reference(plain()),
        "model": plain,
        "engine": lambda: engine_step(networks.unet, x, t, given),
    }
    return variants(ours | with_unets(theirs), networks, compiles, "unet")


def engine_step(model: Rewritable, x: Tensor, t: Tensor, given: dict[str, Any]) -> Call:
    """A U-Net's call with all rewrites, x being both halves of guidance."""
    network = prepare(model, batch=len(x) // 2, halves=2, max_rows=1)
    network.prepare(given, t.reshape(1))
    clock = Clock(x.device)

    def step() -> Tensor:
        return network(x, clock)

    if GPU:
        return replayed(step)
    work = network.work(x.shape[2:])
    contest.prepare(work)
    count = step_contest.threads_for(work, step)

    def shared() -> Tensor:
        with threads.using(count):
            return step()

    return shared


def step_input(networks: Networks, images: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The U-Net's input with both halves of guidance, the timestep, and the other keywords."""
    inputs = networks.inputs(images)
    x = torch.cat([inputs.x_T.to(networks.dtype)] * 2)
    return x, torch.tensor(T, device=networks.device), inputs.joined


def replayed(call: Call) -> Call:
    """The call as a CUDA graph, which is how the engine's loop runs it."""
    graph, output = captured(call)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def step_truth(networks: Networks, images: int, steps: int) -> Tensor:
    x, t, given = step_input(networks, images)
    exact = networks.exact("unet")
    x, given = wide(x, exact.dtype), widened(given, exact.dtype)
    return on_reference(lambda: exact.unet(x, t, **given))()


def wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def widened(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: wide(value, dtype) for name, value in given.items()}


# Loop ------------------------------------------------------------------------------------------


def engine_loop(
    networks: Networks, inputs: Inputs, steps: int, rewrites: Any = "all", graph: str = "auto"
) -> tuple[df.Engine, Call]:
    """An engine, and a run of it."""
    table = {**SETTINGS.table(), "steps": steps, "guidance_scale": GUIDANCE}
    engine = df.Engine(networks.unet, SETTINGS.schedule, graph, rewrites=rewrites, **table)
    shape = tuple(inputs.x_T.shape)

    def run() -> Tensor:
        return engine.sample(shape, inputs.positive, inputs.negative, x_T=inputs.x_T)

    return engine, run


def plain_loop(networks: Networks, inputs: Inputs, steps: int) -> Call:
    return engine_loop(networks, inputs, steps, "none", "off")[1]


def loop_variants(networks: Networks, images: int, steps: int, compiles: bool) -> list[Variant]:
    """Noise to latents, by DDIM."""
    inputs = networks.inputs(images)

    def theirs(make: MakeUNet) -> Call:
        pipe = in_diffusers.pipeline(networks, make(networks), whole=False)
        side = networks.kind.pixels
        given = {"prompt_embeds": inputs.positive["context"], "height": side, "width": side}
        given["negative_prompt_embeds"] = inputs.negative["context"]
        if "text_embeds" in inputs.positive:
            given["pooled_prompt_embeds"] = inputs.positive["text_embeds"]
            given["negative_pooled_prompt_embeds"] = inputs.negative["text_embeds"]
        given |= {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
        latents = inputs.x_T.to(networks.dtype)
        options = {"output_type": "latent", "return_dict": False}
        return lambda: pipe(latents=latents, **given, **options)[0]

    def ours(steps: int) -> dict[str, Build]:
        return {
            "eager": lambda: on_reference(plain_loop(networks, inputs, steps)),
            "model": lambda: plain_loop(networks, inputs, steps),
            "engine": lambda: engine_loop(networks, inputs, steps)[1],
        }

    builds = ours(steps) | with_unets(theirs)
    return variants(builds, networks, compiles, "unet", brief=ours(1))


def loop_truth(networks: Networks, images: int, steps: int) -> Tensor:
    inputs, exact = networks.inputs(images), networks.exact("unet")
    given = (widened(half, exact.dtype) for half in (inputs.positive, inputs.negative))
    return on_reference(plain_loop(exact, Inputs(inputs.x_T, *given), steps))()


# Pipeline --------------------------------------------------------------------------------------


def our_pipeline(
    networks: Networks, images: int, steps: int, rewrites: str = "all", graph: str = "auto"
) -> Call:
    """A prompt in, images [B, 3, H, W] in [-1, 1] out."""
    two = len(networks.kind.text) == 2
    parts = Parts(
        networks.unet,
        networks.vae,
        networks.text,
        SETTINGS,
        zero_empty=two,
        random_weights=True,
    )
    pipe = StableDiffusion(parts, graph, rewrites)
    given: dict[str, Any] = {"steps": steps, "guidance_scale": GUIDANCE}
    given |= {"batch": images, "output": "tensor"}
    return lambda: cast("Tensor", pipe(PROMPT, **given).images)


def pipeline_variants(networks: Networks, images: int, steps: int, compiles: bool) -> list[Variant]:
    def theirs(make: MakeUNet) -> Call:
        pipe = in_diffusers.pipeline(networks, make(networks), whole=True)
        shape = (networks.kind.unet.out_channels, *[networks.kind.side] * 2)
        given = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "pt"}
        given |= {"num_images_per_prompt": images, "return_dict": False}

        def run() -> Tensor:
            seeds = [torch.Generator().manual_seed(seed) for seed in range(images)]
            noise = torch.stack([torch.randn(shape, generator=seed) for seed in seeds])
            latents = noise.to(networks.device, networks.dtype)
            return pipe(PROMPT, latents=latents, **given)[0] * 2 - 1

        return run

    def ours(steps: int) -> dict[str, Build]:
        def plain() -> Call:
            return our_pipeline(networks, images, steps, "none", "off")

        return {
            "eager": lambda: on_reference(plain()),
            "model": plain,
            "engine": lambda: our_pipeline(networks, images, steps),
        }

    builds = ours(steps) | with_unets(theirs)
    return variants(builds, networks, compiles, "unet", "vae", "text", brief=ours(1))


def pipeline_truth(networks: Networks, images: int, steps: int) -> Tensor:
    exact = networks.exact("unet", "vae", "text")
    return on_reference(our_pipeline(exact, images, steps, "none", "off"))()
