"""Backend choice: auto, by name, per op, from the environment; explain() and the reasons."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from diffusion_fast import ops
from diffusion_fast.ops.dispatch import known_ops

PUBLIC = (
    "add_noise",
    "attention",
    "conv2d",
    "decoupled_attention",
    "geglu",
    "group_norm_silu",
    "layer_norm",
    "linear",
    "row_statistics",
    "weighted_mse",
)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 2, 5, 3, 8, dtype=torch.float64))  # SDPA's own on a CPU


def test_every_public_op_has_a_torch_operator() -> None:
    for name in (*PUBLIC, "sampler_step"):
        assert hasattr(torch.ops.diffusion_fast, name)
        assert name in known_ops
        assert hasattr(ops, name)


def test_auto_takes_the_first_that_can_run(qkv: tuple[torch.Tensor, ...]) -> None:
    ops.attention(*qkv)
    assert ops.explain("attention").last_ran == "sdpa"
    ops.attention(*qkv, bias=torch.randn(5, dtype=torch.float64))
    assert ops.explain("attention").last_ran == "sdpa"


def test_the_choice_is_explained_for_one_call(qkv: tuple[torch.Tensor, ...]) -> None:
    half = [x.bfloat16().requires_grad_() for x in qkv]  # which keeps a CPU's kernel out
    bias = torch.randn(5)
    choice = ops.explain("attention", *half, scale=1.0, bias=bias)
    assert choice.backend == "reference"
    assert "round" in choice.rejected["sdpa"]
    assert choice.backend not in choice.rejected


def test_use_backend_overrides_and_restores(qkv: tuple[torch.Tensor, ...]) -> None:
    with ops.use_backend("reference"):
        ops.attention(*qkv)
        assert ops.explain("attention").last_ran == "reference"
        with ops.use_backend(attention="sdpa"):
            ops.attention(*qkv)
            assert ops.explain("attention").last_ran == "sdpa"
            assert "reference was asked for" not in str(ops.explain("attention"))
        with ops.use_backend("auto"):
            ops.attention(*qkv)
            assert ops.explain("attention").last_ran == "sdpa"
        ops.attention(*qkv)
        assert ops.explain("attention").last_ran == "reference"
    with ops.use_backend(attention="reference"), ops.use_backend("auto"):
        ops.attention(*qkv)
        assert ops.explain("attention").last_ran == "sdpa"
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    ops.attention(*qkv)
    assert ops.explain("attention").last_ran == "sdpa"


def test_a_backend_that_cannot_run_raises_with_the_reason(qkv: tuple[torch.Tensor, ...]) -> None:
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match=r"geglu.*cuda.*not impl"):
        ops.geglu(torch.randn(2, 4))
    half = [x.bfloat16() for x in qkv]
    with ops.use_backend("sdpa"), pytest.raises(ops.BackendError, match="would round it"):
        ops.attention(*half, bias=torch.randn(5))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of auto.*got 'fast'"):
        ops.use_backend("fast").__enter__()
    with pytest.raises(ValueError, match=r"expected ops among .*attention.*got 'conv'"):
        ops.use_backend(conv="reference").__enter__()
    with pytest.raises(ValueError, match=r"op: expected one of .*attention.*got 'conv'"):
        ops.explain("conv")


def test_the_environment_sets_the_default() -> None:
    code = (
        "import torch, diffusion_fast as df\n"
        "q = torch.randn(1, 2, 1, 4); df.ops.attention(q, q, q)\n"
        "print(df.ops.explain('attention').last_ran)"
    )
    for value, expected in (("reference", "reference"), ("nonsense", "expected one of auto")):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"DIFFUSION_FAST_BACKEND": value, "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert expected in run.stdout + run.stderr


def test_explain_without_arguments_covers_every_op() -> None:
    assert {choice.op for choice in ops.explain()} == set(known_ops)


# op -> the arguments of a call of its public function
X, W, IMAGE = torch.randn(4, 8), torch.randn(6, 8), torch.randn(2, 4, 6, 6)
T, TABLES = torch.tensor([0, 2]), torch.rand(2, 3)
ROW = [[0.5] * 25]
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "add_noise": ((IMAGE, IMAGE, T, *TABLES), {"target": "sample"}),
    "attention": (tuple(torch.randn(3, 2, 5, 2, 8)), {"key_lengths": torch.tensor([5, 1])}),
    "conv2d": ((IMAGE, torch.randn(3, 4, 3, 3)), {"padding": 1}),
    "decoupled_attention": (
        (*torch.randn(3, 2, 5, 2, 8), (3, 2), torch.rand(1, 1, 1)),
        {"key_lengths": torch.tensor([3, 1])},
    ),
    "geglu": ((X,), {}),
    "group_norm_silu": ((IMAGE, 2, W[0, :4], W[0, :4]), {"silu": False}),
    "layer_norm": ((X,), {"weight": W[0], "bias": W[1]}),
    "linear": ((X, W), {"bias": W[:, 0], "residual": torch.zeros(4, 6)}),
    "residual": ((X, X), {"scale": 0.5}),
    "row_statistics": ((X,), {}),
    "sampler_step": ((X, X, ROW, 0), {"noise": X, "y": X, "h1": X, "h2": X, "h3": X}),
    "weighted_mse": ((X, X), {"weight": X[:, 0]}),
}


@pytest.mark.parametrize("name", CALLS)
def test_explain_takes_the_public_arguments_and_computes_nothing(name: str) -> None:
    args, kwargs = CALLS[name]
    kept = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    known_ops[name].last_ran = None
    choice = ops.explain(name, *args, **kwargs)
    assert choice.op == name
    assert choice.last_ran is None
    for before, now in zip(kept, args, strict=True):
        assert before is now or torch.equal(before, now)
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    getattr(ops, name)(*copies, **kwargs)
    assert ops.explain(name).last_ran == choice.backend
    with torch.no_grad(), ops.use_backend("reference"):
        assert ops.explain(name, *args, **kwargs).backend == "reference"
    with pytest.raises((ValueError, TypeError)):
        ops.explain(name, torch.ones(1).int(), *args[1:], **kwargs)


def test_explain_follows_philox_and_gradients() -> None:
    args, kwargs = CALLS["add_noise"]
    choice = ops.explain("add_noise", args[0], ops.Philox(1), *args[2:], **kwargs)
    assert choice.op == "add_noise_philox"
    x, weight = torch.randn(64, 256), torch.randn(256, 256, requires_grad=True)
    assert ops.explain("linear", x, weight).backend == "reference"
    with torch.no_grad():
        assert ops.explain("linear", x, weight).backend == "onednn"
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert "linear" in str(ops.explain("linear", x, weight))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A letter for each time that a backend of ``linear`` is asked about a call."""
    op, letters = known_ops["linear"], []
    backends = [
        dataclasses.replace(one, supports=lambda *args: letters.append("a") or [])
        for one in op.backends
        if one.name == "reference"
    ]
    monkeypatch.setattr(op, "backends", backends)
    op.forget()
    yield letters
    op.forget()


def changes() -> dict[str, tuple[Any, ...]]:
    """Calls of ``linear`` of kinds that all differ from :func:`changes`' first."""
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    return {
        "itself": (x, weight),
        "shape": (torch.randn(5, 8), weight),
        "strides": (torch.randn(8, 4).mT, weight),
        "dtype": (x.double(), weight.double()),
        "another tensor's strides": (x, torch.randn(8, 6).mT),
        "another tensor": (x, weight, torch.randn(6)),
        "a packed weight": (x, weight, None, (torch.randn(6, 8),)),
        "a gradient": (x, weight.clone().requires_grad_()),
        "a subclass": (x, weight.as_subclass(Labeled)),
    }


class Labeled(torch.Tensor):
    """A tensor that knows something else too."""


@pytest.mark.parametrize("kind", changes())
def test_each_kind_of_call_is_asked_about_once(asked: list[str], kind: str) -> None:
    def call(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, packed: Any = None) -> None:
        result = ops.linear(x, weight, bias, packed=packed)
        torch.testing.assert_close(result, torch.nn.functional.linear(x, weight, bias))

    for _ in range(3):
        call(*changes()["itself"])
    assert len(asked) == 1
    for _ in range(3):
        call(*changes()[kind])
    assert len(asked) == (1 if kind == "itself" else 2)
    call(*changes()["itself"])
    assert len(asked) == (1 if kind == "itself" else 2)


def test_modes_belong_to_the_kind_of_a_call(asked: list[str]) -> None:
    x, weight = changes()["itself"]
    ops.linear(x, weight)
    with torch.no_grad():
        ops.linear(x, weight)
    with ops.use_backend("reference"):
        ops.linear(x, weight)
    torch.func.vmap(ops.linear, (0, None))(x[None], weight)
    assert len(asked) == 4
    for _ in range(2):
        with torch.no_grad(), ops.use_backend("reference"):
            ops.linear(x, weight)
        with ops.use_backend("auto"):
            ops.linear(x, weight)
    assert len(asked) == 5
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="asked for"):
        ops.linear(x, weight)


def test_what_is_remembered_is_bounded() -> None:
    op = known_ops["residual"]
    for scale in range(10_000):
        ops.residual(X, scale=scale / 3)
    assert len(op._found) <= 4096


def test_a_bad_call_is_told_however_often(asked: list[str]) -> None:
    x, weight = changes()["itself"]
    ops.linear(x, weight)
    for _ in range(2):
        with pytest.raises(ValueError, match="weight: expected the dtype of x"):
            ops.linear(x, weight.double())


def test_autocast_and_the_meta_device() -> None:
    x, weight = torch.randn(256, 128), torch.randn(128, 128, requires_grad=True)
    with torch.no_grad():
        assert not ops.linear(x, weight).requires_grad
    ops.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(128, -1), rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert ops.linear(x, weight).dtype == dtype
        assert ops.linear(x, weight).dtype == torch.float32
        assert ops.linear(x.to("meta"), weight.to("meta")).is_meta
