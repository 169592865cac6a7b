"""Titles and columns that all tables share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


def make_table(columns: Iterable[str], *, text: Collection[str] = ("", "model")) -> Table:
    """An empty table; columns named in `text` are left-justified, all others hold numbers.

    >>> [column.justify for column in make_table(["model", "MACs"]).columns]
    ['left', 'right']
    """
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in text else "right")
    return table


def titled(title: str, table: Table) -> Iterator[RenderableType]:
    """A title, which may be wider than its table, and the table."""
    yield Text(title, style="italic")
    yield table
