"""What benchmarks of several commands share: a command as a user calls it, and a table for the screen and the docs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


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


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of this machine's processor, and how many cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {cores()} cores"
