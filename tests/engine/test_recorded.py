"""A step by its operators alone gives, bit for bit, what its blocks give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import unet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffusion_fast as df
from diffusion_fast import ops
from diffusion_fast.engine.rewrites.plan import make_plan
from diffusion_fast.engine.rewrites.recorded import MOST, Recorded

SCHEDULE = df.DiffusionSchedule(timesteps=100)
NAMES = [name for name, why in make_plan(unet(), batch=1, halves=2, max_rows=9).off.items()]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Counted:
    """A function, and how often its Python ran."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def ran(function: Callable[..., Any], *calls: tuple[Any, ...]) -> int:
    """How often the Python of a function runs in these calls; all of them are right."""
    counted = Counted(function)
    by_operators = Recorded(counted)
    for args in calls:
        torch.testing.assert_close(by_operators(*args), function(*args), rtol=0, atol=0)
    return counted.calls


WEIGHT = torch.randn(4, 4)


def mixed(x: Tensor, several: list[Tensor], scale: float = 2.0, more: Any = None) -> Any:
    """Views, lists, in-place writes, and tensors of its own."""
    parts = (x @ WEIGHT).split(2, 1)
    y = torch.cat([parts[1], parts[0] * scale], 1)
    y.add_(several[0]).mul_(torch.arange(4.0))
    y[:, 1:3] -= 1
    if more is not None:
        y = y + more
    return [y, ((several[1] + y).T, [x, WEIGHT, None])]


def arguments(rows: int = 3) -> tuple[Any, ...]:
    return torch.randn(rows, 4), [torch.randn(4), torch.randn(rows, 4)]


def test_the_fourth_call_and_those_after_it_are_operators_alone() -> None:
    assert ran(mixed, *(arguments() for _ in range(7))) == 3


@pytest.mark.parametrize(
    "other",
    [
        arguments(2),
        (torch.randn(4, 3).T, arguments()[1]),
        (arguments()[0], tuple(arguments()[1])),
        (*arguments(), 3.0),
        (*arguments(), 2),
        (*arguments(), 2.0, torch.ones(3, 4)),
    ],
    ids=["shape", "strides", "list or tuple", "number", "its type", "one more"],
)
def test_another_kind_is_recorded_for_itself(other: tuple[Any, ...]) -> None:
    assert ran(mixed, *[arguments()] * 4, *[other] * 4, arguments(), other) == 6


def test_the_same_tensor_twice_is_another_kind() -> None:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.clone().mul_(2) * b

    one, other = torch.randn(2, 3)
    assert ran(product, *[(one, one)] * 4, *[(one, other)] * 4, (other, other)) == 6


def test_numbers_in_what_it_reads_are_read_anew() -> None:
    weight = torch.randn(4)
    by_operators = Recorded(lambda x: x * weight)
    for _ in range(5):
        weight.add_(1)
        assert torch.equal(by_operators(torch.ones(4)), weight)


def test_what_it_writes_is_written_anew() -> None:
    kept = torch.zeros(3)
    by_operators = Recorded(lambda x: kept.add_(x))
    for count in range(1, 6):
        assert by_operators(torch.ones(3)) is kept
        assert kept.tolist() == [count] * 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 if x[0] > 0 else x,
        lambda x: x * x.sum().item(),
        lambda x: x + torch.rand(3),
        lambda x: torch.nn.functional.dropout(x, 0.5),
        lambda x: torch.from_numpy(torch.empty(3).numpy() * 0) + x,
    ],
    ids=["a branch", "a number", "noise", "dropout", "memory past the operators"],
)
def test_what_is_never_recorded(function: Callable[[Tensor], Tensor]) -> None:
    counted = Counted(function)
    by_operators = Recorded(counted)
    for count in range(1, 6):
        x = torch.randn(3)
        torch.manual_seed(count)
        result = by_operators(x)
        torch.manual_seed(count)
        assert torch.equal(result, function(x))
        assert counted.calls == count


def test_gradients_autocast_and_watchers_see_the_function() -> None:
    counted = Counted(lambda x: (x @ x).relu())
    by_operators, x = Recorded(counted), torch.randn(4, 4)
    for _ in range(4):
        by_operators(x)
    with torch.enable_grad():
        assert by_operators(x.requires_grad_()).requires_grad
    x = x.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert by_operators(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        by_operators(x)
    assert counter.get_total_flops() == 2 * 4**3
    assert counted.calls == 6


def test_other_backends_are_another_kind() -> None:
    counted = Counted(lambda x: ops.group_norm_silu(x, 2, torch.ones(4), torch.zeros(4)))
    by_operators, x = Recorded(counted), torch.randn(1, 4, 3, 3)
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            for _ in range(4):
                by_operators(x)
    assert counted.calls == 6


def test_the_oldest_kinds_go() -> None:
    counted = Counted(lambda x: x + 1)
    by_operators = Recorded(counted)
    for size in range(1, MOST + 2):
        for _ in range(4):
            by_operators(torch.zeros(size))
    assert counted.calls == 3 * (MOST + 1)
    by_operators(torch.zeros(MOST + 1))
    assert counted.calls == 3 * (MOST + 1)
    by_operators(torch.zeros(1))
    assert counted.calls == 3 * (MOST + 1) + 1


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_function(data: st.DataObject) -> None:
    """A drawn program over a few tensors: views, writes into them, lists, new tensors."""
    steps = data.draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 9)), max_size=12)
    )

    def program(a: Tensor, b: Tensor) -> list[Tensor]:
        found = [a.clone(), b.clone()]
        for kind, i, j in steps:
            one, other = found[i % len(found)], found[j % len(found)]
            if kind == 0:
                found.append(one + other)
            elif kind == 1:
                found.append(one.mT.contiguous().mT)
            elif kind == 2:
                found += [part.tile(1, 2) for part in torch.cat([one, other], 1).split(2, 1)][:2]
            elif kind == 3:
                one.mul_(0.5).add_(1)
            elif kind == 4:
                found.append(one.flip(0)[:])
            elif kind == 5:
                one[1:].copy_(other[:-1].clone())
            else:
                found.append(one.view(4, 4))
        return found

    assert ran(program, *(tuple(torch.randn(2, 4, 4)) for _ in range(5))) == 3


def engines(model: nn.Module, **options: Any) -> tuple[df.Engine, df.Engine]:
    """One with the step's operators, and one with all else."""
    rest = [
        name for name in df.engine.rewrites.plan.REWRITES if name not in (*NAMES, "recorded_step")
    ]
    plain = df.Engine(model, SCHEDULE, rewrites=rest, **options)  # type: ignore[arg-type]
    return df.Engine(model, SCHEDULE, **options), plain  # type: ignore[arg-type]


def test_an_engine_of_it() -> None:
    """Edits of weights, other sizes and prompts, other samplers: as without, and it says so."""
    model = unet()
    both = engines(model, sampler="ddim", steps=6, guidance_scale=3.0)
    width = model.config.cross_attention_dim

    def same(size: int, tokens: int) -> None:
        context, x = torch.randn(2, 1, tokens, width), torch.randn(1, 4, size, size)
        drawn = [one.sample(tuple(x.shape), context[0], context[1], x_T=x) for one in both]
        assert torch.equal(*drawn)

    for size, tokens in ((8, 5), (8, 5), (16, 5), (8, 7), (8, 5)):
        same(size, tokens)
    for parameter in model.parameters():
        parameter.mul_(0.9)
    same(8, 5)
    model.conv_in.weight = nn.Parameter(model.conv_in.weight * 0.5)
    same(8, 5)
    for one in both:
        one.configure(sampler="dpmpp_2m", steps=3)
    same(8, 5)
    rows = {row.name: row for row in both[0].explain()["rewrites"]}
    assert rows["recorded_step"].on
    model.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: None)
    same(8, 5)
    rows = {row.name: row for row in both[0].explain()["rewrites"]}
    assert "more than its weights" in rows["recorded_step"].why


def test_a_hook_added_later_runs_at_each_step() -> None:
    model, seen = unet(), []
    engine, _ = engines(model, sampler="ddim", steps=5)
    context = torch.randn(1, 5, model.config.cross_attention_dim)
    engine.sample((1, 4, 8, 8), context)
    layer = model.mid_block.resnets[0].conv1
    layer.register_forward_hook(lambda *_: seen.append(1))
    engine.sample((1, 4, 8, 8), context)
    assert len(seen) == 5
