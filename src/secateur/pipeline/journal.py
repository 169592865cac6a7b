"""The run folder's journal: what every command measured, one JSON file for each, for the report.

`RUN/journal/20261126T044135.123456Z-prune.json` holds the kind of command, the whole line as typed, the time, the
versions, the seed, the models it was about, and the result exactly as `--json` writes it. Files are only ever added, so
several processes may write into one journal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secateur.checkpoint.record import versions
from secateur.errors import CheckpointError
from secateur.files import make_folder, read_json, unwritable, write_json

FOLDER = "journal"  # within a run folder
_KEYS: dict[str, type] = {
    "kind": str,
    "command": str,
    "time": str,
    "versions": dict,
    "seed": int,
    "models": list,
    "result": dict,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One command's result; `models` are the names and folders that it read and wrote, as typed.

    >>> made = datetime(2026, 1, 2, tzinfo=UTC)
    >>> Entry(Path("a.json"), "plan", "secateur plan demo", made, {"torch": "2.13"}, 0, ("demo",), {}).models
    ('demo',)
    """

    path: Path
    kind: str  # the command's name: prune, evaluate, ...
    command: str
    time: datetime  # UTC, when the result was there
    versions: Mapping[str, str]
    seed: int
    models: tuple[str, ...]
    result: Mapping[str, Any]


def append(run: Path, command: str, kind: str, result: Mapping[str, Any], *, seed: int, models: Sequence[str]) -> Path:
    """Add a command's result to the journal of a run folder, which is made if need be; returns the new file.

    The file is there whole or not at all, and no other is ever replaced. Raises `CheckpointError` when it cannot be
    written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     _ = append(Path(run), "secateur plan demo", "plan", {"ratio": 0.2}, seed=0, models=["demo"])
    ...     [(entry.kind, entry.result) for entry in read(Path(run))]
    [('plan', {'ratio': 0.2})]
    """
    check_run_folder(run)
    folder = run / FOLDER
    about = {"kind": kind, "command": command, "versions": versions(), "seed": seed, "models": list(models)}
    make_folder(folder)
    while True:
        now = datetime.now(UTC)
        path = folder / f"{now:%Y%m%dT%H%M%S.%f}Z-{kind}.json"
        temporary = folder / f".{os.getpid()}-{path.name}"
        write_json(temporary, {**about, "time": now.isoformat(), "result": result})
        try:
            _name(temporary, path)
        except FileExistsError:
            continue  # another process had the same microsecond
        except OSError as error:
            raise unwritable(path, error) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return path


def _name(temporary: Path, path: Path) -> None:
    """Give a file its name unless another has it; a rename would replace the other."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(path) from None
        temporary.rename(path)


def check_run_folder(run: Path) -> None:
    """Raise `CheckpointError` when no journal can be kept there, before the work whose result it is to hold.

    >>> check_run_folder(Path("/dev/null"))
    Traceback (most recent call last):
    secateur.errors.CheckpointError: /dev/null is a file, and a run folder is to hold the journal: name another ...
    """
    found = next(path for path in (run / FOLDER, *(run / FOLDER).absolute().parents) if _exists(path))
    if not found.is_dir():
        raise CheckpointError(
            f"{found} is a file, and a run folder is to hold the journal: name another with --run, for example "
            "--run runs/mine"
        )
    if not os.access(found, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{run}: you may not write in {found}, and the run folder is to hold the journal: name another with --run"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that no file system takes
        raise CheckpointError(f"--run {path.parent!s:.60}... cannot be a folder: {error.strerror}") from error


def read(run: Path) -> list[Entry]:
    """Read the journal of a run folder, oldest first; without one, nothing. Raises `CheckpointError` for a damaged one.

    >>> read(Path("no-such-folder"))
    []
    """
    paths = [path for path in (run / FOLDER).glob("*.json") if not path.name.startswith(".")]
    entries = [_entry(path) for path in paths]
    return sorted(entries, key=lambda entry: (entry.time, entry.path.name))


def _entry(path: Path) -> Entry:
    try:
        data = read_json(path)
        if not isinstance(data, dict):
            raise ValueError(f"expected an object, found {type(data).__name__}")
        for key, kind in _KEYS.items():
            if type(data.get(key)) is not kind:
                raise ValueError(f"{key!r} is {'missing' if key not in data else 'no ' + kind.__name__}")
        if not all(isinstance(text, str) for text in (*data["models"], *data["versions"].values())):
            raise ValueError("models and versions are to be texts")
        time = datetime.fromisoformat(data["time"])
        time = time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (CheckpointError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Remove it, and the report is made of the other entries: rm {path}"
        ) from error
    given = {key: data[key] for key in ("kind", "command", "versions", "seed", "result")}
    return Entry(path=path, time=time, models=tuple(data["models"]), **given)
