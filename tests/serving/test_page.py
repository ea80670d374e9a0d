"""The page in headless Chromium: it generates with previews, edits with a mask, and is usable without a mouse."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from http_client import Running
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.serving
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[(1280, 900, "light"), (390, 844, "dark")], ids=["wide", "phone"])
def page(browser: Browser, tiny_service: Running, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The opened page. At the end nothing was written to the console, and nothing is wider than the window."""
    width, height, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened, complaints = context.new_page(), list[str]()
    opened.on("console", lambda message: "status of 429" in message.text or complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(tiny_service.ready["url"])
    yield opened
    assert complaints == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def finished(page: Page) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)


def test_generate_with_previews(page: Page, tmp_path: Path) -> None:
    page.fill("#class", "1")
    page.fill("#seed", "123")
    page.click("#generate")
    finished(page)
    assert page.locator("#filmstrip img").count() >= 3
    assert page.locator("#result").get_attribute("src") and "123" in page.inner_text("#status")
    with page.expect_download() as download:
        page.click("#download")
    path = tmp_path / "image.png"
    download.value.save_as(path)
    with Image.open(path) as image:
        assert image.format == "PNG"


def test_edit_with_a_mask(page: Page) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (40, 90, 160)).save(picture, "PNG")
    page.click("#tab-edit")
    page.set_input_files("#edit-file", {"name": "a.png", "mimeType": "image/png", "buffer": picture.getvalue()})
    canvas = page.locator("#edit-canvas")
    canvas.wait_for(state="visible")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.5, steps=5)
    page.mouse.up()
    page.fill("#class", "1")
    page.click("#edit-run")
    finished(page)
    assert page.locator("#result").get_attribute("src")


def test_without_a_mouse(page: Page) -> None:
    page.focus("#class")
    page.keyboard.type("0")
    page.keyboard.press("Enter")
    page.focus("#generate")
    page.keyboard.press("Enter")
    finished(page)
    page.focus("#copy-curl")
    page.keyboard.press("Enter")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "curl" in copied and "/v1/images/generations" in copied
    page.focus("#tab-generate")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-edit").get_attribute("aria-selected") == "true"


def test_every_control_has_a_name(page: Page) -> None:
    """As a screen reader says it."""
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, button, canvas, [role=tab]')].filter(one =>
            !(one.labels && one.labels.length) && !one.getAttribute('aria-label') &&
            !one.getAttribute('aria-labelledby') && !one.textContent.trim() && !one.title).map(one => one.outerHTML)"""
    )
    assert unnamed == []


def test_an_error_is_shown(page: Page) -> None:
    from playwright.sync_api import expect

    error = {"message": "64 images wait.", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    answer = {"status": 429, "headers": {"retry-after": "7"}, "json": {"error": error}}
    page.route("**/v1/images/generations", lambda route: route.fulfill(**answer))
    page.fill("#class", "1")
    page.click("#generate")
    expect(page.locator("#status")).to_contain_text("Error", timeout=10_000)
    assert "64 images wait." in page.inner_text("#status") and "7" in page.inner_text("#status")
