"""Two models side by side on a local web page: ask both, plan a cut of either.

`sides` loads them, `answers` lets them write in turns, `cuts` plans, `markup` and `page` show, `server` serves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.compare.answers import Answer, Writing, answers
from secateur.compare.cuts import Workplace
from secateur.compare.page import build_page
from secateur.compare.server import HERE, PORT, bind, check_gradio, quiet_gradio, serve, url_of
from secateur.compare.sides import Side, Size, load_sides, sizes_as_json
from secateur.models.loading import LoadOptions
from secateur.progress import ProgressBars

__all__ = ["HERE", "PORT", "Answer", "Opened", "Side", "Size", "Writing", "answers", "compare", "load_sides"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A page that can be opened now, and what it compares."""

    url: str
    sides: tuple[Side, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur compare --json` writes it."""
        return {"url": self.url, "results": sizes_as_json(self.sides)}


def compare(
    models: Sequence[str],
    *,
    host: str = HERE,
    port: int = PORT,
    loading: LoadOptions | None = None,
    calibration: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    seed: int = 0,
    bars: ProgressBars | None = None,
    announce: Callable[[Opened], None] | None = None,
) -> None:
    """Serve a page that compares two MODEL arguments, until it is interrupted.

    `calibration` holds arguments of `calibration_for`, for plans; `run` is a folder that keeps statistics, as in
    `plan_model`. `announce` is called when the page can be opened. Raises `PageError` when gradio is missing or the
    address is taken, before a model is loaded, and what `load_sides` raises before the page opens.

    >>> compare(["demo"], port=0)
    Traceback (most recent call last):
    secateur.errors.ModelError: 1 models to compare; expected two: secateur compare demo pruned
    """
    check_gradio()
    loading = loading or LoadOptions()
    with bind(host, port) as taken, tempfile.TemporaryDirectory(prefix="secateur-compare-") as name:
        folder = Path(name)
        plans = folder / "plans"
        plans.mkdir()
        with bars("load") if bars else nullcontext():
            sides = load_sides(models, loading=loading, seed=seed)
        place = Workplace(Path(run) if run is not None else folder / "run", loading, calibration)
        with quiet_gradio(folder / "gradio"):
            page = build_page(sides, place, folder=plans, seed=seed)
            if announce is not None:
                announce(Opened(url_of(taken), sides))
            serve(page, taken)
