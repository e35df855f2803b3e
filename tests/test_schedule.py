"""The schedule against its definitions, against diffusers, and against the forward process."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

from diffusion_fast.schedule import (
    KINDS,
    DiffusionSchedule,
)

TABLES = ("betas", "alphas", "alphas_cumprod", "sqrt_alphas_cumprod")


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_what_their_names_say(kind):
    schedule = DiffusionSchedule(1000, kind=kind)
    assert schedule.timesteps == 1000
    for name in (*TABLES, "sqrt_one_minus_alphas_cumprod"):
        table = getattr(schedule, name)
        assert (table.dtype, table.shape, table.device.type) == (torch.float32, (1000,), "cpu")
    assert torch.equal(schedule.alphas, 1 - schedule.betas)
    product = torch.cumprod(schedule.alphas.double(), 0)
    assert torch.equal(schedule.alphas_cumprod, product.float())
    assert torch.equal(schedule.sqrt_alphas_cumprod, product.sqrt().float())
    assert torch.equal(schedule.sqrt_one_minus_alphas_cumprod, (1 - product).sqrt().float())
    assert schedule.alpha_bar.dtype == np.float64
    assert (schedule.alpha_bar == schedule.alphas_cumprod.double().numpy()).all()


def test_linear_betas_are_those_of_ddpm():
    schedule = DiffusionSchedule()
    assert schedule.betas[0].item() == pytest.approx(1e-4)
    assert schedule.betas[-1].item() == pytest.approx(0.02)
    assert schedule.betas.diff().std() < 1e-8
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


def test_cosine_alpha_bars_are_a_cosine():
    """Nichol & Dhariwal 2021, eq. 17, wherever beta isn't capped."""
    schedule = DiffusionSchedule(1000, kind="cosine")
    assert schedule.betas.max().item() == pytest.approx(0.999)
    u = (torch.arange(1, 991) / 1000 + 0.008) / 1.008 * math.pi / 2
    expected = u.cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(schedule.alphas_cumprod[:990], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("timesteps", (10, 1000))
@pytest.mark.parametrize("zero_snr", (False, True))
@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.1},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": [0.01, 0.02, 0.05]},
    ],
)
def test_schedule_from_a_diffusers_config(config, zero_snr, timesteps):
    timesteps = len(config.get("trained_betas", range(timesteps)))
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=timesteps, rescale_betas_zero_snr=zero_snr, **config
    )
    ours = DiffusionSchedule.from_config(theirs.config)
    if zero_snr:
        # They subtract nearly equal roots of abar in float32, which costs up to five bits here;
        # the algorithm itself has a test below.
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=1e-5)
        assert ours.alphas_cumprod[-1] == 0
    else:
        torch.testing.assert_close(ours.betas, theirs.betas, rtol=5e-7, atol=0)
        torch.testing.assert_close(
            ours.alphas_cumprod, theirs.alphas_cumprod, rtol=5e-7, atol=1e-12
        )


@pytest.mark.parametrize("zero_snr", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_config_round_trip(kind, zero_snr):
    schedule = DiffusionSchedule(30, kind=kind, zero_terminal_snr=zero_snr)
    again = DiffusionSchedule.from_config(schedule.to_config())
    assert torch.equal(again.betas, schedule.betas)
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)


def test_an_unknown_config_names_the_known_ones():
    with pytest.raises(ValueError, match="beta_schedule: expected one of squaredcos_cap_v2, lin"):
        DiffusionSchedule.from_config({"beta_schedule": "laplace"})


def test_zero_terminal_snr_keeps_the_start():
    """Lin et al. 2023, algorithm 1: sqrt(abar) shifted and scaled, abar_0 kept, the end 0."""
    plain = DiffusionSchedule()
    zero = DiffusionSchedule(zero_terminal_snr=True)
    root = plain.sqrt_alphas_cumprod.double()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(zero.sqrt_alphas_cumprod.double(), expected, rtol=2e-5, atol=1e-7)
    assert zero.betas[-1] == 1
    assert zero.alphas_cumprod[-1] == 0
    assert zero.sqrt_one_minus_alphas_cumprod[-1] == 1


def test_given_betas():
    betas = torch.tensor([0.1, 0.2, 0.3])
    schedule = DiffusionSchedule(betas=betas)
    assert schedule.timesteps == 3
    assert torch.equal(schedule.betas, betas)
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.9, 0.72, 0.504]))
    last_is_one = DiffusionSchedule(betas=[0.1, 0.5, 1.0], zero_terminal_snr=True)
    assert last_is_one.alphas_cumprod.tolist() == pytest.approx([0.9, 0.45, 0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"timesteps": 0}, "timesteps: expected a positive integer, got 0"),
        ({"timesteps": 10.0}, "timesteps: expected a positive integer, got 10.0"),
        ({"kind": "quadratic"}, "kind: expected one of linear, scaled_linear, cosine, sigmoid"),
        ({"beta_start": 0.0}, r"beta_start: expected a number in \(0, 1\), got 0.0"),
        ({"beta_end": 1.0}, r"beta_end: expected a number in \(0, 1\), got 1.0"),
        ({"beta_end": math.nan}, "beta_end: expected a finite number, got nan"),
        ({"betas": [0.1, 1.2]}, r"betas: expected values in \(0, 1\), got 1 outside, the first"),
        ({"betas": [0.1, 1.0]}, r"betas: expected values in \(0, 1\)"),
        ({"betas": [0.0, 0.1]}, r"betas: expected values in \(0, 1\)"),
        ({"betas": [0.1, math.nan]}, r"betas: expected values in \(0, 1\)"),
        ({"betas": [0.1, 1.0, 0.1], "zero_terminal_snr": True}, r"betas: expected values in"),
        ({"betas": [1e-9, 0.1]}, "betas: expected alpha-bars that decrease"),
        ({"betas": [0.999] * 20}, "betas: expected alpha-bars that decrease"),
        ({"betas": torch.ones(2, 2) / 2}, r"betas: expected shape \[T\], got \[2, 2\]"),
        ({"betas": []}, r"betas: expected shape \[T\], got \[0\]"),
        ({"timesteps": 1, "zero_terminal_snr": True}, "timesteps: expected at least 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSchedule(**arguments)


def test_add_noise_is_the_closed_form():
    schedule = DiffusionSchedule()
    x_0, noise = torch.randn(2, 4, 3, 5)
    t = torch.tensor([0, 10, 500, 999])
    abar = schedule.alphas_cumprod.double()[t].view(4, 1, 1)
    expected = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise
    torch.testing.assert_close(
        schedule.add_noise(x_0, t, noise).double(), expected, rtol=1e-6, atol=1e-6
    )


def test_noise_comes_from_the_generator():
    schedule = DiffusionSchedule(10)
    x_0, t = torch.randn(3, 2, 2), torch.tensor([0, 4, 9])
    drawn = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(3))
    ours = schedule.add_noise(x_0, t, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours, schedule.add_noise(x_0, t, drawn))


@pytest.mark.parametrize(
    "t, message",
    [
        (torch.tensor([0, 10]), r"t: expected values in \[0, 10\), got values in \[0, 10\]"),
        (torch.tensor([-1, 3]), r"t: expected values in \[0, 10\), got values in \[-1, 3\]"),
        (torch.tensor([0.0, 1.0]), "t: expected dtype torch.int64, got torch.float32"),
        (torch.tensor([1]), r"t: expected shape \[B\] = \[2\], got \[1\]"),
    ],
)
def test_bad_timesteps(t, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSchedule(10).add_noise(torch.zeros(2, 3), t)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_process_step_by_step_composes_to_the_closed_form(kind):
    """x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z: means multiply, variances add up."""
    schedule = DiffusionSchedule(50, beta_end=0.2, kind=kind)
    mean, variance = 1.0, 0.0
    for i in range(50):
        alpha = schedule.alphas[i].double().item()
        mean, variance = mean * alpha**0.5, variance * alpha + 1 - alpha
        assert mean == pytest.approx(schedule.alpha_bar[i] ** 0.5, abs=1e-7)
        assert variance == pytest.approx(1 - schedule.alpha_bar[i], abs=1e-7)


def test_half_precision_stays_half():
    schedule = DiffusionSchedule(10)
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    t = torch.tensor([0, 9])
    assert schedule.add_noise(x, t).dtype == torch.bfloat16


def test_device_tables_are_copied_once():
    """The meta device stands for a GPU."""
    schedule = DiffusionSchedule(10)
    x_0 = torch.zeros(2, 3, device="meta")
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    assert schedule.add_noise(x_0, t).device.type == "meta"
    first = schedule.tables(x_0.device)
    schedule.add_noise(x_0, t)
    assert schedule.tables(x_0.device) is first
    assert set(first) == set(schedule.tables(torch.device("cpu")))
