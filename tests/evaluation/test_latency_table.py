"""Latency tables are measured once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from families import family_config, family_model
from secateur import discover
from secateur.discovery.groups import Discovery, Group
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


def with_narrow_layer(units: int) -> tuple[Any, Discovery, list[Group]]:
    """A model whose first MLP is cut to so many units, and its MLPs."""
    model = family_model(family_config("llama"), dtype=torch.float32)
    dense = discover(model)
    narrow = next(group for group in dense.groups if group.kind == "mlp")
    cut = PlannedGroup(narrow.name, "mlp", narrow.layer, narrow.units, units, tuple(range(units)))
    pruned = prune(model, Plan("llama", CutOptions(ratio=0.0), (cut,), {}, {}), discovery=dense)
    discovery = discover(pruned)
    return pruned, discovery, [group for group in discovery.groups if group.kind == "mlp"]


def half_as_long(models: dict[str, object], options: object) -> list[dict[str, SimpleNamespace]]:
    return [{"dense": SimpleNamespace(prefill_seconds=1.0), "cut": SimpleNamespace(prefill_seconds=0.5)}]


def test_layers_of_different_sizes_save_by_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, discovery, groups = with_narrow_layer(20)
    assert groups[0].units == 20
    monkeypatch.setattr("secateur.evaluation.latency.measure_speed", half_as_long)
    table = latency_table(pruned, discovery, groups, seq_len=8, cache=tmp_path)
    halves = {group.name: group.units // 2 for group in groups}
    assert table.seconds(discovery, halves) == pytest.approx(0.5)
    share = 20 / sum(group.units for group in groups)
    assert table.seconds(discovery, {groups[0].name: 10}) == pytest.approx(1 - 0.5 * share)


def test_a_kind_is_timed_by_the_group_that_can_give_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, discovery, groups = with_narrow_layer(2)
    monkeypatch.setattr("secateur.evaluation.latency.measure_speed", half_as_long)
    table = latency_table(pruned, discovery, groups, seq_len=8, cache=tmp_path)
    assert [kept for kept, _ in table.saved_per_unit["mlp"]] == [0.25, 0.5, 0.75, 1]
    assert table.seconds(discovery, {groups[0].name: 2}) == 1
