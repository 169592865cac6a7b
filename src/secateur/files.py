"""Files and folders on the disk: written whole or not at all, read with errors that name the file.

A file or folder is written under a hidden name beside its place, flushed, and renamed. A killed process leaves at most
a hidden `.NAME.PID.partial`, which the next writer of the same name removes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from secateur.errors import CheckpointError, DiskError

MODEL_MARK = "config.json"  # a folder that holds it is one of a model
PLAN_FILE = "secateur_plan.json"
RECORD_FILE = "secateur_record.json"
RECIPE_FILE = "recipe.yaml"
MOST_JSON = 2**28  # bytes of a JSON file that are read: an index of a million tensors has a third of that
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


def check_vacant(out: Path, *, overwrite: bool = False, mark: str = MODEL_MARK) -> None:
    """Raise `CheckpointError` when `out` exists and may not be replaced, or when nothing can be written beside it.

    With `overwrite`, only a folder that is empty or holds the file `mark` is replaced: any other was not made by us.
    """
    exists = is_there(out)
    if exists and not overwrite:
        raise CheckpointError(f"{out} exists; name another folder, or replace it with --overwrite (overwrite=True)")
    if exists and not out.is_dir():
        raise CheckpointError(f"{out} is a file, and a folder is to be written; name another, or remove it")
    if exists and any(out.iterdir()) and not (out / mark).is_file():
        raise CheckpointError(
            f"{out} holds other things: it is not empty and has no {mark}, so it is not replaced; name another folder, "
            "or remove it yourself"
        )
    _check_parent(out)


def check_file_vacant(out: Path, *, overwrite: bool = False) -> None:
    """Raise `CheckpointError` when the file `out` exists and may not be replaced, or cannot be written."""
    exists = is_there(out)
    check_writable(out)
    if exists and not overwrite:
        raise CheckpointError(f"{out} exists; name another file, or replace it with --overwrite (overwrite=True)")
    if exists and not out.is_file():
        raise CheckpointError(f"{out} is no ordinary file, so it is not replaced; name another")


def check_writable(path: Path) -> None:
    """Raise `CheckpointError` when no file can be written there: the path is a folder, or lies in none."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, and a file is to be written; name one in it")
    _check_parent(path)


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder. Raises `CheckpointError` for a name that no file system takes."""
    try:
        return path.exists()
    except OSError as error:
        raise CheckpointError(f"{path!s:.60}... cannot be written: {error.strerror}") from error


def _check_parent(path: Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise CheckpointError(f"{path}: the folder {parent} does not exist; make it first: mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path}: you may not write in {parent}; name a path in a folder of yours")


def check_space(out: Path, needed: int) -> None:
    """Raise `DiskError` when fewer than `needed` bytes are free on the disk that `out` is to be written to.

    >>> check_space(Path("out"), 2**60)
    Traceback (most recent call last):
    secateur.errors.DiskError: out needs 1,152,921,504,606.8 MB, and ... MB are free on its disk. ...
    """
    disk = shutil.disk_usage(out.absolute().parent)
    if disk.total and disk.free < needed:  # what is no disk has no size
        raise DiskError(
            f"{out} needs {needed / 1e6:,.1f} MB, and {disk.free / 1e6:,.1f} MB are free on its disk. Free some, or "
            "name a folder on another"
        )


def check_apart(source: Path | None, out: Path) -> None:
    """Raise `CheckpointError` when writing the folder would delete its own source (None: one of the hub)."""
    if source is not None and out.resolve() in (source.resolve(), *source.resolve().parents):
        raise CheckpointError(f"{out} holds the MODEL itself, which would be deleted; name another folder")


def unwritable(path: Path, error: Exception) -> DiskError:
    """The error of a file or folder that cannot be written, for example because the disk is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = ". Free some space, or name a folder on another disk" if full else ""
    return DiskError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}{remedy}")


def make_folder(path: Path) -> None:
    """Make a folder and those around it, unless it is there. Raises `DiskError` when it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def cache_folder() -> Path:
    """The folder of what is made or fetched once for all runs of a user: `~/.cache/secateur`; it may not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


@contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False, mark: str = MODEL_MARK) -> Iterator[Path]:
    """Give a temporary folder beside `out`; when the block ends well, it becomes `out`, else it is removed.

    Everything in it is flushed to the disk before it gets its name, so `out` is never half-written. What a killed
    process has left of the same `out` is removed. Raises `CheckpointError` as `check_vacant` does, and when something
    cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with atomic_folder(Path(parent) / "out") as folder:
    ...         _ = (folder / "a").write_text("1")
    ...     sorted(path.name for path in Path(parent).iterdir())
    ['out']
    """
    check_vacant(out, overwrite=overwrite, mark=mark)
    with renamed(out) as temporary:
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                path.chmod(0o644)  # some writers make files that only their owner can read
            _flush(path)


@contextmanager
def atomic_file(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a path beside `out` to write a file to; as in `atomic_folder`, it becomes `out` or is removed.

    Raises `CheckpointError` as `check_file_vacant` does, and when something cannot be written.
    """
    check_file_vacant(out, overwrite=overwrite)
    with renamed(out) as temporary:
        yield temporary


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """Give a path beside `path`; what is written there is flushed and renamed to `path`, whatever was there."""
    try:
        path = path.resolve()  # a link stays a link
        temporary = _beside(path, "partial")
        _remove_stale(path)
        try:
            yield temporary
            _flush(temporary)
            _replace(path, temporary)
            _flush(path.parent)
            _remove_stale(path)  # now that there is one, what an earlier process had moved away
        finally:
            _remove(temporary)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def _beside(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.{kind}")


def _remove_stale(out: Path) -> None:
    """Remove what processes that are gone have left; this one's own number is a dead one's, used again."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.(\d+)\.(partial|old)")
    for path in out.parent.iterdir():
        match = ours.fullmatch(path.name)
        if match is None or (int(match[1]) != os.getpid() and psutil.pid_exists(int(match[1]))):
            continue
        if match[2] == "old" and not out.exists():
            continue  # the one that was moved away is all there is
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _replace(out: Path, new: Path) -> None:
    """Rename `new` to `out`; what was there is removed once `new` has its name, and comes back if it cannot have it."""
    if not out.exists() or new.is_file():
        new.replace(out)
        return
    if _exchanged(out, new):
        return  # what `new` is now is removed with it
    old = _beside(out, "old")
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _exchanged(a: Path, b: Path) -> bool:
    """Let two folders change their names in one step, so that no moment is without either, where the system can."""
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old one
        return False
    return bool(exchange(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0)


def write_json(path: Path, data: Any) -> None:
    """Write JSON as one file, whole or not at all; a pipe or a device is written to as it is.

    JSON has no infinity (the perplexity of a ruined model): it is written as null, as is NaN. Raises `DiskError`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "a.json", {"b": 1, "ppl": [float("inf")]})
    ...     read_json(Path(folder) / "a.json")
    {'b': 1, 'ppl': [None]}
    """
    text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is no UTF-8 has lone surrogates, which become what JSON writes for them: \\udcff
    encoded = text.encode("utf-8", errors="backslashreplace")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(encoded)
            return
    except OSError as error:
        raise unwritable(path, error) from error
    with renamed(path) as temporary:
        temporary.write_bytes(encoded)


def plain(value: Any) -> Any:
    """A value as JSON and YAML hold it: dataclasses as mappings, tuples as lists, paths as text, no infinity or NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path) -> Any:
    """Read JSON from a file that may be anything. Raises `CheckpointError`, which names the file.

    A key that stands twice is an error: which of the two is meant?

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a.json"
    ...     _ = file.write_text('{"a": 1, "a": 2}')
    ...     read_json(file)
    Traceback (most recent call last):
    secateur.errors.CheckpointError: a.json cannot be read; the key 'a' stands twice in one object
    """
    try:
        if not path.is_file():
            raise ValueError("it is no regular file" if path.exists() else "there is no such file")
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"it has {path.stat().st_size} bytes; at most {MOST_JSON} are read")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:  # the last for nesting that no one writes
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise CheckpointError(f"{path.name} cannot be read; {reason[:200]}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key[:80]!r} stands twice in one object")
        mapping[key] = value
    return mapping


def copy_in(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy files into a folder under the names given, which may lie in a folder of their own."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
