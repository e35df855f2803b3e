"""The page at /, in a browser without a screen: drawing, previews, phones and keyboards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_server import Served

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[(1280, 800), (375, 667)], ids=["desk", "phone"])
def page(
    request: pytest.FixtureRequest, browser: sync_api.Browser, served: Served
) -> Iterator[sync_api.Page]:
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    made = context.new_page()
    errors: list[str] = []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.goto(served.url)
    made.get_by_text("slots", exact=False).wait_for(timeout=30_000)
    yield made
    assert errors == []
    context.close()


def shot(page: sync_api.Page, folder: Path, name: str) -> None:
    page.screenshot(path=folder / f"{name} {page.viewport_size['width']}.png", full_page=True)


def test_drawing_with_a_preview(page: sync_api.Page, tmp_path: Path) -> None:
    assert page.title() == "diffusion-fast"
    assert page.locator("#model").inner_text() == "tiny"
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0  # nothing to scroll sideways, on a phone either
    for box in page.locator("input:visible, select, button").all():
        size = box.bounding_box()
        assert size is not None
        assert size["height"] >= 44  # for fingers
    page.get_by_label("Prompt", exact=True).fill("a lighthouse")
    page.get_by_label("Steps").fill("300")
    page.get_by_label("Sampler").select_option("Euler a")
    page.get_by_label("Images").fill("2")
    page.get_by_role("button", name="Draw").click()
    preview = page.get_by_alt_text("Preview of a lighthouse")
    preview.wait_for(timeout=30_000)
    assert "of 300" in page.locator("li small").inner_text()
    shot(page, tmp_path, "running")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for(timeout=30_000)
    page.get_by_label("Steps").fill("2")
    page.get_by_role("button", name="Draw").click()
    page.get_by_alt_text("a lighthouse", exact=True).nth(1).wait_for(timeout=30_000)
    assert page.locator("li small").first.inner_text().startswith("seed ")
    shot(page, tmp_path, "done")


def test_errors_and_the_keyboard(page: sync_api.Page) -> None:
    """The prompt has the focus; Ctrl+Enter draws and Escape stops."""
    page.keyboard.type("a boat")
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "sampler"
    page.get_by_label("Width").fill("64000")
    page.keyboard.press("Control+Enter")
    error = page.get_by_role("alert")
    sync_api.expect(error).to_contain_text("width, height: expected sides of at most 256")
    page.get_by_label("Width").fill("64")
    page.get_by_label("Steps").fill("400")
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for(timeout=30_000)
    sync_api.expect(error).to_have_text("")
