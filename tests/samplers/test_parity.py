"""Every sampler against its counterpart in diffusers, state by state, with the same noise."""

from __future__ import annotations

import pytest
from scheduler_parity import COUNTERPARTS, Parity, has_counterpart

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

TOLERANCE = 2e-5  # of max |x|, float32
ROUNDING = 1e-9  # of max |x|, float64
SPACINGS = ("leading", "trailing", "linspace", "karras")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = (1, 2, 7, 10, 13, 33, 50)

COMBINATIONS = [
    (sampler, kind, steps, spacing, prediction)
    for sampler in COUNTERPARTS
    for kind in ("scaled_linear", "linear", "cosine")
    for spacing in SPACINGS
    for prediction in PREDICTIONS
    for steps in (STEPS if kind == "scaled_linear" else (1, 2, 13))
    if has_counterpart(sampler, kind, steps, spacing, prediction)
]


def assert_equal(parity: Parity) -> None:
    float32, float64 = parity.errors_against_double()
    assert float64 <= ROUNDING
    assert float32 <= TOLERANCE


@pytest.mark.parametrize("sampler, kind, steps, spacing, prediction", COMBINATIONS)
def test_sampler_is_diffusers(sampler, kind, steps, spacing, prediction):
    assert_equal(Parity(sampler, kind, steps, spacing, prediction))


@pytest.mark.parametrize("steps", (1, 10, 13, 50))
@pytest.mark.parametrize("sampler", COUNTERPARTS)
def test_float32_is_diffusers_float32(sampler, steps):
    """Both as users run them, tables included."""
    parity = Parity(sampler, "scaled_linear", steps, "trailing", "epsilon")
    assert parity.float32_error() <= TOLERANCE


@pytest.mark.parametrize("kind", ("linear", "cosine"))
@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("sampler", ("ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"))
def test_float32_is_diffusers_float32_on_other_betas(sampler, spacing, kind):
    assert Parity(sampler, kind, 33, spacing, "epsilon").float32_error() <= TOLERANCE


@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("steps", (2, 7, 50))
def test_ddpm_small_variance(steps, spacing):
    config = {"variance_type": "fixed_small"}
    assert_equal(
        Parity("ddpm", "linear", steps, spacing, "epsilon", config=config, variance="small")
    )


@pytest.mark.parametrize("variance", ("large", "small"))
def test_ddpm_with_every_step(variance):
    config = {"variance_type": f"fixed_{variance}"}
    assert_equal(
        Parity("ddpm", "linear", 1000, "leading", "epsilon", config=config, variance=variance)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("steps", (2, 7, 50))
@pytest.mark.parametrize("eta", (0.5, 1.0))
def test_ddim_with_eta(eta, steps, spacing, prediction):
    assert_equal(
        Parity("ddim", "linear", steps, spacing, prediction, step_options={"eta": eta}, eta=eta)
    )


CLIPPED = [
    (sampler, eta, prediction)
    for sampler, eta in [("ddpm", 0), ("ddim", 0), ("ddim", 0.5), ("heun", 0)]
    for prediction in PREDICTIONS
    if has_counterpart(sampler, "scaled_linear", 10, "trailing", prediction)
]


@pytest.mark.parametrize("clip", (1.0, 0.8))
@pytest.mark.parametrize("sampler, eta, prediction", CLIPPED)
def test_clipping(sampler, eta, prediction, clip):
    parity = Parity(
        sampler,
        "scaled_linear",
        10,
        "trailing",
        prediction,
        config={"clip_sample": True, "clip_sample_range": clip},
        step_options={"eta": eta} if eta else None,
        clip_sample=True if clip == 1 else clip,
        eta=eta,
    )
    assert_equal(parity)


@pytest.mark.parametrize("steps", (10, 13, 50))
@pytest.mark.parametrize("sampler", COUNTERPARTS)
def test_stable_diffusions_offset(sampler, steps):
    config = {"steps_offset": 1}
    assert_equal(
        Parity(sampler, "scaled_linear", steps, "leading", "epsilon", config, steps_offset=1)
    )


@pytest.mark.parametrize("steps", (10, 13))
@pytest.mark.parametrize(
    "sampler, config",
    [
        ("ddim", {"set_alpha_to_one": False}),
        ("dpmpp_1", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_3m_diffusers", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m_sde", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("unipc", {"final_sigmas_type": "sigma_min"}),
        ("unipc_3", {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_final_alpha_of_the_first_timestep(sampler, config, steps):
    parity = Parity(
        sampler,
        "scaled_linear",
        steps,
        "leading",
        "epsilon",
        config | {"steps_offset": 1},
        steps_offset=1,
        final_alpha="first",
    )
    if sampler == "euler":  # its last state is still x_0 + sigma epsilon
        parity.final_scale = float(parity.schedule.alpha_bar[0]) ** 0.5
    assert_equal(parity)


@pytest.mark.parametrize("strength", (0.05, 0.5, 0.77, 1.0))
@pytest.mark.parametrize("steps", (20, 33))
@pytest.mark.parametrize("sampler", COUNTERPARTS)
def test_image_to_image(sampler, steps, strength):
    assert_equal(Parity(sampler, "scaled_linear", steps, "leading", "epsilon", strength=strength))


ZERO_SNR = [
    (sampler, prediction)
    for sampler in COUNTERPARTS
    for prediction in ("v_prediction", "sample")
    if sampler != "heun"  # diffusers' has no such setting
    if has_counterpart(sampler, "scaled_linear", 10, "trailing", prediction)
]


@pytest.mark.parametrize("steps", (1, 10, 13))
@pytest.mark.parametrize("sampler, prediction", ZERO_SNR)
def test_zero_terminal_snr(sampler, prediction, steps):
    assert_equal(
        Parity(sampler, "scaled_linear", steps, "trailing", prediction, zero_terminal_snr=True)
    )
