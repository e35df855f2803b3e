"""The noise schedule of a diffusion model: betas, alpha-bars and the Gaussians made of them.

Notation of Ho et al. 2020 (arXiv:2006.11239): alpha_t = 1 - beta_t, abar_t = alpha_0 ... alpha_t
with t in [0, T), q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .ops import add_noise, checks
from .ops.add_noise import TARGETS

KINDS = ("linear", "scaled_linear", "cosine", "sigmoid", "exp")

FloatArray = npt.NDArray[np.float64]


class DiffusionSchedule:
    """Betas and everything that follows from them.

    Tables: betas and 1 - beta are rounded to float32, which is what checkpoints were trained with;
    their product is taken in float64 and ``alphas_cumprod`` is that product rounded to float32.

    Args:
        timesteps: T, the number of noise levels.
        beta_start, beta_end: the ends of the linear, scaled_linear and sigmoid kinds.
        kind: ``"linear"`` (Ho et al. 2020, section 4), ``"scaled_linear"`` (linear in sqrt(beta);
            Rombach et al. 2022, Stable Diffusion), ``"cosine"`` (Nichol & Dhariwal 2021, eq. 17,
            beta at most 0.999), ``"sigmoid"`` (a sigmoid on [-6, 6]; Xu et al. 2022, GeoDiff) or
            ``"exp"`` (abar = exp(-12 t / T), beta at most 0.999).
        betas: the betas themselves, [T], in place of the four arguments above.
        zero_terminal_snr: shift and scale sqrt(abar) so that abar_{T-1} is exactly 0 (Lin et al.
            2023, arXiv:2305.08891, algorithm 1). Such a model cannot predict epsilon at T - 1.

    Attributes:
        timesteps: T.
        betas, alphas, alphas_cumprod, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod:
            float32 [T] on the CPU.
        alpha_bar: ``alphas_cumprod`` as a float64 numpy array [T]; the samplers' tables use it.

    Raises:
        ValueError: betas outside (0, 1) (1 is allowed as the last one with zero_terminal_snr),
            betas so small or so many that float32 alpha-bars stop decreasing, an unknown kind.

    Examples:
        >>> schedule = df.DiffusionSchedule(timesteps=1000, beta_end=0.02)
        >>> x_0, t = torch.zeros(2, 3, 8, 8), torch.tensor([0, 999])
        >>> schedule.add_noise(x_0, t).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        kind: str = "linear",
        betas: Tensor | Sequence[float] | FloatArray | None = None,
        zero_terminal_snr: bool = False,
    ) -> None:
        if betas is None:
            checks.positive_int("timesteps", timesteps)
            checks.one_of("kind", kind, KINDS)
            if kind not in ("cosine", "exp"):
                for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
                    checks.finite(name, value)
                    if not 0 < value < 1:
                        checks.fail(name, "a number in (0, 1)", value)
            exact = _betas(kind, timesteps, beta_start, beta_end)
        else:
            try:
                exact = torch.as_tensor(betas).detach().to("cpu", torch.float64).numpy()
            except (TypeError, ValueError, RuntimeError):
                checks.fail("betas", "numbers [T]", repr(betas)[:60])
            if exact.ndim != 1 or exact.size == 0:
                checks.fail("betas", "shape [T]", list(exact.shape))
        beta = exact.astype(np.float32)
        _check_betas(beta, zero_terminal_snr)
        if zero_terminal_snr and beta[-1] != 1:
            beta = _zero_terminal_snr(beta).astype(np.float32)
        alpha = np.float32(1) - beta
        product = np.cumprod(alpha, dtype=np.float64)  # abar
        self.alpha_bar: FloatArray = product.astype(np.float32).astype(np.float64)
        if self.alpha_bar[0] == 1 or (np.diff(self.alpha_bar) >= 0).any():
            checks.fail(
                "betas", "alpha-bars that decrease at every step in float32", "some that do not"
            )

        self.timesteps = len(beta)
        self.betas = torch.from_numpy(beta)
        self.alphas = torch.from_numpy(alpha)
        self.alphas_cumprod = _float32(product)
        self.sqrt_alphas_cumprod = _float32(np.sqrt(product))
        self.sqrt_one_minus_alphas_cumprod = _float32(np.sqrt(1 - product))

        self._tables = {
            "signal": self.sqrt_alphas_cumprod,
            "noise": self.sqrt_one_minus_alphas_cumprod,
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DiffusionSchedule:
        """The schedule of a diffusers ``scheduler_config.json``, read into a dict.

        Raises:
            ValueError: a ``beta_schedule`` that this class doesn't have, or ``trained_betas`` of
                another number than the timesteps.
        """
        kinds = {"squaredcos_cap_v2": "cosine"} | {kind: kind for kind in KINDS if kind != "cosine"}
        kind, betas = config.get("beta_schedule", "linear"), config.get("trained_betas")
        checks.one_of("beta_schedule", kind, kinds)
        count = config.get("num_train_timesteps", 1000 if betas is None else len(betas))
        if betas is not None and len(betas) != count:
            checks.fail("trained_betas", f"num_train_timesteps = {count} values", len(betas))
        return cls(
            timesteps=count,
            beta_start=config.get("beta_start", 1e-4),
            beta_end=config.get("beta_end", 0.02),
            kind=kinds[kind],
            betas=betas,
            zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        )

    def to_config(self, prediction_type: str = "epsilon") -> dict[str, Any]:
        """The same as a diffusers ``scheduler_config.json``, with the betas themselves."""
        checks.one_of("prediction_type", prediction_type, TARGETS)
        return {
            "num_train_timesteps": self.timesteps,
            "trained_betas": self.betas.tolist(),
            "rescale_betas_zero_snr": bool(self.betas[-1] == 1),
            "prediction_type": prediction_type,
        }

    def __repr__(self) -> str:
        first, last = self.betas[0].item(), self.betas[-1].item()
        return f"DiffusionSchedule(timesteps={self.timesteps}, betas {first:.3g} to {last:.3g})"

    def add_noise(
        self,
        x_0: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A sample of q(x_t | x_0) (Ho et al. 2020, eq. 4).

        Args:
            x_0: data, [B, ...], any device.
            t: timesteps, int64 [B], values in [0, T).
            noise: standard normal, like ``x_0``; drawn with ``generator`` if None.

        Returns:
            x_t, like ``x_0``.

        Raises:
            ValueError: as :func:`diffusion_fast.ops.add_noise`.
        """
        checks.floating("x_0", x_0)
        if noise is None:
            noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
        tables = self.tables(x_0.device)
        return add_noise(x_0, noise, t, tables["signal"], tables["noise"])[0]

    def tables(self, device: torch.device) -> dict[str, Tensor]:
        """sqrt(abar) as ``signal`` and sqrt(1 - abar) as ``noise``, float32 [T], copied once."""
        if device.type == "cpu":
            return self._tables
        if device not in self._on_device:
            self._on_device[device] = {k: v.to(device) for k, v in self._tables.items()}
        return self._on_device[device]


def _float32(table: FloatArray) -> Tensor:
    return torch.from_numpy(table.astype(np.float32))


def _betas(kind: str, count: int, start: float, end: float) -> FloatArray:
    if kind == "linear":
        return np.linspace(start, end, count)
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    if kind == "sigmoid":
        return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, count)))
    u = np.arange(count + 1) / count
    cosine = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    abar = np.exp(-12 * u) if kind == "exp" else cosine
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def _check_betas(betas: npt.NDArray[np.float32], last_may_be_one: bool) -> None:
    inner = betas[:-1] if last_may_be_one and betas[-1] == 1 else betas
    bad = inner[~((inner > 0) & (inner < 1))]  # catches NaN as well
    if bad.size:
        checks.fail("betas", "values in (0, 1)", f"{bad.size} outside, the first {bad[0]}")


def _zero_terminal_snr(betas: npt.NDArray[np.float32]) -> FloatArray:
    root = np.sqrt(np.cumprod(1 - betas.astype(np.float64)))  # sqrt(abar)
    if len(root) < 2:
        checks.fail("timesteps", "at least 2 for zero_terminal_snr", len(root))
    first, last = root[0], root[-1]
    abar = ((root - last) * first / (first - last)) ** 2
    return 1 - abar / np.concatenate(([1.0], abar[:-1]))
