"""The log of a run folder: whole entries, none lost, damaged ones named."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import CheckpointError
from secateur.pipeline import run_log
from secateur.pipeline.run_log import LogEntry, append_entry, check_run_folder, load_entries
from tiny import names


def append_plan(run: Path, result: dict[str, Any] | None = None) -> Path:
    return append_entry(run, "secateur plan a", "plan", result or {}, seed=0, models=["a"])


def test_entries_are_loaded_as_they_were_appended(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    path = append_entry(run, "secateur evaluate a", "evaluate", {"ppl": float("inf")}, seed=3, models=["a"])
    append_entry(run, "secateur prune a b", "prune", {"out": "b"}, seed=0, models=("a", "b"))
    one, two = load_entries(run)
    assert (one.path, one.kind, one.command, one.seed) == (path, "evaluate", "secateur evaluate a", 3)
    assert (one.models, one.result) == (("a",), {"ppl": None})  # JSON has no infinity
    assert (two.kind, two.models) == ("prune", ("a", "b"))
    assert one.time <= two.time
    assert sorted(one.versions) == ["python", "secateur", "torch", "transformers"]
    assert {*json.loads(path.read_text(encoding="utf-8")), "path"} == {each.name for each in fields(LogEntry)}


def test_entries_written_at_the_same_moment_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(run_log, "datetime", Stopped)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: append_plan(tmp_path, {"n": n}), range(20)))
    assert sorted(json.loads(path.read_text())["result"]["n"] for path in (tmp_path / "log").iterdir()) == [*range(20)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("", "cannot be read"),
        ("[]", "[] is no Mapping"),
        ("{}", "time: None is no str"),
        ({"seed": "0"}, "seed: '0' is no int"),
        ({"models": [1]}, "models: 1 is no str"),
        ({"time": "yesterday"}, "Invalid isoformat string"),
    ],
)
def test_a_damaged_entry_is_named(change: str | dict[str, Any], why: str, tmp_path: Path) -> None:
    path = append_plan(tmp_path)
    append_plan(tmp_path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(change if isinstance(change, str) else json.dumps({**whole, **change}), encoding="utf-8")
    with pytest.raises(CheckpointError) as raised:
        load_entries(tmp_path)
    assert str(raised.value).startswith(f"{path} is damaged (")
    assert why in str(raised.value)
    assert str(raised.value).endswith(f"rm {path}")


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    append_plan(tmp_path)
    (tmp_path / "log" / ".half.json.123.partial").write_text("{", encoding="utf-8")
    (tmp_path / "log" / "notes.txt").write_text("mine", encoding="utf-8")
    assert len(load_entries(tmp_path)) == 1


class TestWhereNothingCanBeWritten:
    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "run").touch()
        with pytest.raises(CheckpointError, match="run is a file, and --run needs a folder for the run's log"):
            append_plan(tmp_path / "run")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "log").touch()
        with pytest.raises(CheckpointError, match="log is a file, and --run needs a folder"):
            check_run_folder(tmp_path / "other")

    def test_a_read_only_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # chmod does not stop root
        with pytest.raises(CheckpointError, match=f"you have no permission to write in {tmp_path}: name another"):
            append_plan(tmp_path / "a" / "run")
        assert names(tmp_path) == []

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            append_plan(tmp_path)
        assert names(tmp_path) == ["log"]

    def test_a_name_too_long(self) -> None:
        with pytest.raises(CheckpointError, match=r"cannot be written: File name too long"):
            check_run_folder(Path("a" * 300))
