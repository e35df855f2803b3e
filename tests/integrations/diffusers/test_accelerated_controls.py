"""ControlNets and T2I-Adapters in accelerated pipelines: the same pictures, and no fallback."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from numerics import error

from diffusion_fast.integrations.diffusers import accelerate, explain, restore

sys.path.append(str(Path(__file__).parents[2] / "models"))
from control_parity import HINT, adapter, controlnet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "error:diffusion_fast:UserWarning")
CLOSE = 1e-4
STEPS = 3
CONFIGS = {"sd": tiny.SD, "sdxl": tiny.SDXL}


def hint() -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("count", [1, 2])
def test_controlnets(kind: str, count: int) -> None:
    xl = "XL" if kind == "sdxl" else ""
    net_config = {**CONFIGS[kind], "conditioning_embedding_out_channels": HINT[:2]}
    nets = [controlnet(net_config, seed) for seed in range(count)]
    net: Any = diffusers.MultiControlNetModel(nets) if count > 1 else nets[0]
    plain: Any = tiny.pipeline(kind)
    options: dict[str, Any] = {} if xl else {"requires_safety_checker": False}
    pipe = getattr(diffusers, f"StableDiffusion{xl}ControlNetPipeline")(
        **{**plain.components, "controlnet": net}, **options
    )
    pipe.set_progress_bar_config(disable=True)
    images: Any = [hint()] * count if count > 1 else hint()
    asked = {"image": images, "num_inference_steps": STEPS, "control_guidance_end": 0.7}
    fast = accelerate(copy.deepcopy(pipe))
    expected, result = tiny.picture(pipe, **asked), tiny.picture(fast, **asked)
    assert error(result, expected) <= CLOSE
    assert error(tiny.picture(plain, num_inference_steps=STEPS), expected) > 0.01
    told = explain(fast)
    assert told.unet is not None
    assert (told.unet.calls, not told.unet.others) == (STEPS, True)
    assert len(told.controlnets) == count
    for part in told.controlnets:
        assert part is not None
        assert (part.calls, not part.others) == (STEPS, True)
    assert "ControlNet: 3 calls by diffusion_fast" in str(told)
    restore(fast)
    assert explain(fast).controlnets == [None] * count


def test_a_hint_is_embedded_once() -> None:
    """Until it, or a weight that reads it, is another one."""
    net_config = {**tiny.SD, "conditioning_embedding_out_channels": HINT[:2]}
    parts = {**tiny.pipeline("sd").components, "controlnet": controlnet(net_config, 0)}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    fast, calls = accelerate(copy.deepcopy(pipe)), []
    fast.controlnet.controlnet_cond_embedding.conv_in.register_forward_hook(
        lambda *_: calls.append(1)
    )
    asked: dict[str, Any] = {"image": hint(), "num_inference_steps": STEPS}
    expected, result = tiny.picture(pipe, **asked), tiny.picture(fast, **asked)
    assert error(result, expected) <= CLOSE
    assert len(calls) == 1
    for one in (pipe, fast):
        with torch.no_grad():
            one.controlnet.controlnet_cond_embedding.conv_in.weight.mul_(-2)
    edited, result = tiny.picture(pipe, **asked), tiny.picture(fast, **asked)
    assert error(result, edited) <= CLOSE
    assert error(edited, expected) > 1e-3

    net = fast.controlnet
    seen = torch.rand(2, 3, 32, 32)
    states = {"sample": torch.rand(2, 4, 16, 16), "encoder_hidden_states": torch.rand(2, 7, 24)}

    def residual(module: Any) -> torch.Tensor:
        return module(timestep=3, controlnet_cond=seen, **states, return_dict=False)[1]

    with torch.no_grad():
        first = residual(net)
        calls.clear()
        assert torch.equal(residual(net), first)
        assert not calls
        seen.mul_(0.5)
        assert error(residual(net), residual(pipe.controlnet)) <= CLOSE
        assert len(calls) == 1
    net.requires_grad_(True)
    residual(net).sum().backward()  # with gradients, nothing is kept
    residual(net).sum().backward()
    assert len(calls) == 3
    assert net.controlnet_cond_embedding.conv_in.weight.grad is not None


def test_a_tiny_autoencoder_stays() -> None:
    """The U-Net and the ControlNet run by ours all the same."""
    widths = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = diffusers.AutoencoderTiny(**widths, **blocks).eval()
    net_config = {**tiny.SD, "conditioning_embedding_out_channels": HINT[:2]}
    parts = tiny.pipeline("sd", vae=vae).components | {"controlnet": controlnet(net_config, 0)}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    fast = accelerate(copy.deepcopy(pipe))
    asked: dict[str, Any] = {"image": hint(), "num_inference_steps": STEPS}
    assert error(tiny.picture(fast, **asked), tiny.picture(pipe, **asked)) <= CLOSE
    told = explain(fast)
    assert told.vae_decoder is None
    for part in (told.unet, *told.controlnets):
        assert part is not None
        assert (part.calls, not part.others) == (STEPS, True)
    assert explain(restore(fast)).unet is None


def test_t2i_adapters() -> None:
    plain: Any = tiny.pipeline("sd")
    parts = {n: v for n, v in plain.components.items() if n != "image_encoder"}
    tool = adapter({"channels": (16, 32), "num_res_blocks": 1, "downscale_factor": 2})
    pipe = diffusers.StableDiffusionAdapterPipeline(
        **parts, adapter=tool, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    fast = accelerate(copy.deepcopy(pipe))
    asked = {"image": hint(), "num_inference_steps": STEPS, "adapter_conditioning_scale": 0.8}
    expected, result = (torch.as_tensor(tiny.picture(one, **asked)) for one in (pipe, fast))
    assert error(result, expected) <= CLOSE
    told = explain(fast).unet
    assert told is not None
    assert (told.calls, not told.others) == (STEPS, True)
