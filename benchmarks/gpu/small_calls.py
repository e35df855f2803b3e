"""Every Triton kernel once on small shapes with odd sizes, for a checker such as compute-sanitizer.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.small_calls
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels import tuning
from diffusion_fast.ops.sampler_step import COLUMNS

Call = Callable[[], object]


def calls(device: str) -> Iterator[tuple[str, Call]]:
    """A call for each op and way through it, and its gradients where it has any."""

    def randn(*size: int, last: bool = False) -> Tensor:
        x = torch.randn(*size, device=device, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last) if last else x

    def both(call: Callable[..., Tensor], *values: Tensor) -> Call:
        def run() -> None:
            leaves = [value.detach().requires_grad_() for value in values]
            call(*leaves).sum().backward()

        return run

    t, weight = torch.randint(10, (3,), device=device), torch.rand(3, device=device)
    signal, sigma = torch.rand(2, 10, device=device)
    philox = ops.Philox(7, 3, torch.device(device))
    x, z = randn(3, 5, 7, 9), randn(3, 5, 7, 9)
    yield "add_noise", both(lambda x, z: ops.add_noise(x, z, t, signal, sigma)[0], x, z)
    yield "add_noise philox", lambda: ops.add_noise(x, philox, t, signal, sigma)
    yield "weighted_mse", both(ops.weighted_mse, x, z, weight)
    yield "sampler_step", _step(device, x, philox)
    w, b = randn(2, 36).unbind()
    for last in (False, True):
        for side in (5, 61):  # in one launch, and in chunks of the image
            given = randn(2, 24, side, side, last=last), randn(2, 12, side, side, last=last)
            norm = both(_norm, *given, w, b, randn(2, 36))
            yield f"group_norm_silu {side} {'NHWC' if last else 'NCHW'}", norm
    rows = randn(7, 36)
    yield "layer_norm", both(lambda x, w, b: ops.layer_norm(x, w, b), rows, w, b)
    yield "row_statistics", lambda: ops.row_statistics(rows)
    yield "geglu", both(ops.geglu, randn(7, 74))
    yield "residual", both(lambda x, r, b: ops.residual(x, r, b, 0.5), rows, rows, b)
    yield "linear", lambda: ops.linear(randn(7, 36), randn(22, 36), randn(22), geglu=True)
    yield "linear parts", lambda: ops.linear(randn(7, 2560), randn(22, 2560), randn(22))
    image, window = randn(2, 12, 7, 9, last=True), randn(10, 12, 3, 3, last=True)
    yield "conv2d", lambda: ops.conv2d(image, window, randn(10), padding=1)
    q, keys, weights = randn(2, 7, 3, 13), randn(2, 40, 3, 13), randn(2, 2, 7)
    seen = torch.tensor([33, 1], device=device)
    contexts = (q, keys, keys, (33, 4, 3), weights)
    yield "decoupled_attention", lambda: ops.decoupled_attention(*contexts, key_lengths=seen)


def _norm(x: Tensor, x2: Tensor, weight: Tensor, bias: Tensor, add: Tensor) -> Tensor:
    return ops.group_norm_silu(x, 4, weight, bias, add=add, x2=x2)


def _step(device: str, like: Tensor, philox: ops.Philox) -> Call:
    rows = torch.rand(4, len(COLUMNS), dtype=torch.float64, device=device)
    state = {name: like.float() for name in ("x", "y", "h1", "h2", "h3")}
    output = torch.cat((like, like))
    peak = torch.zeros(4, device=device)
    step = torch.ones(1, dtype=torch.int64, device=device)
    state |= {"model_output": output, "model_input": output.clone(), "peak": peak}
    more: dict[str, Any] = {"table": rows, "step": step, "noise": philox, **state}
    return lambda: ops.sampler_step(**more)


def every_config(
    _: str, __: object, configs: Sequence[Any], run: Callable[[Any], object], *rest: object
) -> Any:
    """Run all instead of measuring: the checker slows them down, and graphs can't allocate."""
    for config in configs:
        run(config)
    return configs[0]


def main() -> None:
    tuning.choose = every_config
    torch.manual_seed(0)
    for name, call in calls("cuda"):
        with ops.use_backend("triton"):
            call()
        torch.cuda.synchronize()
        print(name, flush=True)


if __name__ == "__main__":
    main()
