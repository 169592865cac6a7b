"""What the page is made of, as plain data, and numbers in words.

The template turns blocks into HTML and knows nothing of models; the modules that make them know nothing of HTML.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from secateur.report.charts import BarChart, HeatMap, Plot


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


def interval(middle: str, low: float | None, high: float | None, text: Callable[[float], str]) -> Cell:
    """A number and its 95 % interval."""
    return Cell(middle, f"{text(low)} to {text(high)}" if low is not None and high is not None else "")
