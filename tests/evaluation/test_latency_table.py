"""Latency tables are measured once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families import family_config, family_model
from secateur import discover
from secateur.evaluation.latency import latency_table


def test_a_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    discovery = discover(model)
    groups = [group for group in discovery.groups if group.kind in ("attention", "mlp")]
    table = latency_table(model, discovery, groups, seq_len=8, cache=tmp_path)
    assert [units for units, _ in table.savings["attention"]] == [1, 2, 3]
    assert [units for units, _ in table.savings["mlp"]] == [21, 42, 63, 84]
    assert table.dense_seconds > 0
    monkeypatch.setattr("secateur.evaluation.latency.measure_speed", None)
    assert latency_table(model, discovery, groups, seq_len=8, cache=tmp_path) == table
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    with pytest.raises(TypeError):  # a damaged file is measured again
        latency_table(model, discovery, groups, seq_len=8, cache=tmp_path)
