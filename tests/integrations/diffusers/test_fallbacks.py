"""What our models don't have runs on diffusers' own forward, and it is said; or it is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from accelerated import Pipe, assert_equal, pair
from diffusers.models import attention_processor as processors
from torch import nn

from diffusion_fast.integrations.diffusers import accelerate, explain

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::RuntimeWarning:peft",
    "ignore::UserWarning:peft",
    "error:diffusion_fast:UserWarning",  # falling back where no test expects it
)


def residuals(pipe: Pipe) -> dict[str, Any]:
    return {"mid_block_additional_residual": torch.ones(2, 32, 4, 4)}


def mask(pipe: Pipe) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.arange(7)[None].expand(2, -1) < 4}


def freeu(pipe: Pipe) -> dict[str, Any]:
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    return {}


class Doubled(processors.AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


def processor(pipe: Pipe) -> dict[str, Any]:
    pipe.unet.set_attn_processor(Doubled())
    return {}


def chunking(pipe: Pipe) -> dict[str, Any]:
    for module in pipe.unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, 1)
    return {}


def block_hook(pipe: Pipe) -> dict[str, Any]:
    pipe.unet.mid_block.register_forward_hook(lambda _m, _i, out: out * 1.5)
    return {}


def norm_hook(pipe: Pipe) -> dict[str, Any]:
    pipe.unet.conv_norm_out.register_forward_hook(lambda _m, _i, out: out * 1.5)
    return {}


def block_forward(pipe: Pipe) -> dict[str, Any]:
    block = pipe.unet.mid_block
    block.forward = lambda *args, **kwargs: 2 * type(block).forward(block, *args, **kwargs)
    return {}


def other_class(pipe: Pipe) -> dict[str, Any]:
    block = pipe.unet.mid_block
    forward = type(block).forward
    patched = {"forward": lambda *args, **kwargs: 2 * forward(*args, **kwargs)}
    block.__class__ = type("Patched", (type(block),), patched)
    return {}


def other_norm(pipe: Pipe) -> dict[str, Any]:
    pipe.unet.conv_norm_out = nn.GroupNorm(2, 16, eps=1e-5)
    return {}


def more_layers(pipe: Pipe) -> dict[str, Any]:
    pipe.unet.mid_block.resnets[0].nonlinearity = nn.PReLU()
    return {}


def gligen(pipe: Pipe) -> dict[str, Any]:
    return {"cross_attention_kwargs": {"scale": 1.0, "gligen": None}}


def added(pipe: Pipe) -> dict[str, Any]:
    return {"added_cond_kwargs": {"image_embeds": torch.zeros(2, 1, 4)}}


FALLBACKS = {
    residuals: "residuals of either the way down or the bottom alone",
    mask: "encoder_attention_mask",
    freeu: "FreeU",
    processor: "attention processor Doubled",
    chunking: "chunked feed-forward",
    block_hook: "mid_block: forward hooks",
    norm_hook: "conv_norm_out: expected GroupNorm, got forward hooks",
    block_forward: "mid_block: a forward of its own",
    other_class: "mid_block: ",
    other_norm: "conv_norm_out.num_groups: expected 4, got 2",
    more_layers: "nonlinearity: a PReLU with weights",
    gligen: r"cross_attention_kwargs\['gligen'\]",
    added: r"added_cond_kwargs \['image_embeds'\]",
}


@pytest.mark.parametrize("ask", FALLBACKS)
def test_what_ours_lacks_runs_on_diffusers(ask: Callable[[Pipe], dict[str, Any]]) -> None:
    plain, fast = pair()
    tiny.predict(fast)
    wanted, arguments = ask(plain), ask(fast)
    with pytest.warns(UserWarning, match=f"U-Net runs diffusers' own forward: .*{FALLBACKS[ask]}"):
        result = tiny.predict(fast, **arguments)
    assert torch.equal(result, tiny.predict(plain, **wanted))
    part = explain(fast).unet
    assert part.calls == 1
    assert sum(part.others.values()) == 1
    assert "1 by diffusers: " in str(part)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        tiny.predict(fast, **arguments)
    assert sum(part.others.values()) == 2


def test_ours_comes_back() -> None:
    plain, fast = pair()
    for pipe in (plain, fast):
        freeu(pipe)
    with pytest.warns(UserWarning, match="FreeU"):
        tiny.predict(fast)
    assert "FreeU" in str(explain(fast))
    for pipe in (plain, fast):
        pipe.disable_freeu()
        handle = pipe.unet.mid_block.register_forward_hook(lambda _m, _i, out: out * 1.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiny.predict(pipe)
        handle.remove()
    assert_equal(plain, fast)


def test_gradient_checkpointing() -> None:
    _, fast = pair()
    fast.unet.enable_gradient_checkpointing()
    fast.unet.train().requires_grad_(True)
    with pytest.warns(UserWarning, match="gradient checkpointing"):
        fast.unet(**tiny.unet_inputs(fast.unet))
    tiny.predict(fast)  # without gradients there is nothing to checkpoint
    assert explain(fast).unet.calls == 1
    fast.vae.enable_gradient_checkpointing()
    with pytest.warns(UserWarning, match="VAE decoder runs .*: gradient checkpointing"):
        fast.vae.decode(torch.randn(1, 4, 4, 4))


def test_sequential_offload_hooks() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    plain, fast = pair()
    for module in fast.unet.modules():
        if not list(module.children()):
            add_hook_to_module(module, ModelHook())
    with pytest.warns(UserWarning, match="a forward of its own"):
        result = tiny.predict(fast)
    assert torch.equal(result, tiny.predict(plain))


# What is refused.


def refused(pipe: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        accelerate(pipe)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type: 'UNetMidBlock2D' is not supported"),
        ({"class_embed_type": "timestep"}, "class_embed_type: 'timestep' is not supported"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
    ],
)
def test_unsupported_unet(changes: dict[str, Any], match: str) -> None:
    pipe = tiny.pipeline(unet=tiny.unet("sd", **changes))
    refused(pipe, f"pipe.unet: .*{match}")
    assert "forward" not in vars(pipe.unet)
    assert "forward" not in vars(pipe.vae.decoder)


def test_nothing_is_half_swapped() -> None:
    pipe = tiny.pipeline(vae=tiny.vae(act_fn="relu"))
    refused(pipe, "pipe.vae: .*act_fn: 'relu' is not supported")
    assert "forward" not in vars(pipe.unet)
    assert explain(pipe).unet is None


def test_unsupported_pipelines() -> None:
    supported = "pipe: expected a Stable Diffusion or SDXL pipeline"
    refused("pipe", supported)
    ddpm = diffusers.DDPMPipeline(unet=None, scheduler=tiny.scheduler())
    refused(ddpm, f"{supported}.*DDPMPipeline whose unet is none")
    quantized = tiny.pipeline(vae=diffusers.VQModel())
    refused(quantized, "whose vae is VQModel")
    patched = tiny.pipeline()
    patched.unet.forward = lambda *args, **kwargs: None
    refused(patched, "pipe.unet: expected a forward as diffusers wrote it, got a patched one")
