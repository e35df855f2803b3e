"""Refuse to release a tag that is not the package's version, or that the changelog lacks.

python .github/check_tag.py v0.1.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problem(tag: str, version: str, changelog: str) -> str | None:
    """What is wrong with the tag; None if nothing is."""
    if tag != f"v{version}":
        return f"tag: expected v{version}, as diffusion_fast/_version.py says, got {tag}"
    if not re.search(rf"^## {re.escape(version)}$", changelog, re.MULTILINE):
        return f"CHANGELOG.md: expected a section '## {version}', found none"
    return None


def main() -> None:
    text = (ROOT / "diffusion_fast" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.+)"', text)
    assert found is not None
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sys.exit(problem(sys.argv[1] if len(sys.argv) == 2 else "", found[1], changelog))


if __name__ == "__main__":
    main()
