"""The documentation site: built strictly, every link followed, no request to another server."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import diffusion_fast as df
from diffusion_fast import models, pipelines, samplers, training

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The ids of a page, where it links to, and what a browser loads to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.update(value for name in ("id", "name") if (value := found.get(name)))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        if tag in LOADS and found.get(LOADS[tag]) and found.get("rel") != "canonical":
            self.loaded.append(found[LOADS[tag]] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", out],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not included in the" not in done.stderr, done.stderr  # pages that the nav lacks
    return {path: Page(path) for path in out.rglob("*.html")}


def test_every_link_leads_somewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        if path.name == "404.html":  # its links count from the server's root
            continue
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in site:
                assert unquote(parts.fragment) in site[target].ids, f"{path.name}: {link}"


def test_nothing_is_asked_of_another_server(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        assert not [url for url in page.loaded if urlsplit(url).netloc], path
        for sheet in path.parent.rglob("*.css"):
            text = sheet.read_text(encoding="utf-8")
            assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", text), sheet


def test_formulas_are_drawn(site: dict[Path, Page]) -> None:
    for path in site:
        text = path.read_text(encoding="utf-8")
        assert 'class="arithmatex"' not in text, path
        if path.name in ("step.html", "rewrites.html", "guidance.html"):
            assert "<math " in text


def exported(module: object, prefix: str) -> Iterable[str]:
    for name in module.__all__:  # type: ignore[attr-defined]
        value = getattr(module, name)
        if callable(value):  # constants and modules have no entry of their own
            yield f"{prefix}{name}"


def test_the_reference_has_every_public_name(site: dict[Path, Page]) -> None:
    ids = set().union(*(page.ids for page in site.values()))
    names = [*exported(df.ops, "ops."), *exported(samplers, "samplers.")]
    names += [*exported(models, "models."), *exported(pipelines, "pipelines.")]
    names += exported(training, "training.")
    assert not [name for name in names if f"diffusion_fast.{name}" not in ids]
    overview = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert not [name for name in exported(df, "") if f"[diffusion_fast.{name}]" not in overview]


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if "```python\n" in path.read_text(encoding="utf-8")],
    ids=lambda path: path.stem,
)
def test_the_blocks_of_a_page_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, path.name, "exec"), names)


def messages() -> str:
    """Every string in the package and the Makefile, what is filled in left out."""
    found = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    folders = (ROOT / "diffusion_fast", ROOT / "benchmarks")
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    known = messages()
    quoted = [
        line for line in re.findall(r"^### `(.*)`$", text, re.MULTILINE) if "make" not in line
    ]
    assert len(quoted) > 15
    for part in (part.strip(" ,:()") for line in quoted for part in line.split("…")):
        pieces = [part] if part in known else re.split(r", got|: expected ", part)
        assert all(piece.strip(" ,:()") in known for piece in pieces), part


def test_thresholds_are_those_of_the_code() -> None:
    """Each constant of the table is assigned in the file that the table names."""
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| .* \| `([\w/]+\.py)` \|$", text, re.MULTILINE)
    assert len(rows) > 10
    for names, file in rows:
        place = ROOT if file.startswith("benchmarks/") else ROOT / "diffusion_fast"
        tree = ast.parse((place / file).read_text(encoding="utf-8"))
        targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
        assigned = {one.id for t in targets for one in ast.walk(t) if isinstance(one, ast.Name)}
        assert assigned.issuperset(re.findall(r"\w+", names)), f"{names} in {file}"
