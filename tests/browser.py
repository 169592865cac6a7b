"""Chromium for the tests of pages, and for the pictures in the docs.

`python tests/browser.py PAGE.html OUT_FOLDER` writes OUT_FOLDER/report-1280.png and report-390.png.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = {1280: 900, 390: 844}  # of a desk and of a phone, with the height of what is seen at once
COLOURS = 128  # of a picture


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium, the system's."""
    if CHROMIUM is None:
        raise FileNotFoundError("no chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        try:
            yield running
        finally:
            running.close()


def screenshots(running: Browser, page: Path, folder: Path) -> list[Path]:
    """Pictures of a whole page at every width, in few colours."""
    written = []
    for width, height in WIDTHS.items():
        context = running.new_context(viewport={"width": width, "height": height}, color_scheme="light")
        opened = context.new_page()
        opened.goto(page.resolve().as_uri())
        out = folder / f"{page.stem}-{width}.png"
        opened.screenshot(path=out, full_page=True)
        with Image.open(out) as picture:
            few = picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(out, optimize=True)
        written.append(out)
        context.close()
    return written


if __name__ == "__main__":
    with browser() as chromium:
        for file in screenshots(chromium, Path(sys.argv[1]), Path(sys.argv[2])):
            sys.stdout.write(f"{file}: {file.stat().st_size / 1024:.0f} KiB\n")
