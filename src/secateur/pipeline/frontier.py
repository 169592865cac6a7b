"""Points of a sweep: size and loss of each cut, which of them nothing beats, and the picture of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.files import atomic_file

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Point:
    """One cut: what is left of the model and how well it predicts; ratio 0 is the dense model."""

    score: str
    preset: str
    ratio: float
    label: str  # what tells its curve from others
    parameters: int
    non_embedding_parameters: int
    macs: int  # of 64 tokens
    perplexity: tuple[Mapping[str, Any], ...]  # as `evaluate` gives them, one for each text and window
    frontier: bool = False  # whether no other point is both as small and as good, and better in one

    @property
    def nll(self) -> float:
        """Nats per token, the mean over texts and windows."""
        values = [entry["nll"] for entry in self.perplexity]
        return math.inf if any(value is None for value in values) else sum(values) / len(values)


@dataclass(frozen=True, slots=True)
class Refused:
    """A cut that cannot be done, and why."""

    score: str
    preset: str
    ratio: float
    label: str
    why: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points of one model, the dense one first; `size` names what the frontier weighs perplexity against."""

    model: str
    size: str  # "parameters" or "macs"
    rows: tuple[Point, ...]
    refused: tuple[Refused, ...]
    pictures: tuple[Path, ...] = ()
    resumed: int = 0  # points that an earlier run had kept

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur sweep --json` writes it."""
        return {**asdict(self), "pictures": [str(path) for path in self.pictures]}


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points (size, loss) no other beats: one that is no larger and no worse, and better in one of both.

    Of points that are alike in both, all are on the frontier if one is.

    >>> frontier([(10, 2.0), (8, 2.5), (8, 3.0), (9, 2.6)])
    [True, True, False, False]
    """
    best, found = math.inf, [False] * len(points)
    order = sorted(range(len(points)), key=lambda i: points[i])
    for place, i in enumerate(order):
        same = place > 0 and points[order[place - 1]] == points[i]
        found[i] = found[order[place - 1]] if same else points[i][1] < best
        best = min(best, points[i][1])
    return found


def draw(found: Sweep, folder: Path) -> tuple[Path, ...]:
    """Draw perplexity against size, a panel for each text and window, as PNG and SVG; returns the files.

    A curve joins the cuts of one label, a grey line those that nothing beats on this text; the dense model is a star.
    Raises `CheckpointError` when a file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    panels = [(entry["data"], entry["seq_len"]) for entry in found.rows[0].perplexity]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * lines), layout="constrained")
    unit, factor = ("billion MACs of 64 tokens", 1e9) if found.size == "macs" else ("million parameters", 1e6)
    curves: dict[str, list[Point]] = {}
    for row in found.rows[1:]:
        curves.setdefault(row.label, []).append(row)
    for number, (data, seq_len) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, number + 1, xlabel=unit, ylabel="perplexity", yscale="log")
        axes.set_title(f"{data}, windows of {seq_len}")

        def at(row: Point, number: int = number) -> tuple[float, float]:
            nll = row.perplexity[number]["nll"]
            return getattr(row, found.size) / factor, math.exp(min(math.inf if nll is None else nll, 700.0))

        on_it = frontier([at(row) for row in found.rows])
        best = sorted(at(row) for row, on in zip(found.rows, on_it, strict=True) if on)
        axes.plot(*zip(*best, strict=True), color="0.75", linewidth=6, marker="o", markersize=15, zorder=1)
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        for place, (label, members) in enumerate(curves.items()):
            along = sorted(at(row) for row in members)
            axes.plot(*zip(*along, strict=True), marker="osD^vP"[place % 6], linewidth=1.2, label=label, zorder=2)
        axes.plot(*at(found.rows[0]), marker="*", markersize=13, color="black", linestyle="", label=DENSE, zorder=3)
        axes.legend()
    figure.suptitle(f"{found.model}: quality against size; what nothing beats in grey")
    written = tuple(folder / f"frontier.{kind}" for kind in ("png", "svg"))
    with matplotlib.rc_context({"svg.hashsalt": "secateur"}):  # the same file from the same numbers
        for path in written:
            with atomic_file(path, overwrite=True) as temporary:
                kind = path.suffix[1:]
                figure.savefig(temporary, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {})
    return written
