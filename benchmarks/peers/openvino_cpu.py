"""OpenVINO on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def build(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The module traced and compiled for the shapes of ``inputs``.

    Raises:
        ImportError: without openvino.
    """
    import openvino

    shapes = [tuple(one.shape) for one in inputs]
    model = openvino.convert_model(module, example_input=tuple(inputs), input=shapes)
    options = {
        # Where a CPU has bfloat16 products, OpenVINO would round to it.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    network = openvino.compile_model(model, "CPU", options)

    def compute(*tensors: Tensor) -> Tensor:
        found = network([one.numpy() for one in tensors], share_inputs=True)
        return torch.from_numpy(found[0])

    return compute
