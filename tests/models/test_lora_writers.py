"""Adapter files of other writers: names, settings, and what stands beside the layers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from small_unets import small_config
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_fast.models import CheckpointError, UNet2DCondition
from diffusion_fast.models.lora import LoRAs

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LDM = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
TEXT = "encoder.layers.0.self_attn.q_proj"
TOLERANCE = 2e-6


@pytest.fixture
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 9}
    text = CLIPTextModel(CLIPTextConfig(num_attention_heads=2, **sizes)).eval()
    return {"unet": UNet2DCondition(small_config()).eval(), "text_encoder": text}


def layer(networks: dict[str, nn.Module], component: str, name: str) -> nn.Module:
    module = networks[component]
    inner = getattr(module, "text_model", module) if component == "text_encoder" else module
    return inner.get_submodule(name)


def pair(weight: Tensor, r: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(weight.shape[0], r), torch.randn(r, weight.shape[1])


def load(networks: dict[str, nn.Module], state: dict[str, Tensor], folder: Path) -> None:
    save_file({n: v.contiguous() for n, v in state.items()}, folder / "x.safetensors")
    LoRAs(networks).load(folder / "x.safetensors", "x")


UNET_STEMS = {
    "kohya, OneTrainer": ("lora_unet_" + QUERY.replace(".", "_"), "lora_down", "lora_up"),
    "kohya, LDM names": ("lora_unet_" + LDM.replace(".", "_"), "lora_down", "lora_up"),
    "SimpleTuner, LyCORIS": ("lycoris_" + QUERY.replace(".", "_"), "lora_down", "lora_up"),
    "ComfyUI": ("diffusion_model." + LDM, "lora_down", "lora_up"),
    "ComfyUI, a whole model's prefix": ("model.diffusion_model." + LDM, "lora_down", "lora_up"),
    "PEFT": ("base_model.model." + QUERY, "lora_A", "lora_B"),
    "PEFT, a named adapter": ("base_model.model." + QUERY, "lora_A.style", "lora_B.style"),
    "diffusers": ("unet." + QUERY, "lora_A", "lora_B"),
    "diffusers 0.17": ("unet." + QUERY, "lora.down", "lora.up"),
    "diffusers 0.12": (QUERY.replace(".to_q", ".processor.to_q_lora"), "down", "up"),
}
TEXT_STEMS = {
    "kohya": ("lora_te_text_model_" + TEXT.replace(".", "_"), "lora_down", "lora_up"),
    "OneTrainer": ("lora_te1_text_model_" + TEXT.replace(".", "_"), "lora_down", "lora_up"),
    "ComfyUI": (
        f"text_encoders.clip_l.transformer.text_model.{TEXT}",
        *("lora_down", "lora_up"),
    ),
    "PEFT": (f"base_model.model.text_model.{TEXT}", "lora_A", "lora_B"),
    "diffusers 0.17": (f"text_encoder.text_model.{TEXT}.lora_linear_layer", "down", "up"),
    "diffusers 0.15": (
        f"text_encoder.text_model.{TEXT.replace('q_proj', 'to_q')}_lora",
        *("down", "up"),
    ),
}


@pytest.mark.parametrize("writer", UNET_STEMS)
def test_names_of_unet_layers(writer: str, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    stem, down, up = UNET_STEMS[writer]
    weight = layer(networks, "unet", QUERY).weight
    base = weight.detach().clone()
    b, a = pair(base)
    load(networks, {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}, tmp_path)
    assert torch.allclose(weight, base + b @ a, atol=TOLERANCE)


@pytest.mark.parametrize("writer", TEXT_STEMS)
def test_names_of_text_layers(writer: str, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    stem, down, up = TEXT_STEMS[writer]
    weight = layer(networks, "text_encoder", TEXT).weight
    base = weight.detach().clone()
    b, a = pair(base)
    load(networks, {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}, tmp_path)
    assert torch.allclose(weight, base + b @ a, atol=TOLERANCE)


def test_biases_and_norms(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    conv, norm = "mid_block.resnets.0.conv1", "mid_block.resnets.0.norm1"
    before = {n: p.detach().clone() for n, p in networks["unet"].named_parameters()}
    conv_stem, norm_stem = (f"lora_unet_{name.replace('.', '_')}" for name in (conv, norm))
    state = {
        f"{conv_stem}.diff": torch.randn_like(before[f"{conv}.weight"]),
        f"{conv_stem}.diff_b": torch.randn_like(before[f"{conv}.bias"]),
        f"{norm_stem}.w_norm": torch.randn_like(before[f"{norm}.weight"]),
        f"{norm_stem}.b_norm": torch.randn_like(before[f"{norm}.bias"]),
    }
    save_file(state, tmp_path / "x.safetensors")
    loras = LoRAs(networks)
    loras.load(tmp_path / "x.safetensors", "x", scale=0.5)
    for change, name in zip(
        state.values(),
        (f"{conv}.weight", f"{conv}.bias", f"{norm}.weight", f"{norm}.bias"),
        strict=True,
    ):
        now = networks["unet"].get_parameter(name)
        assert torch.allclose(now, before[name] + 0.5 * change, atol=TOLERANCE), name
    loras.set()
    for name, value in networks["unet"].named_parameters():
        assert torch.equal(value, before[name]), name


def test_what_stands_beside_is_left_out_with_one_warning(
    networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    stem = UNET_STEMS["ComfyUI"][0]
    weight = layer(networks, "unet", QUERY).weight
    base = weight.detach().clone()
    b, a = pair(base)
    state = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
    beside = {
        "bundle_emb.token.string_to_param.*": torch.zeros(2, 3),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 3),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(3, 2),
        f"{stem}.lora_up.bias": torch.zeros(len(base)),  # of a layer without one: nothing
    }
    with pytest.warns(UserWarning, match=r"2 names .*bundle_emb\.token.*lora_te2_") as caught:
        load(networks, state | beside, tmp_path)
    assert len(caught) == 1
    assert torch.allclose(weight, base + b @ a, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"lora_unet_{QUERY.replace('.', '_')}.oft_blocks", "an OFT"),
        (f"{QUERY}.on_input", "an IA3"),
        (f"{QUERY}.a1.weight", "a GLoRA"),
        ("vera_A.default", "a VeRA"),
        ("string_to_param", "an embedding"),
        ("model.diffusion_model.double_blocks.0.x", "Flux"),
        ("anything", "others: anything"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "a LoRA for Flux"),
        ("unet.elsewhere.lora_up.weight", r"a LoRA for another model.*unet\.elsewhere"),
    ],
)
def test_what_has_no_formula_here_is_named(
    name: str, kind: str, networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=kind):
        load(networks, {name: torch.ones(2, 2)}, tmp_path)


PEFT = {
    "alpha": LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"]),
    "rslora": LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=["to_q"]),
    "patterns": LoraConfig(
        r=2,
        lora_alpha=6,
        rank_pattern={"attn1.to_q": 3},
        alpha_pattern={"mid_block.*to_q": 5},
        target_modules=["to_q", "conv1"],
    ),
    "DoRA": LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=["to_q", "conv1"]),
    "bias": LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=["conv1"]),
    "LoHa": LoHaConfig(r=2, alpha=6, target_modules=["to_q", "conv1"]),
    "LoHa, factors of kernels": LoHaConfig(
        r=2, alpha=6, use_effective_conv2d=True, target_modules=["conv1"]
    ),
    "LoKr": LoKrConfig(r=2, alpha=6, target_modules=["to_q", "conv1"]),
    "LoKr, whole factors": LoKrConfig(r=64, alpha=6, target_modules=["to_q"]),
}


@pytest.mark.parametrize("kind", PEFT)
def test_folders_of_peft(kind: str, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    """Its own merge is the judge: adapter_config.json has what the tensors don't say."""
    torch.manual_seed(1)
    theirs = get_peft_model(UNet2DCondition(networks["unet"].config), PEFT[kind])  # type: ignore
    state = theirs.base_model.model.state_dict()
    base = {n.replace(".base_layer", ""): v.clone() for n, v in state.items()}
    networks["unet"].load_state_dict({n: base[n] for n in networks["unet"].state_dict()})
    for name, value in theirs.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "hada_", "lokr_")):
            nn.init.normal_(value, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    LoRAs(networks).load(tmp_path / "adapter", "x")
    merged = theirs.merge_and_unload().state_dict()
    changed = 0
    for name, value in networks["unet"].state_dict().items():
        assert torch.allclose(value, merged[name], atol=1e-5), name
        changed += not torch.equal(value, base[name])
    assert changed > 1


@pytest.mark.parametrize(
    "setting",
    [
        {"bias": "all"},
        {"modules_to_save": ["conv_in"]},
        {"peft_type": "OFT"},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_settings_of_peft_without_a_counterpart(
    setting: dict[str, Any], networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    b, a = pair(layer(networks, "unet", QUERY).weight)
    state = {f"{PEFT_STEM}.lora_A.weight": a, f"{PEFT_STEM}.lora_B.weight": b}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 2} | setting))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {next(iter(setting))}="):
        LoRAs(networks).load(tmp_path, "x")


PEFT_STEM = UNET_STEMS["PEFT"][0]


def test_a_pickle_in_a_file_of_any_name(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    weight = layer(networks, "unet", QUERY).weight
    base = weight.detach().clone()
    b, a = pair(base)
    state = {f"{PEFT_STEM}.lora_A.weight": a, f"{PEFT_STEM}.lora_B.weight": b}
    torch.save(state, tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRAs(networks).load(tmp_path / "x.safetensors", "x")
    assert torch.allclose(weight, base + b @ a, atol=TOLERANCE)
