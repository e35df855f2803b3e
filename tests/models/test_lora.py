"""LoRA files against diffusers and PEFT, which put them on the same random networks."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_fast.models import CheckpointError, UNet2DCondition, UNetConfig
from diffusion_fast.models.compvis_unet import unet_name
from diffusion_fast.models.lora import LoRAs
from diffusion_fast.models.lora_file import read_lora

CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=4,
)
LINEARS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj"]
CONVS = ["conv1", "conv_shortcut", "downsamplers.0.conv"]
TEXT = ["q_proj", "out_proj", "fc1"]

Pair = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def plain() -> Pair:
    """A U-Net of diffusers and a text encoder, without any LoRA."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(CONFIG.to_dict())
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "vocab_size": 99}
    return unet, CLIPTextModel(CLIPTextConfig(num_attention_heads=4, **sizes))


@pytest.fixture
def ours(plain: Pair) -> dict[str, nn.Module]:
    unet = UNet2DCondition(CONFIG).eval()
    unet.load_state_dict(plain[0].state_dict())
    return {"unet": unet, "text_encoder": copy.deepcopy(plain[1])}


def with_lora(plain: Pair, seed: int, alpha: float = 6) -> Pair:
    """Both networks with random adapters of rank 3 by PEFT."""
    torch.manual_seed(seed)
    networks = copy.deepcopy(plain)
    for network, targets in zip(networks, (LINEARS + CONVS, TEXT), strict=True):
        network.add_adapter(LoraConfig(r=3, lora_alpha=alpha, target_modules=targets))
        for name, value in network.named_parameters():
            if "lora_" in name:
                nn.init.normal_(value, std=0.3)
    return networks


def weights(network: nn.Module) -> dict[str, Tensor]:
    """As they are with the adapters merged, without the adapters' own."""
    merged = copy.deepcopy(network)
    for layer in merged.modules():
        if hasattr(layer, "base_layer"):
            layer.merge()
    state = merged.state_dict().items()
    return {n.replace(".base_layer", ""): v for n, v in state if "lora_" not in n}


def saved(networks: Pair, folder: Path, kind: str) -> Path:
    """A file of these adapters as each tool writes it."""
    unet, text = (get_peft_model_state_dict(network) for network in networks)
    path = folder / f"{kind}.safetensors"
    if kind == "diffusers":
        settings = [network.peft_config["default"].to_dict() for network in networks]
        diffusers.StableDiffusionPipeline.save_lora_weights(
            folder,
            unet,
            text,
            weight_name=path.name,
            unet_lora_adapter_metadata=settings[0],
            text_encoder_lora_adapter_metadata=settings[1],
        )
    elif kind == "kohya":
        save_file(kohya(unet, "lora_unet") | kohya(text, "lora_te", "text_model."), path)
    elif kind == "kohya, LDM names":
        state = kohya({ldm(name): value for name, value in unet.items()}, "lora_unet")
        save_file(state | kohya(text, "lora_te", "text_model."), path)
    elif kind == "older diffusers":
        state = {f"unet.{name}": value for name, value in unet.items()}
        state |= {f"text_encoder.text_model.{name}": value for name, value in text.items()}
        save_file({older(name): value for name, value in state.items()}, path)
    return path


def ldm(name: str) -> str:
    layer, _, rest = name.partition(".lora_")
    return f"{unet_name(layer + '.weight', CONFIG).removesuffix('.weight')}.lora_{rest}"


def older(name: str) -> str:
    if name.startswith("unet"):
        name = name.replace(".to_", ".processor.to_", 1).replace("to_out.0.", "to_out.")
        joint = "_lora" if "processor" in name else ".lora"
    else:
        joint = ".lora_linear_layer"
    return name.replace(".lora_A", f"{joint}.down").replace(".lora_B", f"{joint}.up")


def kohya(state: dict[str, Tensor], prefix: str, inner: str = "") -> dict[str, Tensor]:
    """kohya-ss's own names, with alpha 6."""
    out = {}
    for name, value in state.items():
        layer, _, rest = (inner + name).partition(".lora_")
        stem = f"{prefix}_{layer.replace('.', '_')}"
        out[f"{stem}.lora_{'down' if rest[0] == 'A' else 'up'}.weight"] = value.contiguous()
        out[f"{stem}.alpha"] = torch.tensor(6.0)
    return out


def close(got: nn.Module, wanted: dict[str, Tensor]) -> None:
    state = got.state_dict()
    assert state.keys() == wanted.keys()
    errors = {name: (state[name] - value).abs().max().item() for name, value in wanted.items()}
    assert max(errors.values()) < 2e-6, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "kohya, LDM names", "older diffusers"])
def test_a_file_of_any_tool_changes_the_weights_as_peft_does(
    kind: str, plain: Pair, ours: dict[str, nn.Module], tmp_path: Path
) -> None:
    # Files of the older layout carry no alpha: it is the rank.
    networks = with_lora(plain, 1, alpha=3 if kind == "older diffusers" else 6)
    loras = LoRAs(ours)
    loras.load(saved(networks, tmp_path, kind), "style")
    for got, network in zip(ours.values(), networks, strict=True):
        close(got, weights(network))


def test_kohya_names_are_those_that_diffusers_reads(plain: Pair, tmp_path: Path) -> None:
    path = saved(with_lora(plain, 1), tmp_path, "kohya")
    state, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(
        path.parent, weight_name=path.name, unet_config=plain[0].config
    )
    stems = [re.sub(r"[._]lora\.(down|up)\.weight$", "", n) for n in state if n.startswith("unet.")]
    layers = {n.removeprefix("unet.").replace(".processor.", ".") for n in stems}
    layers = {re.sub(r"\.to_out$", ".to_out.0", n) for n in layers}
    components = dict(zip(("unet", "text_encoder"), plain, strict=True))
    assert {f"{layer}.weight" for layer in layers} == set(read_lora(path, components)["unet"])
    assert set(alphas.values()) == {6.0}


def test_several_with_scales_then_none_restores_every_bit(
    plain: Pair, ours: dict[str, nn.Module], tmp_path: Path
) -> None:
    before = {n: v.clone() for n, v in ours["unet"].state_dict().items()}
    base = weights(plain[0])
    changes = []
    loras = LoRAs(ours)
    for seed in (1, 2):
        (folder := tmp_path / str(seed)).mkdir()
        networks = with_lora(plain, seed)
        loras.load(saved(networks, folder, "diffusers"), f"lora{seed}", scale=0.5)
        merged = weights(networks[0])
        changes.append({name: merged[name] - base[name] for name in base})
    assert loras.scales == {"lora1": 0.5, "lora2": 0.5}
    for scales in ({"lora1": 0.5, "lora2": 0.5}, {"lora2": -1.25}, {"lora1": 1.0, "lora2": 2.0}):
        loras.set(scales)
        wanted = dict(base)
        for name, scale in scales.items():
            change = changes[int(name[-1]) - 1]
            wanted = {n: v + scale * change[n] for n, v in wanted.items()}
        close(ours["unet"], wanted)
    loras.unload("lora2")
    assert loras.names == ["lora1"]
    assert loras.scales == {"lora1": 1.0}
    loras.set()
    for name, value in ours["unet"].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_cast_while_a_lora_is_on(
    plain: Pair, ours: dict[str, nn.Module], tmp_path: Path
) -> None:
    loras = LoRAs(ours)
    loras.load(saved(with_lora(plain, 1), tmp_path, "diffusers"), "style")
    before = {name: value.bfloat16() for name, value in weights(plain[0]).items()}
    ours["unet"].bfloat16()
    loras.set()
    for name, value in ours["unet"].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_switching_shows_in_the_weights_versions(
    plain: Pair, ours: dict[str, nn.Module], tmp_path: Path
) -> None:
    loras = LoRAs(ours)
    weight = ours["unet"].get_parameter("mid_block.resnets.0.conv1.weight")
    seen = {(weight.data_ptr(), weight._version)}
    loras.load(saved(with_lora(plain, 1), tmp_path, "diffusers"), "style")
    seen.add((weight.data_ptr(), weight._version))
    loras.set()
    seen.add((weight.data_ptr(), weight._version))
    assert len(seen) == 3


def fused_step(weight: Tensor) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


@pytest.mark.parametrize(
    "edit",
    [lambda weight: weight.mul_(2), lambda weight: weight.data.mul_(2), fused_step],
    ids=["in place", "through data", "fused optimizer"],
)
def test_an_edit_under_a_lora_is_not_lost_silently(
    plain: Pair, ours: dict[str, nn.Module], tmp_path: Path, edit: Callable[[Tensor], object]
) -> None:
    loras = LoRAs(ours)
    loras.load(saved(with_lora(plain, 1), tmp_path, "diffusers"), "style")
    with torch.no_grad():
        edit(ours["unet"].get_parameter("mid_block.resnets.0.conv1.weight"))
    with pytest.raises(RuntimeError, match=r"mid_block\.resnets\.0\.conv1\.weight: was edited"):
        loras.set()


def test_errors_name_what_is_wrong_and_change_nothing(
    plain: Pair, ours: dict[str, nn.Module], tmp_path: Path
) -> None:
    loras = LoRAs(ours)
    good = saved(with_lora(plain, 1), tmp_path, "diffusers")
    before = {n: v.clone() for n, v in ours["unet"].state_dict().items()}
    state = load_file(good)
    bad = tmp_path / "bad.safetensors"
    first = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"

    def fails(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, bad)
        with pytest.raises(CheckpointError, match=message):
            loras.load(bad, "bad")

    nowhere = {f"unet.nowhere.lora_{one}.weight": torch.zeros(3, 3) for one in "AB"}
    fails(nowhere, r"a LoRA for another model, .* unet\.nowhere")
    fails({**state, f"{first}.lora_A.weight": torch.zeros(3, 4)}, rf"misshapen: {first} is for")
    without = {n: v for n, v in state.items() if n != f"{first}.lora_B.weight"}
    fails(without, rf"missing: one of the matrices of {first} \(lora_up\)")
    fails({f"{first}.hada_w1_a": torch.zeros(3)}, rf"missing: one of the matrices of {first}")
    magnitude = {**state, f"{first}.lora_magnitude_vector": torch.zeros(63)}
    fails(magnitude, rf"misshapen: {first} is for a weight .* dora_scale \[63\]")
    for number in (float("nan"), float("inf")):
        value = torch.full_like(state[f"{first}.lora_A.weight"], number)
        fails(state | {f"{first}.lora_A.weight": value}, rf"{first}\.\w+: expected finite numbers")
    for several in (torch.ones(2), torch.ones(0)):
        fails(state | {f"{first}.alpha": several}, rf"{first}\.alpha: expected one number, got \[")
    good.with_name("cut.safetensors").write_bytes(good.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: truncated"):
        loras.load(tmp_path / "cut.safetensors", "cut")
    with pytest.raises(CheckpointError, match="no such file"):
        loras.load(tmp_path / "none.safetensors", "none")
    assert loras.names == []
    loras.load(good, "good", scale=0.0)
    with pytest.raises(ValueError, match="name: expected one that isn't taken"):
        loras.load(good, "good")
    with pytest.raises(ValueError, match="scales: expected one of good"):
        loras.set({"bad": 1.0})
    with pytest.raises(ValueError, match="scales"):
        loras.set({"good": float("nan")})
    for names in ("good", ["good"]):
        with pytest.raises(TypeError, match=r"^scales: expected a mapping of names to numbers"):
            loras.set(names)  # type: ignore[arg-type]
    for name in ("", " ", None, 3):
        with pytest.raises(ValueError, match=r"^name: expected a word"):
            loras.load(good, name)  # type: ignore[arg-type]
    for name, value in ours["unet"].state_dict().items():
        assert torch.equal(value, before[name]), name
