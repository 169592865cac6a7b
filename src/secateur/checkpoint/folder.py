"""Folders and files that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError


def check_vacant(out: Path, *, overwrite: bool = False) -> None:
    """Raise `CheckpointError` when `out` exists and may not be replaced, or when its parent is no folder.

    >>> check_vacant(Path("/nonexistent/model"))
    Traceback (most recent call last):
    secateur.errors.CheckpointError: /nonexistent/model: the folder /nonexistent does not exist; ...
    """
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists; name another folder, or replace it with --overwrite (overwrite=True)")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file, and a folder is to be written; name another, or remove it")
    if not out.absolute().parent.is_dir():
        parent = out.absolute().parent
        raise CheckpointError(f"{out}: the folder {parent} does not exist; make it first: mkdir -p {parent}")


@contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `out`; when the block ends well, it becomes `out`, else it is removed.

    Everything in it is flushed to the disk before it gets its name, so `out` is never half-written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with atomic_folder(Path(parent) / "out") as folder:
    ...         _ = (folder / "a").write_text("1")
    ...     sorted(path.name for path in Path(parent).iterdir())
    ['out']
    """
    check_vacant(out, overwrite=overwrite)
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                path.chmod(0o644)  # some writers make files that only their owner can read
            _flush(path)
        _flush(temporary)
        if out.exists():
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            out.rename(old)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
        _flush(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON beside its name, flush it, and give it its name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "a.json", {"b": 1})
    ...     json.loads((Path(folder) / "a.json").read_text())
    {'b': 1}
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False, allow_nan=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
