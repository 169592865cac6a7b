"""The report in a real browser: nothing that axe-core finds fault with, nothing wider than a phone, no scripts."""

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
# What of the page's boxes, but those within a box that scrolls, reaches beyond the right edge.
BEYOND = """() => [...document.querySelectorAll('body *')]
    .filter(each => !each.closest('.scroll > *') && !each.closest('.skip, .hidden'))
    .filter(each => each.getBoundingClientRect().right > window.innerWidth + 0.5)
    .map(each => each.tagName + '.' + each.className)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, and with names that are longer than a phone is wide."""
    folder = tmp_path_factory.mktemp("report")
    long = "models/" + "a-name-without-a-space-" * 6
    write_run(folder / "run")
    append_entry(
        folder / "run", f"secateur evaluate {long}", "evaluate", evaluate_json({long: 31.0}), seed=0, models=[long]
    )
    write_report(folder / "run", folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing(width: int, scheme: Any, page: Path, chromium: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto(page.as_uri())
    for everything in (False, True):
        if everything:
            opened.evaluate(OPEN_ALL)
        found = Axe().run(opened)
        assert found.response["violations"] == [], found.generate_report()
        passed = {rule["id"] for rule in found.response["passes"]}
        assert passed >= {
            "color-contrast",
            "svg-img-alt",
            "heading-order",
            "landmark-one-main",
            "html-has-lang",
            "list",
        }
    context.close()


def test_axe_can_find_something(page: Path, chromium: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    opened = chromium.new_page()
    opened.goto(page.as_uri())
    opened.evaluate("document.querySelector('h2').style.color = '#ccc'")
    assert "color-contrast" in {rule["id"] for rule in Axe().run(opened).response["violations"]}
    opened.close()


@pytest.mark.parametrize("width", [320, *WIDTHS])
def test_nothing_is_wider_than_the_window(width: int, page: Path, chromium: Any) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 844})
    opened = context.new_page()
    opened.goto(page.as_uri())
    opened.evaluate(OPEN_ALL)
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    assert opened.evaluate(BEYOND) == []
    context.close()


def test_it_needs_no_scripts_and_no_network(page: Path, chromium: Any, tmp_path: Path) -> None:
    pictures = []
    for scripts in (True, False):
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, java_script_enabled=scripts)
        requests: list[str] = []
        said: list[str] = []
        context.on("request", lambda request, requests=requests: requests.append(request.url))
        opened = context.new_page()
        opened.on("console", lambda message, said=said: said.append(message.text))
        opened.on("pageerror", lambda error, said=said: said.append(str(error)))
        opened.goto(page.as_uri())
        pictures.append(opened.screenshot(full_page=True))
        assert requests == [page.as_uri()]
        assert said == []
        opened.locator("summary").first.click()
        assert opened.locator("details table").first.is_visible()
        context.close()
    assert pictures[0] == pictures[1]


def test_it_prints(page: Path, chromium: Any, tmp_path: Path) -> None:
    opened = chromium.new_page(viewport={"width": 718, "height": 1047})  # A4 within margins of 1 cm
    opened.goto(page.as_uri())
    opened.pdf(path=tmp_path / "report.pdf", format="A4")
    opened.emulate_media(media="print", color_scheme="dark")
    assert opened.evaluate("document.documentElement.scrollWidth") == 718
    assert opened.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not opened.locator("nav").is_visible()
    assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page\n") in range(3, 15)
    opened.close()


def test_pictures_are_small(page: Path, chromium: Any, tmp_path: Path) -> None:
    written = screenshots(chromium, page, tmp_path)
    assert [file.name for file in written] == ["report-1280.png", "report-390.png"]
    assert all(20_000 < file.stat().st_size < 400_000 for file in written)
