"""What a server tells of its model, and what draws its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from ..pipelines import Pending, StableDiffusion, call
from ..pipelines.batcher import Statistics


@dataclass(frozen=True)
class Model:
    """A model that is served.

    Attributes:
        name: what clients call it.
        loras: scales of its LoRAs by their names.
        height, width: of its images, unless a request says otherwise.
        steps, guidance, sampler: its usual settings; no sampler where its scheduler is none of
            ours, so that each request names one.
        inpainting: whether it was made for inpainting, and so needs an image and a mask.
    """

    name: str
    loras: Mapping[str, float] = field(default_factory=dict)
    height: int = 512
    width: int = 512
    steps: int = 20
    guidance: float = 7.5
    sampler: str | None = "dpmpp_2m"
    inpainting: bool = False

    @classmethod
    def of(
        cls, pipe: StableDiffusion, name: str, loras: Mapping[str, float] | None = None
    ) -> Model:
        """That of a pipeline."""
        height, width = call.size_of(pipe._parts(), None)
        return cls(
            name,
            dict(loras or {}),
            height,
            width,
            pipe.defaults.steps,
            pipe.defaults.guidance_scale,
            pipe.scheduler.sampler,
            pipe.inpainting,
        )


class Drawer(Protocol):
    """What draws: a :class:`~diffusion_fast.Batcher`, or several of them on other machines.

    Its members mean what those of the batcher mean, summed.
    """

    @property
    def slots(self) -> int: ...

    @property
    def occupied(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    @property
    def statistics(self) -> Statistics: ...

    def submit_all(self, requests: Sequence[Mapping[str, Any]]) -> Sequence[Pending]: ...

    def close(self, timeout: float | None = None) -> bool: ...


def warm_up(drawer: Drawer, model: Model, timeout: float) -> None:
    """Draw one image, so that the first client does not wait for what is made once."""
    inpainting: dict[str, Any] = {}
    if model.inpainting:
        size = model.width, model.height
        inpainting = {"image": Image.new("RGB", size), "mask": Image.new("L", size, 255)}
    [one] = drawer.submit_all([{"prompt": "", "steps": 1, **inpainting}])
    one.result(timeout)
