"""What Prometheus asks a server for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..pipelines import Pending
from .model import Drawer

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self, drawer: Drawer) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Batch(drawer))
        self.requests = Counter(
            "diffusion_fast_http_requests",
            "HTTP requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "diffusion_fast_http_seconds",
            "Seconds from a request's head to its answer's end.",
            ["route"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self._waits = Histogram(
            "diffusion_fast_queue_seconds",
            "Seconds that images waited for a slot.",
            registry=self.registry,
            buckets=SECONDS,
        )
        self._images = Histogram(
            "diffusion_fast_image_seconds",
            "Seconds that images took, waiting included.",
            registry=self.registry,
            buckets=SECONDS,
        )

    def observe(self, one: Pending) -> None:
        """An image that is done."""
        if one.started is not None and one.ended is not None:
            self._waits.observe(one.started - one.submitted)
            self._images.observe(one.ended - one.submitted)


class _Batch(Collector):
    """The drawer's own numbers, read when they are asked for."""

    def __init__(self, drawer: Drawer) -> None:
        self._drawer = drawer

    def collect(self) -> Iterator[Metric]:
        drawer, now = self._drawer, self._drawer.statistics
        gauges = {
            "slots": ("Images that fit in the batch.", drawer.slots),
            "slots_occupied": ("Images in the batch.", drawer.occupied),
            "queue_length": ("Images that wait for a slot.", drawer.waiting),
            "up": ("Whether images are accepted.", float(drawer.alive)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"diffusion_fast_{name}", text, value)
        counters = {
            "steps": ("Calls of the model; their rate is steps per second.", now.steps),
            "step_images": ("Images in those calls.", now.images),
            "step_rows": ("Rows of the model's batch in those calls.", now.rows),
            "busy_seconds": ("Seconds of steps and what was done between them.", now.seconds),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"diffusion_fast_{name}", text, value)
        images = CounterMetricFamily("diffusion_fast_images", "Images by fate.", labels=["fate"])
        for fate in ("accepted", "finished", "failed", "cancelled"):
            images.add_metric([fate], getattr(now, fate))
        yield images
