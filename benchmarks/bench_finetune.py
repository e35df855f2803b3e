"""A step of fine-tuning beside diffusers and peft, written as diffusers' example scripts do.

    python benchmarks/bench_finetune.py               # a LoRA on SD 1.5, all of a half-width U-Net
    python benchmarks/bench_finetune.py --task tiny    # seconds, to try it

Each measurement is a process of its own, and the ways take turns: a network with random weights
(the same for all), one step to warm up, then ``--steps`` timed ones. Latents and text states are
given to all. ``ours`` is what ``df.finetune`` runs; ``diffusers`` is the loop of
``train_text_to_image_lora.py`` and ``train_text_to_image.py`` (their defaults: AdamW, gradients cut
to a norm of 1). What such a script does beside that, as it encodes each image and caption anew, is
left out, to its advantage. ``loss`` is that of the first step, and has to be the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GB = 2**30
RANK, RATE = 8, 1e-4


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        title: for people.
        method: ``"lora"`` or ``"full"``.
        unet: the U-Net, in the names of diffusers' config.
        latent: height and width of the latents.
    """

    title: str
    method: str
    unet: dict[str, Any]
    latent: int


SD15: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
TINY = SD15 | {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32}
HALF = SD15 | {"block_out_channels": (160, 320, 640, 640)}
TASKS = {
    "lora": Task("LoRA of rank 8 on the attention of SD 1.5's U-Net", "lora", SD15, 64),
    "full": Task("the whole of a U-Net of half SD 1.5's width", "full", HALF, 64),
    "tiny": Task("LoRA of rank 8 on a tiny U-Net", "lora", TINY, 16),
}
WAYS = ("ours", "diffusers")


def fill(network: nn.Module) -> None:
    """Random weights that depend on names alone; with them, activations keep their size."""
    with torch.no_grad():
        for number, (name, value) in enumerate(sorted(network.named_parameters())):
            generator = torch.Generator().manual_seed(number)
            if value.dim() == 1:
                value.fill_(float("norm" in name and name.endswith("weight")))
            else:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)


def batch(task: Task) -> tuple[Tensor, Tensor]:
    """Latents and text states of one image."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, task.latent, task.latent, generator=generator)
    width = task.unet["cross_attention_dim"]
    return latents, torch.randn(1, 77, width, generator=generator)


def ours(task: Task, steps: int, device: str) -> tuple[list[float], float]:
    """When each step was done, and the first loss, of what ``df.finetune`` runs."""
    from torch.utils.data import Dataset
    from transformers import CLIPTextConfig, CLIPTextModel

    import diffusion_fast as df
    from diffusion_fast.finetuning.lora import add_lora
    from diffusion_fast.finetuning.network import Finetuned
    from diffusion_fast.finetuning.settings import Settings
    from diffusion_fast.models.text import TextEncoders
    from diffusion_fast.training import Batches

    with torch.device("meta"):
        unet = df.UNet2DCondition(df.UNetConfig(**task.unet))
    unet.to_empty(device="cpu")
    fill(unet)
    unet.to(device).requires_grad_(task.method == "full")
    if task.method == "lora":
        given = {"model": "m", "data": "d", "out": "o", "rank": RANK}
        torch.manual_seed(0)
        add_lora({"unet": unet}, Settings.of(given))
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    small = CLIPTextModel(CLIPTextConfig(**shape, num_attention_heads=2)).requires_grad_(False)

    class Nothing(list[Any]):  # captions are states already
        pass

    text = TextEncoders([Nothing()], [small])
    latents, states = batch(task)

    class One(Dataset[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, _: int) -> tuple[Tensor, dict[str, Tensor]]:
            return latents[0], {"context": states[0]}

    trainer = df.Trainer(
        Finetuned(unet, text),
        Batches(One(), 1),
        df.DiffusionSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085,
                                          "beta_end": 0.012, "num_train_timesteps": 1000}),
        seed=0,
        learning_rate=RATE,
        weight_decay=1e-2,
        gradient_clip=1.0,
        read_every=1,
    )  # fmt: skip
    ends = [time.perf_counter()]
    losses = trainer.fit(steps + 1, lambda progress: ends.append(time.perf_counter()))
    return ends[1:], losses[0]


def diffusers(task: Task, steps: int, device: str) -> tuple[list[float], float]:
    """The same of diffusers' example."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from torch.nn import functional as F

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**task.unet)
    unet.to_empty(device="cpu")
    fill(unet)
    unet.to(device)
    if task.method == "lora":
        unet.requires_grad_(False)
        torch.manual_seed(0)
        unet.add_adapter(
            LoraConfig(
                r=RANK,
                lora_alpha=RANK,
                init_lora_weights="gaussian",
                target_modules=["to_k", "to_q", "to_v", "to_out.0"],
            )
        )
    unet.train()
    noise_scheduler: Any = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    generator = torch.Generator(device).manual_seed(0)
    ends, first = [], 0.0
    for step in range(steps + 1):
        latents, states = (one.to(device) for one in batch(task))
        timesteps = torch.randint(0, 1000, (1,), generator=generator, device=device)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, states, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        first = loss.item() if step == 0 else first
        loss.item()  # the script logs it
        ends.append(time.perf_counter())
    return ends, first


def child(way: str, name: str, steps: int, device: str) -> dict[str, Any]:
    """Seconds of each step but the first, the first loss, and the most memory at a time."""
    run: dict[str, Callable[..., tuple[list[float], float]]] = {
        "ours": ours,
        "diffusers": diffusers,
    }
    ends, loss = run[way](TASKS[name], steps, device)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return {"seconds": seconds, "loss": loss, "peak_bytes": peak}


def measure(name: str, steps: int, rounds: int, device: str) -> dict[str, Any]:
    """All rounds of a task; the ways take turns."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            command = [sys.executable, __file__, "--child", way, "--task", name]
            command += ["--steps", str(steps), "--device", device]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{way}: {done.stderr.strip().splitlines()[-1]}")
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}, {way}: {found[way][-1]}", file=sys.stderr, flush=True)
    rows: dict[str, Any] = {}
    for way, runs in found.items():
        seconds = [one for run in runs for one in run["seconds"]]
        rows[way] = {
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "images_per_s": 1 / statistics.median(seconds),
            "peak_gib": max(run["peak_bytes"] for run in runs) / GB,
            "loss": runs[0]["loss"],
        }
    ours_row, theirs = rows["ours"], rows["diffusers"]
    if abs(ours_row["loss"] / theirs["loss"] - 1) > 1e-4:
        raise RuntimeError(f"{name}: the losses differ: {ours_row['loss']}, {theirs['loss']}")
    return {
        "title": TASKS[name].title,
        "rows": rows,
        "ratio": theirs["seconds"] / ours_row["seconds"],
        "memory": ours_row["peak_gib"] / theirs["peak_gib"],
    }


def page(found: dict[str, Any], command: str) -> str:
    """The figures as Markdown."""
    about = found["environment"]
    lines = [
        "# Speed of fine-tuning",
        "",
        f"Made by `{command}` on {about['time'][:10]}: {about['device']},",
        f"{about['threads']} threads, torch {about['torch']}, diffusers {about['diffusers']},",
        f"commit {about['commit']}. float32, batch 1, 64 x 64 latents; each way in",
        "processes of its own that took turns.",
        "",
        "| what is trained | way | s a step | fastest to slowest | images/s | peak GiB | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found["tasks"].values():
        for way, row in one["rows"].items():
            ratio = one["ratio"] if way == "ours" else 1.0
            lines.append(
                f"| {one['title']} | {way} | {row['seconds']:.2f} |"
                f" {row['fastest']:.2f} to {row['slowest']:.2f} | {row['images_per_s']:.3f} |"
                f" {row['peak_gib']:.2f} | {ratio:.2f} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", action="append", choices=TASKS, help="lora and full by default")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for speed.json and speed.md")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.task or ["lora", "full"]
    if given.child:
        print(json.dumps(child(given.child, names[0], given.steps, given.device)))
        return
    from diffusion_fast.benchmarks.lib.environment import environment

    found: dict[str, Any] = {"environment": environment(), "tasks": {}}
    if given.out is not None and (given.out / "speed.json").is_file():
        kept = json.loads((given.out / "speed.json").read_text())
        found["tasks"] = {n: one for n, one in kept["tasks"].items() if n not in names}
    for name in names:
        found["tasks"][name] = measure(name, given.steps, given.rounds, given.device)
    text = page(found, "python benchmarks/bench_finetune.py")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.out / "speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
