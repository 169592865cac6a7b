"""Units score as LLM-Pruner's formulas say, axis by axis; grouped queries are added to the right group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from families import family_config, family_model
from secateur import CalibrationOptions, discover, score
from secateur.discovery.groups import Discovery
from secateur.errors import ScoreError
from secateur.scoring.registry import REDUCTIONS
from secateur.scoring.scores import Scores, statistics_for
from secateur.scoring.statistics import Statistics
from secateur.scoring.unit_scores import covers, unit_scores

WINDOWS = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(2))
LAYER = "model.layers.1"

# The table of formulas, written out once more: of the weight W, its gradient G and the mean of squared gradients A.
FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l1": lambda w, g, a: w.abs(),
    "l2": lambda w, g, a: w**2,
    "vectorize": lambda w, g, a: w * g,
    "param_first": lambda w, g, a: (w * g).abs(),
    "param_second": lambda w, g, a: (w * a * w).abs(),
    "param_mix": lambda w, g, a: (w * g - w * a * w / 2).abs(),
}
COMBINED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda axes: axes.sum(0),
    "mean": lambda axes: axes.mean(0),
    "max": lambda axes: axes.max(0).values,
    "prod": lambda axes: axes.prod(0),
    "first": lambda axes: axes[0],
    "last": lambda axes: axes[-1],
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return family_model(family_config("llama"), dtype=torch.float32)


@pytest.fixture(scope="module")
def discovery(model: PreTrainedModel) -> Discovery:
    return discover(model)


@pytest.fixture(scope="module")
def statistics(model: PreTrainedModel, discovery: Discovery) -> Statistics:
    """Of all scores of gradients and weights."""
    gradients = statistics_for("param_mix", model, discovery, WINDOWS)
    return statistics_for("l1", model, discovery).joined(gradients)


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """W, G of one batched loss, and A as the mean of squared gradients of the samples' own losses; plain autograd."""

    def backward(ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    batched, single = backward(WINDOWS), [backward(ids[None]) for ids in WINDOWS]
    model.zero_grad(set_to_none=True)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {n: (weights[n], batched[n], torch.stack([g[n].square() for g in single]).mean(0)) for n in batched}


@pytest.mark.parametrize("name", FORMULAS)
def test_units_score_as_the_paper_says(
    name: str,
    discovery: Discovery,
    statistics: Statistics,
    reference: dict[str, tuple[Tensor, Tensor, Tensor]],
) -> None:
    def channels(weight: str, dim: int) -> Tensor:
        s = FORMULAS[name](*reference[f"{LAYER}.{weight}.weight"])
        return s.sum(1 - dim).abs() if name == "vectorize" else s.sum(1 - dim)

    mlp = torch.stack([channels("mlp.gate_proj", 0), channels("mlp.up_proj", 0), channels("mlp.down_proj", 1)])
    heads = torch.stack(
        [
            channels("self_attn.q_proj", 0).reshape(3, 2 * 10).sum(1),  # KV head g has query heads 2g and 2g + 1
            channels("self_attn.k_proj", 0).reshape(3, 10).sum(1),
            channels("self_attn.v_proj", 0).reshape(3, 10).sum(1),
            channels("self_attn.o_proj", 1).reshape(3, 2 * 10).sum(1),
        ]
    )
    assert COMBINED.keys() == REDUCTIONS.keys()
    for reduce, combined in COMBINED.items():
        found = unit_scores(discovery, statistics, name=name, reduce=reduce)
        torch.testing.assert_close(found["layers.1.mlp"], combined(mlp), rtol=1e-4, atol=0)
        torch.testing.assert_close(found["layers.1.attention"], combined(heads), rtol=1e-4, atol=0)


def test_a_query_head_counts_for_its_own_kv_head(discovery: Discovery) -> None:
    """Marker weights: of 6 query heads on 3 KV heads, heads 2g and 2g + 1 belong to KV head g."""
    model = family_model(family_config("llama"), dtype=torch.float32)
    query = model.get_parameter(f"{LAYER}.self_attn.q_proj.weight").data
    for name, parameter in model.named_parameters():
        if ".self_attn." in name:
            parameter.data.zero_()
    for marked in range(6):
        query.zero_()[marked * 10 : (marked + 1) * 10] = 1.0
        found = score(model, name="l1", discovery=discovery).units
        assert found["layers.1.attention"].nonzero().flatten().tolist() == [marked // 2]
        assert found["layers.1.query"].nonzero().flatten().tolist() == [marked % 2]


def test_only_the_groups_asked_for_are_scored(
    model: PreTrainedModel, discovery: Discovery, statistics: Statistics
) -> None:
    groups = ["layers.0.mlp", "layers.2.attention"]
    some = score(model, windows=WINDOWS, name="param_mix", groups=groups, discovery=discovery)
    assert [*some.units] == groups
    whole = unit_scores(discovery, statistics, name="param_mix")
    for group in groups:
        torch.testing.assert_close(some.units[group], whole[group], rtol=1e-5, atol=0)


def test_a_layer_scores_the_sum_of_its_weights(
    model: PreTrainedModel, discovery: Discovery, statistics: Statistics
) -> None:
    found = unit_scores(discovery, statistics, name="l1", reduce="sum")["layers"]
    for i in range(3):
        weights = [p.detach() for name, p in model.named_parameters() if name.startswith(f"model.layers.{i}.")]
        assert float(found[i]) == pytest.approx(float(sum(weight.abs().sum() for weight in weights)), rel=1e-5)


def test_random_scores_follow_the_seed_and_not_the_model(model: PreTrainedModel, discovery: Discovery) -> None:
    def drawn(seed: int) -> Scores:
        return score(model, name="random", discovery=discovery, calibration=CalibrationOptions(seed=seed))

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(one.units[group], again.units[group]) for group in one.units)
    assert not torch.equal(one.units["layers.0.mlp"], other.units["layers.0.mlp"])
    assert not torch.equal(one.units["layers.0.mlp"], one.units["layers.1.mlp"])
    assert (one.calibration, one.seed) == (None, 1)


@settings(max_examples=20)
@given(unit=st.integers(0, 83), factor=st.floats(1.5, 1e3))
def test_a_larger_unit_scores_higher(model: PreTrainedModel, discovery: Discovery, unit: int, factor: float) -> None:
    """Scaling one MLP channel of every axis up raises its norm score and no other."""
    row = model.get_parameter("model.layers.0.mlp.up_proj.weight").data[unit]
    before, unscaled = score(model, name="l2", discovery=discovery).units["layers.0.mlp"], row.clone()
    row *= factor
    after = score(model, name="l2", discovery=discovery).units["layers.0.mlp"]
    row.copy_(unscaled)
    assert after[unit] > before[unit]
    others = [i for i in range(84) if i != unit]
    assert torch.equal(after[others], before[others])


def test_statistics_cover_what_needs_no_more_than_they_hold(discovery: Discovery, statistics: Statistics) -> None:
    names = (*FORMULAS, "wanda", "fisher", "obs", "block_influence")
    assert {name for name in names if covers(statistics, name, discovery, discovery.groups)} == set(FORMULAS)


def test_groups_of_another_kind_are_refused(model: PreTrainedModel, discovery: Discovery) -> None:
    with pytest.raises(ScoreError, match="compares whole layers"):
        statistics_for("layer_loss", model, discovery, WINDOWS, groups=[discovery.group("layers.0.mlp")])
    with pytest.raises(ScoreError, match="is not for whole layers"):
        statistics_for("fisher", model, discovery, WINDOWS, groups=[discovery.group("layers")])
