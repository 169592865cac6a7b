"""The manifest names every file and tensor of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import CheckpointError
from secateur.models.manifest import (
    MANIFEST_FILE,
    Entry,
    changes,
    check_as_written,
    files_in,
    read_manifest,
    tensors_in,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jinja").write_text("a")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").touch()
    (tmp_path / "b.json").write_text("{}")
    save_file({"w": torch.zeros(2, 3, dtype=torch.bfloat16), "n": torch.tensor(1)}, tmp_path / "c.safetensors")
    write_manifest(tmp_path)
    return tmp_path


class TestManifest:
    def test_what_it_says(self, folder: Path) -> None:
        found = read_manifest(folder)
        assert found is not None
        assert list(found) == list(files_in(folder)) == ["b.json", "c.safetensors", "deep/a.jinja"]
        assert found["c.safetensors"].tensors == {"w": "BF16 [2, 3]", "n": "I64 []"}
        empty = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        assert found["b.json"] == Entry(2, empty)

    def test_the_same_bytes_twice(self, folder: Path) -> None:
        before = (folder / MANIFEST_FILE).read_bytes()
        write_manifest(folder)
        assert (folder / MANIFEST_FILE).read_bytes() == before

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..\\x", "./b.json", "", "."])
    def test_a_path_out_of_the_folder(self, name: str, folder: Path) -> None:
        data = json.loads((folder / MANIFEST_FILE).read_text())
        data["files"][name] = data["files"]["b.json"]
        (folder / MANIFEST_FILE).write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=rf"^{MANIFEST_FILE} is damaged \(.* is no path within the folder\)"):
            read_manifest(folder)

    @pytest.mark.parametrize(
        "data",
        [
            [],
            3,
            None,
            {},
            {"format": 1},
            {"format": 2, "files": {}},
            {"format": 1, "files": []},
            {"format": 1, "files": {"a": {}}},
            {"format": 1, "files": {"a": {"bytes": True, "sha256": ""}}},
            {"format": 1, "files": {"a": {"bytes": "1", "sha256": ""}}},
            {"format": 1, "files": {"a": {"bytes": 1, "sha256": 3}}},
            {"format": 1, "files": {"a": {"bytes": 1, "sha256": "", "tensors": []}}},
            {"format": 1, "files": {"a": {"bytes": 1, "sha256": "", "tensors": {"x": 3}}}},
        ],
        ids=str,
    )
    def test_what_is_none(self, data: Any, folder: Path) -> None:
        (folder / MANIFEST_FILE).write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=rf"^{MANIFEST_FILE} is damaged [^\n]+remove {MANIFEST_FILE}"):
            read_manifest(folder)

    def test_a_folder_without_one(self, folder: Path) -> None:
        (folder / MANIFEST_FILE).unlink()
        (folder / "b.json").write_text("changed")
        assert read_manifest(folder) is None
        check_as_written(folder, lambda name: True)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda file: file.write_text("{} "), "has 3 bytes, 2 were written"),
            (lambda file: file.write_text("[]"), r"has other bytes than were written \(sha256 "),
            (lambda file: file.unlink(), "is missing"),
            (lambda file: (file.unlink(), file.mkdir()), "is no regular file"),
        ],
    )
    def test_what_has_changed(self, change: Any, match: str, folder: Path) -> None:
        check_as_written(folder, lambda name: True)
        change(folder / "b.json")
        with pytest.raises(
            CheckpointError, match=rf"^b\.json {match}.*if it was changed on purpose, remove {MANIFEST_FILE}"
        ):
            check_as_written(folder, lambda name: True)
        check_as_written(folder, lambda name: name != "b.json")

    def test_what_was_added(self, folder: Path) -> None:
        (folder / "d.safetensors").write_bytes((folder / "c.safetensors").read_bytes())
        check_as_written(folder, lambda name: name.endswith(".json"))
        with pytest.raises(CheckpointError, match=r"^d\.safetensors was not written with the rest"):
            check_as_written(folder, lambda name: name.endswith(".safetensors"))

    @pytest.mark.parametrize(
        ("tensors", "match"),
        [
            ({"w": torch.zeros(2, 3, dtype=torch.bfloat16)}, "lacks the tensor n"),
            ({"w": torch.zeros(2, 4, dtype=torch.bfloat16)}, r"lacks the tensor n"),
            ({"n": torch.tensor(1), "w": torch.zeros(3, 2).bfloat16()}, r"holds w as BF16 \[3, 2\], BF16 \[2, 3\] was"),
            (
                {"n": torch.tensor(1), "w": torch.zeros(2, 3).half()},
                r"holds w as F16 \[2, 3\], BF16 \[2, 3\] was written",
            ),
            ({"n": torch.tensor(1), "w": torch.zeros(2, 3).bfloat16(), "x": torch.ones(1)}, "holds x, which was not"),
        ],
    )
    def test_tensors_are_named(self, tensors: dict[str, torch.Tensor], match: str, folder: Path) -> None:
        save_file(tensors, folder / "c.safetensors")
        with pytest.raises(CheckpointError, match=rf"^c\.safetensors {match}"):
            check_as_written(folder, lambda name: name == "c.safetensors")

    def test_bytes_of_weights_are_read_when_asked(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        assert manifest is not None
        raw = bytearray((folder / "c.safetensors").read_bytes())
        raw[-1] ^= 1
        (folder / "c.safetensors").write_bytes(raw)
        written = manifest["c.safetensors"]
        assert changes(folder, "c.safetensors", written, hashed=False) is None
        assert "has other bytes" in (changes(folder, "c.safetensors", written, hashed=True) or "")


class TestTensors:
    @pytest.mark.parametrize("raw", [b"", b"1234567", b"\xff" * 100, (2**40).to_bytes(8, "little") + b"{}"])
    def test_what_is_no_file_of_weights(self, raw: bytes, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"^x\.safetensors is truncated or not a safetensors file"):
            tensors_in(tmp_path / "x.safetensors")

    def test_a_header_that_is_deeply_nested(self, tmp_path: Path) -> None:
        header = b"[" * 100_000
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            tensors_in(tmp_path / "x.safetensors")
