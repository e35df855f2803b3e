"""k-diffusion's conventions: models as ``model(x, sigma) -> denoised``, samplers on given sigmas.

There the state is x = x_0 + sigma z (variance exploding; Karras et al. 2022, arXiv:2206.00364). Our
networks see x / sqrt(1 + sigma^2), and so does the state of our tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops import checks, sampler_step
from ..prediction import PREDICTION_TYPES
from ..samplers import Grid, StepTable, table_from_grid
from ..samplers.grids import LEAST_ALPHA_BAR
from ..schedule import DiffusionSchedule

KModel = Callable[..., Tensor]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]


class Denoiser(nn.Module):
    """A model of this package as ``model(x, sigma, **extra) -> denoised``.

    Args:
        model: a module or function, called as ``model(x, t, **extra)`` with x of unit variance
            and float t.
        schedule: what it was trained with.
        prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.

    Attributes:
        sigmas: the noise level of every timestep, float32 [T], increasing.
    """

    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: DiffusionSchedule,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        checks.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        self.inner_model, self.prediction_type = model, prediction_type
        abar = np.maximum(schedule.alpha_bar, LEAST_ALPHA_BAR)
        sigmas = torch.from_numpy(np.sqrt((1 - abar) / abar))
        self.register_buffer("sigmas", sigmas.float())
        self.register_buffer("log_sigmas", sigmas.log().float())

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def get_sigmas(self, steps: int | None = None) -> Tensor:
        """Noise levels at evenly spaced timesteps from T - 1 down to 0, and a last 0, [steps + 1].

        Args:
            steps: None for one at every timestep.
        """
        count = len(self.sigmas) if steps is None else steps
        checks.positive_int("steps", count)
        t = torch.linspace(
            len(self.sigmas) - 1, 0, count, dtype=torch.float32, device=self.sigmas.device
        )
        return torch.cat((self.t_to_sigma(t), self.sigmas.new_zeros(1)))

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The noise level at fractional timesteps, by interpolation of log sigma."""
        low = t.floor().long().clamp(0, len(self.sigmas) - 1)
        high = (low + 1).clamp(max=len(self.sigmas) - 1)
        return self.log_sigmas[low].lerp(self.log_sigmas[high], t.float() - low).exp()

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """The inverse, in [0, T - 1]; reads nothing on the host."""
        log_sigma = sigma.float().log()
        high = torch.searchsorted(self.log_sigmas, log_sigma).clamp(1, len(self.sigmas) - 1)
        low_value, high_value = self.log_sigmas[high - 1], self.log_sigmas[high]
        weight = (log_sigma - low_value) / (high_value - low_value)
        return high - 1 + weight.clamp(0, 1)

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """The model's x_0.

        Args:
            x: x_0 + sigma z, [B, ...].
            sigma: noise levels, [B] or 0-dim.
            extra: handed to the model, such as ``context=``.
        """
        shape = (-1,) + (1,) * (x.dim() - 1)
        sigma = sigma.expand(len(x)) if sigma.dim() == 0 else sigma
        wide = sigma.to(x).view(shape)
        signal = torch.rsqrt(wide.square() + 1)
        parameters = getattr(self.inner_model, "parameters", tuple)  # a function has none
        dtype = next((p.dtype for p in parameters()), x.dtype)
        out = self.inner_model((x * signal).to(dtype), self.sigma_to_t(sigma), **extra).to(x)
        if self.prediction_type == "epsilon":
            return x - wide * out
        if self.prediction_type == "v_prediction":
            return signal * (signal * x - wide * out)
        return out


def sample_euler(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """Euler (Karras et al. 2022, algorithm 1 without its second half)."""
    return _sample("euler", model, x, sigmas, **options)


def sample_euler_ancestral(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """Euler to a lower noise level, and fresh noise back up."""
    return _sample("euler_ancestral", model, x, sigmas, **options)


def sample_heun(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """Heun's method, two model calls a step (Karras et al. 2022, algorithm 1)."""
    return _sample("heun", model, x, sigmas, **options)


def sample_lms(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """Linear multistep: Adams-Bashforth in sigma."""
    return _sample("lms", model, x, sigmas, **options)


def sample_ddim(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """DDIM, which is DPM-Solver++ of order 1 (Lu et al. 2022, arXiv:2211.01095, section 4.1)."""
    return _sample("dpmpp_1", model, x, sigmas, **options)


def sample_dpmpp_2m(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """DPM-Solver++ of order 2, multistep (Lu et al. 2022, algorithm 2)."""
    return _sample("dpmpp_2m", model, x, sigmas, **options)


def sample_dpmpp_3m(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """DPM-Solver++ of order 3, multistep."""
    return _sample("dpmpp_3m", model, x, sigmas, **options)


def sample_dpmpp_2m_sde(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """The stochastic form of order 2."""
    return _sample("dpmpp_2m_sde", model, x, sigmas, **options)


def sample_dpm_2(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """DPM-Solver-2 as Karras et al. (2022) write it, two model calls a step."""
    return _sample("dpm_2", model, x, sigmas, **options)


def sample_dpm_2_ancestral(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """The same to a lower noise level, and fresh noise back up."""
    return _sample("dpm_2_ancestral", model, x, sigmas, **options)


def sample_dpmpp_2s_ancestral(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """DPM-Solver++ of order 2, singlestep, to a lower noise level, and fresh noise back up."""
    return _sample("dpmpp_2s_ancestral", model, x, sigmas, **options)


def sample_dpmpp_sde(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """The stochastic form of order 2, two model calls a step, whose noises lie on one path."""
    return _sample("dpmpp_sde", model, x, sigmas, **options)


def sample_dpmpp_2m_sde_heun(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """The stochastic form of order 2, multistep, with ``solver_type="heun"``."""
    return _sample("dpmpp_2m_sde_heun", model, x, sigmas, **options)


def sample_dpmpp_3m_sde(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """The stochastic form of order 3, multistep."""
    return _sample("dpmpp_3m_sde", model, x, sigmas, **options)


def sample_unipc(model: KModel, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023, arXiv:2302.04867)."""
    return _sample("unipc", model, x, sigmas, **options)


@torch.no_grad()
def _sample(
    name: str,
    model: KModel,
    x: Tensor,
    sigmas: Tensor,
    *,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    eta: float | None = None,
    s_noise: float | None = None,
    **more: Any,
) -> Tensor:
    """Run one of our tables on given noise levels.

    Args:
        model: called as ``model(x, sigma, **extra_args)``, returns x_0; such as :class:`Denoiser`,
            or any wrapper of it that guides.
        x: x_0 + sigmas[0] z, [B, ...].
        sigmas: [n + 1], decreasing; the last one may be 0.
        callback: called after each model call with a dict of x, i, sigma, sigma_hat and denoised.
        disable: True for no progress bar; there is none either way.
        noise_sampler: ``noise_sampler(sigma, next_sigma)`` gives standard normal noise like ``x``;
            PyTorch's global generator by default. A step that draws twice asks for the noise of
            each part of it.
        eta, s_noise: how much noise a step adds, for samplers that add some; 1 by default.
        more: s_churn, s_tmin, s_tmax (Euler, Heun, DPM-Solver-2) and order (LMS).

    Raises:
        ValueError: sigmas that don't decrease, or a model whose output has another shape.
    """
    levels = _levels(sigmas)
    # Tables end at no noise: other runs stop before that step.
    whole = levels if levels[-1] == 0 else np.append(levels, 0.0)
    noise_options = {"eta": eta, "s_noise": s_noise, "prediction_type": "sample", **more}
    table = table_from_grid(name, Grid.from_sigmas(whole, whole[:-1]), **noise_options)
    spans = _noise_spans(table, levels)
    rows, draws = table.folded().tolist(), table.draws.tolist()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = x.to(dtype, copy=True) / math.hypot(1, levels[0])
    start = float(table.levels[0, 1] / table.levels[0, 0])
    if start > levels[0]:  # the first step's churn
        state *= math.hypot(1, levels[0])
        extra = 1.0 if s_noise is None else s_noise
        added = extra * math.sqrt(start**2 - levels[0] ** 2)
        state.add_(torch.randn_like(state), alpha=added).div_(math.hypot(1, start))
    kept: dict[str, Any] = {name: torch.zeros_like(state) for name in table.kept}
    for row, sigma in enumerate(table.timesteps.tolist()):  # the grid was given sigmas as times
        step = int(table.step_of_row[row])
        if step == len(levels) - 1:
            break
        wide, level = state * math.hypot(1, sigma), sigmas.new_tensor(sigma)
        denoised = model(wide.to(x.dtype), level.expand(len(x)), **(extra_args or {}))
        checks.shape("model(x, sigma)", denoised, x.shape, "of x")
        noise = None
        if draws[row]:
            span = (sigmas.new_tensor(end) for end in spans[row])
            noise = noise_sampler(*span) if noise_sampler else torch.randn_like(x)
            noise = noise.to(dtype)
        if callback is not None:
            callback(
                {"x": wide, "i": step, "sigma": level, "sigma_hat": level, "denoised": denoised}
            )
        sampler_step(state, denoised.to(dtype), rows, row, noise=noise, **kept)
    return (state * math.hypot(1, levels[-1])).to(x.dtype)


def _noise_spans(table: StepTable, levels: np.ndarray) -> list[tuple[float, float]]:
    """The noise levels between which each row's noise lies, within its step."""
    steps, at, draws = table.step_of_row.tolist(), table.timesteps.tolist(), table.draws.tolist()
    spans = []
    for row, step in enumerate(steps):
        rows = [i for i, one in enumerate(steps) if one == step and draws[i]]
        first = not rows or row <= rows[0]
        last = not rows or row >= rows[-1]
        start = levels[min(step, len(levels) - 1)] if first else at[row]
        end = levels[min(step + 1, len(levels) - 1)] if last else at[row + 1]
        spans.append((float(start), float(end)))
    return spans


def _levels(sigmas: Tensor) -> np.ndarray:
    levels = sigmas.double().cpu().numpy()
    if levels.ndim != 1 or len(levels) < 2 or not (np.diff(levels) < 0).all() or levels[-1] < 0:
        checks.fail("sigmas", "at least two noise levels that decrease, to 0 at least", sigmas)
    return levels
