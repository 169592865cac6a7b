"""Latency tables are measured once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from families import family_config, family_model
from secateur import discover
from secateur.evaluation.latency import latency_table
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup
from secateur.pruning.prune import prune


def test_a_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    discovery = discover(model)
    groups = [group for group in discovery.groups if group.kind in ("attention", "mlp")]
    table = latency_table(model, discovery, groups, seq_len=8, cache=tmp_path)
    assert [kept for kept, _ in table.saved_per_unit["attention"]] == [1 / 3, 2 / 3, 1]
    assert [kept for kept, _ in table.saved_per_unit["mlp"]] == [0.25, 0.5, 0.75, 1]
    assert table.dense_seconds > 0
    monkeypatch.setattr("secateur.evaluation.latency.measure_speed", None)
    assert latency_table(model, discovery, groups, seq_len=8, cache=tmp_path) == table
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    with pytest.raises(TypeError):  # a damaged file is measured again
        latency_table(model, discovery, groups, seq_len=8, cache=tmp_path)


def test_layers_of_different_sizes_save_by_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    dense = discover(model)
    narrow = next(group for group in dense.groups if group.kind == "mlp")
    cut = PlannedGroup(narrow.name, "mlp", narrow.layer, narrow.units, 20, tuple(range(20)))
    pruned = prune(model, Plan("llama", CutOptions(ratio=0.0), (cut,), {}, {}), discovery=dense)
    discovery = discover(pruned)
    groups = [group for group in discovery.groups if group.kind == "mlp"]
    assert {group.units for group in groups} == {20, 84}

    def half_as_long(models: dict[str, object], options: object) -> list[dict[str, SimpleNamespace]]:
        return [{"dense": SimpleNamespace(prefill_seconds=1.0), "cut": SimpleNamespace(prefill_seconds=0.5)}]

    monkeypatch.setattr("secateur.evaluation.latency.measure_speed", half_as_long)
    table = latency_table(pruned, discovery, groups, seq_len=8, cache=tmp_path)
    halves = {group.name: group.units // 2 for group in groups}
    assert table.seconds(discovery, halves) == pytest.approx(0.5)
    assert table.seconds(discovery, {narrow.name: 10}) == pytest.approx(1 - 0.5 * 20 / sum(g.units for g in groups))
