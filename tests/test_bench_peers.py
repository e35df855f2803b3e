"""Other programs that the benchmarks run the same networks in."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_fast.benchmarks import peers
from diffusion_fast.benchmarks.models import networks, parts, steered, variants
from diffusion_fast.benchmarks.models.in_diffusers import Served, ServedUNet
from diffusion_fast.benchmarks.models.measure import measure


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x) + t


@pytest.fixture(scope="module")
def small() -> networks.Networks:
    return networks.Networks(networks.KINDS["small"], torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("name", "package"), [("openvino", "openvino"), ("onnxruntime", "onnx")])
def test_a_peer_computes_the_module(name: str, package: str) -> None:
    pytest.importorskip(name)
    pytest.importorskip(package)
    module, inputs = Sum(), (torch.randn(2, 4), torch.tensor(500))
    with torch.no_grad():
        compute = peers.PEERS[name](module, inputs)
        for x in (inputs[0], torch.randn(2, 4)):
            torch.testing.assert_close(compute(x, inputs[1]), module(x, inputs[1]))


class OpenVINO(types.ModuleType):
    """Converts to the module itself, and writes down what it was asked for."""

    def __init__(self) -> None:
        super().__init__("openvino")
        self.asked: dict[str, Any] = {}

    def convert_model(self, module: nn.Module, **given: Any) -> nn.Module:
        self.asked |= given
        return module

    def compile_model(self, module: nn.Module, device: str, options: dict[str, Any]) -> Any:
        self.asked |= {"device": device, "options": options}

        def network(arrays: list[Any], share_inputs: bool) -> dict[int, Any]:
            with torch.no_grad():
                return {0: module(*map(torch.from_numpy, arrays)).numpy()}

        return network


def test_openvino_keeps_float32_and_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino, module = OpenVINO(), Sum()
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    inputs = torch.randn(2, 4), torch.tensor(500)
    compute = peers.PEERS["openvino"](module, inputs)
    assert torch.equal(compute(*inputs), module(*inputs).detach())
    options = openvino.asked["options"]
    assert options["INFERENCE_PRECISION_HINT"] == "f32"
    assert options["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    assert openvino.asked["input"] == [(2, 4), ()]
    assert openvino.asked["device"] == "CPU"


def test_a_peer_is_built_once_with_what_it_is_first_called_with() -> None:
    built: list[Any] = []

    def peer(module: nn.Module, inputs: Any) -> peers.Compute:
        built.append(inputs)
        return module

    module, inputs = Sum(), (torch.randn(2, 4), torch.tensor(3))
    served = Served(module, peer)
    assert not built
    for _ in range(2):
        assert torch.equal(served(*inputs), module(*inputs))
    assert len(built) == 1
    assert built[0][0] is inputs[0]


@torch.no_grad()
def test_every_computation_goes_through_a_peer(
    small: networks.Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that computes what it is given has no error anywhere, and is called for each part."""
    calls: list[str] = []

    def peer(module: nn.Module, inputs: Any) -> peers.Compute:
        def compute(*tensors: Tensor) -> Tensor:
            calls.append(type(module).__name__)
            return module(*tensors)

        return compute

    monkeypatch.setitem(variants.UNETS, "openvino", lambda of: ServedUNet(of, peer))
    monkeypatch.setitem(peers.PEERS, "openvino", peer)
    made = {
        "unet": (variants.step_variants, variants.step_truth, {"UNetStep"}),
        "loop": (variants.loop_variants, variants.loop_truth, {"UNetStep"}),
        "pipeline": (
            variants.pipeline_variants,
            variants.pipeline_truth,
            {"UNetStep", "Decoding", "TextStates"},
        ),
        "vae": (parts.decode_variants, parts.decode_truth, {"Decoding"}),
        "text": (parts.encode_variants, parts.encode_truth, {"Encoding"}),
    }
    for what, (build, truth, wanted) in made.items():
        calls.clear()
        found = [one for one in build(small, 1, 2, False) if one.name == "openvino"]
        expected = truth(small, 1, 2)
        (row,) = measure(found, lambda t=expected: t, images=1, steps=2, budget=0.0)  # type: ignore[misc]
        assert row["error"] < 1e-4, what
        assert set(calls) == wanted, what


@pytest.mark.parametrize("steering", ["controlnet", "ip-adapter"])
@torch.no_grad()
def test_what_steers_moves_the_step(steering: str) -> None:
    kind = networks.KINDS[f"small-{steering}"]
    found = networks.Networks(kind, torch.float32, torch.device("cpu"))
    moved, bare = steered.steered_truth(found, 1, 1), variants.step_truth(found, 1, 1)
    assert (moved - bare).abs().max() > 0.01 * bare.abs().max()
