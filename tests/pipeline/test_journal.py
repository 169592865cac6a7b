"""The journal of a run folder: whole entries, none lost, damaged ones named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import CheckpointError
from secateur.pipeline import journal
from secateur.pipeline.journal import append, check_run_folder, read
from tiny import names

RESULT: dict[str, Any] = {"results": [{"model": "a", "perplexity": [{"ppl": 3.5}]}]}


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    first = append(run, "secateur evaluate a", "evaluate", RESULT, seed=3, models=["a"])
    append(run, "secateur prune a b", "prune", {"out": "b"}, seed=0, models=("a", "b"))
    one, two = read(run)
    assert (one.path, one.kind, one.command, one.seed, one.models) == (
        first,
        "evaluate",
        "secateur evaluate a",
        3,
        ("a",),
    )
    assert one.result == RESULT
    assert (two.kind, two.models) == ("prune", ("a", "b"))
    assert one.time <= two.time
    assert sorted(one.versions) == ["python", "secateur", "torch", "transformers"]
    data = json.loads(first.read_text(encoding="utf-8"))
    assert set(data) == {"kind", "command", "time", "versions", "seed", "models", "result"}


def test_infinity_is_null_as_in_json_files(tmp_path: Path) -> None:
    append(tmp_path, "c", "evaluate", {"ppl": float("inf")}, seed=0, models=[])
    assert read(tmp_path)[0].result == {"ppl": None}


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from secateur.pipeline.journal import append\n"
        "[append(Path('run'), sys.argv[1], 'plan', {'n': n}, seed=0, models=[]) for n in range(40)]"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, name], cwd=tmp_path) for name in "ab"]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    found = {(entry.command, entry.result["n"]) for entry in read(tmp_path / "run")}
    assert found == {(name, n) for name in "ab" for n in range(40)}
    assert not [name for name in names(tmp_path / "run") if "/." in name]


def test_the_same_microsecond_is_not_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that find the name taken, and a file system that has none."""
    times = [datetime(2026, 1, 1, second=s, tzinfo=UTC) for s in (1, 1, 2, 2, 3)]

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return times.pop(0)

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(journal, "datetime", Clock)
    for n in (1, 2):
        append(tmp_path, "c", "plan", {"n": n}, seed=0, models=[])
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    append(tmp_path, "c", "plan", {"n": 3}, seed=0, models=[])
    assert not times
    assert [entry.result["n"] for entry in read(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be read"),
        ("[]", "expected an object, found list"),
        ("{}", "'kind' is missing"),
        ('{"kind": 1}', "'kind' is no str"),
        ({"seed": "0"}, "'seed' is no int"),
        ({"result": []}, "'result' is no dict"),
        ({"models": [1]}, "models and versions are to be texts"),
        ({"time": "yesterday"}, "Invalid isoformat string"),
    ],
)
def test_a_damaged_entry_is_named(text: str | dict[str, Any], why: str, tmp_path: Path) -> None:
    path = append(tmp_path, "c", "plan", {}, seed=0, models=[])
    append(tmp_path, "c", "plan", {}, seed=0, models=[])
    whole = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(text if isinstance(text, str) else json.dumps({**whole, **text}), encoding="utf-8")
    with pytest.raises(CheckpointError) as raised:
        read(tmp_path)
    assert str(raised.value).startswith(f"{path} is damaged (")
    assert why in str(raised.value)
    assert str(raised.value).endswith(f"rm {path}")


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    append(tmp_path, "c", "plan", {}, seed=0, models=[])
    (tmp_path / "journal" / ".123-half.json").write_text("{", encoding="utf-8")
    (tmp_path / "journal" / "notes.txt").write_text("mine", encoding="utf-8")
    assert len(read(tmp_path)) == 1


class TestWhereNothingCanBeWritten:
    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "run").touch()
        with pytest.raises(CheckpointError, match="run is a file, and a run folder is to hold the journal"):
            append(tmp_path / "run", "c", "plan", {}, seed=0, models=[])
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "journal").touch()
        with pytest.raises(CheckpointError, match="journal is a file, and a run folder"):
            check_run_folder(tmp_path / "other")

    def test_a_folder_that_is_read_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # chmod does not stop root
        with pytest.raises(CheckpointError, match=f"you may not write in {tmp_path}, and the run folder"):
            append(tmp_path / "a" / "run", "c", "plan", {}, seed=0, models=[])
        assert names(tmp_path) == []

    def test_a_disk_that_says_no(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            append(tmp_path, "c", "plan", {}, seed=0, models=[])
        assert names(tmp_path) == ["journal"]

    def test_a_name_too_long(self) -> None:
        with pytest.raises(CheckpointError, match=r"cannot be a folder: File name too long"):
            check_run_folder(Path("a" * 300))
