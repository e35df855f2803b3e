"""What every test shares: threads, seeds, and which tests need a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import register_random, settings

# One thread a process: most tensors here are tiny, and workers share the cores.
torch.set_num_threads(1)

# float32 means float32, also in cuDNN, which rounds to tf32 by default.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

# Triton's interpreter is chosen when triton is imported, by any test file. Nothing in this process
# compiles Triton code without a GPU; ahead-of-time compilation runs in a process of its own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class _Torch:
    """PyTorch's generator, as Hypothesis wants one: with it an example that failed fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH = _Torch()  # Hypothesis holds a weak reference
register_random(_TORCH)

# The same examples at every run: in low precision one draw in thousands is unlucky, and a run that
# judges a change must not be a lottery. --hypothesis-profile=search draws others.
settings.register_profile("search", settings(), derandomize=False)
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords also hold the folders' names
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    """The same backends for every test: not those of whichever test made the first engine.

    The kernels for CPUs are compiled once, and what is measured on this machine decides nothing.
    """
    from unmeasured import unmeasured

    from diffusion_fast.ops.cpu import library

    library.settle()
    unmeasured()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # whatever a test before has left: sums are rounded by it
