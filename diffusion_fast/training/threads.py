"""PyTorch's number of threads where a run goes on.

Sums are rounded differently by another number of threads, so a checkpoint remembers it. The library
never changes PyTorch's number; its steps use fewer where that is faster, see :mod:`.rehearsal`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..cores import THREADS
from ..files import read_json
from ..ops import checks
from .checkpoint import STATE


def take_threads(checkpoint: Path) -> str:
    """Set PyTorch's number of threads to that with which a checkpoint was made.

    The variable OMP_NUM_THREADS decides where it is set.

    Args:
        checkpoint: folder of the checkpoint to go on from.

    Returns:
        A line that says how many there are, and why.

    Raises:
        CheckpointError: the checkpoint can't be read.
        ValueError: the checkpoint has a number of threads that is none.
    """
    count = torch.get_num_threads()
    saved = read_json(checkpoint / STATE).get("threads", count)  # older ones don't have it
    checks.positive_int(f"{checkpoint / STATE}: threads", saved)
    if os.environ.get(THREADS):
        other = "" if saved == count else f" ({saved} in {checkpoint}: rounded differently)"
        return f"threads: {count}, as {THREADS} says{other}"
    torch.set_num_threads(saved)
    return f"threads: {saved}, as in {checkpoint}"
