"""``diffusion-fast doctor``: this machine, and what each op runs on."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..ops import Choice


def doctor() -> None:
    """Show what this machine has, which backend each op runs on, and why not the others."""
    from .. import hardware, ops
    from ..ops.cpu import library

    console = Console()
    facts = Table("what", "found", title="This machine", title_justify="left")
    for part in (hardware.versions, hardware.processor, hardware.gpus, hardware.compilers):
        for name, value in part().items():
            facts.add_row(name, value)
    facts.add_row("kernels for this CPU", library.state())
    console.print(facts)
    backends = Table("op", "runs on", "why not the others", title="Ops", title_justify="left")
    for (backend, reasons), names in _grouped(ops.explain()).items():
        backends.add_row("\n".join(names), backend, reasons)
    console.print(backends)


def _grouped(choices: list[Choice]) -> dict[tuple[str, str], list[str]]:
    """Ops with the same backend and the same reasons, told once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        reasons: dict[str, list[str]] = {}
        for name, why in choice.rejected.items():
            reasons.setdefault(why, []).append(name)
        text = "\n".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        groups.setdefault((choice.backend, text), []).append(choice.op)
    return groups
