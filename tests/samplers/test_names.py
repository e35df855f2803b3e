"""Names of other programs and their schedules; every sampler with every schedule."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scheduler_parity import run_table, toy_model

from diffusion_fast.samplers import SAMPLERS, gits, make_table
from diffusion_fast.samplers.names import document, table
from diffusion_fast.samplers.published import AYS, AYS_32, AYS_GITS, AYS_SDXL
from diffusion_fast.samplers.schedules import NAMES
from diffusion_fast.schedule import DiffusionSchedule

T = 1000
STABLE_DIFFUSION = DiffusionSchedule(T, 0.00085, 0.012, "scaled_linear")
LEVELS = np.sqrt(1 / STABLE_DIFFUSION.alpha_bar - 1)


def levels_of(sampler: str, steps: int, **options) -> np.ndarray:
    table = make_table(sampler, STABLE_DIFFUSION, steps, **options)
    return (table.levels[:, 1] / table.levels[:, 0]).numpy()


@pytest.mark.parametrize("spacing", [name for name in NAMES if not name.startswith("gits_")])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_with_every_schedule(sampler: str, spacing: str) -> None:
    if SAMPLERS[sampler].own_grid:
        return  # no schedule fits it
    options = {"timestep_spacing": spacing, "convention": "comfyui"}
    made = make_table(sampler, STABLE_DIFFUSION, 9, **options)
    assert made.integer_timesteps
    assert made.timesteps.min() >= 0
    assert made.timesteps.max() <= T - 1
    x = torch.randn(2, 3, dtype=torch.float64)
    runs = [run_table(made, toy_model, x, seed, math.nan)[-1] for seed in (1, 1)]
    assert runs[0].isfinite().all()
    assert torch.equal(*runs)
    alone = run_table(made, toy_model, x[:1])[-1] if not made.draws.any() else runs[0][:1]
    torch.testing.assert_close(alone, runs[0][:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, sampler, spacing, whole",
    [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras", False),
        ("dpm++ 2m karras", "dpmpp_2m", "karras", False),
        ("DPM++ 2M SDE Heun Exponential", "dpmpp_2m_sde_heun", "exponential", False),
        ("Euler a", "euler_ancestral", "normal", False),
        ("DPM2 a Karras", "dpm_2_ancestral", "karras", False),
        ("DPM++ 2S a SGM Uniform", "dpmpp_2s_ancestral", "sgm_uniform", False),
        ("sample_dpmpp_sde", "dpmpp_sde", "normal", False),
        ("comfyui/dpmpp_2m", "dpmpp_2m", "normal", True),
        ("comfyui/lcm", "lcm_plain", "normal", True),
        ("comfyui/uni_pc_bh2", "uni_pc_bh2", "normal", True),
        ("LMS Karras", "lms", "karras", False),
        ("DPM++ 2M Align Your Steps 32", "dpmpp_2m", "ays_32", False),
        ("comfyui/ddpm", "euler_ancestral", "normal", True),
        ("comfyui/dpmpp_3m_sde_gpu", "dpmpp_3m_sde", "normal", True),
    ],
)
def test_a_name_fixes_the_grid(name: str, sampler: str, spacing: str, whole: bool) -> None:
    """Also beside the spacing of a model's own config."""
    named = make_table(name, STABLE_DIFFUSION, 8, timestep_spacing="leading", steps_offset=1)
    convention = "comfyui" if whole else "k_diffusion"
    same = make_table(sampler, STABLE_DIFFUSION, 8, timestep_spacing=spacing, convention=convention)
    assert torch.equal(named.rows, same.rows)
    assert torch.equal(named.timesteps, same.timesteps)
    assert named.integer_timesteps == whole


def test_ddim_of_a1111_is_that_of_the_models_own_config() -> None:
    """As with Stable Diffusion's offset it steps through t = 1, 1 + T // n, ..., but not from 1."""
    made = make_table("DDIM", STABLE_DIFFUSION, 20, steps_offset=1)
    own = make_table("ddim", STABLE_DIFFUSION, 20, steps_offset=1)
    torch.testing.assert_close(made.rows, own.rows[:-1])


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2s"),
        ("UniPCMultistepScheduler", "unipc"),
        ("EulerDiscreteScheduler", "euler"),
        ("LCMScheduler", "lcm"),
    ],
)
def test_a_class_of_diffusers_means_its_defaults(name: str, sampler: str) -> None:
    assert make_table(name, STABLE_DIFFUSION, 5).sampler == sampler


def test_a_class_of_diffusers_means_its_grid() -> None:
    named = make_table("KDPM2DiscreteScheduler", STABLE_DIFFUSION, 8, timestep_spacing="linspace")
    own = make_table("dpm_2", STABLE_DIFFUSION, 8, timestep_spacing="linspace")
    assert torch.equal(named.timesteps, own.timesteps)


def test_a_schedule_that_only_comfyui_has_means_its_grid() -> None:
    made = make_table("dpmpp_2m", STABLE_DIFFUSION, 8, timestep_spacing="simple")
    assert made.timesteps.tolist() == [T - 1 - 125 * k for k in range(8)]
    assert made.initial_scale == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("DPM adaptive", "expected one that is a table of rows, got DPM adaptive: it chooses"),
        ("UniPC Karras", "expected one of ddpm, ddim"),
        ("DDIMInverseScheduler", "got DDIMInverseScheduler: it goes from an image to noise"),
        ("IPNDMScheduler", "got IPNDMScheduler: its schedule is of its own"),
        ("Euler b", "expected one of ddpm, ddim"),
        ("DPM++ 2M Carras", "expected one of ddpm, ddim"),
        ("", "expected one of ddpm, ddim"),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"sampler: .*{message}"):
        make_table(name, STABLE_DIFFUSION, 8)


def test_bad_conventions_and_schedules() -> None:
    for options, message in (
        ({"convention": "mine"}, "convention: expected one of diffusers, k_diffusion, comfyui"),
        ({"convention": "comfyui"}, "timestep_spacing: expected one of normal, sgm_uniform"),
        ({"timestep_spacing": "smooth"}, "expected one of leading, .*, beta, normal, .*, gits_1.5"),
        ({"s_noise": -1.0}, "s_noise: expected a number of at least 0"),
        ({"eta": 0.5}, "eta: expected none for euler"),
        ({"timesteps": [900, 20], "steps": 3}, "steps: expected None or 2 for a grid of one's"),
        ({"timesteps": [1200, 20]}, "timesteps: expected at least 1 decreasing numbers"),
        ({"sigmas": [1.0, 2.0]}, "sigmas: expected at least 2 decreasing numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            make_table("euler", STABLE_DIFFUSION, **{"steps": None, **options})
    with pytest.raises(ValueError, match="steps: expected at most 50 for a consistency model"):
        make_table("lcm", STABLE_DIFFUSION, 51)


def test_grids_of_ones_own() -> None:
    made = make_table("dpmpp_2m", STABLE_DIFFUSION, timesteps=[900, 500, 20])
    assert made.timesteps.tolist() == [900, 500, 20]
    levels = levels_of("euler", None, sigmas=[9.0, 3.0, 0.5, 0.0])
    np.testing.assert_allclose(levels, [9.0, 3.0, 0.5])


# The schedules' formulas, each on its own.


def log_levels(t: np.ndarray) -> np.ndarray:
    return np.exp(np.interp(t, np.arange(T), np.log(LEVELS)))


def test_levels_of_the_schedules() -> None:
    low, high = LEVELS[0], LEVELS[-1]
    k = np.arange(8)
    ddim = [LEVELS[1 + 125 * i] for i in range(8)]
    expected = {
        "normal": log_levels(np.linspace(T - 1, 0, 8)),
        "sgm_uniform": log_levels(np.linspace(T - 1, 0, 9)[:-1]),
        "simple": LEVELS[[T - 1 - 125 * i for i in range(8)]],
        "ddim_uniform": ddim[::-1],
        "kl_optimal": np.tan(k / 7 * math.atan(low) + (1 - k / 7) * math.atan(high)),
        "karras": (high ** (1 / 7) + k / 7 * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
        "exponential": high * (low / high) ** (k / 7),
        "polyexponential": high * (low / high) ** (k / 7),
    }
    for spacing, levels in expected.items():
        options = {"timestep_spacing": spacing, "convention": "k_diffusion"}
        np.testing.assert_allclose(levels_of("euler", 8, **options), levels, rtol=1e-9)


def test_linear_quadratic_rises_to_the_threshold_and_then_to_one() -> None:
    options = {"timestep_spacing": "linear_quadratic", "convention": "comfyui"}
    share = 1 - levels_of("euler", 10, **options) / LEVELS[-1]
    np.testing.assert_allclose(share[:6], np.arange(6) * 0.005, atol=1e-12)
    rest = np.append(share[5:], 1.0)
    np.testing.assert_allclose(np.diff(rest, 3), 0, atol=1e-12)  # a parabola
    assert rest[1] - rest[0] > 0.005


def test_published_levels_and_their_interpolation() -> None:
    options = {"timestep_spacing": "ays", "convention": "comfyui"}
    levels = levels_of("euler", 10, **options)
    np.testing.assert_allclose(levels[[0, 1, -1]], [14.615, 6.475, 0.152])
    twice = levels_of("euler", 20, **options)
    np.testing.assert_allclose(twice[::2], levels, rtol=1e-9)
    np.testing.assert_allclose(twice[1::2][:-1] ** 2, levels[1:] * levels[:-1], rtol=1e-9)
    a1111 = levels_of("euler", 11, timestep_spacing="ays", convention="k_diffusion")
    np.testing.assert_allclose(a1111[-1], 0.029)


@pytest.mark.parametrize("spacing", ["ays_11", "ays_32", "ays_gits", "ays_11_sdxl"])
def test_published_levels_of_the_models_own_range(spacing: str) -> None:
    count = 32 if "32" in spacing else 11
    levels = levels_of("euler", count, timestep_spacing=spacing, convention="k_diffusion")
    np.testing.assert_allclose(levels[[0, -1]], LEVELS[[-1, 0]], rtol=1e-9)
    table = {"ays_32": AYS_32, "ays_gits": AYS_GITS, "ays_11_sdxl": AYS_SDXL}.get(spacing, AYS)
    low, high = LEVELS[[0, -1]]
    known = low + (np.array(table) - table[-1]) * (high - low) / (table[0] - table[-1])
    np.testing.assert_allclose(levels, known, rtol=1e-9)
    twice = levels_of("euler", 2 * count - 1, timestep_spacing=spacing, convention="k_diffusion")
    np.testing.assert_allclose(twice[::2], levels, rtol=1e-9)


def test_gits_has_levels_for_each_number_of_steps() -> None:
    options = {"timestep_spacing": "gits", "convention": "comfyui"}
    for steps in (2, 7, 20):
        known = gits.levels_of(1.2, steps)
        assert len(known) == steps + 1
        np.testing.assert_allclose(levels_of("euler", steps, **options), known[:-1])
    more = levels_of("euler", 40, **options)
    np.testing.assert_allclose(more[::2], known[:-1], rtol=1e-9)
    with pytest.raises(ValueError, match=r"steps: expected an integer >= 2, got 1"):
        levels_of("euler", 1, **options)


@pytest.mark.parametrize("coefficient", gits.TABLES)
def test_gits_at_each_coefficient(coefficient: float) -> None:
    """A larger one goes down sooner."""
    for steps in range(2, 21):
        levels = gits.levels_of(coefficient, steps)
        assert len(levels) == steps + 1
        assert (np.diff(levels) < 0).all()
    options = {"timestep_spacing": f"gits_{coefficient:g}", "convention": "comfyui"}
    np.testing.assert_allclose(levels_of("euler", 20, **options), levels[:-1])
    usual = gits.levels_of(gits.USUAL, 20)
    assert np.sign(levels[10] - usual[10]) == np.sign(gits.USUAL - coefficient)


def test_gits_as_published() -> None:
    assert gits.levels_of(0.8, 4) == [14.61464119, 11.54541874, 7.49001646, 3.07277966, 0.02916753]
    assert gits.levels_of(1.0, 3) == [14.61464119, 6.77309084, 0.95350921, 0.02916753]
    assert gits.levels_of(1.5, 2) == [14.61464119, 0.54755926, 0.02916753]


def test_unipc_of_a1111_has_its_own_grid() -> None:
    """Evenly spaced t down to 0 at the end, log A interpolated between them."""
    made = make_table("UniPC", STABLE_DIFFUSION, 12, timestep_spacing="leading", steps_offset=1)
    assert (made.sampler, made.steps) == ("unipc_a1111", 13)  # 0, 83, ..., 996: there are 13
    t = np.linspace(T - 1, 0, 14)
    np.testing.assert_allclose(made.timesteps, t[:-1])
    log_signal = 0.5 * np.interp(t, np.arange(T), np.log(STABLE_DIFFUSION.alpha_bar))
    np.testing.assert_allclose(made.levels[:, 0], np.exp(log_signal[:-1]))
    np.testing.assert_allclose(made.next_levels[-1, 0] ** 2, STABLE_DIFFUSION.alpha_bar[0])
    # The same rows as diffusers' order 3 with bh1 on those noise levels.
    sigmas = np.sqrt(np.exp(-2 * log_signal) - 1)
    same = make_table("unipc_3_bh1", STABLE_DIFFUSION, sigmas=sigmas)
    torch.testing.assert_close(made.rows, same.rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2}, "steps: expected an integer >= 3, got 2"),
        ({"timestep_spacing": "karras"}, "timestep_spacing: expected none for unipc_a1111"),
        ({"convention": "comfyui"}, "convention: expected 'diffusers' for unipc_a1111"),
    ],
)
def test_what_does_not_fit_unipc_of_a1111(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_table("unipc_a1111", STABLE_DIFFUSION, **{"steps": 8, **options})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipping_is_honored_or_refused(sampler: str) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    plain = run_table(make_table(sampler, STABLE_DIFFUSION, 6), toy_model, x, 1)[-1]
    if (
        sampler == "pndm"
        or "cfg_pp" in sampler
        or re.fullmatch(r"dpm_solver_\d(|m|_.*|m_.*)", sampler)
    ):
        with pytest.raises(ValueError, match="clip_sample: expected False for"):
            make_table(sampler, STABLE_DIFFUSION, 6, clip_sample=0.01)
        return
    table = make_table(sampler, STABLE_DIFFUSION, 6, clip_sample=0.01)
    assert not torch.equal(run_table(table, toy_model, x, 1)[-1], plain)


def test_dpm_2_drops_the_last_but_one_level() -> None:
    options = {"timestep_spacing": "karras", "convention": "comfyui"}
    starts = levels_of("dpm_2", 7, **options)[::2]
    np.testing.assert_allclose(starts, levels_of("euler", 8, **options)[:-1])


def test_the_table_of_names() -> None:
    rows = {row[0]: row[1:] for row in table(SAMPLERS)}
    assert rows.keys() == SAMPLERS.keys()
    assert rows["dpmpp_2m"][1:] == ("sample_dpmpp_2m", "dpmpp_2m", "DPM++ 2M")
    assert "DPMSolverMultistepScheduler" in rows["dpmpp_2m"][0]
    for _, k_diffusion, comfyui, a1111 in rows.values():
        for name in (k_diffusion, comfyui and f"comfyui/{comfyui}", a1111):
            if name:
                make_table(name, STABLE_DIFFUSION, 5)


def test_the_docs_are_the_registry() -> None:
    path = Path(__file__).parents[2] / "docs" / "samplers.md"
    assert path.read_text(encoding="utf-8") == document(SAMPLERS)
