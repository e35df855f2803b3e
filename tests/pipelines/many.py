"""What each process does in the test under torchrun: many.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import diffusion_fast as df
from diffusion_fast.cli.sample_many import many_classes

SETTINGS = {"sampler": "ddim", "steps": 3}
CLASSES = [3, 1, 4, 1, 5, 9, 2]


def draw_all(
    folder: Path, batch_size: int = 1, classes: list[int] = CLASSES, seed: int = 7
) -> None:
    torch.manual_seed(0)
    model = df.UNet2DCondition(df.UNetConfig.preset("digits", block_out_channels=(16, 16)))
    options = {**SETTINGS, "eta": 1.0, "guidance_scale": 2.0}
    many_classes(
        df.Engine(model, df.DiffusionSchedule(), **options),
        *(classes, (1, 8, 8), folder),
        null_context=torch.tensor([model.null_class]),
        **{"seed": seed, "settings": SETTINGS, "batch_size": batch_size},
    )


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) / "single")
    draw_all(Path(sys.argv[1]) / "pairs", 2)
