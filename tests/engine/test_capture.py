"""What a capture that failed leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusion_fast.engine import capture


@pytest.mark.parametrize("ended_by_driver", [False, True])
def test_the_allocator_does_not_go_on_capturing(
    monkeypatch: pytest.MonkeyPatch, ended_by_driver: bool
) -> None:
    """PyTorch ends its part only where the driver ends the capture without an error."""
    calls: list[tuple[str, Any]] = []

    class Graph:
        def capture_end(self) -> None:
            if ended_by_driver:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(
            torch._C, name, lambda *args, name=name: calls.append((name, args)), raising=False
        )
    capture._break_off(Graph(), (0, 7))
    args = (3, (0, 7))
    expected = [("_cuda_endAllocateToPool", args), ("_cuda_releasePool", args)]
    assert calls == (expected if ended_by_driver else [])
