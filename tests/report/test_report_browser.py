"""The report in a real browser: axe-core finds no fault, nothing is wider than a phone, nothing else is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, WIDTHS, browser, screenshots
from runs import evaluate_json, write_run
from secateur.pipeline.run_log import append_entry
from secateur.report.page import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]
OPEN_ALL = "document.querySelectorAll('details').forEach(each => each.open = true)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, and with a name that is longer than a phone is wide."""
    folder = tmp_path_factory.mktemp("report")
    long = "models/" + "a-name-without-a-space-" * 6
    write_run(folder / "run")
    result = evaluate_json({long: 31.0})
    append_entry(folder / "run", f"secateur evaluate {long}", "evaluate", result, seed=0, models=[long])
    write_report(folder / "run", folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1280, "light")])
def test_it_is_accessible_and_fits_the_window(width: int, scheme: Any, page: Path, chromium: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    loaded: list[str] = []
    messages: list[str] = []
    opened.on("request", lambda request: loaded.append(request.url))
    opened.on("console", lambda message: messages.append(message.text))
    opened.goto(page.as_uri())
    opened.evaluate(OPEN_ALL)
    found = Axe().run(opened)
    assert found.response["violations"] == [], found.generate_report()
    assert {rule["id"] for rule in found.response["passes"]} >= {"color-contrast", "role-img-alt", "heading-order"}
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    assert (loaded, messages) == ([page.as_uri()], [])
    opened.evaluate("document.querySelector('header p').style.color = '#777'")
    assert "color-contrast" in {rule["id"] for rule in Axe().run(opened).response["violations"]}  # axe can find faults
    context.close()


def test_it_prints_in_dark_mode_as_in_light(page: Path, chromium: Any, tmp_path: Path) -> None:
    opened = chromium.new_page(viewport={"width": 718, "height": 1047}, color_scheme="dark")  # A4, margins of 1 cm
    opened.goto(page.as_uri())
    opened.pdf(path=tmp_path / "report.pdf", format="A4")
    opened.emulate_media(media="print", color_scheme="dark")
    assert opened.evaluate("document.documentElement.scrollWidth") == 718
    assert opened.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    assert not opened.locator("nav").is_visible()
    assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page\n") in range(3, 15)
    opened.close()


def test_pictures_for_the_docs_are_small(page: Path, chromium: Any, tmp_path: Path) -> None:
    written = screenshots(chromium, page, tmp_path)
    assert [file.name for file in written] == [f"report-{width}.png" for width in WIDTHS]
    assert all(20_000 < file.stat().st_size < 400_000 for file in written)
