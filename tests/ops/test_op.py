"""Backend choice: auto, by name, per op, from the environment; explain() and the reasons."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from diffusion_fast import ops
from diffusion_fast.ops.backend import known_ops
from diffusion_fast.ops.op import Site

PUBLIC = (
    "add_noise",
    "attention",
    "conv2d",
    "geglu",
    "group_norm_silu",
    "layer_norm",
    "linear",
    "row_statistics",
    "weighted_mse",
)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 2, 5, 3, 8))


def test_every_public_op_has_a_torch_operator() -> None:
    for name in (*PUBLIC, "sampler_step"):
        assert hasattr(torch.ops.diffusion_fast, name)
        assert name in known_ops
        assert hasattr(ops, name)


def test_auto_takes_the_first_that_can_run(qkv: tuple[torch.Tensor, ...]) -> None:
    ops.attention(*qkv)
    assert ops.explain("attention").last_ran == "sdpa"
    ops.attention(*qkv, bias=torch.randn(5))
    assert ops.explain("attention").last_ran == "sdpa"


def test_the_choice_is_explained_for_one_call(qkv: tuple[torch.Tensor, ...]) -> None:
    half = [x.bfloat16() for x in qkv]
    bias = torch.randn(5)
    choice = ops.explain("attention", *half, 1.0, bias, None, False)
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


@torch.no_grad()
def test_a_site_keeps_its_choice_until_the_kind_of_call_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    op = known_ops["linear"]
    choose = op.choose
    monkeypatch.setattr(op, "choose", lambda *args: asked.append(args[0].shape) or choose(*args))
    site, rest = Site("linear"), (None, None, False, None, None, None, None)
    weight = torch.randn(6, 8)

    def same(x: torch.Tensor) -> bool:
        return torch.equal(site(x, weight.to(x.dtype), *rest), x @ weight.to(x.dtype).mT)

    x = torch.randn(4, 8)
    assert same(x)
    assert same(torch.randn(4, 8))
    assert len(asked) == 1
    assert same(torch.randn(5, 8))  # another shape
    assert same(torch.randn(8, 5).mT)  # other strides
    assert same(torch.randn(8, 5, dtype=torch.float64).mT)  # another dtype
    assert len(asked) == 4
    with ops.use_backend("reference"):
        assert same(x)
        assert ops.explain("linear").last_ran == "reference"
    assert len(asked) == 5
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="asked for"):
        site(x, weight, *rest)


def test_a_site_follows_gradients_and_autocast() -> None:
    site, rest = Site("linear"), (None, None, False, None, None, None, None)
    x, weight = torch.randn(256, 128), torch.randn(128, 128, requires_grad=True)
    with torch.no_grad():
        assert not site(x, weight, *rest).requires_grad
    site(x, weight, *rest).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(128, -1), rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert site(x, weight, *rest).dtype == dtype
        assert site(x, weight, *rest).dtype == torch.float32
        assert site(x.to("meta"), weight.to("meta"), *rest).is_meta
