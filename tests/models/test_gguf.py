"""A GGUF is parsed once, and silently."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from model_folders import fails
from secateur.export.gguf_file import export_gguf
from secateur.models.config import load_config
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from tiny import tiny_model, tiny_tokenizer


class TestGguf:
    def test_config_tokenizer_and_weights_share_one_parse(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gguf = pytest.importorskip("gguf")
        file = str(tmp_path / "tiny.gguf")
        export_gguf(tiny_model(), tiny_tokenizer(), file)
        read: list[str] = []

        class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
            def __init__(self, path: str) -> None:
                read.append(path)
                super().__init__(path)

        monkeypatch.setattr(gguf, "GGUFReader", Reader)
        config, tokenizer = load_config(file), load_tokenizer(file)
        assert load(file, device="cpu").config.vocab_size == config.vocab_size == tokenizer.vocab_size
        assert len(read) == 1
        load_config(file).vocab_size = 0  # a copy: the config is kept, after the weights nothing else is
        assert load_config(file).vocab_size == config.vocab_size
        assert len(read) == 1
        load_tokenizer(file)
        assert len(read) == 2
        assert gguf.GGUFReader is Reader

    def test_another_gguf_of_that_name_is_read(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        for layers in (2, 3):
            writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
            writer.add_block_count(layers)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            assert load_config(str(tmp_path / "x.gguf")).num_hidden_layers == layers

    def test_an_old_transformers_would_take_other_special_tokens(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
        monkeypatch.setattr(importlib.metadata, "version", lambda _: "5.17.0")
        with fails("the tokenizer of a GGUF file needs transformers 5.18 or newer, and 5.17.0 is installed"):
            load_tokenizer(str(tmp_path / "x.gguf"))

    def test_a_broken_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
        for function in (load_config, load, load_tokenizer):
            with fails("x.gguf': "):
                function(str(tmp_path / "x.gguf"))
