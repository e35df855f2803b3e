"""IP-Adapters: latents as diffusers draws them, whatever the kind, the scales and the masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from command_line import run
from control_parity import controlnet_of, saved
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers_pipelines import PROMPT, arguments, mask, picture
from numerics import error
from PIL import Image
from safetensors.torch import save_file

from diffusion_fast.files import CheckpointError
from diffusion_fast.pipelines import StableDiffusion

TOLERANCE = 1e-4  # of max|latents|, as in test_pipeline_parity
FEATURES, WIDTH, SIDE = 24, 32, 32  # of the image encoder: embedding, states, pixels
Folder = Callable[[str], Path]


def tensors(kind: str, channels: int, widths: list[int], seed: int = 0) -> dict[str, Any]:
    """An adapter's file: random, at scales that its images show."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}

    if kind == "plain":
        proj = {"proj.weight": random(4 * channels, FEATURES), "proj.bias": random(4 * channels)}
        proj |= norm("norm", channels)
    elif kind == "full":
        proj = {"proj.0.weight": random(WIDTH, WIDTH), "proj.0.bias": random(WIDTH)}
        proj |= {"proj.2.weight": random(channels, WIDTH), "proj.2.bias": random(channels)}
        proj |= norm("proj.3", channels)
    else:
        width, inner = 40, 128
        proj = {"latents": random(1, 5, width), "proj_in.weight": random(width, WIDTH)}
        proj |= {"proj_in.bias": random(width), "proj_out.weight": random(channels, width)}
        proj |= {"proj_out.bias": random(channels)} | norm("norm_out", channels)
        for i in range(4):
            proj |= norm(f"layers.{i}.0.norm1", width) | norm(f"layers.{i}.0.norm2", width)
            proj |= norm(f"layers.{i}.1.0", width)
            proj |= {
                f"layers.{i}.0.to_q.weight": random(inner, width),
                f"layers.{i}.0.to_kv.weight": random(2 * inner, width),
                f"layers.{i}.0.to_out.weight": random(width, inner),
                f"layers.{i}.1.1.weight": random(4 * width, width),
                f"layers.{i}.1.3.weight": random(width, 4 * width),
            }
    layers = {
        f"{2 * n + 1}.to_{x}_ip.weight": {"k": 2, "v": 20}[x] * random(width, channels)
        for n, width in enumerate(widths)
        for x in "kv"
    }
    return {"image_proj": proj, "ip_adapter": layers}


def in_file_order(pipe: StableDiffusion) -> list[int]:
    """Channels of the cross-attentions: down, up, then the bottom."""
    unet = pipe.unet
    return [
        layer.attn2.to_k.out_features
        for block in (*unet.down_blocks, *unet.up_blocks, unet.mid_block)
        for attention in block.attentions
        for layer in attention.transformer_blocks
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image encoder, and beside it adapters for both kinds of model."""
    place = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(3)
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=FEATURES,
    )
    encoder = transformers.CLIPVisionModelWithProjection(config).eval()
    encoder.save_pretrained(place / "image_encoder")
    for kind in ("sd15", "sdxl"):
        pipe = StableDiffusion.from_pretrained("tiny" if kind == "sd15" else "tiny-sdxl")
        for n, name in enumerate(("plain", "full", "plus")):
            widths, channels = in_file_order(pipe), pipe.unet.config.cross_attention_dim
            found = tensors(name, channels, widths, n)
            flat = {f"{a}.{b}": value for a, part in found.items() for b, value in part.items()}
            save_file(flat, place / f"{name}_{kind}.safetensors")
            torch.save(found, place / f"{name}_{kind}.bin")
    return place


def judge(model: Path, adapters: Path, files: list[str]) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.image_encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(
        adapters / "image_encoder"
    )
    name = "CLIPImageProcessorPil"
    kind = getattr(transformers, name, None) or transformers.CLIPImageProcessor
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    pipe.feature_extractor = kind(**sides)
    if files:
        pipe.load_ip_adapter(str(adapters), "", files, image_encoder_folder=None)
    return pipe


def drawn(pipe: Any, steps: int = 2, **changes: Any) -> torch.Tensor:
    """Latents of diffusers' pipeline."""
    size = {"height": 64, "width": 96, "output_type": "latent"}
    drawing = arguments([3, 4], num_inference_steps=steps, **size, **changes)
    return pipe(**drawing).images


def ours(pipe: StableDiffusion, steps: int = 2, **changes: Any) -> torch.Tensor:
    drawing = {"guidance_scale": 5.0, "sampler": "ddim", "seed": 3, "batch": 2, "size": (64, 96)}
    drawing |= {"timestep_spacing": "trailing", "output": "latent", "steps": steps, **changes}
    return pipe(PROMPT, "dark", **drawing).latents


def photo(seed: int = 0) -> Image.Image:
    return picture(40 + 8 * seed, 56)


@pytest.fixture(params=["sd15", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", ["plain", "full", "plus"])
def test_each_kind(tiny_folder: Folder, folder: Path, kind: str, name: str) -> None:
    model, file = tiny_folder(kind), f"{name}_{kind}.safetensors"
    pipe, theirs = StableDiffusion.from_pretrained(model), judge(model, folder, [file])
    without = ours(pipe)
    pipe.ip_adapters.load(folder / file)
    theirs.set_ip_adapter_scale(0.7)
    pipe.ip_adapters.set({f"{name}_{kind}": 0.7})
    for steps in (1, 4, 20):
        result = ours(pipe, steps, ip_adapter_image=photo())
        assert error(result, drawn(theirs, steps, ip_adapter_image=photo())) < TOLERANCE
    assert error(ours(pipe, ip_adapter_image=photo()), without) > 0.01
    pipe.ip_adapters.unload(f"{name}_{kind}")
    assert torch.equal(ours(pipe), without)


def test_two_adapters_scales_by_block_and_masks(
    tiny_folder: Folder, folder: Path, kind: str
) -> None:
    """Several images for one of them; with a LoRA; without a new engine for what changes."""
    model = tiny_folder(kind)
    files = [f"plus_{kind}.bin", f"plain_{kind}.bin"]
    pipe, theirs = StableDiffusion.from_pretrained(model), judge(model, folder, files)
    for file, name in zip(files, ("plus", "plain"), strict=True):
        pipe.ip_adapters.load(folder / file, name)
    images = [[photo(0), photo(1)], [photo(2)]]
    level = 0 if kind == "sd15" else 1
    by_block = {"down": {f"block_{level}": 0.9}, "up": 0.3}
    theirs.set_ip_adapter_scale([by_block, 0.6])
    pipe.ip_adapters.set({"plus": by_block, "plain": 0.6})
    first = ours(pipe, ip_adapter_image=images)
    assert error(first, drawn(theirs, ip_adapter_image=images)) < TOLERANCE

    left = Image.new("L", (96, 64))
    left.paste(255, (0, 0, 56, 64))
    right = Image.eval(left, lambda value: 255 - value)
    processor = IPAdapterMaskProcessor()
    read = [processor.preprocess(one, height=64, width=96) for one in ([left, right], [right])]
    masks = [one.reshape(1, len(one), 64, 96) for one in read]
    theirs.set_ip_adapter_scale([[0.9, 0.4], 0.6])
    pipe.ip_adapters.set({"plus": [0.9, 0.4]})
    for changes in ({}, {"guidance_scale": 1.0}):
        result = ours(
            pipe, ip_adapter_image=images, ip_adapter_masks=[[left, right], [right]], **changes
        )
        attend = {"cross_attention_kwargs": {"ip_adapter_masks": masks}}
        assert (
            error(result, drawn(theirs, ip_adapter_image=images, **attend, **changes)) < TOLERANCE
        )
    assert error(result, first) > 0.01


def test_embeddings_in_the_place_of_images(tiny_folder: Folder, folder: Path, kind: str) -> None:
    """And what they are read by stays off where there are none."""
    model, file = tiny_folder(kind), f"plain_{kind}.safetensors"
    pipe, theirs = StableDiffusion.from_pretrained(model), judge(model, folder, [file])
    pipe.ip_adapters.load(folder / file, "plain")
    torch.manual_seed(5)
    embeds = [torch.randn(2, 1, FEATURES)]
    result = ours(pipe, ip_adapter_image_embeds=embeds)
    assert error(result, drawn(theirs, ip_adapter_image_embeds=embeds)) < TOLERANCE


def test_its_rewrites(tiny_folder: Folder, folder: Path) -> None:
    """Keys and values once per image, and one attention call for text and image: the same numbers,
    and another image or scale is data."""
    model, file = tiny_folder("sd15"), folder / "plain_sd15.safetensors"
    fast = StableDiffusion.from_pretrained(model)
    few = StableDiffusion.from_pretrained(model, rewrites=["cached_context", "time_table"])
    joined = StableDiffusion.from_pretrained(model, rewrites="joined_contexts")
    none = StableDiffusion.from_pretrained(model, rewrites="none")
    calls = []
    for pipe in (fast, few, joined, none):
        pipe.ip_adapters.load(file, "plain")
        layer = pipe.unet.ip_adapters[0].to_k[0]
        layer.register_forward_hook(lambda *_: calls.append(1))
        made = []
        for scale, image in ((0.8, photo(0)), (0.3, photo(1))):
            pipe.ip_adapters.set({"plain": scale})
            calls.clear()
            made.append(ours(pipe, 3, ip_adapter_image=image))
            assert len(calls) == (1 if pipe is fast else 3)
        if pipe is fast:
            expected = made
        assert all(error(a, b) < 1e-5 for a, b in zip(made, expected, strict=True))
        assert error(made[0], made[1]) > 0.01
    assert fast._engine is not None
    rows = {row.name: row for row in fast._engine.explain()["rewrites"]}
    assert rows["cached_images"].on
    assert rows["cached_images"].launches > 0
    # A call for the image, and the sum, at each cross-attention.
    assert rows["joined_contexts"].launches == 2 * len(fast.unet.cross_attentions())
    assert rows["joined_contexts"].flops == 0
    assert len(fast._engine._loops) == 1


def test_with_a_lora_and_saved(tiny_folder: Folder, folder: Path, tmp_path: Path) -> None:
    """The adapter is no part of what is saved."""
    model, file = tiny_folder("sd15"), "plain_sd15.safetensors"
    pipe, theirs = StableDiffusion.from_pretrained(model), judge(model, folder, [file])
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    state = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    save_file(state | {f"{layer}.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors")
    pipe.loras.load(tmp_path / "lora.safetensors", "style")
    pipe.ip_adapters.load(folder / file)
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    result = ours(pipe, ip_adapter_image=photo())
    assert error(result, drawn(theirs, ip_adapter_image=photo())) < TOLERANCE
    pipe.loras.set()
    with pytest.warns(UserWarning, match="IP-Adapters are not written.*: plain_sd15"):
        pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusion.from_pretrained(tmp_path / "saved")
    assert not again.ip_adapters.names


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint"])
def test_together_with_a_controlnet(
    tiny_folder: Folder, folder: Path, kind: str, task: str, tmp_path: Path
) -> None:
    """And a LoRA; from noise (there with two), an image, or within a mask; 1, 4 and 20 steps."""
    model, file = tiny_folder(kind), f"plus_{kind}.safetensors"
    pipe, theirs = StableDiffusion.from_pretrained(model), judge(model, folder, [file])
    nets = [controlnet_of(model, i) for i in range(1 if task else 2)]
    net = nets[0] if task else diffusers.MultiControlNetModel(nets)
    xl = "XL" if kind == "sdxl" else ""
    parts = theirs.components if xl else theirs.components | {"requires_safety_checker": False}
    theirs = getattr(diffusers, f"StableDiffusion{xl}ControlNet{task}Pipeline")(
        **parts, controlnet=net
    )
    theirs.set_progress_bar_config(disable=True)
    hint = picture(64, 96).rotate(90)
    start: dict[str, Any] = {"image": picture(64, 96), "strength": 0.8} if task else {}
    mine: dict[str, Any] = dict(start)
    if task == "Inpaint":
        start |= {"mask_image": mask(64, 96), "strength": 1.0}
        mine |= {"mask": mask(64, 96), "strength": 1.0}
    hints, scales = ([hint, hint.rotate(180)], [0.8, 0.5]) if not task else (hint, 0.8)
    start |= {"control_image" if task else "image": hints, "controlnet_conditioning_scale": scales}
    control = {"control_image": hints, "control_scale": scales}
    mine |= {"size": None if task else (64, 96)}
    bare = ours(pipe, 4, **mine)
    for i, one in enumerate(nets):
        pipe.load_control(saved(one, tmp_path / f"control{i}"), f"number {i}")
    steered = ours(pipe, 4, **mine, **control)
    assert error(steered, bare) > 0.01
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    generator, width = torch.Generator().manual_seed(2), pipe.unet.config.cross_attention_dim
    down, up = torch.randn(2, width, generator=generator), torch.randn(32, 2, generator=generator)
    state = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    save_file(state | {f"{layer}.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors")
    pipe.loras.load(tmp_path / "lora.safetensors", "style")
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.ip_adapters.load(folder / file, "plus", 0.7)
    theirs.set_ip_adapter_scale(0.7)
    seeds = [3] if task == "Inpaint" else [3, 4]  # of a batch, diffusers encodes the first alone
    size = {} if task == "Img2Img" else {"height": 64, "width": 96}
    for steps in (4, 20) if task == "Img2Img" else (1, 4, 20):  # of 1 step, none is left to it
        given = {**mine, **control, "batch": len(seeds), "ip_adapter_image": photo()}
        result = ours(pipe, steps, **given)
        asked = {**start, **size, "ip_adapter_image": photo(), "num_inference_steps": steps}
        expected = theirs(**arguments(seeds, output_type="latent", **asked)).images
        assert error(result, expected) < TOLERANCE
        if steps == 4:
            assert error(result, steered[: len(seeds)]) > 0.01


def test_on_the_command_line(tiny_folder: Folder, folder: Path, tmp_path: Path) -> None:
    model, file = tiny_folder("sd15"), folder / "plain_sd15.safetensors"
    photo().save(tmp_path / "photo.png")
    left = Image.new("L", (80, 64))
    left.paste(255, (0, 0, 40, 64))
    left.save(tmp_path / "left.png")
    common = ["sample", "a cat", "--model", model, "--steps", 2, "--size", "80x64"]
    given = ["--ip-adapter", f"{file}=0.6", "--ip-adapter-image", tmp_path / "photo.png"]

    def drawn(name: str, *options: Any) -> Any:
        done = run(*common, "-o", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
        return np.asarray(Image.open(tmp_path / name))

    bare, full = drawn("bare.png"), drawn("full.png", *given)
    masked = drawn("masked.png", *given, "--ip-adapter-mask", tmp_path / "left.png")
    pipe = StableDiffusion.from_pretrained(model)
    pipe.ip_adapters.load(file, "plain", 0.6)
    image = Image.open(tmp_path / "photo.png")
    expected = pipe("a cat", steps=2, size=(64, 80), ip_adapter_image=image).images[0]
    assert np.array_equal(full, np.asarray(expected))
    assert (full != bare).any()
    assert (masked != full).any()
    encoder = ["--image-encoder", folder / "image_encoder"]
    assert np.array_equal(drawn("encoder.png", *given, *encoder), full)
    again = tmp_path / "again.png"
    assert run("sample", "--again", tmp_path / "masked.png", "-o", again).returncode == 0
    assert again.read_bytes() == (tmp_path / "masked.png").read_bytes()
    for options, message in (
        (given[:2], "expected an image for each of 1 IP-Adapters"),
        (given[2:], "expected None: the model has no IP-Adapter"),
        (["--ip-adapter", f"{file}=much", *given[2:]], "--ip-adapter: expected a file, or FILE="),
        (["--ip-adapter", folder / "plain_sdxl.bin", *given[2:]], "--ip-adapter: "),
        ([*given, "--image-encoder", tmp_path], "--ip-adapter: "),
    ):
        done = run(*common, "-o", tmp_path / "x.png", *options)
        assert done.returncode == 1, options
        assert message in done.stderr.replace("\n", " ")


def test_what_is_refused(tiny_folder: Folder, folder: Path, tmp_path: Path) -> None:
    pipe = StableDiffusion.from_pretrained(tiny_folder("sd15"))

    def refused(message: str, call: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)

    load = pipe.ip_adapters.load
    refused("expected None: the model has no IP-Adapter", lambda: ours(pipe, ip_adapter_image=1))
    refused("for another model", lambda: load(folder / "plain_sdxl.safetensors"))
    other = tmp_path / "other.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, other)
    refused("expected an IP-Adapter, got a LoRA", lambda: load(other))
    face = {"image_proj.norm.weight": torch.ones(32), "image_proj.proj.0.weight": torch.ones(2, 2)}
    save_file(face | {"ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)}, other)
    refused("IP-Adapter FaceID is not supported", lambda: load(other))
    assert not len(pipe.unet.ip_adapters)
    load(folder / "plain_sd15.safetensors", "plain")
    refused("name: expected one that isn't taken", lambda: load(folder / "full_sd15.bin", "plain"))
    refused("ip_adapter_image: expected an image for each of 1", lambda: ours(pipe))
    images = {"ip_adapter_image": [photo(), photo()]}
    refused("ip_adapter_image: expected one, or a list", lambda: ours(pipe, **images))
    refused("scale of 'plain'", lambda: pipe.ip_adapters.set({"plain": float("nan")}))
    refused("block_0", lambda: pipe.ip_adapters.set({"plain": {"down": {"block_7": 1.0}}}))
    pipe.ip_adapters.set({"plain": [0.5, 0.5]})
    refused("scale of 'plain'", lambda: ours(pipe, ip_adapter_image=photo()))
    pipe.ip_adapters.set({"plain": 0.5})
    wrong = {"ip_adapter_image_embeds": [torch.ones(2, 1, 7)]}
    refused("ip_adapter_image_embeds: expected shape", lambda: ours(pipe, **wrong))
    with pytest.raises(TypeError, match="ip_adapter_image: expected PIL images"):
        ours(pipe, ip_adapter_image="photo.png")
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "none.bin")
