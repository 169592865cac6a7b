"""Numbers -> the geometry of charts, in shares of their width, so that they fit a phone and a desk alike.

The templates write the SVG. All x positions and lengths are percents of the width; heights are pixels; within the area
of a `Plot` y is in percents, too. Nothing is measured in text widths: labels have columns or lines of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LABEL = 27.0  # percent of the width that the names of bars take
VALUE = 18.0  # and their numbers
AXIS = 13.0  # and the numbers of a plot's y axis
MOST_POINTS = 400  # of a line; a chart has no more pixels for them
MOST_TICKS = 6
FEWEST_TICKS = 3  # of powers of ten, their doubles and halves; a range too narrow for them has ticks at equal steps


@dataclass(frozen=True, slots=True)
class Tick:
    """A number at a place."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One value with its interval, to be drawn; None where it is infinite."""

    label: str
    value: float | None
    text: str
    tone: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class DrawnBar:
    """A bar with its places; `low` and `high` of the interval, if there is one."""

    label: str
    text: str
    tone: int
    y: int
    width: float
    low: float | None
    high: float | None

    @property
    def end(self) -> float:
        """Where its number begins."""
        return round(max(LABEL + self.width, self.high or 0.0) + 1.2, 3)


@dataclass(frozen=True, slots=True)
class Heading:
    """The name of a group of bars."""

    text: str
    y: int


@dataclass(frozen=True, slots=True)
class BarChart:
    """Bars from the left, in groups one below the other."""

    title: str
    description: str
    height: int
    headings: tuple[Heading, ...]
    bars: tuple[DrawnBar, ...]
    left: float = LABEL


ROW, HEAD, GAP = 22, 24, 10  # pixels: of a bar, of a group's name, between groups


def bar_chart(title: str, description: str, groups: Mapping[str, Sequence[Bar]]) -> BarChart:
    """Bars that begin at zero; the longest bar or interval takes all of the width that labels leave.

    >>> chart = bar_chart("t", "d", {"text": [Bar("dense", 10.0, "10", 0), Bar("pruned", 20.0, "20", 1, 15, 25)]})
    >>> [(bar.y, bar.width) for bar in chart.bars], chart.height
    ([(24, 22.0), (46, 44.0)], 68)
    """
    every = [bar for bars in groups.values() for bar in bars]
    ends = [end for bar in every for end in (bar.value, bar.high) if end is not None]
    scale = (100 - LABEL - VALUE) / (max(ends, default=1.0) or 1.0)
    headings: list[Heading] = []
    drawn: list[DrawnBar] = []
    y = 0
    for name, bars in groups.items():
        y += GAP if headings else 0
        headings.append(Heading(name, y))
        y += HEAD
        for bar in bars:
            has_interval = bar.low is not None and bar.high is not None and bar.value is not None
            drawn.append(
                DrawnBar(
                    label=bar.label,
                    text=bar.text,
                    tone=bar.tone,
                    y=y,
                    width=round(max(bar.value or 0.0, 0.0) * scale, 3),
                    low=round(LABEL + max(bar.low or 0.0, 0.0) * scale, 3) if has_interval else None,
                    high=round(LABEL + max(bar.high or 0.0, 0.0) * scale, 3) if has_interval else None,
                )
            )
            y += ROW
    return BarChart(title, description, y, tuple(headings), tuple(drawn))


# --- the heat map -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer of one kind: the share of its units that stays."""

    x: float
    width: float
    kept: float  # 0 to 1
    text: str


@dataclass(frozen=True, slots=True)
class Strip:
    """One kind: a row of layers."""

    label: str
    y: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Kinds below each other, layers from left to right."""

    title: str
    description: str
    height: int
    strips: tuple[Strip, ...]
    ticks: tuple[Tick, ...]


STRIP_LABEL, STRIP = 22, 30  # pixels


def heat_map(title: str, description: str, kinds: Mapping[str, Mapping[int, tuple[int, int]]], layers: int) -> HeatMap:
    """A strip of cells for each kind (name -> layer -> units kept and units); a layer without the kind has no cell.

    >>> drawn = heat_map("t", "d", {"mlp": {0: (3, 4), 1: (4, 4)}}, 2)
    >>> [(cell.x, cell.kept, cell.text) for cell in drawn.strips[0].cells]
    [(0.0, 0.75, 'layer 0: 3 of 4'), (50.0, 1.0, 'layer 1: 4 of 4')]
    """
    strips, y, width = [], 0, 100 / layers
    for name, found in kinds.items():
        cells = tuple(
            Cell(
                x=round(layer * width, 3),
                width=round(width, 3),
                kept=round(kept / units, 4),
                text=f"layer {layer}: {kept:,} of {units:,}",
            )
            for layer, (kept, units) in sorted(found.items())
        )
        strips.append(Strip(name, y + STRIP_LABEL, cells))
        y += STRIP_LABEL + STRIP + GAP
    step = max(1, math.ceil(layers / 8))
    step = step if step <= 2 else 5 * math.ceil(step / 5)
    ticks = tuple(Tick(round((layer + 0.5) * width, 3), str(layer)) for layer in range(0, layers, step))
    return HeatMap(title, description, y + 16, tuple(strips), ticks)


# --- lines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """A named line through (x, y)."""

    label: str
    tone: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Band:
    """The area between two values at each x."""

    label: str
    strength: int  # 1 is pale, 2 is dark
    points: tuple[tuple[float, float, float], ...]  # x, low, high


@dataclass(frozen=True, slots=True)
class Line:
    """A drawn series: the points of its line within the plot, and its marks within the chart."""

    label: str
    tone: int
    path: str
    marks: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A drawn bar of a histogram, in percents of the plot."""

    x: float
    width: float
    y: float
    height: float
    tone: int


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines, bands and columns over two axes."""

    title: str
    description: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    bands: tuple[tuple[int, str], ...]
    columns: tuple[Column, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    legend: tuple[tuple[int, str], ...]
    left: float = AXIS
    height: int = 220  # of the area within the axes


def line_plot(
    title: str,
    description: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    bands: Sequence[Band] = (),
    whole_x: bool = True,
) -> Plot:
    """Lines over linear x and linear or logarithmic y.

    >>> drawn = line_plot("t", "d", [Series("loss", 0, ((0, 1.0), (10, 3.0)))], x_label="step", y_label="nats")
    >>> drawn.lines[0].path, [tick.text for tick in drawn.x_ticks]
    ('0,100 100,0', ['0', '2', '4', '6', '8', '10'])
    """
    xs = [x for each in series for x, _ in each.points] + [x for band in bands for x, _, _ in band.points]
    ys = [y for each in series for _, y in each.points] + [y for band in bands for p in band.points for y in p[1:]]
    x_axis = _Axis.over(xs, whole=whole_x)
    y_axis = _Axis.over(ys, log=log_y)
    lines = []
    for each in series:
        at = [(x_axis.at(x), 100 - y_axis.at(y)) for x, y in _thinned(each.points)]
        marks = tuple((_in_chart(x), y) for x, y in at) if len(at) <= 60 else ()
        lines.append(Line(each.label, each.tone, " ".join(f"{x:g},{y:g}" for x, y in at), marks))
    areas = []
    for band in bands:
        above = [f"{x_axis.at(x):g},{100 - y_axis.at(high):g}" for x, _, high in band.points]
        below = [f"{x_axis.at(x):g},{100 - y_axis.at(low):g}" for x, low, _ in reversed(band.points)]
        areas.append((band.strength, " ".join(above + below)))
    return Plot(
        title=title,
        description=description,
        x_label=x_label,
        y_label=y_label,
        lines=tuple(lines),
        bands=tuple(areas),
        columns=(),
        x_ticks=tuple(Tick(_in_chart(tick.at), tick.text) for tick in x_axis.ticks()),
        y_ticks=tuple(Tick(100 - tick.at, tick.text) for tick in y_axis.ticks()),
        legend=tuple((each.tone, each.label) for each in series),
    )


def histogram(
    title: str,
    description: str,
    edges: Sequence[float],
    stacks: Sequence[tuple[str, int, Sequence[int]]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> Plot:
    """Counts between edges (their powers of ten where `log_x`), one upon the other: label, tone, counts.

    >>> drawn = histogram("t", "d", [0, 1, 2], [("kept", 0, [2, 4]), ("cut", 1, [2, 0])], x_label="x", y_label="n")
    >>> [(column.x, column.y, column.height) for column in drawn.columns]
    [(0.0, 50.0, 50.0), (50.0, 0.0, 100.0), (0.0, 0.0, 50.0)]
    """
    totals = [sum(counts[i] for _, _, counts in stacks) for i in range(len(edges) - 1)]
    y_axis = _Axis(0.0, float(max(totals, default=1) or 1), whole=True)
    x_axis = _Axis(edges[0], edges[-1], log=log_x)
    places = [x_axis.at(10**edge if log_x else edge) for edge in edges]
    done = [0] * len(totals)
    columns = []
    for _, tone, counts in stacks:
        for i, count in enumerate(counts):
            if count:
                top = 100 - y_axis.at(done[i] + count)
                width = round(places[i + 1] - places[i], 3)
                columns.append(Column(places[i], width, top, round(100 - y_axis.at(done[i]) - top, 3), tone))
                done[i] += count
    return Plot(
        title=title,
        description=description,
        x_label=x_label,
        y_label=y_label,
        lines=(),
        bands=(),
        columns=tuple(columns),
        x_ticks=tuple(Tick(_in_chart(tick.at), tick.text) for tick in x_axis.ticks()),
        y_ticks=tuple(Tick(100 - tick.at, tick.text) for tick in y_axis.ticks()),
        legend=tuple((tone, label) for label, tone, _ in stacks),
        height=160,
    )


def _in_chart(x: float) -> float:
    """From percents of the plot to percents of the chart, whose right edge leaves room for half a number."""
    return round(AXIS + x * (100 - AXIS - 4) / 100, 3)


@dataclass(frozen=True, slots=True)
class _Axis:
    """A range of numbers, and where in it a number lies, in percents."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @classmethod
    def over(cls, values: Sequence[float], *, log: bool = False, whole: bool = False) -> _Axis:
        low, high = min(values, default=0.0), max(values, default=1.0)
        if log and low > 0:
            low, high = math.log10(low), math.log10(high)
        else:
            log = False
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-12):
            margin = 0.5 if log or whole else max(abs(low) * 0.05, 1e-12)
            low, high = low - margin, high + margin
        return cls(low, high, log, whole)

    def at(self, value: float) -> float:
        number = math.log10(value) if self.log else value
        return round(100 * (number - self.low) / (self.high - self.low), 3)

    def ticks(self) -> list[Tick]:
        if self.log:
            low, high = 10**self.low, 10**self.high
            every = [m * 10.0**p for p in range(math.floor(self.low), math.floor(self.high) + 1) for m in (1, 2, 5)]
            chosen = [value for value in every if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
            if len(chosen) > MOST_TICKS:
                chosen = [value for value in chosen if f"{value:e}".startswith("1.0")]
            chosen = chosen[:: max(1, math.ceil(len(chosen) / MOST_TICKS))]
            if len(chosen) >= FEWEST_TICKS:
                return [Tick(self.at(value), _number(value)) for value in chosen]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        step = _step((high - low) / 4)
        if self.whole:
            step = max(1.0, step)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [Tick(self.at(i * step), _number(i * step, step)) for i in range(first, last + 1)]


def _step(rough: float) -> float:
    """The nearest 1, 2 or 5 times a power of ten.

    >>> _step(0.23), _step(37)
    (0.2, 50.0)
    """
    power = math.floor(math.log10(rough))
    nearest = min((1, 2, 5, 10), key=lambda m: abs(math.log(m * 10.0**power / rough)))
    return float(nearest * 10**power if power >= 0 else nearest / 10**-power)


def _number(value: float, step: float = 0.0) -> str:
    """A number as an axis has it, with as many decimals as its neighbours at `step` from it need.

    >>> _number(1e-7), _number(0.25), _number(1500), _number(2_500_000), _number(305.2, 0.05)
    ('1e-7', '0.25', '1,500', '2.5 M', '305.20')
    """
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for size, suffix in ((1e9, " B"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:,.{_decimals(step / size)}f}{suffix}" if step else f"{value / size:.3g}{suffix}"
    if step:
        return f"{value:,.{_decimals(step)}f}"
    return f"{round(value):,}" if abs(value) >= 1000 else f"{value:.4g}"


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _thinned(points: Sequence[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """Every n-th point where there are more than a chart can show, and the last."""
    step = math.ceil(len(points) / MOST_POINTS)
    return points if step <= 1 else (*points[:-1:step], points[-1])
