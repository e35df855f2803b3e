"""What each process does under torchrun: rank_runs.py MODEL IMAGES OUT CASE..."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from small_runs import run
from unmeasured import unmeasured

from diffusion_fast.finetuning.run import Finetuning

STEPS = 20
CASES: dict[str, dict[str, Any]] = {
    "lora": {
        **{"targets": ("all",), "train_text": True, "ema_decay": 0.9, "flip": True},
        **{"caption_dropout": 0.3, "noise_offset": 0.1, "loss_weighting": "min_snr"},
    },
    "lora fsdp": {"sharding": "fsdp", "validation_prompts": ("a cat",), "validation_every": 10},
    "full fsdp": {
        **{"method": "full", "sharding": "fsdp", "ema_decay": 0.9, "train_text": True},
        **{"validation_prompts": ("a cat",), "validation_every": 10},
    },
    "embedding": {"method": "embedding", "word": "cat", "init_word": "red", "vectors": 2},
    "controlnet": {"method": "controlnet"},
    "controlnet fsdp": {"method": "controlnet", "sharding": "fsdp"},
}


def case(model: Path, images: Path, out: Path, name: str) -> Finetuning:
    """A run of five images of three shapes in batches of two: some hold one, which all share."""
    options = {"steps": STEPS, "learning_rate": 1e-3, "validation_steps": 1, **CASES[name]}
    if "controlnet" in name:
        options["conditioning"] = images.parent / "hints"
    return run(model, images, out / name, checkpoint_every=10, **options)


if __name__ == "__main__":
    signal.alarm(250)  # a process that waits for one that is gone ends all the same
    unmeasured()
    model, images, out = map(Path, sys.argv[1:4])
    for name in sys.argv[4:]:
        case(model, images, out, name).train()
