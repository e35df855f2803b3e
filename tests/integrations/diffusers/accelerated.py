"""A pipeline beside the same one with our models inside."""

from __future__ import annotations

import copy
from typing import Any

import tiny_pipelines as tiny
import torch
from numerics import error

from diffusion_fast.integrations.diffusers import accelerate, explain

CLOSE = 2e-5  # of max |out|, float32
Pipe = Any


def pair(kind: str = "sd", task: str = "", **parts: Any) -> tuple[Pipe, Pipe]:
    """A pipeline and an accelerated one, with equal weights."""
    plain = tiny.pipeline(kind, task, **parts)
    return plain, accelerate(copy.deepcopy(plain))


def assert_equal(plain: Pipe, fast: Pipe, **changes: Any) -> torch.Tensor:
    """The U-Nets say the same, and ours has run."""
    calls = explain(fast).unet.calls
    expected, result = tiny.predict(plain, **changes), tiny.predict(fast, **changes)
    assert error(result, expected) <= CLOSE
    assert result.dtype == expected.dtype
    assert explain(fast).unet.calls == calls + 1
    return result
