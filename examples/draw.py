"""From words to pictures: the emoji model that comes with the package, before anything is trained.

Run it with ``make demo`` or ``python examples/draw.py --out out``: seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from emoji.pictures import inpainting, labelled
from torch import Tensor

import diffusion_fast as df

PROMPTS = (
    "a red apple",
    "tiger face, 3d style",
    "a yellow rose, flat style",
    "rocket, noto style",
    "a purple heart",
    "cactus, noto style",
    "penguin, 3d style",
    "birthday cake, flat style",
    # No picture that it was trained on shows these.
    "a purple fox",
    "a blue squid",
    "a pink pizza",
    "a purple peach",
    "a green helicopter",
    "a yellow whale",
    "a blue chipmunk",
    "a purple motorcycle",
)
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0, 7.5, 12.0, 20.0)
GUIDED = ("a red apple", "tiger face", "a blue heart", "cupcake", "rocket")


def draw(pipe: df.StableDiffusion, out: Path) -> list[Path]:
    """Write the pictures: by prompt, by guidance scale, step by step, and inside of others."""
    files = [out / f"emoji{part}.png" for part in ("", "_guidance", "_denoising", "_inpainting")]
    labelled(files[0], pictures(pipe, PROMPTS), PROMPTS, 8, 2)

    rows = [pictures(pipe, GUIDED, guidance_scale=scale) for scale in GUIDANCE_SCALES]
    texts = [f"guidance {scale:g}" for scale in GUIDANCE_SCALES for _ in GUIDED]
    labelled(files[1], torch.cat(rows), texts, len(GUIDED), 2)

    frames: list[tuple[float, Tensor]] = []
    pictures(pipe, GUIDED[:3], callback=lambda step, t, x: frames.append((t, x)))
    shown = frames[:: max(1, len(frames) // 8)][:8] + frames[-1:]
    seen = torch.stack([decoded(pipe, x) for _, x in shown], 1).flatten(0, 1)
    texts = [f"t = {t:.0f}" for t, _ in shown] * 3
    labelled(files[2], seen, texts, len(shown), 2)

    inpainting(pipe, files[3], progress=True)
    return files


def pictures(pipe: df.StableDiffusion, prompts: tuple[str, ...], **options: object) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1], one for each prompt."""
    return pipe(prompts, seed=1, output="tensor", progress=True, **options).images


@torch.no_grad()
def decoded(pipe: df.StableDiffusion, latents: Tensor) -> Tensor:
    """What noisy latents look like, [N, 3, H, W]."""
    return pipe.vae.decode(pipe.vae.unscale(latents)).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--model", default="emoji", help="any that StableDiffusion loads")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    pipe = df.StableDiffusion.from_pretrained(arguments.model, dtype=torch.float32)
    files = draw(pipe, arguments.out)
    print(f"wrote {', '.join(map(str, files))} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
