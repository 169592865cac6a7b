"""A command's result -> one JSON file in the log of its run folder, from which the report is made.

`RUN/log/20261126T044135.123456Z-prune-5f1c09ab.json` holds the kind of command, the whole line as typed, the time, the
versions, the seed, the models it read and wrote, and the result exactly as `--json` writes it. Entries are only ever
added, each in a file of its own, so several processes may write to one log.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secateur.checkpoint.record import versions
from secateur.decoding import build_known, decode
from secateur.errors import CheckpointError
from secateur.files import is_there, make_folder, read_json, write_json

LOG_FOLDER = "log"  # within a run folder


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One command and its result."""

    path: Path  # the file that holds the entry
    kind: str  # the command's name: prune, evaluate, ...
    command: str  # the whole line, as typed
    time: datetime  # when the command had its result, UTC
    versions: Mapping[str, str]  # of secateur, torch, transformers and Python
    seed: int
    models: tuple[str, ...]  # names and folders of the models that the command read and wrote, as typed
    result: Mapping[str, Any]  # what the command writes with `--json`


def append_entry(
    run: Path, command: str, kind: str, result: Mapping[str, Any], *, seed: int, models: Sequence[str]
) -> Path:
    """Add a command's result to the log of a run folder, which is made if it does not exist; returns the new file.

    Raises `CheckpointError` when the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     _ = append_entry(Path(run), "secateur plan demo", "plan", {"ratio": 0.2}, seed=0, models=["demo"])
    ...     [(entry.kind, entry.result) for entry in load_entries(Path(run))]
    [('plan', {'ratio': 0.2})]
    """
    check_run_folder(run)
    folder = run / LOG_FOLDER
    make_folder(folder)
    now = datetime.now(UTC)
    path = folder / f"{now:%Y%m%dT%H%M%S.%f}Z-{kind}-{uuid.uuid4().hex[:8]}.json"
    about = {"kind": kind, "command": command, "versions": versions(), "seed": seed, "models": list(models)}
    write_json(path, {**about, "time": now.isoformat(), "result": result})
    return path


def check_run_folder(run: Path) -> None:
    """Raise `CheckpointError` when no log can be written to a run folder; called before the work starts.

    >>> check_run_folder(Path("/dev/null"))
    Traceback (most recent call last):
    secateur.errors.CheckpointError: /dev/null is a file, and --run needs a folder for the run's log: name another, ...
    """
    parent = next(path for path in (run / LOG_FOLDER, *(run / LOG_FOLDER).absolute().parents) if is_there(path))
    if not parent.is_dir():
        raise CheckpointError(
            f"{parent} is a file, and --run needs a folder for the run's log: name another, for example --run runs/mine"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        advice = "name another folder, for example --run runs/mine"
        raise CheckpointError(f"--run {run}: you have no permission to write in {parent}: {advice}")


def load_entries(run: Path) -> list[LogEntry]:
    """Load the log of a run folder, oldest entry first; empty without a log. Raises `CheckpointError` if damaged."""
    entries = [_load_entry(path) for path in (run / LOG_FOLDER).glob("*.json")]
    return sorted(entries, key=lambda entry: (entry.time, entry.path.name))


def _load_entry(path: Path) -> LogEntry:
    try:
        data = decode(Mapping[str, Any], read_json(path))
        time = datetime.fromisoformat(decode(str, data.get("time"), "time"))
        time = time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
        return build_known(LogEntry, {**data, "path": path, "time": time})
    except (CheckpointError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Remove it to make the report from the other entries: rm {path}"
        ) from error
