"""What a run would do, in lines, before it does it."""

from __future__ import annotations

from .run import Finetuning

_MOMENTS = {"adamw": 8, "adam": 8, "adafactor": 0, "adamw8bit": 2, "prodigy": 16}  # bytes


def plan(run: Finetuning) -> list[str]:
    """The base, what is trained, the data, steps, memory, and the files that come out."""
    settings, data = run.settings, run.data
    trained = sum(parameter.numel() for parameter in run.network.parameters())
    networks = (run.parts.unet, run.parts.vae, *run.parts.text.encoders)
    if run.method.control is not None:
        networks += (run.method.control,)
    weights = sum(p.numel() * p.element_size() for one in networks for p in one.parameters())
    per_weight = 4 + _MOMENTS[settings.optimizer] + (4 if settings.ema_decay is not None else 0)
    shapes = data.shapes()
    batches = sum(-(-count // settings.batch_size) for count in shapes.values())
    listed = [f"{w} x {h}: {n}" for (h, w), n in sorted(shapes.items())]
    lines = [
        f"base: {settings.model} ({run.kind}, predicts {run.prediction_type})",
        f"method: {settings.method}, {trained:,} parameters to train",
        f"images: {len(data.examples)}, {sum(shapes.values())} read in a pass of {batches} batches",
        f"shapes: {', '.join(listed)}",
        f"steps: {settings.steps} of {settings.batch_size} images,"
        f" {settings.steps / batches:.1f} passes",
        f"memory: {weights / 2**30:.2f} GiB of weights,"
        f" {trained * per_weight / 2**30:.2f} GiB of gradients, moments and averages; and"
        " activations",
    ]
    if settings.class_prompt is not None:
        there = sum(example.picture.prior for example in data.examples)
        missing = max(0, settings.class_images - there)
        lines.append(f"class images: {there}, {missing} more to be drawn")
    lines += data.notes(run.method)
    lines.append(f"writes: {', '.join(map(str, run.files()))}")
    return lines
