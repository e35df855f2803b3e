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
# What has a name elsewhere and is no table of rows.
REFUSED = {
    "dpm_adaptive": "it chooses its steps by the error that it finds on the way",
    "DPM adaptive": "it chooses its steps by the error that it finds on the way",
    "IPNDMScheduler": "its schedule is of its own, not that of Stable Diffusion",
    "UniPC": "AUTOMATIC1111's own grid; uni_pc is ComfyUI's form, unipc and unipc_3 diffusers'",
}


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
        ValueError: a name that nobody has, or that of a sampler that is no table.
    """
    plain = name.strip()
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
        if sampler.a1111 and plain.lower().startswith(sampler.a1111.lower()):
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
        "Refused:",
        "",
        *(f"- `{name}`: {reason}" for name, reason in REFUSED.items()),
        "",
    ]
    return "\n".join(lines)


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
