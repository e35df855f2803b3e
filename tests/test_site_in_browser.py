"""The documentation site in a browser without a screen: errors, phones, search."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_site import Page, site  # noqa: F401

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: dict[Path, Page]) -> Iterator[str]:  # noqa: F811
    folder = next(path.parent for path in site if path.name == "404.html")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("width", [1280, 375], ids=["desk", "phone"])
def test_every_page(
    width: int,
    browser: sync_api.Browser,
    address: str,
    site: dict[Path, Page],  # noqa: F811
) -> None:
    """No error on the console, no request elsewhere, nothing to scroll sideways."""
    root = next(path.parent for path in site if path.name == "404.html")
    page = browser.new_page(viewport={"width": width, "height": 800})
    told: list[str] = []

    def lost(request: sync_api.Request) -> bool:
        """Whether a request failed by itself, and not because the page was left meanwhile."""
        return request.failure != "net::ERR_ABORTED"

    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("console", lambda line: told.append(line.text) if line.type == "error" else None)
    page.on("requestfailed", lambda r: told.append(f"failed: {r.url}") if lost(r) else None)
    page.on(
        "request", lambda r: None if r.url.startswith((address, "data:")) else told.append(r.url)
    )
    for path in sorted(site):
        if path.name == "404.html":
            continue
        name = path.relative_to(root).as_posix()
        page.goto(f"{address}/{name}")
        if page.evaluate("document.documentElement.scrollWidth - innerWidth") > 0:
            told.append("wider than the screen")
        broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
        assert not told + broken, f"{name}: {told + broken}"
    page.close()


def test_search(browser: sync_api.Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}/index.html")
    page.get_by_role("textbox", name="Search").click()
    page.keyboard.type("group_norm_silu")
    found = page.locator(".md-search-result__item").first
    found.wait_for(timeout=30_000)
    assert "group_norm_silu" in found.inner_text()
    page.close()
