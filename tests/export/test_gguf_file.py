"""GGUF files on the disk: types, bytes, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_cases import WIDE, case_model, fields, needs_llama_cpp, write
from transformers import AutoConfig

import secateur.export.gguf_file
import secateur.export.tensors
from families import family_model
from secateur.errors import CheckpointError, ExportError
from tiny import names, tiny_model


def test_rows_that_do_not_divide_into_blocks_stay_in_f16(tmp_path: Path) -> None:
    written = write(case_model("llama"), tmp_path / "m.gguf", gguf="q8_0")
    assert written.plain == tuple(f"blk.{layer}.attn_output.weight" for layer in range(3))  # rows of 6 heads of 24
    assert written.notes[-1].startswith("3 matrices stay in f16, since their rows are no multiples of 32: blk.0.attn_")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert (kinds["blk.0.attn_output.weight"], kinds["blk.0.attn_q.weight"]) == ("F16", "Q8_0")


@needs_llama_cpp
def test_mlps_are_padded_to_whole_blocks(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **{**WIDE, "intermediate_size": 149})
    model = family_model(config, dtype=torch.float32)
    written = write(model, tmp_path / "m.gguf", gguf="q8_0", check=True)
    assert fields(tmp_path / "m.gguf")["llama.feed_forward_length"] == 160
    assert written.added == 3 * 3 * 96 * 11
    assert "blk.0.ffn_down.weight" not in written.plain


def test_a_model_of_which_no_row_divides_into_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"q8_0 stores rows in blocks of 32 numbers, and the hidden width is 50,"):
        write(
            tiny_model(hidden_size=50, num_attention_heads=5, num_key_value_heads=5),
            tmp_path / "m.gguf",
            gguf="q8_0",
        )


def test_numbers_beyond_f16_are_refused_there(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[0, 0] = 1e5
    with pytest.raises(
        ExportError, match=r"blk\.2\.ffn_up\.weight holds 9\.98e\+04, more than f16 can; write --gguf bf16"
    ):
        write(model, tmp_path / "m.gguf", gguf="f16")
    assert names(tmp_path) == []
    write(model, tmp_path / "m.gguf", gguf="bf16")
    tensor = next(t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.2.ffn_up.weight")
    wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    kept = model.get_parameter("model.layers.2.mlp.up_proj.weight").detach()
    assert np.array_equal(wide[: len(kept)], kept.float().numpy())
    assert not wide[len(kept) :].any()  # the channels that fill up the last block


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(bad: float, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = bad
    with pytest.raises(ExportError, match=r"output_norm\.weight holds NaN or Inf"):
        write(model, tmp_path / "m.gguf")
    assert names(tmp_path) == []


def test_one_tensor_at_a_time_is_read_and_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is read before the file is open, and none twice."""
    read: list[str] = []
    plain = secateur.export.tensors.encode

    def note(name: str, values: torch.Tensor, kind: str) -> Any:
        assert names(tmp_path) == [f".m.gguf.{os.getpid()}.partial"]
        read.append(name)
        return plain(name, values, kind)

    monkeypatch.setattr(secateur.export.gguf_file, "encode", note)
    done: list[tuple[int, int]] = []
    write(tiny_model(), tmp_path / "m.gguf", progress=lambda *step: done.append(step))
    assert len(read) == len(set(read)) == 3 * 9 + 3
    assert done == [(n, 30) for n in range(1, 31)]


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("before")
    with pytest.raises(CheckpointError, match=r"m\.gguf exists; name another file, or replace it with --overwrite"):
        write(tiny_model(), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "before"
    write(tiny_model(), tmp_path / "m.gguf", overwrite=True)
    assert GGUFReader(tmp_path / "m.gguf").tensors


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"m\.bin does not end in \.gguf; name it .*m\.bin\.gguf"):
        write(tiny_model(), tmp_path / "m.bin")


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_text("before")
    monkeypatch.setattr(secateur.export.gguf_file, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tiny_model(), tmp_path / "m.gguf", overwrite=True)
    assert names(tmp_path) == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "before"


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tiny_model(), tmp_path / folder / "m.gguf")
    assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()


def test_without_llama_cpp_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"which is not installed: pip install 'secateur\[gguf\]'"):
        write(tiny_model(), tmp_path / "m.gguf", check=True)
    assert write(tiny_model(), tmp_path / "m.gguf", check=None).checked is None
