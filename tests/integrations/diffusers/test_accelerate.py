"""Our U-Net and VAE decoder inside diffusers' pipelines: the same pictures, whatever is done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from accelerated import CLOSE, Pipe, assert_equal, pair
from numerics import error
from peft import LoraConfig
from torch import nn

from diffusion_fast.integrations.diffusers import AttentionProcessor, accelerate, explain, restore

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::RuntimeWarning:peft",
    "ignore::UserWarning:peft",
    "error:diffusion_fast:UserWarning",  # falling back where no test expects it
)


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_pictures_are_the_same(kind: str, task: str) -> None:
    plain, fast = pair(kind, task)
    assert error(tiny.picture(fast), tiny.picture(plain)) <= CLOSE
    told = explain(fast)
    assert told.unet.calls > 0
    assert told.vae_decoder.calls == 1
    assert not told.unet.others
    assert not told.vae_decoder.others
    assert "by diffusion_fast" in str(told)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_linear_projection": True, "attention_head_dim": (2, 4)},
        {"resnet_time_scale_shift": "scale_shift"},
        {"downsample_padding": 0},
        {"in_channels": 9},
    ],
)
def test_configs(changes: dict[str, Any]) -> None:
    """Also where every layer is called, because of a hook on it."""
    plain, fast = pair(unet=tiny.unet("sd", **changes))
    inputs = torch.randn(2, changes.get("in_channels", 4), 8, 9)
    before = assert_equal(plain, fast, sample=inputs)
    for pipe in (plain, fast):
        for module in pipe.unet.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(lambda _m, _i, out: out * 1.01)
    assert error(assert_equal(plain, fast, sample=inputs), before) > 0.01


def test_weights_are_shared() -> None:
    pipe = tiny.pipeline()
    accelerate(pipe)
    parts = explain(pipe)
    for theirs, part in ((pipe.unet, parts.unet), (pipe.vae.decoder, parts.vae_decoder)):
        ours = dict(part.ours.named_parameters())
        expected = dict(theirs.named_parameters())
        assert ours.keys() == expected.keys()
        for name, parameter in expected.items():
            assert ours[name] is parameter
            assert ours[name].data_ptr() == parameter.data_ptr()


def test_restore_undoes_it_exactly() -> None:
    pipe = tiny.pipeline()
    before = {id(m): dict(vars(m)) for m in (*pipe.unet.modules(), *pipe.vae.modules())}
    first = tiny.picture(pipe)
    assert accelerate(pipe) is pipe
    tiny.picture(pipe)
    assert restore(pipe) is pipe
    after = {id(m): dict(vars(m)) for m in (*pipe.unet.modules(), *pipe.vae.modules())}
    assert before.keys() == after.keys()
    for key, attributes in before.items():
        assert attributes.keys() == after[key].keys()
    assert torch.equal(tiny.picture(pipe), first)
    assert str(explain(pipe)) == "U-Net: not accelerated\nVAE decoder: not accelerated"
    restore(pipe)  # and once more


def test_twice_is_once() -> None:
    pipe = accelerate(tiny.pipeline())
    parts = explain(pipe)
    accelerate(pipe)
    assert explain(pipe) == parts
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components)
    assert explain(accelerate(other)) == parts
    restore(pipe)
    assert explain(other).unet is None


def test_a_copy_reads_its_own_weights() -> None:
    pipe = accelerate(tiny.pipeline())
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        twin.unet.conv_in.weight.mul_(2)
    changed = tiny.predict(twin)
    assert error(changed, tiny.predict(pipe)) > 0.01
    assert torch.equal(changed, tiny.predict(twin))
    restore(twin)
    assert error(changed, tiny.predict(twin)) <= CLOSE
    assert explain(pipe).unet is not None


def edit(pipe: Pipe) -> None:
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].norm1.weight.mul_(1.5)
        pipe.unet.conv_out.bias.add_(1)


def replace_parameter(pipe: Pipe) -> None:
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].norm1
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    pipe.unet.conv_in.weight = nn.Parameter(pipe.unet.conv_in.weight.detach() * 2)


def replace_layer(pipe: Pipe) -> None:
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    torch.manual_seed(2)
    attention.to_q = nn.Linear(32, 32, bias=False)


def replace_data(pipe: Pipe) -> None:
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data * 3


def load_weights(pipe: Pipe) -> None:
    weights = {n: v * 1.1 for n, v in pipe.unet.state_dict().items()}
    pipe.unet.load_state_dict(weights, assign=True)


def hook(pipe: Pipe) -> None:
    pipe.unet.conv_in.register_forward_hook(lambda _m, _i, out: out * 1.5)


def circular(pipe: Pipe) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


CHANGES = (edit, replace_parameter, replace_layer, replace_data, load_weights, hook, circular)


@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_used(change: Callable[[Pipe], None], first: bool) -> None:
    plain = tiny.pipeline()
    fast = copy.deepcopy(plain)
    original = tiny.predict(plain)
    if first:
        accelerate(fast)
        tiny.predict(fast)
    for pipe in (plain, fast):
        change(pipe)
    accelerate(fast)
    assert error(assert_equal(plain, fast), original) > 1e-3


def test_other_dtypes() -> None:
    plain, fast = pair()
    for pipe in (plain, fast):
        pipe.to(torch.float64)
    expected, result = tiny.predict(plain), tiny.predict(fast)
    assert result.dtype == torch.float64
    assert error(result, expected) <= 1e-6  # diffusers' time embedding has float32 sinusoids
    for pipe in (plain, fast):
        pipe.to(torch.bfloat16)
    assert tiny.predict(fast).dtype == torch.bfloat16
    assert error(tiny.predict(fast), expected) <= 2 * error(tiny.predict(plain), expected) + 1e-2
    assert explain(fast).unet.calls == 3


def test_autocast() -> None:
    plain, fast = pair()
    expected = tiny.predict(plain)
    with torch.autocast("cpu", torch.bfloat16):
        result, theirs = tiny.predict(fast), tiny.predict(plain)
    assert error(result, expected) <= 2 * error(theirs, expected) + 1e-2


def test_training_mode_and_gradients() -> None:
    plain, fast = pair(unet=tiny.unet("sd", dropout=0.3))
    assert_equal(plain, fast)
    gradients = []
    for pipe in (plain, fast):
        pipe.unet.train().requires_grad_(True)
        torch.manual_seed(1)
        pipe.unet(**tiny.unet_inputs(pipe.unet)).sample.square().mean().backward()
        gradients.append(pipe.unet.conv_in.weight.grad)
    assert error(gradients[1], gradients[0]) <= 1e-4
    for pipe in (plain, fast):
        pipe.unet.eval()
    assert_equal(plain, fast)


@pytest.mark.parametrize("call", ["enable_slicing", "enable_tiling"])
def test_vae_slicing_and_tiling(call: str) -> None:
    plain, fast = pair()
    for pipe in (plain, fast):
        getattr(pipe.vae, call)()
        pipe.vae.tile_latent_min_size = 8
    latents = torch.randn(3, 4, 12, 12)
    expected, result = plain.vae.decode(latents).sample, fast.vae.decode(latents).sample
    assert error(result, expected) <= CLOSE
    assert explain(fast).vae_decoder.calls > 1


def test_channels_last_and_attention_slicing() -> None:
    plain, fast = pair()
    fast.unet.to(memory_format=torch.channels_last)
    fast.enable_attention_slicing()
    assert_equal(plain, fast)
    fast.unet.set_attn_processor(AttentionProcessor())
    assert_equal(plain, fast)


@pytest.mark.parametrize("kind, first", [("sd", False), ("sd", True), ("sdxl", True)])
def test_lora(kind: str, first: bool, tmp_path: Path) -> None:
    """Loaded, scaled, switched, fused and unloaded through the pipeline."""
    plain = tiny.pipeline(kind)
    fast = copy.deepcopy(plain)
    original = tiny.predict(plain)
    files = [
        tiny.lora_file(tmp_path, kind, "all"),
        tiny.lora_file(tmp_path, kind, "attention", r".*to_[qv]", use_dora=False),
    ]
    if first:
        accelerate(fast)
        tiny.predict(fast)
    for pipe in (plain, fast):
        for (folder, file), name in zip(files, ("a", "b"), strict=True):
            pipe.load_lora_weights(folder, weight_name=file, adapter_name=name)
        pipe.set_adapters("a")
    accelerate(fast)
    seen = [original]

    def check(**changes: Any) -> None:
        """And unlike everything before."""
        result = assert_equal(plain, fast, **changes)
        for other in seen:
            assert error(result, other) > 1e-4
        seen.append(result)

    check()
    check(cross_attention_kwargs={"scale": 0.5})
    for scales in ([1.0, 1.0], [0.3, 0.7]):
        for pipe in (plain, fast):
            pipe.set_adapters(["a", "b"], scales)
        check()
    for pipe in (plain, fast):
        pipe.set_adapters("b")
    check()
    for pipe in (plain, fast):
        pipe.fuse_lora(lora_scale=0.6)
    check()
    for pipe in (plain, fast):
        pipe.unfuse_lora()
        pipe.disable_lora()
    assert error(assert_equal(plain, fast), original) <= 1e-5
    for pipe in (plain, fast):
        pipe.enable_lora()
        pipe.delete_adapters("b")
        pipe.set_adapters("a", 0.2)
    check()
    for pipe in (plain, fast):
        pipe.unload_lora_weights()
    assert error(assert_equal(plain, fast), original) <= 1e-5
    assert not explain(fast).unet.others
    restore(fast)
    assert torch.equal(tiny.predict(fast), tiny.predict(plain))


@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_other_adapters(variant: str) -> None:
    plain, fast = pair()
    original = tiny.predict(plain)
    for pipe in (plain, fast):
        torch.manual_seed(1)
        config = LoraConfig(
            r=2,
            target_modules=r".*(to_q|proj_in|conv1)",
            init_lora_weights=False,
            **{variant: True},
        )
        pipe.unet.add_adapter(config)
    assert error(assert_equal(plain, fast), original) > 1e-4


def test_lora_edited_in_place(tmp_path: Path) -> None:
    plain, fast = pair()
    folder, file = tiny.lora_file(tmp_path, "sd", "all")
    for pipe in (plain, fast):
        pipe.load_lora_weights(folder, weight_name=file)
    before = assert_equal(plain, fast)
    for pipe in (plain, fast):
        with torch.no_grad():
            for name, parameter in pipe.unet.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.5)
    assert error(assert_equal(plain, fast), before) > 1e-3


def test_model_offload_hooks() -> None:
    """accelerate's hooks wrap the forward that they find: ours stays in, and they stay on."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Twice(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            output.sample = output.sample * 2
            return output

    for first in (False, True):
        plain = tiny.pipeline()
        fast = copy.deepcopy(plain)
        if first:
            accelerate(fast)
        for pipe in (plain, fast):
            add_hook_to_module(pipe.unet, Twice())
        accelerate(fast)
        twice = assert_equal(plain, fast)
        restore(fast)
        assert torch.equal(tiny.predict(fast), tiny.predict(plain))
        accelerate(fast)
        for pipe in (plain, fast):
            remove_hook_from_module(pipe.unet)
        assert error(assert_equal(plain, fast), twice) > 0.1


def test_a_guidance_scale_as_an_input() -> None:
    """A latent consistency model, whose pipeline gives its scale to the U-Net."""
    unet = tiny.unet("sd", time_cond_proj_dim=16)
    scheduler = diffusers.LCMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    plain, fast = pair(unet=unet, scheduler=scheduler)
    expected = tiny.picture(plain, guidance_scale=6.0, num_inference_steps=2)
    assert error(tiny.picture(fast, guidance_scale=6.0, num_inference_steps=2), expected) <= CLOSE
    assert error(tiny.picture(fast, guidance_scale=2.0, num_inference_steps=2), expected) > 0.01
    assert explain(fast).unet.calls == 4
    assert not explain(fast).unet.others


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_ip_adapters(kind: str, masked: bool) -> None:
    """Loaded before and after, with scales and masks; and taken off again."""
    plain, fast = pair(kind)
    before = tiny.predict(plain)
    for pipe in (plain, fast):
        unet = pipe.unet
        torch.manual_seed(4)
        layers = {}
        names = [name for name in unet.attn_processors if "attn2" in name]
        for n, name in enumerate(names):
            width = unet.get_submodule(name.rpartition(".")[0]).to_k.out_features
            for x in "kv":
                layers[f"{2 * n + 1}.to_{x}_ip.weight"] = torch.randn(width, 24)
        proj = {"proj.weight": torch.randn(96, 12), "proj.bias": torch.randn(96)}
        proj |= {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
        state = {"image_proj": proj, "ip_adapter": layers}
        unet._load_ip_adapter_weights([state, state])
        pipe.set_ip_adapter_scale([0.8, 0.5])
    images = [torch.randn(2, 2, 12), torch.randn(2, 1, 12)]
    added = {**(tiny.unet_inputs(plain.unet).get("added_cond_kwargs") or {})}
    asked: dict[str, Any] = {"added_cond_kwargs": {**added, "image_embeds": images}}
    if masked:
        masks = [torch.rand(1, 2, 64, 64).round(), torch.rand(1, 1, 64, 64).round()]
        asked["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    assert error(assert_equal(plain, fast, **asked), before) > 0.01
    assert error(tiny.predict(accelerate(copy.deepcopy(plain)), **asked), before) > 0.01
    for pipe in (plain, fast):
        pipe.unload_ip_adapter()
    assert error(assert_equal(plain, fast), before) <= CLOSE
