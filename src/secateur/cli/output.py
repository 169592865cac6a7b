"""Results -> tables on standard output, JSON files and the journal of a run; progress on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich import progress as columns
from rich.console import Console, RenderableType
from rich.text import Text

from secateur.files import check_writable, write_json
from secateur.pipeline.options import RunOptions
from secateur.pipeline.tracking import Tracker, check_tracker, track
from secateur.progress import ProgressBars
from secateur.report.formatting import format_bytes

if TYPE_CHECKING:
    from secateur.pipeline.run import Pruned
    from secateur.recovery.result import RecoverResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a command prints and writes besides its result."""

    quiet: bool = False
    """Print nothing but errors."""
    json: Path | None = None
    """Also write the result to this file, as JSON."""
    track: Tracker | None = None
    """Also report the result to this experiment tracker."""

    def __post_init__(self) -> None:
        """Refuse a tracker that is not installed."""
        check_tracker(self.track)


PIPE_WIDTH = 240  # columns of a table that no terminal shows
COMMAND: ContextVar[str] = ContextVar("command", default="secateur")  # the command line, for records and the run log


def check_files(*files: Path | None, made: Path | None = None, run: Path | None = None) -> None:
    """Raise `CheckpointError` when a file to write cannot be written; one in the folder `made` need not be yet.

    Nor can a run log be kept in a run folder `run` that is none.
    """
    if run is not None:
        from secateur.pipeline.run_log import check_run_folder

        check_run_folder(run)
    for file in files:
        if file is not None and (made is None or made.absolute() not in file.absolute().parents):
            check_writable(file)


def finish(
    result: Any, output: Output, tables: Iterable[RenderableType] = (), *, run: Path | None = None, **entry: Any
) -> None:
    """Write a result as JSON where that was asked for, and its log entry where there is a run folder; show its tables.

    Tables are made only where they are shown. Last of all, the result is reported to the tracker, if there is one.
    """
    from secateur import processes
    from secateur.checkpoint.record import versions
    from secateur.pipeline.run_log import append_entry

    if processes.is_first() and output.json is not None:
        write_json(output.json, result)
    if processes.is_first() and run is not None:
        append_entry(run, COMMAND.get(), result=result, **{"seed": 0, **entry})
    if not output.quiet:
        show(tables)
    if processes.is_first() and output.track is not None:
        track(output.track, entry["kind"], result, about={"command": COMMAND.get(), **entry, **versions()}, run=run)


def print_written(made: Pruned | RecoverResult, *, resume: bool) -> None:
    """Say where a model was written, how long that took, and whether a killed run was resumed, if it was to be."""
    if resume:
        print("resumed a killed run" if made.resumed else "no killed run of this to resume: started anew")
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in made.seconds.items())
    print(f"wrote {made.out} ({stages}; peak memory {format_bytes(made.peak_rss_bytes)})")


def run_options(given: Mapping[str, Any], *, quiet: bool) -> RunOptions:
    """How the command runs: what was given, its command line, and progress bars unless it is to be quiet."""
    return RunOptions(**given, command=COMMAND.get(), bars=progress_bars(quiet=quiet))


def show(renderables: Iterable[RenderableType]) -> None:
    """Print tables and lines to standard output, as they are; where it is no terminal, no cell is broken."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    for renderable in renderables:
        console.print(renderable)


class _MemoryColumn(columns.ProgressColumn):
    """The memory that the process holds now."""

    def render(self, task: columns.Task) -> Text:
        return Text(format_bytes(psutil.Process().memory_info().rss))


def progress_bars(*, quiet: bool) -> ProgressBars:
    """One progress bar on stderr at a time: what is done, how far, what is measured, the time left, the memory held."""
    from secateur import processes

    @contextmanager
    def bars(stage: str) -> Iterator[Callable[..., None] | None]:
        if quiet or not sys.stderr.isatty() or not processes.is_first():
            yield None
            return
        *usual, left = columns.Progress.get_default_columns()
        said = columns.TextColumn("{task.fields[said]}")
        shown = (columns.SpinnerColumn(), *usual, said, left, _MemoryColumn())
        with columns.Progress(*shown, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(stage, total=None, said="")

            def progress(done: int, total: int, said: str = "") -> None:
                bar.update(task, completed=done, total=total, said=said)

            yield progress

    return bars
