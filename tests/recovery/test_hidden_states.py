"""Hidden states of the teacher are learned at the layers and channels that a plan has left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import place_fixture, shelf, train  # noqa: F401 - the fixture `place`

from secateur import DataOptions
from secateur.data.rows import IGNORED, collate
from secateur.data.training_data import read_training_data
from secateur.discovery.counting import count_parameters
from secateur.discovery.discover import discover
from secateur.errors import ModelError, TrainingError
from secateur.models.loading import load
from secateur.planning.plan import read_plan
from secateur.recovery.hidden_states import (
    MatchedLayers,
    hidden_states_loss,
    match_layers,
    record_outputs,
    select_states,
)
from tiny import names, tiny_tokenizer, write_tiny

LAYERS = tuple(f"model.layers.{i}" for i in range(3))


def matched(name: str) -> MatchedLayers:
    dense, pruned = (discover(str(shelf() / each)) for each in ("dense", name))
    plan = read_plan(shelf() / name / "secateur_plan.json")
    return match_layers(plan, dense, pruned, teacher="dense", width=48)


class TestMatch:
    def test_by_the_plan(self) -> None:
        assert matched("per-layer") == MatchedLayers(LAYERS, LAYERS, None, 48)
        channels = read_plan(shelf() / "hidden" / "secateur_plan.json").groups[0].keep
        assert channels is not None
        assert matched("hidden") == MatchedLayers(LAYERS, LAYERS, channels, len(channels))
        kept = read_plan(shelf() / "layers" / "secateur_plan.json").groups[0].keep
        assert kept is not None
        assert matched("layers") == MatchedLayers(LAYERS[:2], tuple(LAYERS[i] for i in kept), None, 48)

    def test_of_many_layers_four_with_the_last(self, tmp_path: Path) -> None:
        found = discover(str(write_tiny(tmp_path / "deep", num_hidden_layers=9)))
        plan = read_plan(shelf() / "per-layer" / "secateur_plan.json")
        plan = replace(plan, groups=(), parameters={"dense": count_parameters(found)})
        chosen = match_layers(plan, found, found, teacher="deep", width=48).pruned
        assert chosen == tuple(f"model.layers.{i}" for i in (1, 3, 6, 8))

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        wide = discover(str(write_tiny(tmp_path / "wide", intermediate_size=100)))
        plan = read_plan(shelf() / "per-layer" / "secateur_plan.json")
        with pytest.raises(ModelError, match="which of its hidden states belong to which layer is not known"):
            match_layers(plan, wide, discover(str(shelf() / "per-layer")), teacher="wide", width=48)


class TestLoss:
    def test_the_formula(self) -> None:
        student, teacher = torch.randn(2, 5, 3, 7, generator=torch.Generator().manual_seed(0)).unbind()
        expected = 0.0
        for position in range(5):
            for layer in range(3):
                t, s = teacher[position, layer], student[position, layer]
                expected += float(((s - t) ** 2).mean() / t.var(unbiased=False)) / 3
        assert float(hidden_states_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)

    def test_a_position_with_large_states_counts_as_any_other(self) -> None:
        student, teacher = torch.randn(2, 2, 1, 7, generator=torch.Generator().manual_seed(1)).unbind()
        alone = [float(hidden_states_loss(student[i : i + 1], teacher[i : i + 1])) for i in range(2)]
        student[1], teacher[1] = 1000 * student[1], 1000 * teacher[1]
        assert float(hidden_states_loss(student, teacher)) == pytest.approx(sum(alone), rel=1e-4)

    def test_other_shapes_are_refused(self) -> None:
        with pytest.raises(TrainingError, match=r"hidden states of \[1, 1, 4\] .* are \[1, 1, 5\]"):
            hidden_states_loss(torch.zeros(1, 1, 4), torch.zeros(1, 1, 5))


def state_distance(folder: str | Path, name: str) -> float:
    """How far the states of a folder are from those of the dense model, per position."""
    layers = matched(name)
    data = DataOptions((str(shelf() / "rows.json"),), max_length=128)
    batch = collate(read_training_data(tiny_tokenizer(), data).train, range(20), pad=0)
    mask_BT = batch.pop("labels") != IGNORED
    model, dense = load(str(folder), device="cpu"), load(str(shelf() / "dense"), device="cpu")
    with torch.no_grad(), record_outputs(model, layers.pruned) as own, record_outputs(dense, layers.dense) as others:
        model(**batch)
        dense(**batch)
    expected = select_states(others, layers.dense, mask_BT)
    expected = expected if layers.channels is None else expected[..., list(layers.channels)]
    return float(hidden_states_loss(select_states(own, layers.pruned, mask_BT), expected)) / int(mask_BT.sum())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "rate"), [("hidden", "lora+distill", 1e-3), ("layers", "distill", 2e-4)])
def test_training_brings_the_states_nearer(name: str, method: str, rate: float, place: Path) -> None:
    given: dict[str, Any] = {"method": method, "max_steps": 24, "learning_rate": rate, "eval_steps": 24}
    found = train(name, hidden_states_weight=10.0, **given)
    train(name, "here/without", **given)
    after = state_distance("here/out", name)
    assert after < 0.3 * state_distance(shelf() / name, name)
    assert after < 0.3 * state_distance("here/without", name)
    layers = ", ".join(matched(name).pruned)
    assert any(f"layers were compared ({layers}); the teacher's took" in note for note in found.notes)
    assert [path for path in names(place) if "/" not in path] == ["out", "without"]
