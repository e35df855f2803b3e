"""Other programs that run diffusers' networks: what speed on a CPU is held against.

A peer is a function. It takes a module from tensors to one tensor and the inputs of a call, and
returns what computes the module for inputs of the same shapes, with the module's own weights.
Everything is float32 on as many threads as PyTorch uses. ``pip install diffusion-fast[peers]``
brings them; each is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from . import compiled, onnx_runtime, openvino_cpu

Compute = Callable[..., Tensor]
Peer = Callable[[nn.Module, Sequence[Tensor]], Compute]
PEERS: dict[str, Peer] = {
    "diffusers compiled": compiled.build,
    "openvino": openvino_cpu.build,
    "onnxruntime": onnx_runtime.build,
}
