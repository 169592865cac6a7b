"""Records of how a checkpoint was made: hashes of weights, round trips, damage, other versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.checkpoint.record import Record, make_record, read_record, weights_digest
from secateur.errors import CheckpointError
from secateur.files import RECORD_FILE


class TestRecord:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_every_bit_counts(self, dtype: torch.dtype) -> None:
        model = nn.Linear(3, 2).to(dtype)
        found = {weights_digest(model)}
        raw = model.weight.data.view(torch.uint8)
        for byte in range(raw.shape[1]):
            for bit in range(8):
                raw[0, byte] ^= 1 << bit
                found.add(weights_digest(model))
                raw[0, byte] ^= 1 << bit
        assert len(found) == 1 + 8 * raw.shape[1]
        assert weights_digest(model) in found

    def test_names_shapes_and_dtypes_count(self) -> None:
        def digest(shape: tuple[int, int], dtype: torch.dtype = torch.float32, name: str = "a") -> str:
            holder = nn.Module()
            holder.register_buffer(name, torch.zeros(shape, dtype=dtype))
            return weights_digest(holder)

        same = digest((2, 3))
        assert same == digest((2, 3))
        assert len({same, digest((3, 2)), digest((2, 3), torch.int32), digest((2, 3), name="b")}) == 4

    def test_order_does_not_count(self) -> None:
        first, second = nn.ModuleDict(), nn.ModuleDict()
        layers = {name: nn.Linear(2, 2) for name in "ab"}
        first.update(layers)
        second.update(dict(reversed(layers.items())))
        assert weights_digest(first) == weights_digest(second)

    def test_round_trip(self) -> None:
        options = {"text": "demo", "seed": 3}
        scored = {"calibration": "hash", "calibration_options": options, "seed": 3}
        record = make_record(nn.Linear(2, 2), name="x", scored=scored, seed=4, command="c")
        assert Record(**json.loads(json.dumps(record.to_json()))) == record
        assert record.versions.keys() == {"secateur", "torch", "transformers", "python"}
        assert (record.calibration, record.seed, record.dtype) == ("hash", 3, "float32")
        assert record.calibration_options == options

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("{", "cannot be read; Expecting property name"),
            ("[" * 100_000, "cannot be read; maximum recursion depth"),
            ("[]", r"is damaged \(\[\] is no Record\)"),
            ('{"colour": "green"}', r"is damaged \(model is missing\)"),
            ('{"model": 3}', r"is damaged \(model: 3 is no str\)"),
        ],
    )
    def test_a_damaged_record(self, content: str, match: str, tmp_path: Path) -> None:
        (tmp_path / RECORD_FILE).write_text(content)
        with pytest.raises(CheckpointError, match=rf"^[^\n]*{tmp_path.name}: {RECORD_FILE} {match}[^\n]*$"):
            read_record(tmp_path)

    def test_options_of_another_type(self, tmp_path: Path) -> None:
        data = make_record(nn.Linear(2, 2), name="x").to_json()
        (tmp_path / RECORD_FILE).write_text(json.dumps({**data, "calibration_options": {"samples": "many"}}))
        with pytest.raises(CheckpointError, match=r"is damaged \(calibration_options: samples: 'many' is no int\)"):
            read_record(tmp_path)

    def test_no_record(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").touch()
        assert read_record(tmp_path) is None
        assert read_record(tmp_path / "config.json") is None

    def test_a_record_of_an_earlier_version(self, tmp_path: Path) -> None:
        data = make_record(nn.Linear(2, 2), name="x").to_json()
        del data["calibration_options"], data["tensors"]
        (tmp_path / RECORD_FILE).write_text(json.dumps(data))
        record = read_record(tmp_path)
        assert record is not None
        assert (record.model, record.calibration_options, record.tensors) == ("x", None, None)

    def test_a_record_of_a_later_version(self, tmp_path: Path) -> None:
        data = make_record(nn.Linear(2, 2), name="x").to_json()
        (tmp_path / RECORD_FILE).write_text(json.dumps({**data, "mood": "good"}))
        record = read_record(tmp_path)
        assert record is not None
        assert record.to_json() == data
