"""What is counted: every op once, by its own shapes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from diffusion_fast import ops
from diffusion_fast.engine.rewrites.cost import DEVICE, Cost, Counter, DryRun
from diffusion_fast.engine.rewrites.plan import REWRITES, RewritePlan
from diffusion_fast.engine.rewrites.prepare import PreparedUNet
from diffusion_fast.models import UNet2DCondition, UNetConfig


def counted(run: object, *shapes: tuple[int, ...]) -> dict[str, Cost]:
    tensors = [torch.empty(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]
    with Counter() as counter:
        run(*tensors)  # type: ignore[operator]
    return counter.by_op


def test_a_linear_layer() -> None:
    found = counted(lambda x, w, b: ops.linear(x, w, b), (2, 5, 8), (6, 8), (6,))
    size = 2 * (2 * 5 * 8 + 6 * 8 + 6 + 2 * 5 * 6)
    assert found == {"linear": Cost(1, size, 2 * 10 * 8 * 6)}


def test_a_convolution_of_two_sources() -> None:
    def run(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> None:
        ops.conv2d(x, w, x2=y, padding=1, stride=2)

    found = counted(run, (2, 3, 8, 8), (2, 1, 8, 8), (5, 4, 3, 3))
    size = 2 * (2 * 4 * 64 + 5 * 4 * 9 + 2 * 5 * 16)
    assert found == {"conv2d": Cost(1, size, 2 * (2 * 5 * 16) * 4 * 9)}


def test_attention() -> None:
    found = counted(lambda q, k: ops.attention(q, k, k), (2, 9, 4, 8), (2, 7, 4, 8))
    assert found["attention"].flops == 2 * 2 * (2 * 4 * 9 * 7 * 8)


def test_pytorchs_own_products() -> None:
    assert counted(lambda a, b: a @ b, (4, 5), (5, 6))["mm"].flops == 2 * 4 * 5 * 6
    found = counted(lambda x, w: F.conv2d(x, w), (1, 2, 6, 6), (3, 2, 3, 3))
    assert found["convolution"].flops == 2 * (3 * 16) * 2 * 9


def test_views_and_allocations_are_free() -> None:
    def run(x: torch.Tensor) -> None:
        torch.empty_like(x.view(-1)[3:].unsqueeze(0).expand(4, -1).unflatten(1, (3, -1))).chunk(2)
        x.new_empty(3)

    assert counted(run, (3, 4, 2)) == {}


def test_what_writes_in_place_is_not() -> None:
    assert counted(lambda x: x.add_(1), (8,))["add_"] == Cost(1, 2 * 2 * 8)


def test_ops_are_whole_on_the_meta_device_only() -> None:
    x = torch.randn(3, 8)
    with Counter() as counter:
        ops.geglu(x)
    assert "gelu" in counter.by_op
    assert counted(ops.geglu, (3, 8)).keys() == {"geglu"}
    with torch.autocast("cpu", torch.bfloat16):  # which PyTorch has not on the meta device
        assert counted(lambda x, w: ops.linear(x, w), (3, 8), (6, 8)).keys() == {"linear"}


def test_sd15_has_the_flops_that_are_known_of_it() -> None:
    """1.607 TFLOP for both halves of one 512 x 512 image, 126 MB of concatenations."""
    off = dict.fromkeys(REWRITES, "")
    with DEVICE:
        model = UNet2DCondition(UNetConfig.preset("sd15"))
    run = DryRun(model, torch.bfloat16, 2, (64, 64), 77)

    def plan(off: dict[str, str]) -> RewritePlan:
        return RewritePlan(1, 2, 1, torch.bfloat16, DEVICE, off)

    none = run.step(lambda model: PreparedUNet(model, plan(off)))
    assert round(none.total.flops / 1e12, 3) == 1.606
    assert none.by_op["attention"].launches == 32
    assert none.by_op["group_norm_silu"].launches == 61
    del off["split_skips"]
    split = run.step(lambda model: PreparedUNet(model, plan(off)))
    assert round((none.by_op["cat"] - split.by_op["cat"]).bytes / 1e6) == 126
