"""Repair never does more damage to held-out windows than the cut alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_repair import HELD_OUT, WINDOWS, by_score, planned
from torch import Tensor

import secateur.pruning.held_out
from secateur import prune
from secateur.pruning.held_out import checked_reconstruction, checked_repair, repair_rejected
from secateur.pruning.reconstruct import LayerTraining
from secateur.pruning.repair import Repaired, repair
from secateur.scoring.passes.loss import summed_loss


def loss_of(model: Any, discovery: Any, found: Repaired) -> float:
    smaller = prune(model, found.plan, discovery=discovery, weights=found.weights)
    return float(summed_loss(smaller, HELD_OUT)) / HELD_OUT[:, 1:].numel()


@pytest.mark.parametrize("windows", [WINDOWS[:1, :6], WINDOWS[:2], WINDOWS])
@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_repair_is_never_worse_than_the_cut(windows: Tensor, outlier: float) -> None:
    """With few windows and one channel a thousand times larger than the others, least squares alone can be."""
    model, discovery, decided = planned("llama", choose="obs")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name:  # rows are channels
                parameter[5] *= outlier
    repaired, losses = checked_repair(model, decided, discovery, windows, HELD_OUT)
    assert list(losses) == ["before", "cut", "repaired"]
    assert loss_of(model, discovery, repaired) == pytest.approx(min([*losses.values()][1:]), abs=1e-9)
    cut = repair(model, by_score(decided), discovery, windows, method="none")
    assert losses["cut"] == pytest.approx(loss_of(model, discovery, cut), abs=1e-9)


@pytest.mark.parametrize("best", ["cut", "repaired"])
def test_what_loses_least_is_taken(best: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, discovery, decided = planned("llama", choose="obs")
    losses = {"before": 1.0, "cut": 3.0, "repaired": 3.5} | {best: 2.0}
    measured = iter(losses.values())
    monkeypatch.setattr(secateur.pruning.held_out, "_mean_loss", lambda *_: next(measured))
    repaired, found = checked_repair(model, decided, discovery, WINDOWS, HELD_OUT, room=tmp_path)
    assert not any(tmp_path.iterdir())
    assert found == losses
    if best == "cut":
        expected = repair(model, by_score(decided), discovery, WINDOWS, method="none")
    else:
        expected = repair(model, decided, discovery, WINDOWS)
    assert repaired.plan == expected.plan
    assert repair_rejected(found) == (best == "cut")  # so a replay of the plan repairs nothing either
    assert repaired.weights.keys() == expected.weights.keys()
    assert all(torch.equal(weight, expected.weights[name]) for name, weight in repaired.weights.items())


@pytest.mark.parametrize(
    ("measured", "trained", "last"),
    [
        ([5.0, 4.0, 3.5, 3.0], 3, 3.0),
        ([5.0, 5.1, 4.0, 4.0], 2, 4.0),
        ([5.0, 4.0, math.inf, 4.5], 1, 4.0),
        ([5.0, 5.5, 5.2], 0, 5.2),  # twice in a row: the third layer is not trained
    ],
)
def test_layers_are_trained_as_far_as_the_model_loses_less(
    measured: list[float], trained: int, last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearer to the dense layer, and yet worse: so measured on Gemma-3-270M, whose residuals grow large."""
    model, discovery, decided = planned("llama", choose="score")
    smaller = prune(model, decided, discovery=discovery)
    before = {name: parameter.detach().clone() for name, parameter in smaller.named_parameters()}
    losses = iter([*measured, 1.0])  # before, after each part, and the dense model's
    monkeypatch.setattr(secateur.pruning.held_out, "_mean_loss", lambda *_: next(losses))
    training = LayerTraining(steps=10, batch_tokens=64, learning_rate=0.01)
    found = checked_reconstruction(model, smaller, discovery, WINDOWS, HELD_OUT, training=training)
    assert found == {"before": 1.0, "reconstructed": last}
    changed = {name.split(".")[2] for name, value in smaller.named_parameters() if not torch.equal(before[name], value)}
    assert changed == {str(layer) for layer in range(trained)}


@pytest.mark.parametrize("learning_rate", [0.01, 100.0])
def test_layers_that_are_trained_do_not_raise_the_loss(learning_rate: float) -> None:
    model, discovery, decided = planned("llama", choose="score")
    smaller = prune(model, decided, discovery=discovery)
    first = float(summed_loss(smaller, HELD_OUT))
    training = LayerTraining(steps=10, batch_tokens=64, learning_rate=learning_rate)
    checked_reconstruction(model, smaller, discovery, WINDOWS, HELD_OUT, training=training)
    assert float(summed_loss(smaller, HELD_OUT)) <= first


def test_progress_counts_to_the_end() -> None:
    model, discovery, decided = planned("llama", choose="obs")
    shown: list[tuple[int, int]] = []
    checked_repair(
        model, decided, discovery, WINDOWS, HELD_OUT, progress=lambda done, total: shown.append((done, total))
    )
    assert shown == sorted(shown)
    assert shown[-1][0] == shown[-1][1]


def test_a_repetition_has_nothing_left_to_choose() -> None:
    model, discovery, decided = planned("llama", choose="obs")
    repaired, _ = checked_repair(model, decided, discovery, WINDOWS, HELD_OUT)
    assert repaired.plan.options.choose == "score"
    assert all(group.spare is None for group in repaired.plan.groups)
