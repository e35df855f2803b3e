"""What adapters change a weight by: LoRA and the algorithms of LyCORIS, formula by formula.

Sources: LoRA (Hu et al. 2021, arXiv:2106.09685, sec. 4.1), LoHa (FedPara, Hyeon-Woo et al. 2022,
arXiv:2108.06098, sec. 2.2; with Tucker factors, sec. 2.3), LoKr (KronA, Edalati et al. 2022,
arXiv:2212.10650, and Yeh et al. 2023, arXiv:2309.14859), DoRA (Liu et al. 2024, arXiv:2402.09353,
eq. 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """A change of one parameter W.

    It is c times one of these, with c = alpha / r and r the rank:

    - LoRA: B A; with a core T [r, r, kh, kw] between them, a Tucker decomposition.
    - LoHa: (B1 A1) * (B2 A2), elementwise; each product may have a core.
    - LoKr: W1 (x) W2, Kronecker's product, of which each factor may be a product of rank r (if
      neither is, LyCORIS has c = 1).
    - a difference: D itself, with c = 1.

    LyCORIS 4.1 trains with c once; its own ``merge_to`` of a LoHa or a LoKr takes c squared.

    With a magnitude m (DoRA) the sum V = W + change is scaled to m V / |V|, with the norm of each
    row, or of each column where m has the shape [1, in, ...].

    Attributes:
        parts: the matrices by LyCORIS' names: ``lora_down`` (A), ``lora_up`` (B), ``lora_mid`` (T),
            ``hada_w1_a`` (B1), ``hada_w1_b`` (A1), ``hada_t1`` ..., ``lokr_w1`` or ``lokr_w1_a``
            and ``lokr_w1_b`` ..., ``diff``, ``dora_scale`` (m), ``scalar`` (a factor of all).
        scale: c.
    """

    parts: Mapping[str, Tensor]
    scale: float = 1.0

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a weight, in its shape, dtype (float32 or float64) and device.

        Raises:
            KeyError: a part is missing.
            ValueError: the change has another shape than the weight; the message gives it.
            RuntimeError: parts that don't fit each other.
        """
        parts = {name: part.to(weight) for name, part in self.parts.items()}
        change = _product(parts)
        if change.shape[:1] != weight.shape[:1] or change.numel() != weight.numel():
            raise ValueError(list(change.shape))
        change = change.reshape(weight.shape) * (parts.get("scalar", 1) * self.scale)
        magnitude = parts.get("dora_scale")
        if magnitude is None:
            return change
        whole = weight + change
        rows = magnitude.shape[0] == len(weight) and magnitude.numel() == len(weight)
        kept = 0 if rows or whole.dim() == 1 else 1
        axes = [axis for axis in range(whole.dim()) if axis != kept]
        norm = whole.square().sum(axes, keepdim=True).sqrt() + torch.finfo(whole.dtype).eps
        return whole * (magnitude.reshape(norm.shape) / norm) - weight


def rank(parts: Mapping[str, Tensor]) -> int | None:
    """The r that an adapter's alpha is divided by; None where it has none."""
    for name in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in parts:
            return len(parts[name])
    return None


def _product(parts: Mapping[str, Tensor]) -> Tensor:
    """The change before it is scaled."""
    if "diff" in parts:
        return parts["diff"]
    if "hada_w1_a" in parts:
        first, second = (
            _factors(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}"))
            for i in (1, 2)
        )
        return first * second
    if "lora_up" not in parts:
        first, second = (
            parts[f"lokr_w{i}"]
            if f"lokr_w{i}" in parts
            else _factors(parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"], parts.get(f"lokr_t{i}"))
            for i in (1, 2)
        )
        first = first.reshape(first.shape + (1,) * (second.dim() - first.dim()))
        return torch.kron(first, second.contiguous())
    up, down, core = parts["lora_up"], parts["lora_down"], parts.get("lora_mid")
    if core is not None:
        up, down = up.flatten(1).T, down.flatten(1)
    return _factors(up, down, core)


def _factors(b: Tensor, a: Tensor, core: Tensor | None) -> Tensor:
    """B A as a matrix [out, in ...]; with a core [r, s, kh, kw] the Tucker product of B^T and A."""
    if core is None:
        return b.flatten(1) @ a.flatten(1)
    return torch.einsum("rs...,ro,si->oi...", core, b, a)
