"""What the page is made of, as plain data, and numbers in words.

The template turns blocks into HTML and knows nothing of models; the modules that make them know nothing of HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.report.charts import BarChart, HeatMap, Plot

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table; the note is what follows its number in small: a difference."""

    text: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows; the first cell of a row is its heading. `words` are the columns that hold no numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: tuple[int, ...] = (0,)
    kind: str = "table"


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart, and the table of its numbers."""

    chart: BarChart | HeatMap | Plot
    numbers: Table
    note: str = ""
    wide: bool = False
    kind: str = "figure"

    @property
    def form(self) -> str:
        """Which macro draws it."""
        return {BarChart: "bars", HeatMap: "heat", Plot: "plot"}[type(self.chart)]


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Some sentences."""

    text: str
    kind: str = "paragraph"


@dataclass(frozen=True, slots=True)
class Subheading:
    """The name of a part of a section."""

    text: str
    kind: str = "subheading"


@dataclass(frozen=True, slots=True)
class Written:
    """What the models wrote after one prompt: label, tone, text."""

    prompt: str
    texts: tuple[tuple[str, int, str], ...]
    kind: str = "written"


@dataclass(frozen=True, slots=True)
class Commands:
    """Command lines in the order in which they ended: time, line, seed."""

    lines: tuple[tuple[str, str, int], ...]
    kind: str = "commands"


Block = Table | Figure | Paragraph | Subheading | Written | Commands


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading."""

    id: str
    title: str
    blocks: tuple[Block, ...]

    @property
    def rows(self) -> list[list[Block]]:
        """The blocks; plots that follow each other are one row, which a wide page sets side by side."""
        found: list[list[Block]] = []
        for block in self.blocks:
            plot = isinstance(block, Figure) and block.form == "plot"
            if plot and found and isinstance(last := found[-1][-1], Figure) and last.form == "plot":
                found[-1].append(block)
            else:
                found.append([block])
        return found


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One number of the headline: what it is of, how it changed, from what to what, and whether that is good."""

    name: str
    change: str
    detail: str
    good: bool | None


def signed(value: float, text: str) -> str:
    r"""A difference with its sign, which is that of the rounded text.

    >>> ascii(signed(-1.5, "1.5")), signed(0.001, "0.0"), signed(2, "2.0")
    ("'\\u22121.5'", '0.0', '+2.0')
    """
    if not any(digit in "123456789" for digit in text):
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def change(before: float | None, after: float | None) -> str:
    r"""A change in percent; nothing where there is no number to compare with.

    >>> change(1, 3), change(None, 3), ascii(change(100, 84.2)), ascii(change(100, 250_000))
    ('+200 %', '', "'\\u221215.8 %'", "'\\xd7 2,500'")
    """
    if before is None or after is None or before == 0:
        return ""
    share = 100 * (after / before - 1)
    if share >= 1000:
        return f"{TIMES} {after / before:,.0f}"
    return signed(share, f"{abs(share):.1f}" if abs(share) < 99.95 else f"{abs(share):.0f}") + " %"


def ppl_text(value: float | None) -> str:
    """A perplexity; null in JSON is infinite.

    >>> ppl_text(12.345), ppl_text(8.7e6), ppl_text(None)
    ('12.35', '8.7e+06', 'infinite')
    """
    if value is None:
        return "infinite"
    return f"{value:.2f}" if value < 10_000 else f"{value:.2g}"


def seconds_text(value: float) -> str:
    """A time of a forward pass.

    >>> seconds_text(0.0123), seconds_text(2.5)
    ('12.3 ms', '2.50 s')
    """
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def points_text(share: float) -> str:
    """A share of right answers.

    >>> points_text(0.4512)
    '45.1 %'
    """
    return f"{100 * share:.1f} %"


def p_text(p: float | None) -> str:
    """A significance.

    >>> p_text(0.0312), p_text(1e-5), p_text(None)
    ('p = 0.031', 'p < 0.001', '')
    """
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def interval(middle: str, low: float | None, high: float | None, text: Callable[[float], str]) -> Cell:
    """A number and its 95 % interval."""
    return Cell(middle, f"{text(low)} to {text(high)}" if low is not None and high is not None else "")


def listed(names: Sequence[str]) -> str:
    """Names in a row.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
