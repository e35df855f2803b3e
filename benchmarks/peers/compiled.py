"""``torch.compile``, as its users are advised to run a network that doesn't change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def build(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The module compiled: channels_last, on a GPU max-autotune, on a CPU with frozen weights.

    Freezing lets inductor pack the weights for oneDNN, which is worth more there than tuning. The
    compiler runs at the first call.
    """
    # Otherwise, after some shapes of one model, torch.compile leaves it as it is.
    torch._dynamo.reset()
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if inputs[0].is_cuda:
        return torch.compile(module, mode="max-autotune", dynamic=False)
    return torch.compile(module, options={"freezing": True}, dynamic=False)
