"""Samplers by the names that other programs give them.

A name fixes the grid: ``DPM++ 2M Karras`` is AUTOMATIC1111's, with fractional timesteps;
``sample_dpmpp_2m`` k-diffusion's; ``comfyui/dpmpp_2m``, or ``dpmpp_2m`` with a schedule that only
ComfyUI has, ComfyUI's, with whole ones; and a scheduler class of diffusers means its grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..ops import checks
from .grids import SIGMAS
from .sampler import Sampler
from .schedules import NAMES

COMFYUI, K_DIFFUSION = "comfyui/", "sample_"
# AUTOMATIC1111's names of schedules.
A1111_SCHEDULES = {
    "Karras": "karras",
    "Exponential": "exponential",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm_uniform",
    "KL Optimal": "kl_optimal",
    "Align Your Steps": "ays",
    "Align Your Steps 11": "ays_11",
    "Align Your Steps 32": "ays_32",
    "Align Your Steps GITS": "ays_gits",
    "Simple": "simple",
    "Normal": "normal",
    "DDIM": "ddim_uniform",
    "Beta": "beta",
    "Uniform": "normal",
}
# Settings that a class of diffusers has by default.
USUAL: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "data_prediction"),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "predict_x0": (True,),
}
# ComfyUI's names of what has another one here. Its ddpm is the posterior's step, Euler ancestral's.
SAME = {"ddpm": "euler_ancestral"}
_ADAPTIVE = "it chooses its steps by the error that it finds on the way"
_INVERSE = "it goes from an image to noise"
_PARALLEL = "it goes over all steps at once; ddim and ddpm are its steps"
_LEVEL = "its network is told a noise level, not a timestep"
_FLOW = "for flow matching, another kind of model"
_TOKENS = "for models of tokens, not of Gaussian noise"
_VIDEO = "its schedule is that of a video model"
# What has a name elsewhere and is no table of rows.
REFUSED = {
    "dpm_adaptive": _ADAPTIVE,
    "DPM adaptive": _ADAPTIVE,
    "IPNDMScheduler": "its schedule is of its own, not that of Stable Diffusion",
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "DDIMParallelScheduler": _PARALLEL,
    "DDPMParallelScheduler": _PARALLEL,
    "RePaintScheduler": "it goes back in time between steps, and reads the image that it keeps",
    "UnCLIPScheduler": "its noise depends on the model's output",
    "DDPMWuerstchenScheduler": "its time is a number in [0, 1]",
    "EDMEulerScheduler": _LEVEL,
    "EDMDPMSolverMultistepScheduler": _LEVEL,
    "CosineDPMSolverMultistepScheduler": _LEVEL,
    "CMStochasticIterativeScheduler": _LEVEL,
    "KarrasVeScheduler": _LEVEL,
    "ScoreSdeVeScheduler": _LEVEL,
    "CogVideoXDDIMScheduler": _VIDEO,
    "CogVideoXDPMScheduler": _VIDEO,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _FLOW,
    "LTXEulerAncestralRFScheduler": _FLOW,
    "SCMScheduler": _FLOW,
    "AmusedScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
}
_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
# Settings of diffusers' classes that mean no sampler here.
REFUSED_SETTINGS: tuple[tuple[str, dict[str, Any], str], ...] = (
    (
        _MULTISTEP,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        "the sign of a second difference is wrong there",
    ),
    (
        _MULTISTEP,
        {"algorithm_type": "sde-dpmsolver", "solver_order": 3},
        "diffusers has no formula for it",
    ),
    (
        _SINGLESTEP,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"},
        "the sign of a second difference is wrong there",
    ),
    ("UniPCMultistepScheduler", {"predict_x0": False}, "UniPC keeps x_0 here, not epsilon"),
    (
        "PNDMScheduler",
        {"skip_prk_steps": False},
        "PNDM's Runge-Kutta steps at the start are no rows of one table",
    ),
)


def options_of(
    name: str, spacing: str, samplers: Mapping[str, Sampler], convention: str = "diffusers"
) -> dict[str, Any]:
    """The options that a name means, ``sampler`` with our own name among them.

    Args:
        name: any spelling.
        spacing: the ``timestep_spacing`` beside it, which a schedule in the name replaces.
        samplers: the registry.
        convention: what is asked for beside our own name.

    Raises:
        TypeError: no name.
        ValueError: a name that nobody has, or that of a sampler that is no table.
    """
    if not isinstance(name, str):
        raise TypeError(f"sampler: expected a name, got {name!r} ({type(name).__name__})")
    plain = name.strip()
    if plain.endswith(("sde_gpu", "sde_heun_gpu")):  # ComfyUI: noise drawn on the GPU
        plain = plain.removesuffix("_gpu")
    if plain.startswith(COMFYUI):
        own_name = plain.removeprefix(COMFYUI)
        plain = COMFYUI + SAME.get(own_name, own_name)
    if plain in samplers:
        own = convention == "diffusers" and spacing in NAMES and spacing not in SIGMAS
        if not own:
            return {"sampler": plain}
        found = next((one.name for one in samplers.values() if one.comfyui == plain), plain)
        return {"sampler": found, "convention": "comfyui"}
    for refused, reason in REFUSED.items():
        if plain.removeprefix(COMFYUI).removeprefix(K_DIFFUSION) == refused:
            checks.fail("sampler", "one that is a table of rows", f"{plain}: {reason}")
    schedule = spacing if spacing in NAMES else "normal"
    for sampler in samplers.values():
        means = {"sampler": sampler.name, "timestep_spacing": schedule}
        if sampler.comfyui and plain == COMFYUI + sampler.comfyui:
            return {**means, "convention": "comfyui"}
        if sampler.k_diffusion and plain == f"{K_DIFFUSION}{sampler.comfyui}":
            return {**means, "convention": "k_diffusion"}
        if sampler.own_grid and plain == sampler.a1111:
            return {"sampler": sampler.name, "timestep_spacing": "linspace"}
        if (
            sampler.a1111
            and not sampler.own_grid
            and plain.lower().startswith(sampler.a1111.lower())
        ):
            rest = plain[len(sampler.a1111) :].strip()
            known = {label.lower(): one for label, one in A1111_SCHEDULES.items()}
            if not rest or rest.lower() in known:
                means["timestep_spacing"] = known[rest.lower()] if rest else schedule
                return {**means, "convention": "k_diffusion"}
        for theirs in sampler.diffusers:
            usual = all(value in USUAL[key] for key, value in theirs.settings.items())
            if plain == theirs.scheduler and usual and not theirs.nearest:
                return {"sampler": sampler.name}
    if plain.lower() not in samplers:
        checks.one_of("sampler", name, samplers)
    return {"sampler": plain.lower()}


def document(samplers: Mapping[str, Sampler]) -> str:
    """docs/samplers.md."""
    lines = [
        "# Samplers",
        "",
        "Made from the registry by `diffusion_fast/samplers/names.py`. Any of these names may be",
        "given as `sampler=`. Ours and diffusers' take diffusers' grid;",
        "k-diffusion's and AUTOMATIC1111's (with a schedule behind it, as in `DPM++ 2M Karras`)",
        "fractional timesteps, interpolated in log sigma; ComfyUI's (written `comfyui/NAME`, or",
        "without it beside a schedule that only ComfyUI has) whole ones.",
        "",
        "| ours | diffusers | k-diffusion | ComfyUI | AUTOMATIC1111 |",
        "| --- | --- | --- | --- | --- |",
        *(
            "| " + " | ".join(f"`{name}`" if name else "" for name in row) + " |"
            for row in table(samplers)
        ),
        "",
        f"Schedules: {', '.join(f'`{name}`' for name in NAMES)}. AUTOMATIC1111's names of them:",
        ", ".join(f"{label} (`{name}`)" for label, name in A1111_SCHEDULES.items()) + ".",
        "",
        "AUTOMATIC1111's DDIM, PLMS and DDIM CFG++ go to t = 1 and leave out the step from there;",
        "its CFG++ divides the guidance scale by 12.5. CompVis' own PLMS is `pndm`. ComfyUI's",
        "`ddpm` is `euler_ancestral`, and `_gpu` behind its names changes nothing. The `ays`",
        "schedules are published tables of noise levels (`_sdxl`: those for SDXL); `ays_11`,",
        "`ays_32` and `ays_gits` are scaled to the model's range, as Forge does it; `gits_C` is",
        "that of ComfyUI's node at the coefficient C, `gits` at 1.2.",
        "",
        "## Refused",
        "",
        "Names that mean no table of rows, and why:",
        "",
        "| names | why |",
        "| --- | --- |",
        *(f"| {', '.join(f'`{name}`' for name in names)} | {why} |" for why, names in refused()),
        "",
        "Settings that mean none. A model with them loads, and draws with a `sampler=` of another",
        "name:",
        "",
        "| class | settings | why |",
        "| --- | --- | --- |",
        *(
            f"| `{name}` | `{', '.join(f'{k}={v}' for k, v in settings.items())}` | {why} |"
            for name, settings, why in REFUSED_SETTINGS
        ),
        "",
        "And by the name of the option: `clip_sample` for samplers whose steps go by epsilon or by",
        "the model's output (`dpm_solver_1`, `_2m`, `_3m` with their SDE forms, `pndm`, the CFG++",
        "forms); options that a sampler doesn't have; a learned variance, and `fixed_large_log`,",
        "which is NaN in diffusers; and in a model's own scheduler `thresholding` (a quantile of",
        "each image), `solver_p`, `tau_func`, shifted and continuous timesteps, and other",
        "distillations than LCM's of 50 steps, where the sampler that runs would heed them.",
        "",
    ]
    return "\n".join(lines)


def refused() -> list[tuple[str, list[str]]]:
    """The names that are refused, by the reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in REFUSED.items():
        reasons.setdefault(why, []).append(name)
    return list(reasons.items())


def table(samplers: Mapping[str, Sampler]) -> Iterator[tuple[str, str, str, str, str]]:
    """(name, diffusers, k-diffusion, ComfyUI, AUTOMATIC1111) of each sampler, for the docs."""
    for sampler in samplers.values():
        theirs = [
            " ".join([one.scheduler, *(f"{k}={v}" for k, v in one.settings.items())])
            for one in sampler.diffusers
            if not one.nearest
        ]
        comfyui = sampler.comfyui or ""
        k_diffusion = K_DIFFUSION + comfyui if sampler.k_diffusion else ""
        yield sampler.name, "; ".join(theirs), k_diffusion, comfyui, sampler.a1111 or ""
