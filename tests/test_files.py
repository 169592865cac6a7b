"""Files and folders are whole or not there, and what cannot be read or written is one line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

import secateur.files
from secateur.errors import CheckpointError
from secateur.files import (
    atomic_folder,
    check_apart,
    check_file_vacant,
    check_vacant,
    check_writable,
    read_json,
    write_json,
)
from secateur.models.tensor_files import read_tensors, write_tensors
from tiny import names


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def write_half(out: Path, error: BaseException) -> None:
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise error


class TestAtomicFolder:
    def test_nested_folders(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a" / "b").mkdir(parents=True)
            (folder / "a" / "b" / "c").write_text("1")
            (folder / "a" / "b" / "c").chmod(0o600)
            assert not (tmp_path / "out").exists()
        assert names(tmp_path) == ["out", "out/a", "out/a/b", "out/a/b/c"]
        assert stat.S_IMODE((tmp_path / "out/a/b/c").stat().st_mode) == 0o644

    def test_one_within_another(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "out") as outer, atomic_folder(outer / "in") as inner:
            (inner / "a").touch()
        assert names(tmp_path) == ["out", "out/in", "out/in/a"]

    @pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
    def test_an_exception_leaves_nothing(self, tmp_path: Path, error: BaseException) -> None:
        with pytest.raises(type(error)):
            write_half(tmp_path / "out", error)
        assert names(tmp_path) == []

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")], ids=repr)
    def test_what_cannot_be_written_is_an_error_of_ours(self, tmp_path: Path, error: Exception) -> None:
        with pytest.raises(CheckpointError, match=r"out cannot be written: (No space|full)"):
            write_half(tmp_path / "out", error)
        assert names(tmp_path) == []

    def test_overwrite(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text("old")
            (folder / "extra").touch()
        with pytest.raises(CheckpointError, match="out exists; name another folder"), atomic_folder(tmp_path / "out"):
            pytest.fail("the block is not entered")
        with pytest.raises(ValueError, match="no"):
            write_half(tmp_path / "out", ValueError("no"))
        assert names(tmp_path) == ["out", "out/config.json", "out/extra"]
        with atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "config.json").write_text("new")
            assert (tmp_path / "out/config.json").read_text() == "old"
        assert names(tmp_path) == ["out", "out/config.json"]
        assert (tmp_path / "out/config.json").read_text() == "new"

    def test_the_old_comes_back_when_the_new_cannot_have_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/config.json").write_text("old")
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if self.suffix == ".partial":
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        monkeypatch.setattr(secateur.files, "_exchanged", lambda *_: False)
        with (
            pytest.raises(CheckpointError, match="Input/output error"),
            atomic_folder(tmp_path / "out", overwrite=True),
        ):
            pass
        assert names(tmp_path) == ["out", "out/config.json"]

    @pytest.mark.parametrize("exchange", [True, False])
    def test_the_old_is_replaced_in_one_step(
        self, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the system can exchange two folders, there is always one of that name; elsewhere in two steps."""
        if not exchange:
            monkeypatch.setattr(secateur.files, "_exchanged", lambda *_: False)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/config.json").write_text("old")
        renames: list[str] = []
        rename = Path.rename

        def noted(self: Path, target: Path) -> Path:
            renames.append(self.name)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", noted)
        with atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "config.json").write_text("new")
        assert (tmp_path / "out/config.json").read_text() == "new"
        assert names(tmp_path) == ["out", "out/config.json"]
        assert len(renames) == (0 if exchange and sys.platform == "linux" else 2)

    def test_what_was_moved_away_by_a_dead_process(self, dead: int, tmp_path: Path) -> None:
        """It is all there is until there is an output again."""
        old = tmp_path / f".out.{dead}.old"
        old.mkdir()
        with pytest.raises(ValueError, match="no"):
            write_half(tmp_path / "out", ValueError("no"))
        assert names(tmp_path) == [old.name]
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").touch()
        assert names(tmp_path) == ["out", "out/a"]

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "far").mkdir()
        (tmp_path / "out").symlink_to("far")
        with atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "a").touch()
        assert (tmp_path / "out").is_symlink()
        assert names(tmp_path) == ["far", "far/a", "out"]

    def test_what_dead_processes_left_is_removed(self, dead: int, tmp_path: Path) -> None:
        left = [f".out.{dead}.partial", f".out.{os.getpid()}.partial", f".out.{dead}.old"]
        kept = [f".out.{os.getppid()}.partial", f".other.{dead}.partial", ".out.secateur"]
        for name in left + kept:
            (tmp_path / name).mkdir()
            (tmp_path / name / "a").touch()
        with atomic_folder(tmp_path / "out"):
            assert (tmp_path / left[2]).exists()  # all there is, until `out` is there again
        with atomic_folder(tmp_path / "out", overwrite=True):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])


class TestVacant:
    def test_only_what_we_made_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        with pytest.raises(CheckpointError, match=r"holds other things: it is not empty and has no config\.json"):
            check_vacant(tmp_path, overwrite=True)
        with pytest.raises(CheckpointError, match=r"has no summary\.json"):
            check_vacant(tmp_path, overwrite=True, mark="summary.json")
        (tmp_path / "config.json").touch()
        check_vacant(tmp_path, overwrite=True)
        (tmp_path / "empty").mkdir()
        check_vacant(tmp_path / "empty", overwrite=True)
        with pytest.raises(CheckpointError, match="empty exists"):
            check_vacant(tmp_path / "empty")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        with pytest.raises(CheckpointError, match="a is a file, and a folder is to be written"):
            check_vacant(tmp_path / "a", overwrite=True)

    def test_a_folder_one_may_not_write_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write anywhere
        for check in (check_vacant, check_writable):
            with pytest.raises(CheckpointError, match=f"you may not write in {tmp_path}"):
                check(tmp_path / "a")

    def test_a_name_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="File name too long"):
            check_vacant(tmp_path / ("x" * 300))


class TestWriteJson:
    @settings(max_examples=30)
    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
    def test_round_trip(self, data: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "x.json"
            write_json(file, {"data": data})
            assert json.loads(file.read_text(encoding="utf-8")) == {"data": data}

    def test_it_is_whole_or_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_json(tmp_path / "x.json", 1)

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match=r"x\.json cannot be written: No space left on device"):
            write_json(tmp_path / "x.json", 2)
        assert names(tmp_path) == ["x.json"]
        assert (tmp_path / "x.json").read_text() == "1\n"

    def test_what_a_dead_process_left_is_removed(self, dead: int, tmp_path: Path) -> None:
        (tmp_path / f".x.json.{dead}.partial").touch()
        (tmp_path / f".x.json.{os.getppid()}.partial").touch()
        write_json(tmp_path / "x.json", 1)
        assert names(tmp_path) == [f".x.json.{os.getppid()}.partial", "x.json"]

    def test_what_json_cannot_say(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError):
            write_json(tmp_path / "x.json", {"a": object()})
        assert names(tmp_path) == []

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("x.json")
        write_json(tmp_path / "link", 1)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "x.json").read_text() == "1\n"

    def test_a_pipe_is_written_to(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        try:
            write_json(tmp_path / "pipe", {"a": 1})
            assert os.read(reader, 99) == b'{\n  "a": 1\n}\n'
        finally:
            os.close(reader)
        assert names(tmp_path) == ["pipe"]

    def test_a_pipe_is_not_replaced_by_a_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="pipe is no ordinary file, so it is not replaced; name another"):
            check_file_vacant(tmp_path / "pipe", overwrite=True)

    def test_beneath_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").touch()
        with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
            write_json(tmp_path / "x" / "y.json", 1)


class TestReadJson:
    @pytest.mark.parametrize(
        ("raw", "match"),
        [
            (b"{", "Expecting property name"),
            (b"\xff\xfe", "can't decode byte"),
            (b"[" * 100_000, "maximum recursion depth"),
            (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice in one object"),
        ],
    )
    def test_what_cannot_be_read(self, raw: bytes, match: str, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_bytes(raw)
        with pytest.raises(CheckpointError, match=rf"^x\.json cannot be read; [^\n]*{match}[^\n]*$"):
            read_json(tmp_path / "x.json")

    def test_what_is_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(CheckpointError, match="it is no regular file"):
            read_json(tmp_path)
        with pytest.raises(CheckpointError, match="there is no such file"):
            read_json(tmp_path / "x.json")
        monkeypatch.setattr(secateur.files, "MOST_JSON", 10)
        (tmp_path / "x.json").write_text(" " * 11)
        with pytest.raises(CheckpointError, match="it has 11 bytes; at most 10 are read"):
            read_json(tmp_path / "x.json")


class TestTensors:
    def test_a_damaged_file_is_one_line(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "x", {"w": torch.ones(2, 2).t()}, {"a": 1})
        (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"x cannot be read; SafetensorError: [^\n]*$"):
            read_tensors(tmp_path / "x")
        with pytest.raises(CheckpointError, match=r"y cannot be read; FileNotFoundError: "):
            read_tensors(tmp_path / "y")

    def test_a_full_disk_leaves_the_file_that_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_tensors(tmp_path / "x", {"w": torch.ones(2)})

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match="x cannot be written: No space left on device"):
            write_tensors(tmp_path / "x", {"w": torch.zeros(2)})
        assert read_tensors(tmp_path / "x")[0]["w"].tolist() == [1, 1]
        assert names(tmp_path) == ["x"]


def test_a_folder_that_holds_the_model_is_not_written_to(tmp_path: Path) -> None:
    check_apart(None, tmp_path)  # of the hub
    check_apart(tmp_path / "model", tmp_path / "out")
    for source in (tmp_path, tmp_path / "a" / "model.gguf"):
        with pytest.raises(CheckpointError, match="holds the MODEL itself, which would be deleted"):
            check_apart(source, tmp_path)
