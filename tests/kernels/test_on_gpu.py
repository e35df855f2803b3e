"""What only a GPU shows: graph capture and replay, streams, devices, large tensors, equal bits.

The grids of the other files run on the GPU as well where there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_checks import DEVICE, same_bits
from torch import Tensor

from diffusion_fast import ops
from diffusion_fast.kernels import measurements, tuning
from diffusion_fast.ops.dispatch import measured
from diffusion_fast.ops.sampler_step import COLUMNS

pytestmark = pytest.mark.gpu

Case = tuple[Callable[..., object], dict[str, Tensor]]


def cases(device: str = DEVICE) -> dict[str, Case]:
    """A call per op, differentiable where the op is."""
    torch.manual_seed(1)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    image = randn(2, 320, 64, 64).contiguous(memory_format=torch.channels_last)
    small = randn(2, 640, 16, 16)
    tables = torch.rand(2, 10, device=device).unbind()
    t = torch.randint(10, (2,), device=device)
    state = ops.Philox(7, 3, device)
    return {
        "add_noise": (
            lambda x, z: ops.add_noise(x, z, t, *tables, "v_prediction")[1],
            {"x": image, "z": randn(*image.shape)},
        ),
        "add_noise_philox": (lambda x: ops.add_noise(x, state, t, *tables)[0], {"x": image}),
        "group_norm_silu_split": (
            lambda x, w, b, add: ops.group_norm_silu(x, 32, w, b, add=add),
            {"x": image, "w": randn(320), "b": randn(320), "add": randn(2, 320)},
        ),
        "group_norm_silu_fused": (
            lambda x, x2, w, b: ops.group_norm_silu(x, 32, w, b, x2=x2),
            {"x": small, "x2": randn(2, 320, 16, 16), "w": randn(960), "b": randn(960)},
        ),
        "layer_norm": (
            lambda x, w, b: ops.layer_norm(x, w, b),
            {"x": randn(2, 1024, 640), "w": randn(640), "b": randn(640)},
        ),
        "geglu": (lambda x: ops.geglu(x), {"x": randn(2, 1024, 2560)}),
        "weighted_mse": (
            lambda p, q, w: ops.weighted_mse(p, q, w),
            {"p": image, "q": randn(*image.shape), "w": torch.rand(2, device=device)},
        ),
        "residual": (
            lambda x, r, b: ops.residual(x, r, b, 0.5),
            {"x": image, "r": randn(*image.shape), "b": randn(320)},
        ),
    }


NAMES = tuple(cases("cpu"))


def run(case: Case) -> list[Tensor]:
    """The result and every gradient."""
    call, values = case
    leaves = [v.detach().requires_grad_() for v in values.values()]
    y = call(*leaves)
    assert isinstance(y, Tensor)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


@pytest.fixture(autouse=True)
def _ordinary_allocation() -> None:
    """Poisoning with NaN would add kernels to captured graphs."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMES)
def test_equal_bits_every_time(name: str) -> None:
    first = run(cases()[name])
    for _ in range(5):
        for a, b in zip(first, run(cases()[name]), strict=True):
            assert same_bits(a, b)
    assert ops.explain(name.removesuffix("_split").removesuffix("_fused")).last_ran == "triton"


@pytest.mark.parametrize("name", NAMES)
def test_capture_and_replay(name: str) -> None:
    case = cases()[name]
    expected = run(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(case)
    for _ in range(3):
        for value in results:
            value.zero_()
        graph.replay()
        for a, b in zip(results, expected, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_side_stream(name: str) -> None:
    """Work follows the current stream: a long sleep there must hold the kernels back."""
    call, values = cases()[name]
    expected = run((call, values))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = {n: torch.zeros_like(v) for n, v in values.items()}
        torch.cuda._sleep(50_000_000)
        for n, v in values.items():
            late[n].copy_(v)
        results = run((call, late))
    stream.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_is_not_current(name: str) -> None:
    with torch.cuda.device(0):
        results = run(cases("cuda:1")[name])
    for a, b in zip(results, run(cases("cuda:0")[name]), strict=True):
        assert a.device.index == 1
        assert a.shape == b.shape
        assert a.isfinite().all()


def test_one_captured_step_serves_every_step() -> None:
    """A counter and a Philox state on the device: the replayed graph does what eager steps do."""
    rows = torch.zeros(4, len(COLUMNS), dtype=torch.float64)
    rows[:] = torch.randn(4, len(COLUMNS), dtype=torch.float64)
    rows[:, COLUMNS.index("clip")] = 1.0
    rows[:, COLUMNS.index("rescale")] = torch.tensor([0.0, 0.5, 0.0, 0.7])
    shape, device = (2, 4, 64, 64), torch.device("cuda")
    philox = ops.Philox(3, 5, device)

    def state() -> dict[str, Tensor]:
        torch.manual_seed(2)
        values = {n: torch.randn(shape, device=device) for n in ("x", "y", "h1", "h2", "h3")}
        output = torch.randn(4, *shape[1:], device=device).bfloat16()
        return values | {
            "model_output": output.contiguous(memory_format=torch.channels_last),
            "model_input": torch.empty_like(output),
            "peak": torch.zeros(4, device=device),
        }

    eager, captured = state(), state()
    for step in range(4):
        ops.sampler_step(table=rows, step=step, noise=philox, **eager)
    counter, table = torch.zeros(1, dtype=torch.int64, device=device), rows.to(device)
    ops.sampler_step(table=table, step=counter, noise=philox, **state())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sampler_step(table=table, step=counter, noise=philox, **captured)
        counter.add_(1)
    for name, value in state().items():
        captured[name].copy_(value)
    counter.zero_()
    for _ in range(4):
        graph.replay()
    for name, value in eager.items():
        assert same_bits(captured[name], value), name


def test_a_captured_graph_draws_anew_after_set() -> None:
    x, one = torch.zeros(2, 4, 32, 32, device=DEVICE), torch.ones(1, device=DEVICE)
    t, philox = torch.zeros(2, dtype=torch.int64, device=DEVICE), ops.Philox(1, 0, DEVICE)
    ops.add_noise(x, philox, t, one, one)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, noise = ops.add_noise(x, philox, t, one, one)
    for seed in (1, 2):
        philox.set(seed)
        graph.replay()
        truth = ops.Philox(seed).normal(x.shape, device=DEVICE)
        torch.testing.assert_close(noise, truth, rtol=6 * 2.0**-23, atol=0)


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    """2^31 elements and some: the last ones are right."""
    size = 2**31 + 4096
    x = torch.zeros(2, size // 2, device=DEVICE, dtype=torch.bfloat16)
    x[1, -5:] = 1
    x[1, -5 - 2048 : -2048] = 1  # in the other half of the last row of 4096
    one = torch.full((1,), 0.5, device=DEVICE)
    t = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    x_t, _ = ops.add_noise(x, x, t, one, one)
    assert x_t[1, -5:].eq(1).all()
    assert x_t[1, -10:-5].eq(0).all()
    y = ops.residual(x, None, torch.zeros(x.shape[1], device=DEVICE, dtype=x.dtype), 2.0)
    assert y[1, -5:].eq(2).all()
    g = ops.geglu(x.view(-1, 4096))
    assert g.numel() == size // 2
    assert g[-1, -5:].sub(0.8413).abs().max() < 0.01  # gelu(1)
    assert g[-1, -10:-5].eq(0).all()
    rows = ops.layer_norm(x.view(-1, 4096), *torch.ones(2, 4096, device=DEVICE).to(x.dtype))
    assert rows[-1].float().std() > 0.5
    assert rows[0].eq(1).all()
    loss = ops.weighted_mse(x, torch.zeros_like(x)).item()
    assert loss == pytest.approx(10 / size, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_over_more_elements_than_32_bits_count(layout: torch.memory_format) -> None:
    """One image of 2^31 elements and more, so that offsets inside it need 64 bits."""
    x = torch.randn(1, 64, 4096, 8200, device=DEVICE, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=layout)
    one, zero = torch.ones(64, device=DEVICE).bfloat16(), torch.zeros(64, device=DEVICE).bfloat16()
    y = ops.group_norm_silu(x, 32, one, zero, silu=False)
    last = x[:, -2:].float()
    truth = (last - last.mean()) / last.std()
    assert (y[:, -2:].float() - truth).abs().max() < 0.05


def test_tuning_measures_and_keeps(tmp_path: object) -> None:
    call, values = cases()["group_norm_silu_fused"]
    file = tuning.cache_file(torch.device("cuda", torch.cuda.current_device()))
    measurements.known.clear()
    call(**values)
    assert "group_norm_silu" in file.read_text()


def products() -> dict[str, Callable[[], Tensor]]:
    """Calls of linear and conv2d, with their sums whole and in parts, and of several contexts."""
    torch.manual_seed(2)

    def randn(*size: int) -> Tensor:
        value = torch.randn(*size, device=DEVICE, dtype=torch.bfloat16)
        return value.contiguous(memory_format=torch.channels_last) if len(size) == 4 else value

    x, w, wide, b = randn(2048, 640), randn(640, 640), randn(5120, 640), randn(5120)
    small, window = randn(2, 1280, 8, 8), randn(1280, 1280, 3, 3)
    q, keys, weights = x.view(2, 1024, 8, 80), w[:162].view(2, 81, 8, 80), b[:1].view(1, 1, 1)
    return {
        "linear": lambda: ops.linear(x, w, b[:640], residual=x),
        "linear geglu": lambda: ops.linear(x, wide, b, geglu=True),
        "conv2d": lambda: ops.conv2d(small, window, b[:1280], padding=1, residual=small),
        "decoupled_attention": lambda: ops.decoupled_attention(q, keys, keys, (77, 4), weights),
    }


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", ["linear", "linear geglu", "conv2d", "decoupled_attention"])
def test_products_repeat_and_replay_bit_for_bit(name: str, backend: str) -> None:
    call = products()[name]
    with ops.use_backend(backend), torch.no_grad():
        expected = call()
        assert all(same_bits(call(), expected) for _ in range(5))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert same_bits(y, expected)


@pytest.mark.parametrize("op", ["conv2d", "decoupled_attention"])
def test_the_faster_product_is_kept_on_disk(op: str) -> None:
    file = tuning.cache_file(torch.device("cuda", torch.cuda.current_device()))
    for cache in (measurements.known, measured._answers):
        cache.clear()
    with torch.no_grad():
        products()[op]()
    assert f"backend of {op}" in file.read_text()
    assert ops.explain(op).last_ran in ("triton", "reference")
