"""What the page is made of, as plain data: sections of text, tables and figures.

The template turns content into HTML and knows nothing of models; the files that make content know nothing of HTML.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table."""

    text: str
    note: str = ""  # small print below the text: a difference or an interval


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows; the first cell of a row is its heading."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text_columns: tuple[int, ...] = (0,)  # indices of the columns that hold no numbers


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart, and the table of its numbers."""

    title: str
    svg: str | None  # None where matplotlib is not installed
    numbers: Table


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading; a block that is a string is a paragraph."""

    id: str
    title: str
    blocks: tuple[str | Table | Figure, ...]


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One number of the headline."""

    name: str
    change: str
    detail: str
    good: bool | None  # None where the change is neither good nor bad

    def __str__(self) -> str:
        return f"{self.name}: {self.change} ({self.detail})" if self.detail else f"{self.name}: {self.change}"


def optional(value: float | None, text: Callable[[float], str]) -> Cell:
    """A cell with a number; empty where there is none."""
    return Cell("" if value is None else text(value))
