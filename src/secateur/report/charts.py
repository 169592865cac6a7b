"""Numbers -> charts as inline SVG, drawn by matplotlib; None where it is not installed.

A chart is as wide as a phone, so that its text stays readable there; a desk shows it larger, or two side by side. Its
colors become variables of the page's style sheet, which has light, dark and print values.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

from secateur.report.formatting import printable

INK, SOFT, RULE = "#1b1f24", "#555d66", "#d5d9dd"
TONES = ("#595f66", "#0072b2", "#c25200", "#007a5a", "#8f3f7f")  # dense, pruned, recovered, exported, measured
VARIABLES = {INK: "--ink", SOFT: "--soft", RULE: "--rule", **{tone: f"--tone{i}" for i, tone in enumerate(TONES)}}
LINES = tuple((tone, style) for style in ("-", "--", ":") for tone in TONES[1:])
MOST_POINTS = 400  # of a line; a chart has no more pixels
BINS = 32
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "secateur",  # the same chart from the same numbers
    "text.parse_math": False,  # a name with dollars is no formula
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.edgecolor": RULE,
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), SOFT),
}
P = ParamSpec("P")


def _inline_svg(draw: Callable[Concatenate[Any, P], None]) -> Callable[P, str | None]:
    """Make of a function that draws on given axes one that gives the chart as SVG."""

    @functools.wraps(draw)
    def chart(*arguments: P.args, **options: P.kwargs) -> str | None:
        if importlib.util.find_spec("matplotlib") is None:
            return None
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a glyph that the measuring font lacks, in a model's name
            figure = Figure(figsize=(4.8, 3.0))  # inches of 72 pixels
            draw(figure.add_subplot(), *arguments, **options)
            file = io.StringIO()
            no_date = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", bbox_inches="tight", pad_inches=0.03, transparent=True, metadata=no_date)
        return _for_a_page(file.getvalue())

    return chart


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar with its 95 % interval; an infinite value, None, has no bar."""

    label: str
    value: float | None
    text: str
    color: int
    low: float | None = None
    high: float | None = None


@_inline_svg
def bar_chart(axes: Any, groups: Mapping[str, Sequence[Bar]]) -> None:
    """Horizontal bars from zero, in titled groups below each other.

    >>> "dense" in bar_chart({"a text": [Bar("dense", 10.0, "10.00", 0, 9.0, 11.0)]})
    True
    """
    axes.figure.set_figheight(0.25 * sum(len(bars) + 1.3 for bars in groups.values()) + 0.1)
    ends = [end for bars in groups.values() for bar in bars for end in (bar.value, bar.high) if end is not None]
    longest = max([*ends, 1e-12])
    y, labels = 0.0, []
    for name, bars in groups.items():
        at_left = axes.get_yaxis_transform()
        axes.text(0, y, printable(name), color=INK, fontweight="bold", va="center", transform=at_left)
        for bar in bars:
            y += 1
            labels.append((y, printable(bar.label)))
            end = bar.value or 0.0
            axes.barh(y, end, height=0.75, color=TONES[bar.color])
            if bar.value is not None and bar.low is not None and bar.high is not None:
                axes.errorbar(y=y, x=end, xerr=[[end - bar.low], [bar.high - end]], color=INK, capsize=2, lw=1.2)
                end = max(end, bar.high)
            axes.text(end + 0.015 * longest, y, bar.text, color=INK, va="center")
        y += 1.3
    axes.set(xlim=(0, 1.2 * longest), ylim=(y - 0.7, -0.6), yticks=[at for at, _ in labels])
    axes.set_yticklabels([label for _, label in labels], color=INK)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


@_inline_svg
def heat_map(axes: Any, kinds: Mapping[str, Mapping[int, tuple[int, int]]]) -> None:
    """A row for each kind, a cell for each layer: the darker, the larger the share of its units that stays.

    Takes kind -> layer -> (units kept, units); a layer without the kind has no cell, one that keeps nothing is empty.

    >>> "mlp" in heat_map({"mlp": {0: (3, 4), 1: (4, 4)}})
    True
    """
    layers = 1 + max(layer for found in kinds.values() for layer in found)
    axes.figure.set_figheight(0.45 * len(kinds) + 0.45)
    for row, (name, found) in enumerate(kinds.items()):
        axes.text(-0.5, row - 0.32, printable(name), color=INK, va="bottom")
        for layer, (kept, units) in found.items():
            box = {"height": 0.5, "width": 0.92, "edgecolor": RULE, "lw": 0.5}
            axes.bar(layer, bottom=row - 0.25, color=TONES[1], alpha=0.08 + 0.92 * kept / units, **box)
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(len(kinds) - 0.6, -0.75), yticks=[], xlabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[:].set_visible(False)


@_inline_svg
def line_chart(
    axes: Any,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    bands: Sequence[Sequence[tuple[float, float, float]]] = (),
) -> None:
    """Lines through (x, y) over bands of (x, low, high).

    >>> "step" in line_chart({"loss": [(0, 1.0), (10, 3.0)]}, x_label="step", y_label="nats")
    True
    """
    for band in bands:
        xs, lows, highs = zip(*band, strict=True)
        axes.fill_between(xs, lows, highs, color=TONES[1], alpha=0.18, lw=0)
    for (name, points), (color, style) in zip(lines.items(), 10 * LINES, strict=False):
        shown = [*points[:: 1 + len(points) // MOST_POINTS], points[-1]]
        marker = "o" if len(points) <= 30 else ""
        axes.plot(*zip(*shown, strict=True), style, color=color, marker=marker, ms=3.5, label=printable(name))
    _finish_axes(axes, x_label, y_label, legend=len(lines) > 1, log_y=log_y)


@_inline_svg
def histogram(axes: Any, stacks: Mapping[str, Sequence[float]], *, log_x: bool = False) -> None:
    """How many values lie where, one stack upon the other.

    >>> "units" in histogram({"stay": [1.0, 2.0], "go": [0.5]})
    True
    """
    axes.figure.set_figheight(2.4)
    edges = bin_edges([value for values in stacks.values() for value in values], log=log_x)
    axes.hist([*stacks.values()], bins=edges, stacked=True, color=TONES[1 : 1 + len(stacks)], label=[*stacks])
    _finish_axes(axes, "score", "units", legend=len(stacks) > 1, log_x=log_x)


def bin_edges(values: Sequence[float], *, log: bool) -> list[float]:
    """Edges of BINS bins over all values, of equal width or of equal ratio.

    >>> bin_edges([0.0, 32.0], log=False)[:3]
    [0.0, 1.0, 2.0]
    """
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = max(abs(low) * 0.01, 1e-9)
        low, high = low - margin, high + margin
    inner = [low * (high / low) ** (i / BINS) if log else low + (high - low) * i / BINS for i in range(BINS)]
    return [*inner, high]


def _finish_axes(
    axes: Any, x_label: str, y_label: str, *, legend: bool, log_x: bool = False, log_y: bool = False
) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    for axis, set_scale, log in ((axes.xaxis, axes.set_xscale, log_x), (axes.yaxis, axes.set_yscale, log_y)):
        low, high = axis.get_data_interval()
        if log and low > 0:
            set_scale("log")
            decades = math.log10(high / low)
            steps = (1, 2, 5) if decades < 2.5 else (1,)
            axis.set_major_locator(MaxNLocator(5) if decades < 0.7 else LogLocator(subs=steps, numticks=7))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        elif max(abs(low), abs(high)) >= 10_000:
            axis.set_major_formatter(EngFormatter())
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, labelcolor=INK)


def _for_a_page(svg: str) -> str:
    """Only the svg element, with colors of the style sheet, at any width, and without names for its groups."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns:xlink="[^"]*"| version="[^"]*"|(?<=<g) id="[^"]*"', "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg, count=1)
    svg = svg.replace("xlink:href", "href")
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return re.sub(r">\s+<", ">\n<", svg)
