"""T2I-Adapters in TencentARC's names: the features that diffusers has of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from control_parity import adapter
from numerics import error
from safetensors.torch import save_file
from torch import Tensor

from diffusion_fast.files import CheckpointError
from diffusion_fast.models.t2i_adapter import T2IAdapter

KINDS: dict[str, dict[str, Any]] = {
    "full": {"channels": [16, 32, 64, 64], "num_res_blocks": 2},
    "grey": {"channels": [16, 32, 64, 64], "num_res_blocks": 3, "in_channels": 1},
    "xl": {
        "channels": [16, 32, 64, 64],
        "num_res_blocks": 2,
        "adapter_type": "full_adapter_xl",
        "downscale_factor": 16,
    },
    "light": {"channels": [16, 32, 64], "num_res_blocks": 4, "adapter_type": "light_adapter"},
}


def own_layout(model: Any) -> dict[str, Tensor]:
    """The state as ``Adapter``, ``Adapter_XL`` and ``Adapter_light`` of T2I-Adapter have it."""
    state, light = {}, model.config.adapter_type == "light_adapter"
    body = model.adapter.body
    if not light:
        state |= {f"conv_in.{n}": v for n, v in model.adapter.conv_in.state_dict().items()}
    count = 0
    for i, level in enumerate(body):
        for name in ("in_conv", "out_conv"):
            if getattr(level, name, None) is not None:
                place = i if light else count
                own = getattr(level, name).state_dict().items()
                state |= {f"body.{place}.{name}.{n}": v for n, v in own}
        for j, block in enumerate(level.resnets):
            place = f"body.{i}.body.{j}" if light else f"body.{count}"
            state |= {f"{place}.{n}": v for n, v in block.state_dict().items()}
            count += 1
    return {name: value.contiguous() for name, value in state.items()}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_features(kind: str, suffix: str, tmp_path: Path) -> None:
    theirs = adapter(KINDS[kind])
    file, state = tmp_path / f"t2iadapter.{suffix}", own_layout(theirs)
    torch.save(state, file) if suffix == "pth" else save_file(state, file)
    ours = T2IAdapter.from_pretrained(file)
    hint = torch.rand(1, KINDS[kind].get("in_channels", 3), 64, 96)
    with torch.no_grad():
        expected, found = theirs(hint), ours(hint)
    assert len(expected) == len(found)
    assert all(error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_damaged_files(tmp_path: Path) -> None:
    state = own_layout(adapter(KINDS["full"]))
    for name, message in (
        ("body.7.block2.weight", r"missing: body\.7\.block2\.weight"),
        ("conv_in.weight", r"missing: conv_in\.weight|unusual shapes: 'conv_in\.weight'"),
    ):
        file = tmp_path / "x.safetensors"
        save_file({n: v for n, v in state.items() if n != name}, file)
        with pytest.raises(CheckpointError, match=message):
            T2IAdapter.from_pretrained(file)
    save_file({n: v for n, v in state.items() if not n.startswith("body.7.")}, file)
    with pytest.raises(CheckpointError, match="expected a multiple of 4 blocks, got 7"):
        T2IAdapter.from_pretrained(file)
