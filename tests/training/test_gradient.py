"""A gradient by operators alone is, bit for bit, autograd's; and what it must notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diffusion_fast as df
from diffusion_fast import ops
from diffusion_fast.conditioning import bind
from diffusion_fast.ops.cpu import library
from diffusion_fast.training import Batches, MinSNR
from diffusion_fast.training.gradient import Gradient, only_computes

SCHEDULE = df.DiffusionSchedule(timesteps=100)
Loss = Callable[..., tuple[Tensor, Any]]


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    """Those for this CPU, of which some have gradients."""
    library.settle()


def unet() -> df.UNet2DCondition:
    """Every kind of block, for a prompt."""
    torch.manual_seed(0)
    types = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    config = df.UNetConfig(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, **types
    )  # fmt: skip
    return df.UNet2DCondition(config)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


class Pair:
    """A model's gradient by both ways, which are the same; counts the calls of its Python."""

    def __init__(self, model: nn.Module, loss: Loss | None = None) -> None:
        self.model, self.calls = model, 0
        self.loss = loss or self.mse
        self.gradient = Gradient(model, self.counted)

    def mse(self, x: Tensor, t: Tensor, context: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        y = bind(self.model, context)(x, t)
        return F.mse_loss(y, target), (y - target).detach().square().flatten(1).mean(1)

    def counted(self, *args: Any) -> tuple[Tensor, Any]:
        self.calls += 1
        return self.loss(*args)

    def same(self, *args: Any) -> None:
        loss, more = self.loss(*args)
        loss.backward()
        wanted = loss.detach(), more, gradients(self.model)
        found = (*self.gradient(*args), gradients(self.model))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def batch(model: Any, size: int = 8, images: int = 2, tokens: int = 5) -> tuple[Any, ...]:
    width = model.config.cross_attention_dim
    x, y = torch.randn(2, images, 4, size, size)
    return x, torch.randint(0, 100, (images,)), torch.randn(images, tokens, width), y


def test_operators_alone_from_the_fourth_call_of_a_kind_on() -> None:
    model = unet().train().requires_grad_(True)
    pair = Pair(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    for size, images in ((8, 2), (8, 2), (8, 1), (8, 2), (8, 1), (8, 1), (8, 2), (8, 1), (8, 2)):
        pair.same(*batch(model, size, images))
        pair.model(*batch(model, size, images)[:3]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pair.calls == 6


def test_classes_and_images_with_channels_innermost() -> None:
    torch.manual_seed(0)
    model = df.UNet2DCondition(df.UNetConfig.preset("digits")).train()
    model = model.to(memory_format=torch.channels_last)
    pair = Pair(model)
    for _ in range(5):
        x, y = torch.randn(2, 4, 1, 8, 8)
        pair.same(x, torch.randint(0, 100, (4,)), torch.randint(0, 10, (4,)), y)
    assert pair.calls == 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_trainer_takes_the_steps_that_it_takes_without(precision: str) -> None:
    def losses(foreign: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(0)
        model = df.UNet2DCondition(df.UNetConfig.preset("digits"))
        if foreign:
            model.register_forward_hook(lambda *_: None)
        images = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        data = torch.utils.data.TensorDataset(images, torch.arange(40) % 10)
        trainer = df.Trainer(
            model,
            Batches(data, 8, seed=0),
            SCHEDULE,
            null_context=torch.tensor([model.null_class]),
            condition_dropout=0.3,
            loss_weighting=MinSNR(),
            gradient_clip=1.0,
            precision=precision,
            channels_last=True,
            input_perturbation=0.1,
            seed=0,
        )
        return trainer.fit(8), [p.detach() for p in model.parameters()]

    count = torch.get_num_threads()
    torch.set_num_threads(1)  # with several, a Trainer chooses for one of them alone
    try:
        torch.testing.assert_close(losses(False), losses(True), rtol=0, atol=0)
    finally:
        torch.set_num_threads(count)


class Net(nn.Sequential):
    """Takes x and t, and counts as one of PyTorch's modules."""

    __module__ = "torch.nn"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x)


def net(*more: nn.Module) -> Net:
    torch.manual_seed(0)
    return Net(nn.Linear(4, 8), nn.SiLU(), *more, nn.Linear(8, 4))


def points(rows: int = 3) -> tuple[Any, ...]:
    x, y = torch.randn(2, rows, 4)
    return x, torch.zeros(rows, dtype=torch.int64), None, y


def counts(pair: Pair, edit: Callable[[nn.Module], object]) -> None:
    """An edit is seen at the next call, and what it changes."""
    for _ in range(5):
        pair.same(*points())
    assert pair.calls == 3
    edit(pair.model)
    for _ in range(5):
        pair.same(*points())


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: model[0].requires_grad_(False),
        lambda model: model[0].weight.requires_grad_(False),
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn(8, 4))),
        lambda model: model.insert(2, nn.Linear(8, 8)),
        lambda model: setattr(model[2], "p", 0.0),
        lambda model: model.to(torch.float64).to(torch.float32),
    ],
    ids=["frozen", "one frozen", "another weight", "a layer more", "a setting", "moved"],
)
def test_edits_are_noticed(edit: Callable[[Any], object]) -> None:
    pair = Pair(net(nn.Dropout(0.5)).eval())
    counts(pair, edit)
    assert pair.calls == 6


def test_numbers_in_weights_are_read_anew() -> None:
    pair = Pair(net())

    @torch.no_grad()
    def scaled(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.mul_(2)
            parameter.data.add_(1)

    counts(pair, scaled)
    assert pair.calls == 3


def test_dropout_is_drawn_anew() -> None:
    pair = Pair(net(nn.Dropout(0.5)).eval())
    for _ in range(4):
        pair.same(*points())
    assert pair.calls == 3
    pair.model.train()
    found = []
    for count in range(4, 10):
        pair.gradient(*points())
        assert pair.calls == count
        found.append(gradients(pair.model)["0.weight"])
    assert len({one.sum().item() for one in found if one is not None}) == 6


@pytest.mark.parametrize(
    "hook",
    [
        lambda model, seen: model[0].register_forward_hook(lambda *_: seen.append(1)),
        lambda model, seen: model[0].register_full_backward_hook(lambda *_: seen.append(1)),
        lambda model, seen: model[0].weight.register_hook(lambda _: seen.append(1)),
        lambda model, seen: model[0].weight.register_post_accumulate_grad_hook(
            lambda _: seen.append(1)
        ),
    ],
    ids=["forward", "backward", "gradient", "accumulated"],
)
@pytest.mark.parametrize("before", [0, 5])
def test_hooks_are_called_at_each_step(hook: Callable[..., Any], before: int) -> None:
    model, seen = net(), []  # type: tuple[Net, list[int]]
    gradient = Gradient(model, Pair(model).mse)
    for _ in range(before):
        gradient(*points())
    hook(model, seen)
    assert not only_computes(model)
    for count in range(1, 6):
        gradient(*points())
        assert len(seen) == count


def test_foreign_modules_are_called_themselves() -> None:
    class Foreign(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Foreign.calls += 1
            return super().forward(x)

    model = net(Foreign(8, 8))
    gradient = Gradient(model, Pair(model).mse)
    for count in range(1, 6):
        gradient(*points())
        assert Foreign.calls == count


def test_gradients_are_added_and_parameters_without_one_have_none() -> None:
    model = net()
    pair = Pair(model, lambda x, *_: (model[0](x).square().mean(), None))
    copied = copy.deepcopy(model)
    x = points()
    for _ in range(6):
        pair.gradient(*x)
        copied[0](x[0]).square().mean().backward()
    found, wanted = gradients(model), gradients(copied)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert found["2.weight"] is None


def test_no_two_gradients_share_memory() -> None:
    """A sum gives both of its parts the same gradient; an optimizer writes to each."""
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleList([a, b])
    pair = Pair(model, lambda x: ((x * (a.weight + b.weight)).sum() + a.bias.sum(), None))
    for _ in range(5):
        pair.same(torch.randn(4, 4))
        pair.gradient(torch.randn(4, 4))
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert len({one.data_ptr() for one in found}) == len(found) == 3
        assert all(
            one.stride() == p.stride()
            for one, p in zip(found, [a.weight, a.bias, b.weight], strict=True)
        )
        model.zero_grad()
    assert pair.calls == 3


def test_what_is_computed_again_in_the_backward_pass() -> None:
    """PyTorch's own is recorded; with kernels of this package the network is called."""
    model = Net(nn.Linear(4, 8), nn.LayerNorm(8))

    def norm(y: Tensor) -> Tensor:
        h = y[:, :, None, None].expand(-1, -1, 8, 8)
        h = h.contiguous(memory_format=torch.channels_last)
        return ops.group_norm_silu(h, 2, model[1].weight, model[1].bias).square().mean()

    pair = Pair(model, lambda x: (checkpoint(norm, model[0](x), use_reentrant=False), None))
    for _ in range(5):
        pair.same(torch.randn(3, 4))
    assert pair.calls == (3 if library.machine() else 5)
    pair = Pair(net(), lambda x: (checkpoint(pair.model[0], x, use_reentrant=False).mean(), None))
    for _ in range(5):
        pair.same(torch.randn(3, 4))
    assert pair.calls == 3


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_function(data: st.DataObject) -> None:
    """A drawn program over weights and inputs: views, writes, products, saved results."""
    steps = data.draw(
        st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9), st.integers(0, 9)), max_size=12)
    )
    model = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)])

    def program(a: Tensor, b: Tensor) -> tuple[Tensor, Any]:
        found: list[Tensor] = [a, b.sigmoid(), model[0] * 1, model[1].mT, model[0]]
        for kind, i, j in steps:
            one, other = found[i % len(found)], found[j % len(found)]
            if kind == 0:
                found.append(one + other)
            elif kind == 1:
                found.append((one @ other).tanh())
            elif kind == 2:
                found += torch.cat([one, other], 1).split(4, 1)
            elif kind == 3:
                found.append((one * 0.5).clone().add_(other))
            elif kind == 4:
                found.append(one.softmax(1))
            elif kind == 5:
                found.append(F.linear(one, other, model[2]))
            elif kind == 6:
                found.append(F.layer_norm(one, (4,), model[2]))
            elif kind == 7:
                copied = one.clone()
                copied[1:].mul_(other[:-1])
                found.append(copied)
            else:
                found.append(one.where(other > 0, other))
        return sum(one.square().mean() for one in found), [one.detach() for one in found[5:]]

    pair = Pair(model, program)
    for _ in range(5):
        pair.same(*torch.randn(2, 4, 4))
    # Autograd may write to parts of tensors past the operators: then nothing is recorded.
    assert pair.calls == 3 or (pair.calls == 5 and any(kind == 7 for kind, *_ in steps))
