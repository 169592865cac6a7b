"""One entry for every export format: it chooses the format, refuses early, and writes JSON of its result."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf_cases import needs_llama_cpp

from secateur.cli.main import run
from secateur.errors import CheckpointError, ExportError, ModelError, SecateurError
from secateur.export.formats import ExportOptions, choose_format, export_model
from secateur.export.gguf_file import GgufResult
from secateur.export.llama_cpp import _library, is_installed
from secateur.export.options import GgufOptions, Int8Options, MergeOptions, QuantizeOptions
from secateur.models.silence import quiet
from tiny import names, tiny_model

GGUF, INT8, MERGE = GgufOptions(check=False), Int8Options(), MergeOptions()


def test_whether_llama_cpp_can_run_files_here() -> None:
    """Tests ask for the package, so an answer that is wrong is no reason to leave them out."""
    assert is_installed() == (find_spec("llama_cpp_py_sync") is not None)


@needs_llama_cpp
def test_a_library_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("wrong ELF class")

    monkeypatch.setattr("llama_cpp_py_sync._cffi_bindings.get_lib", fail)
    with pytest.raises(ExportError, match=r"llama.cpp is installed, but its library does not load \(.*wrong ELF class"):
        _library.__wrapped__()


def test_the_format_is_the_one_that_was_asked_for() -> None:
    assert choose_format(Path("m.gguf")) == GgufOptions()
    assert choose_format(Path("m.gguf"), gguf=GGUF) is GGUF
    assert choose_format(Path("out"), int8=INT8) is INT8
    assert choose_format(Path("out"), merge=MERGE) is MERGE


@pytest.mark.parametrize(
    ("out", "asked", "match"),
    [
        (
            "out",
            {},
            r"out: no format to write\. Expected --quantize SCHEME, --gguf TYPE or --int8, or a file named out\.gguf",
        ),
        ("m.gguf", {"int8": INT8}, r"--quantize and --int8 write a folder each, and --gguf a \.gguf file: export once"),
        ("out", {"gguf": GGUF, "int8": INT8}, "export once for each, to OUTs of their own"),
        ("out", {"quantize": QuantizeOptions(), "int8": INT8}, "export once for each, to OUTs of their own"),
        ("out", {"merge": MERGE, "int8": INT8}, "merge first, then export that folder"),
        ("m.gguf", {"merge": MERGE}, "merge first, then export that folder"),
    ],
)
def test_two_formats_or_none_are_refused(out: str, asked: dict[str, Any], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        choose_format(Path(out), **asked)


def test_an_unknown_type_is_refused_with_the_tool_that_writes_it() -> None:
    with pytest.raises(ExportError, match=r"gguf='q4_k_m' is unknown\. Expected f32, .* or q4_0.*llama-quantize"):
        GgufOptions("q4_k_m")  # type: ignore[arg-type]  # what is refused


@pytest.mark.parametrize(
    ("out", "options", "error", "match"),
    [
        ("out.bin", GGUF, ExportError, r"out\.bin does not end in \.gguf; name it out\.bin\.gguf"),
        ("no/out.gguf", GGUF, CheckpointError, "does not exist; make it first: mkdir -p"),
        ("no/out", INT8, CheckpointError, "does not exist; make it first: mkdir -p"),
    ],
)
def test_what_shows_without_weights_is_refused_before_they_are_read(
    out: str,
    options: ExportOptions,
    error: type[SecateurError],
    match: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secateur.export.source.load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(error, match=match):
        export_model(str(tiny), out, options)
    assert names(tmp_path) == []


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with quiet():
        tiny_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        export_model(str(tmp_path / "bare"), tmp_path / "m.gguf", GGUF)
    assert names(tmp_path / "bare") == ["config.json", "generation_config.json", "model.safetensors"]


@needs_llama_cpp
def test_the_command_shows_and_writes_the_comparison(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = tmp_path / "m.gguf", tmp_path / "m.json"
    assert run(["export", str(tiny), str(out), "--gguf", "f32", "--json", str(result)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "texts tokenized alike    │ 15 of 15" in shown.out
    data = json.loads(result.read_text())
    assert data.keys() == {field.name for field in dataclasses.fields(GgufResult)}
    assert (data["out"], data["architecture"], data["dtype"]) == (str(out), "llama", "f32")
    assert data["bytes"] == out.stat().st_size
    assert data["checked"]["difference"] < 1e-4
