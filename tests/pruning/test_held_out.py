"""Repair never does more damage to held-out windows than the cut alone, and takes the better way to choose units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from test_repair import HELD_OUT, WINDOWS, planned
from torch import Tensor

import secateur.pruning.held_out
from secateur import prune
from secateur.pruning.held_out import CHOICES, best_repair, left_out
from secateur.pruning.repair import Repaired, repair
from secateur.scoring.passes.forward import summed_loss


def loss_of(model: Any, discovery: Any, found: Repaired) -> float:
    smaller = prune(model, found.plan, discovery=discovery, weights=found.weights)
    return float(summed_loss(smaller, HELD_OUT)) / HELD_OUT[:, 1:].numel()


@pytest.mark.parametrize("windows", [WINDOWS[:1, :6], WINDOWS[:2], WINDOWS])
@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_repair_is_never_worse_than_the_cut(windows: Tensor, outlier: float) -> None:
    """With few windows and one channel a thousand times larger than the others, least squares alone can be."""
    model, discovery, decided = planned("llama", choose="held-out")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name:  # rows are channels
                parameter[5] *= outlier
    repaired, losses = best_repair(model, decided, discovery, windows, HELD_OUT)
    assert list(losses) == ["before", "cut", "obs", "score"]
    assert loss_of(model, discovery, repaired) == pytest.approx(min([*losses.values()][1:]), abs=1e-9)
    cut = repair(model, decided, discovery, windows, method="none")
    assert losses["cut"] == pytest.approx(loss_of(model, discovery, cut), abs=1e-9)


@pytest.mark.parametrize("best", ["cut", "obs", "score"])
def test_what_loses_least_is_taken(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, discovery, decided = planned("llama", choose="held-out")
    losses = {"before": 1.0, "cut": 3.0, "obs": 3.0, "score": 3.0} | {best: 2.0}
    measured = iter(losses.values())
    monkeypatch.setattr(secateur.pruning.held_out, "_mean_loss", lambda *_: next(measured))
    repaired, found = best_repair(model, decided, discovery, WINDOWS, HELD_OUT)
    assert found == losses
    method = "none" if best == "cut" else "least-squares"
    expected = repair(model, decided, discovery, WINDOWS, method=method, choose=best == "obs")
    assert repaired.plan == expected.plan
    assert left_out(found) == (best == "cut")  # so a replay of the plan repairs nothing either
    assert repaired.weights.keys() == expected.weights.keys()
    assert all(torch.equal(weight, expected.weights[name]) for name, weight in repaired.weights.items())


@pytest.mark.parametrize("choice", CHOICES)
def test_one_choice_is_compared_with_the_cut_alone(choice: Literal["obs", "score"], tmp_path: Path) -> None:
    model, discovery, decided = planned("llama", choose="held-out")
    alone = replace(decided, options=replace(decided.options, choose=choice))
    repaired, losses = best_repair(model, alone, discovery, WINDOWS, HELD_OUT, room=tmp_path)
    _, all_losses = best_repair(model, decided, discovery, WINDOWS, HELD_OUT)
    assert losses == {name: all_losses[name] for name in ("before", "cut", choice)}
    assert not any(tmp_path.iterdir())
    assert loss_of(model, discovery, repaired) == pytest.approx(min(losses["cut"], losses[choice]), abs=1e-9)


def test_one_pass_after_the_other_counts_to_the_end() -> None:
    model, discovery, decided = planned("llama", choose="held-out")
    shown: list[tuple[int, int]] = []
    best_repair(model, decided, discovery, WINDOWS, HELD_OUT, progress=lambda done, total: shown.append((done, total)))
    assert shown == sorted(shown)
    assert shown[-1][0] == shown[-1][1]


def test_a_repetition_has_nothing_left_to_choose() -> None:
    model, discovery, decided = planned("llama", choose="held-out")
    repaired, _ = best_repair(model, decided, discovery, WINDOWS, HELD_OUT)
    assert repaired.plan.options.choose == "score"
