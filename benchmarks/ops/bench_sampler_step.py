"""One step of DPM-Solver++ 2M with guidance, beside the launches of plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.ops.sampler_step import COLUMNS

from ..lib.traffic import nbytes
from .harness import VARIANTS, Case, Problem, run
from .shapes import LATENTS

ROW = {"a": 1.2, "b": -0.6, "clip": float("inf"), "c_x": 0.8, "c_0": 0.3, "c_1": -0.1}
ROW |= {"e_0": 1.0, "guidance": 7.5}


def eager(
    x: Tensor, model_output: Tensor, h1: Tensor, rows: Tensor, step: Tensor
) -> tuple[Tensor, ...]:
    """The update as one writes it, coefficients on the host, without changing its inputs."""
    uncond, cond = model_output.to(x.dtype).chunk(2)
    m = uncond + ROW["guidance"] * (cond - uncond)
    x0 = ROW["a"] * x + ROW["b"] * m
    x_next = ROW["c_x"] * x + ROW["c_0"] * x0 + ROW["c_1"] * h1
    both = torch.cat((x_next, x_next)).to(model_output.dtype)
    return x_next, x0, both.contiguous(memory_format=torch.channels_last)


def build(batch: int, side: int, device: str) -> Problem:
    x, h1 = torch.randn(2, batch, 4, side, side, device=device).unbind()
    output = torch.randn(2 * batch, 4, side, side, device=device, dtype=torch.bfloat16)
    output = output.contiguous(memory_format=torch.channels_last)
    rows = torch.tensor([[ROW.get(name, 0.0) for name in COLUMNS]], dtype=torch.float64)
    step = torch.zeros(1, dtype=torch.int64, device=device)

    def ours(
        x: Tensor, model_output: Tensor, h1: Tensor, rows: Tensor, step: Tensor
    ) -> tuple[Tensor, ...]:
        """In place, on copies that are made once: their values drift, which costs no time."""
        if not kept:
            kept.extend((x.clone(), h1.clone(), torch.empty_like(model_output)))
        now, before, model_input = kept
        if device != "cuda" or not torch.cuda.is_current_stream_capturing():
            now.copy_(x)
            before.copy_(h1)
        promised: dict[str, Any] = {"rescale": False, "unconditional": False}
        more: dict[str, Any] = {"h1": before, "model_input": model_input}
        ops.sampler_step(now, model_output, rows, step, **more, **promised)
        return now, before, model_input

    kept: list[Tensor] = []
    inputs = {"x": x, "model_output": output, "h1": h1, "rows": rows.to(device), "step": step}
    # x, h1 and the output in; x, h1 and the next input out.
    moved = 4 * nbytes(x) + 2 * nbytes(output)
    return Problem(inputs, eager, ours, moved, "sampler_step", needed=moved)


CASES = [
    Case(f"{model} {batch}x4x{side}x{side}", build, (batch, side), (1, 16))
    for model, side in {(model, side) for model, _, side in LATENTS}
    for batch in (1, 8)
]
CASES.sort(key=str)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampler_step(benchmark: Any, case: Case, variant: str) -> None:
    run(benchmark, case, variant)
