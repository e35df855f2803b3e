"""A run, killed at a step or taken up to its end: crash_run.py MODEL IMAGES OUT [STEP]."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from small_runs import run
from unmeasured import unmeasured

OPTIONS: dict[str, Any] = {
    "steps": 8,
    "checkpoint_every": 3,
    "flip": True,
    "lora_dropout": 0.2,
    "caption_dropout": 0.3,
    "shuffle_captions": True,
    "ema_decay": 0.9,
    "decay": "cosine",
    "noise_offset": 0.1,
    "input_perturbation": 0.1,
    "train_text": True,
    "text_learning_rate": 1e-3,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    unmeasured()
    torch.manual_seed(os.getpid())  # whatever a new process starts with
    model, images, out, *steps = sys.argv[1:]
    resume = (Path(out) / "checkpoints").exists()
    made = run(Path(model), Path(images), Path(out), **OPTIONS, resume=resume)
    calls = 0

    def kill(*_: Any) -> None:
        global calls
        calls += 1
        if calls in map(int, steps):
            os.kill(os.getpid(), signal.SIGKILL)

    made.network.register_forward_hook(kill)
    made.train()
