"""ONNX Runtime on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def build(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The module exported by ``torch.onnx`` for the shapes of ``inputs``, in a session.

    The weights go through a temporary folder, as one message of ONNX holds 2 GB at most.

    Raises:
        ImportError: without onnxruntime, or without onnxscript, which the export needs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        program = torch.onnx.export(module, tuple(inputs), dynamo=True, verbose=False)
        assert program is not None  # without a file's name there is one
        program.save(file, external_data=True)
        del program
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def compute(*tensors: Tensor) -> Tensor:
        given = {name: one.numpy() for name, one in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return compute
