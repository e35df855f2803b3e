"""Optimizers that are packages, run on some devices only, or keep more than moments."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from diffusion_fast.files import read_tensors, save_tensors
from diffusion_fast.finetuning import Settings
from diffusion_fast.training.optimizers import make_optimizer
from diffusion_fast.training.options import TrainingOptions
from diffusion_fast.training.state import load_optimizer_state, optimizer_state


class EightBit(torch.optim.Optimizer):
    """Keeps what bitsandbytes' AdamW8bit does: bytes, the scales of their blocks, a table that all
    parameters share, and of small ones a float32 moment. The step itself is momentum alone."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "state1": torch.zeros_like(p)}
                    if p.numel() >= 64:
                        state["state1"] = torch.full_like(p, 127, dtype=torch.uint8)
                        state |= {"qmap1": self.table, "absmax1": torch.ones(1)}
                state["step"] += 1
                moment = state["state1"]
                if "qmap1" in state:
                    moment = state["qmap1"][moment.long()] * state["absmax1"]
                moment = 0.9 * moment + p.grad
                if "qmap1" in state:
                    state["absmax1"] = moment.abs().max()[None]
                    scaled = (moment / state["absmax1"] + 1) * 127.5
                    state["state1"].copy_(scaled.round().to(torch.uint8))
                else:
                    state["state1"].copy_(moment)
                p.sub_(group["lr"] / state["step"] ** 0.5 * moment)


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package."""
    package, inner = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    inner.AdamW8bit = EightBit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", inner)


@pytest.mark.usefixtures("bitsandbytes")
def test_8_bit_adamw_is_that_of_bitsandbytes_on_a_gpu() -> None:
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(8, 8, device="cuda"))
        made = make_optimizer("adamw8bit", [{"params": [weight], "factor": 2.0}], 0.1, 0.2)
    assert isinstance(made, EightBit)
    assert made.param_groups[0] | {"params": None} == {
        "params": None, "factor": 2.0, "lr": 0.1, "weight_decay": 0.2
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^optimizer: expected one of adamw, .* on cpu, because"):
        make_optimizer("adamw8bit", [{"params": [nn.Parameter(torch.ones(1))]}], 0.1, 0.0)


@pytest.mark.parametrize(
    ("name", "package", "device"),
    [("adamw8bit", "bitsandbytes", "cuda"), ("prodigy", "prodigyopt", "cpu")],
)
def test_a_package_that_is_missing(
    name: str, package: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(1, device=device))
    with pytest.raises(ModuleNotFoundError, match=rf"^optimizer: {name} .*pip install {package}$"):
        make_optimizer(name, [{"params": [weight]}], 0.1, 0.0)


def test_moments_in_8_bits_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Bytes stay bytes, and the table that all share comes back for each."""

    def start() -> tuple[nn.Module, EightBit]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))  # weights of 144, biases of 12
        return model, EightBit(model.parameters(), lr=0.1)

    def steps(model: nn.Module, optimizer: EightBit, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    whole, own = start()
    steps(whole, own, range(3))
    file, weights = tmp_path / "state.safetensors", tmp_path / "weights.safetensors"
    save_tensors(optimizer_state(whole, own), file)
    save_tensors(whole.state_dict(), weights)
    steps(whole, own, range(3, 6))
    resumed, other = start()
    resumed.load_state_dict(read_tensors(weights))
    load_optimizer_state(resumed, other, read_tensors(file))
    steps(resumed, other, range(3, 6))
    truth: dict[str, Tensor] = whole.state_dict()
    assert all(torch.equal(value, truth[n]) for n, value in resumed.state_dict().items())
    first = next(resumed.parameters())
    assert other.state[first]["step"] == 6
    assert other.state[first]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["adafactor", "adamw8bit", "prodigy"])
def test_weights_that_are_spread_over_processes(name: str, tmp_path: Path) -> None:
    match = rf"^sharding: expected ddp, because {name} takes whole weights, got 'fsdp'$"
    with pytest.raises(ValueError, match=match):
        TrainingOptions(optimizer=name, sharding="fsdp")
    with pytest.raises(ValueError, match=match):
        Settings.of(
            {"model": "tiny", "data": tmp_path, "out": tmp_path, "optimizer": name,
             "sharding": "fsdp"}
        )  # fmt: skip
