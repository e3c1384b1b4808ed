"""The comparison report as a person meets it: opened from disk in a real browser."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from comparison.report.page import write_report
from tests.support.synthetic_results import METHODS, write_results

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
OPTIONS += ("--disable-component-update", "--disable-sync")
WIDTHS = (400, 1200)
PATIENCE_MS = 60_000  # a busy shared core decodes slowly

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: `apt-get install chromium`, or .ci/programs as root"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_results(folder / "results", prompts=2, seeds=(0,))
    write_report(folder / "results", folder / "out", "A *finding*.")
    return folder / "out" / "comparison.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """With a profile of its own: playwright makes a fresh one for each start."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, report: Path) -> Iterator[Any]:
    """`visit(**options of the browser's context)` opens the report; whatever the browser complains about fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_report(**options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:100]}"))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("data:", report.as_uri())) else complaints.append(f"asks for {request.url}")
            ),
        )
        page.goto(report.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_and_tables_scroll_inside(visit: Any, width: int) -> None:
    page = visit(viewport={"width": width, "height": 800})
    page.add_style_tag(content="section, .scene { content-visibility: visible !important }")  # else hidden parts have no width
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.querySelector('#summary .scroll table').offsetWidth") > 500
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every(box => box.clientWidth <= innerWidth)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_picture_is_drawn_in_either_theme(visit: Any, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    page.wait_for_function("[...document.images].every(image => image.complete)")
    assert page.evaluate("document.images.length") > 8
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    light = page.evaluate("[...document.images].every(image => image.currentSrc === image.src)")
    assert light == (scheme == "light")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]


@pytest.mark.parametrize("scripts", [True, False])
def test_every_video_plays_in_sight(visit: Any, scripts: bool) -> None:
    """Without scripts too. Each prompt is brought into sight, as browsers let the others rest."""
    page = visit(java_script_enabled=scripts, viewport={"width": 1200, "height": 1000})
    scenes = page.locator(".scene")
    assert scenes.count() == 2
    for i in range(2):
        scenes.nth(i).scroll_into_view_if_needed()
        scenes.nth(i).evaluate("scene => scene.scrollIntoView()")
        videos = scenes.nth(i).locator("video")
        assert videos.count() == 2 * (1 + len(METHODS))
        times: list[set[float]] = [set() for _ in range(videos.count())]
        give_up = time.monotonic() + PATIENCE_MS / 1000
        while min(map(len, times)) < 3 and time.monotonic() < give_up:
            state = videos.evaluate_all("videos => videos.map(v => v.readyState < 2 ? null : v.currentTime)")
            for seen, at in zip(times, state, strict=True):
                seen |= {at} - {None}
            page.wait_for_timeout(100)
        assert min(map(len, times)) >= 3, times
        assert set(videos.evaluate_all("videos => videos.map(v => v.videoWidth)")) == {256}


def test_one_button_stops_and_starts_the_videos(visit: Any) -> None:
    page = visit()
    page.locator(".scene").first.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('video')].some(video => !video.paused)")
    page.get_by_role("button", name="Pause videos").click()
    page.wait_for_function("[...document.querySelectorAll('video')].every(video => video.paused)")
    page.get_by_role("button", name="Play videos").click()
    page.wait_for_function("[...document.querySelectorAll('video')].some(video => !video.paused)")


def test_who_wants_less_motion_gets_still_videos(visit: Any) -> None:
    page = visit(reduced_motion="reduce")
    page.locator(".scene").first.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    assert page.evaluate("[...document.querySelectorAll('video')].every(video => video.paused)")
    assert page.get_by_role("button", name="Play videos").is_visible()
