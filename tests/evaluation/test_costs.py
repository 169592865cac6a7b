"""Costs by arithmetic: the sizes of a plan are those of the model that it cuts, and MACs belong to a kind of group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from every_type import tiny_config
from families import family_config, family_model
from secateur import CutOptions, discover, plan, prune, score
from secateur.discovery.counting import count_macs
from secateur.errors import PlanError
from secateur.evaluation.costs import config_costs, count_macs_by_kind, model_costs
from secateur.evaluation.options import ProfileOptions
from secateur.models.silence import quiet

TOKENS = 9
CUTS: dict[str, dict[str, Any]] = {
    "llama": {"ratio": 0.4, "scope": "global", "shape": "per-layer", "min_keep": 0.1},
    "gemma2": {"ratio": 0.4, "axes": ("layers",)},
    "gpt2": {"ratio": 0.34, "of": "units"},
}


@pytest.mark.parametrize("family", CUTS)
def test_the_costs_of_a_plan_are_those_of_the_model_that_it_cuts(family: str) -> None:
    """All counts, also by kind where one head is left, which is no group of the smaller model."""
    config = family_config(family)
    discovery, model = discover(config), family_model(config, dtype=torch.float32)
    options = CutOptions(score="l2", **CUTS[family])
    decided = plan(discovery, options, config=config, scores=score(model, discovery=discovery, name="l2"))
    smaller = prune(model, decided)
    grid = ProfileOptions(seq_lens=(TOKENS, 5), batch_sizes=(1, 3))
    planned = config_costs(config, discovery, name="m", plan=decided, options=grid, dtype=torch.float32)
    assert planned == model_costs(smaller, discover(smaller, name="m"), name="m", options=grid)
    assert planned.parameters == decided.parameters["pruned"]
    assert planned.grid[1].macs == 3 * planned.grid[0].macs
    half = config_costs(config, discovery, name="m", plan=decided, options=grid, dtype=torch.bfloat16)
    assert planned.kv_cache_bytes == 2 * (half.kv_cache_bytes or 0) > 0
    assert planned.weight_bytes == 2 * half.weight_bytes


def test_a_plan_that_says_only_how_many_units_stay_is_enough() -> None:
    config = family_config("llama")
    discovery = discover(config)
    decided = plan(discovery, CutOptions(ratio=0.3), config=config)
    assert not decided.decided
    assert config_costs(config, discovery, name="m", plan=decided).parameters == decided.parameters["pruned"]
    other = family_config("llama", intermediate_size=80)
    with pytest.raises(PlanError, match=r"the plan counts 84 units of layers\.0\.mlp, the model has 80"):
        config_costs(other, discover(other), name="m", plan=decided)


# parallel residual; latent attention; states beside attention; one KV head; linear attention; experts; ALiBi
@pytest.mark.parametrize(
    "model_type", ["gpt_neox", "deepseek_v3", "jamba", "gpt_bigcode", "qwen3_next", "dbrx", "bloom"]
)
def test_macs_by_kind_are_macs_by_operator(model_type: str) -> None:
    with quiet():
        discovery = discover(tiny_config(model_type))
    by_kind, by_operator = count_macs_by_kind(discovery, tokens=7), count_macs(discovery, tokens=7)
    assert sum(by_kind.values()) == sum(by_operator.values())
    assert "frozen" not in by_kind


def test_macs_of_a_layer_by_hand() -> None:
    """Grouped queries: 6 heads of 10 over 3 KV heads, hidden 48, MLP 84, 3 layers, 101 tokens in the vocabulary."""
    found = count_macs_by_kind(discover(family_config("llama")), tokens=TOKENS)
    attention = 48 * 60 + 2 * 48 * 30 + 60 * 48  # projections, for each token
    scores = 2 * 60 * TOKENS + 6 * TOKENS  # products, and one of the softmax for each score
    rotary = 2 * (60 + 30)
    assert found["attention"] == 3 * TOKENS * (attention + scores + rotary)
    assert found["mlp"] == 3 * TOKENS * (3 * 48 * 84 + 84)
    assert found["vocabulary"] == TOKENS * 48 * 101
    assert found["hidden"] == (2 * 3 + 1) * 2 * 48 * TOKENS
