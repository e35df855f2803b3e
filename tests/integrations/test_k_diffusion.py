"""Against the formulas in sigma written out, and against the engine on the same noise levels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffusion_fast as df
from diffusion_fast.integrations import k_diffusion as k
from diffusion_fast.prediction import x0_coefficients

SCHEDULE = df.DiffusionSchedule(
    timesteps=1000, beta_start=0.00085, beta_end=0.012, kind="scaled_linear"
)
SIGMAS = torch.tensor([14.6, 9.0, 5.2, 2.7, 1.3, 0.6, 0.2, 0.03, 0.0], dtype=torch.float64)


def denoise(x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
    """A smooth denoiser that isn't linear."""
    level = sigma.view(-1, *(1,) * (x.dim() - 1))
    return torch.tanh(x / (1 + level.square()).sqrt() + shift) * 0.8


def start() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator) * SIGMAS[0]


def euler(x: Tensor, sigmas: Tensor) -> Tensor:
    for s, t in itertools.pairwise(sigmas):
        x = x + (t - s) * (x - denoise(x, s.expand(2))) / s
    return x


def heun(x: Tensor, sigmas: Tensor) -> Tensor:
    for s, t in itertools.pairwise(sigmas):
        slope = (x - denoise(x, s.expand(2))) / s
        ahead = x + (t - s) * slope
        if t > 0:
            slope = (slope + (ahead - denoise(ahead, t.expand(2))) / t) / 2
        x = x + (t - s) * slope
    return x


def dpmpp_2m(x: Tensor, sigmas: Tensor) -> Tensor:
    """In lambda = -log sigma: x' = s'/s x - (exp(-h) - 1) D, D extrapolated to the middle."""
    last, last_step = None, None
    for s, t in itertools.pairwise(sigmas):
        now = denoise(x, s.expand(2))
        if t == 0:
            return now
        h = (s / t).log()
        d = now if last is None else now + (now - last) * h / (2 * last_step)
        x, last, last_step = t / s * x - torch.expm1(-h) * d, now, h
    return x


@pytest.mark.parametrize(
    ("sampler", "formula"),
    [(k.sample_euler, euler), (k.sample_heun, heun), (k.sample_dpmpp_2m, dpmpp_2m)],
)
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[2:-1]], ids=["to zero", "a part"])
def test_a_sampler_is_its_formula(
    sampler: Callable[..., Tensor], formula: Callable[..., Tensor], sigmas: Tensor
) -> None:
    wanted = formula(start(), sigmas)
    got = sampler(denoise, start(), sigmas)
    assert (got - wanted).abs().max() < 1e-11 * wanted.abs().max()


def test_ancestral_noise_comes_from_the_noise_sampler() -> None:
    asked = []

    def noise(sigma: Tensor, after: Tensor) -> Tensor:
        asked.append((sigma.item(), after.item()))
        return torch.ones(2, 3, 4, 4, dtype=torch.float64) * len(asked)

    x = start()
    for i, (s, t) in enumerate(itertools.pairwise(SIGMAS)):
        up = math.sqrt(t**2 * (s**2 - t**2) / s**2)
        down = math.sqrt(t**2 - up**2)
        x = x + (down - s) * (x - denoise(x, s.expand(2))) / s + up * (i + 1)
    got = k.sample_euler_ancestral(denoise, start(), SIGMAS, noise_sampler=noise)
    assert (got - x).abs().max() < 1e-11 * x.abs().max()
    pairs = zip(SIGMAS[:-2].tolist(), SIGMAS[1:-1].tolist(), strict=True)
    assert asked == list(pairs)  # none for the last step


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "dpmpp_2m_sde", "unipc"])
def test_finer_grids_agree(name: str) -> None:
    """All solve the same equation; the stochastic one without its noise is off by its noise."""
    run = getattr(k, f"sample_{name}")
    options: dict[str, Any] = {}
    if name == "dpmpp_2m_sde":
        torch.manual_seed(0)
    fine = torch.cat((torch.logspace(1.16, -2, 400, dtype=torch.float64), torch.zeros(1)))
    got = run(denoise, start(), fine, **options)
    assert got.isfinite().all()
    assert got.abs().max() < 0.9
    if name != "dpmpp_2m_sde":
        wanted = heun(start(), fine)
        assert (got - wanted).abs().max() < 0.02


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_denoiser_and_the_engine_make_the_same_image(prediction_type: str) -> None:
    torch.manual_seed(0)
    model = df.UNet2DCondition(df.UNetConfig.preset("digits")).double().eval()
    x_T = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([3, 7])
    settings = {"sampler": "euler", "steps": 6, "timestep_spacing": "trailing"}
    engine = df.Engine(model, SCHEDULE, prediction_type=prediction_type, **settings)
    wanted = engine.sample(x_T.shape, context=labels, x_T=x_T)
    denoiser = k.Denoiser(model, SCHEDULE, prediction_type)
    t = engine.table.timesteps
    sigmas = torch.cat((denoiser.sigmas[t.long()], torch.zeros(1))).double()
    got = k.sample_euler(
        denoiser, x_T * sigmas[0].square().add(1).sqrt() * engine.table.initial_scale,
        sigmas, extra_args={"context": labels},
    )  # fmt: skip
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_denoised_is_x0_of_the_prediction() -> None:
    x, sigma = torch.randn(3, 2, 4, 4).double(), torch.tensor([0.2, 1.0, 7.0]).double()
    out = torch.randn(3, 2, 4, 4).double()
    signal = 1 / (1 + sigma**2).sqrt()
    for kind in ("epsilon", "v_prediction", "sample"):
        a, b = x0_coefficients(kind, signal.numpy(), (signal * sigma).numpy())
        model = torch.nn.Module()
        model.forward = lambda x, t: out
        got = k.Denoiser(model, SCHEDULE, kind)(x, sigma)
        wide = [torch.from_numpy(np.asarray(v)).view(-1, 1, 1, 1) for v in (a, b)]
        wanted = wide[0] * signal.view(-1, 1, 1, 1) * x + wide[1] * out
        torch.testing.assert_close(got, wanted)


def test_a_function_is_a_model_too() -> None:
    x, sigma = torch.randn(2, 1, 4, 4), torch.full((2,), 3.0)
    got = k.Denoiser(lambda x, t: torch.zeros_like(x), SCHEDULE)(x, sigma)
    assert torch.equal(got, x)


def test_sigma_and_t_are_inverse() -> None:
    denoiser = k.Denoiser(torch.nn.Identity(), SCHEDULE)
    t = torch.cat((torch.linspace(0, 999, 77), torch.tensor([0.5, 998.5])))
    assert (denoiser.sigma_to_t(denoiser.t_to_sigma(t)) - t).abs().max() < 2e-2
    assert torch.equal(denoiser.sigma_to_t(torch.tensor([0.0, 1e9])), torch.tensor([0.0, 999.0]))
    sigmas = denoiser.get_sigmas(10)
    assert len(sigmas) == 11
    torch.testing.assert_close(sigmas[0], denoiser.sigma_max)
    assert sigmas[-1] == 0
    torch.testing.assert_close(sigmas[-2], denoiser.sigma_min)
    assert len(denoiser.get_sigmas()) == 1001


def test_the_callback_sees_every_model_call() -> None:
    seen: list[dict[str, Any]] = []
    k.sample_heun(denoise, start(), SIGMAS[:4], callback=seen.append, extra_args={"shift": 0.1})
    assert [call["i"] for call in seen] == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(seen[0]["x"], start())
    torch.testing.assert_close(seen[0]["denoised"], denoise(start(), SIGMAS[:1].expand(2), 0.1))


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 2.0], [1.0, 1.0], [1.0, -1.0], [[1.0, 0.0]]])
def test_bad_sigmas_are_named(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas: expected at least two noise levels"):
        k.sample_euler(denoise, start(), torch.tensor(sigmas))


def test_a_model_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\(x, sigma\): expected shape"):
        k.sample_euler(lambda x, sigma: x[:1], start(), SIGMAS)


@pytest.mark.parametrize(
    "name",
    ["dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"],
)
def test_stochastic_samplers_take_their_noise_from_the_sampler(name: str) -> None:
    """Its spans fill each step but the last, to no noise; eta = 0 asks for none."""
    spans: list[tuple[float, float]] = []

    def noise(sigma: Tensor, after: Tensor) -> Tensor:
        spans.append((sigma.item(), after.item()))
        return torch.ones_like(start())

    run = getattr(k, f"sample_{name}")
    got = run(denoise, start(), SIGMAS, noise_sampler=noise, eta=0.7, s_noise=1.1)
    assert got.isfinite().all()
    assert spans[0][0] == SIGMAS[0]
    assert spans[-1][1] == pytest.approx(0.03)
    assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(spans))
    assert len(spans) == (14 if name == "dpmpp_sde" else 7)
    spans.clear()
    quiet = run(denoise, start(), SIGMAS, noise_sampler=noise, eta=0.0)
    assert not spans
    assert not torch.equal(quiet, got)


def test_dpm_2_takes_the_slope_at_the_geometric_mean() -> None:
    x = start()
    for s, t in itertools.pairwise(SIGMAS):
        slope = (x - denoise(x, s.expand(2))) / s
        if t > 0:
            middle = (s * t).sqrt()
            ahead = x + (middle - s) * slope
            slope = (ahead - denoise(ahead, middle.expand(2))) / middle
        x = x + (t - s) * slope
    torch.testing.assert_close(k.sample_dpm_2(denoise, start(), SIGMAS), x)
