"""What benchmarks share: a command as a user calls it, tables for the screen and the docs, and the files they are of.

A table of docs/benchmarks.md stands between two marks of its name, and is made from `benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from secateur.files import atomic_file, write_json

ROOT = Path(__file__).parent.parent
PAGE = "docs/benchmarks.md"


class TableError(Exception):
    """Why a table cannot be written."""


def secateur(*arguments: str) -> None:
    """Run a command in a process of its own, so that its peak memory is its own."""
    subprocess.run([sys.executable, "-m", "secateur", *arguments], check=True)


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first row is its head."""
    table = Table(*rows[0], title=title)
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=200).print(table)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first row is its head.

    >>> print(markdown([["", "a"], ["b", ""]]))
    | | a |
    | --- | --- |
    | b | |
    """
    head, *others = rows
    return "\n".join(
        "".join(["|", *(f" {cell} |" if cell else " |" for cell in row)])
        for row in (head, ["---"] * len(head), *others)
    )


def marks(name: str) -> tuple[str, str]:
    """What a table lies between."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between_marks(page: str, made: str, name: str) -> str:
    r"""A page with what lies between the marks of a table replaced.

    Raises `TableError` unless it has each mark once, in order.

    >>> between_marks("a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb", "new", "t")
    'a\n<!-- t:begin -->\nnew\n<!-- t:end -->\nb'
    """
    begin, end = marks(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise TableError(f"expected {begin} once, and {end} once after it")
    before, after = page[: page.index(begin)], page[page.index(end) + len(end) :]
    return f"{before}{begin}\n{made}\n{end}{after}"


def write_table(name: str, made: str, *, page: str = PAGE, root: Path = ROOT) -> None:
    """Put a table between its marks in a page. Raises `TableError` as `between_marks` does."""
    path = root / page
    text = between_marks(path.read_text(encoding="utf-8"), made, name)
    with atomic_file(path, overwrite=True) as file:
        file.write_text(text, encoding="utf-8")


def result_file(name: str, *, root: Path = ROOT) -> Path:
    """Where the results are kept that a table is of."""
    return root / "benchmarks" / "results" / f"{name}.json"


def keep(name: str, results: Any, made: str, *, root: Path = ROOT) -> None:
    """Write a table, and the results that it is of. Raises `TableError` as `between_marks` does, and writes nothing."""
    write_table(name, made, root=root)
    write_json(result_file(name, root=root), results)


def about() -> dict[str, Any]:
    """When and where something is measured: day, processor, cores, versions."""
    versions = {name: version(name).partition("+")[0] for name in ("secateur", "torch", "transformers")}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "processor": processor(), "versions": versions}


def told(of: Mapping[str, Any]) -> str:
    """The same as a line of a page.

    >>> told({"date": "2026-01-02", "processor": "CPU, 2 cores", "versions": {"torch": "2.13.0"}})
    '2026-01-02; CPU, 2 cores; torch 2.13.0'
    """
    return "; ".join([of["date"], of["processor"], *(f"{name} {number}" for name, number in of["versions"].items())])


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of this machine's processor, and how many cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {cores()} cores"
