"""Pruning in several iterations ends at the budget, as one plan of the dense model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import family_config, family_model
from recipes import cut_in_memory
from secateur import CutOptions, discover, plan, prune
from secateur.discovery.counting import count_parameters
from secateur.errors import PlanError

WINDOWS = torch.randint(3, 97, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("of", ["units", "non-embedding", "macs", "memory"])
def test_iterations_end_at_the_budget(of: Any) -> None:
    model = family_model(family_config("llama", intermediate_size=400), dtype=torch.float32)
    discovery = discover(model)
    options = CutOptions(ratio=0.4, of=of, axes=("mlp",), score="l2", iterations=3, scope="local", shape="uniform")
    smaller, decided = cut_in_memory(model, discovery, options, None)
    one = plan(discovery, replace(options, iterations=1), config=model.config)
    assert decided.parameters["dense"] == count_parameters(discovery)
    assert decided.parameters["pruned"] == sum(p.numel() for p in smaller.parameters())
    assert decided.parameters["pruned"] == pytest.approx(one.parameters["pruned"], rel=0.01)
    assert decided.settings == {"intermediate_size": smaller.config.intermediate_size}


def test_a_plan_made_in_iterations_is_one_of_the_dense_model() -> None:
    model = family_model(family_config("llama"), dtype=torch.float64)
    discovery = discover(model)
    options = CutOptions(ratio=0.4, scope="global", shape="per-layer", score="l2", iterations=3, min_keep=0.0)
    smaller, decided = cut_in_memory(model, discovery, options, None)
    at_once = prune(model, decided, discovery=discovery)
    with torch.no_grad():
        assert torch.allclose(at_once(WINDOWS).logits, smaller(WINDOWS).logits, rtol=1e-9, atol=1e-9)


def test_every_iteration_scores_and_repairs_what_the_last_one_left() -> None:
    model = family_model(family_config("llama"), dtype=torch.float64)
    discovery = discover(model)
    options = CutOptions(ratio=0.4)
    seen: list[str] = []
    _, twice = cut_in_memory(model, discovery, replace(options, iterations=2), WINDOWS, seen)
    _, once = cut_in_memory(model, discovery, options, WINDOWS)
    assert seen == [
        *("score, iteration 1", "price, iteration 1", "repair, iteration 1", "cut, iteration 1"),
        *("score, iteration 2", "price, iteration 2", "repair, iteration 2", "cut, iteration 2"),
    ]
    assert twice.groups != once.groups
    assert twice.parameters["pruned"] == pytest.approx(once.parameters["pruned"], rel=0.02)


def test_no_iterations() -> None:
    with pytest.raises(PlanError, match=r"iterations=0 is too small. Expected at least 1, for example iterations=4"):
        CutOptions(ratio=0.2, iterations=0, scope="local", shape="uniform")


def test_iterations_score_anew() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    options = CutOptions(ratio=0.2, axes=("mlp",), score="l2", repair="none", choose="score", iterations=2)
    bars: list[str] = []
    smaller, decided = cut_in_memory(model, discover(model), options, WINDOWS, bars)
    assert bars == [
        *("score, iteration 1", "cut, iteration 1"),
        *("score, iteration 2", "cut, iteration 2"),
    ]
    assert decided.parameters["pruned"] == sum(parameter.numel() for parameter in smaller.parameters())


def test_iterations_end_with_a_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    discovery = discover(model)
    options = CutOptions(ratio=0.4, of="units", axes=("mlp",), score="l2", iterations=2, repair="reconstruct")
    bars: list[str] = []
    seen: list[Tensor] = []

    def told(dense: PreTrainedModel, cut: PreTrainedModel, *_: Any, **__: Any) -> None:
        assert dense is model
        seen.append(cut.model.layers[0].mlp.down_proj.weight)

    monkeypatch.setattr("secateur.pruning.held_out.reconstruct_in_place", told)
    smaller, decided = cut_in_memory(model, discovery, options, WINDOWS, bars)
    assert bars[-1] == "reconstruct"
    assert seen[0] is smaller.model.layers[0].mlp.down_proj.weight
    assert decided.options.repair == "reconstruct"
