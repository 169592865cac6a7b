"""Two models side by side on a local web page, which gradio serves; nothing is asked of any other machine.

`models.py` loads them, `answers.py` lets them answer in turns, `plan_tab.py` plans cuts, `page.py` shows all of it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.compare import HERE, PORT
from secateur.compare.models import Side, load_sides
from secateur.errors import PageError, check_installed, one_line
from secateur.models.options import LoadOptions
from secateur.progress import ProgressBars

logger = logging.getLogger(__name__)

OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # the reader's own: none is fetched


@dataclass(frozen=True, slots=True)
class Opened:
    """A page that can be opened now, and the models that it compares."""

    url: str
    sides: tuple[Side, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur compare --json` writes it."""
        return {"url": self.url, "results": [side.costs.to_json() for side in self.sides]}


def compare(
    models: Sequence[str],
    *,
    host: str = HERE,
    port: int = PORT,
    loading: LoadOptions | None = None,
    calibration: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    bars: ProgressBars | None = None,
    announce: Callable[[Opened], None] | None = None,
) -> None:
    """Serve a page that compares two MODEL arguments, until it is interrupted.

    `calibration` holds calibration options by name, and `run` is a folder for statistics, both for plans. `announce` is
    called when the page can be opened. Raises `PageError` when gradio is missing or the address is
    taken, before a model is loaded, and what `load_sides` raises before the page opens.

    >>> compare(["demo"], port=0)
    Traceback (most recent call last):
    secateur.errors.ModelError: 1 models to compare; expected two: secateur compare demo pruned
    """
    check_installed(PageError, "gradio", extra="compare", what="the page")
    port = free_port(host, port)
    with bars("load") if bars else nullcontext():
        sides = load_sides(models, loading=loading)
    with tempfile.TemporaryDirectory(prefix="secateur-compare-") as folder:
        os.environ.update(OFFLINE, GRADIO_TEMP_DIR=folder)
        import gradio as gr

        from secateur.compare.page import build_page
        from secateur.compare.plan_tab import Planner

        planner = Planner(Path(run or Path(folder) / "run"), loading or LoadOptions(), calibration or {})
        page = build_page(sides, planner, plans=Path(folder))
        page.queue(api_open=False).launch(
            server_name=host,
            server_port=port,
            quiet=True,
            prevent_thread_lock=True,
            share=False,
            footer_links=[],
            theme=gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
        )
        try:
            if announce is not None:
                announce(Opened(f"http://{host}:{port}", sides))
            threading.Event().wait()  # until Ctrl-C
        finally:
            page.close(verbose=False)


def free_port(host: str, port: int) -> int:
    """The port, or with 0 any that is free; raises `PageError` when it cannot be listened at.

    >>> 0 < free_port(HERE, 0) < 65536
    True
    """
    try:
        with socket.create_server((host, port)) as server:
            address, found = server.getsockname()[:2]
    except (OSError, UnicodeError) as error:
        raise PageError(
            f"--host {host} --port {port} cannot be listened at ({one_line(error)}): another page may have it, or the "
            f"address is not this machine's. Any free port: --port 0; this machine alone: --host {HERE}"
        ) from error
    if not ipaddress.ip_address(address).is_loopback:
        logger.warning("whoever reaches %s can use the page, and see what is planned", host)
    return int(found)
