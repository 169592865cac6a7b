"""Cutting: what is checked before, what is shared and tied after, and the attributes that follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from families import family_config, family_model
from secateur import CutOptions, discover, evaluate, plan, profile, prune, score
from secateur.discovery.module_attributes import attributes_after
from secateur.discovery.sizes import PrunedSizes
from secateur.errors import DiscoveryError, PlanError
from secateur.evaluation.options import ProfileOptions
from secateur.planning.plan import Plan, PlannedGroup


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return family_model(family_config("llama"), dtype=torch.float32)


def decided(model: PreTrainedModel, **options: Any) -> Plan:
    chosen = CutOptions(**{"ratio": 0.4, "of": "units", "score": "l2", **options})
    return plan(discover(model.config), chosen, config=model.config, scores=score(model, name="l2"))


def test_nothing_kept_whole_is_copied(model: PreTrainedModel) -> None:
    pruned = prune(model, decided(model, axes=("mlp",)))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert pruned.get_parameter(name).data_ptr() == model.get_parameter(name).data_ptr()


@pytest.mark.parametrize(("family", "axes"), [("gemma", ("hidden",)), ("gpt2", ("mlp",))])
def test_ties_stay_tied(family: str, axes: tuple[str, ...]) -> None:
    dense = family_model(family_config(family), dtype=torch.float32)
    pruned = prune(dense, decided(dense, axes=axes, ratio=0.25))
    head, table = pruned.get_output_embeddings(), pruned.get_input_embeddings()
    assert isinstance(head, nn.Module)
    assert head.weight is table.weight


def test_a_stock_cut_keeps_dtype_and_generation_settings(model: PreTrainedModel) -> None:
    half = family_model(family_config("llama"), dtype=torch.bfloat16)
    assert half.generation_config is not None
    half.generation_config.max_length = 33
    pruned = prune(half, decided(half, axes=("mlp",)))
    assert pruned.dtype == torch.bfloat16
    assert pruned.generation_config is not None
    assert pruned.generation_config.max_length == 33
    assert not pruned.training


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "opt"])
def test_linear_layers_say_their_size(family: str) -> None:
    """What an adapter reads off a layer agrees with its weight, where no config says it."""
    dense = family_model(family_config(family), dtype=torch.float32)
    pruned = prune(dense, decided(dense, layers=(1, 2)))
    for name, module in pruned.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape), name
        if isinstance(module, nn.Embedding):
            assert (module.num_embeddings, module.embedding_dim) == tuple(module.weight.shape), name


def test_a_model_cut_in_memory_is_measured_as_it_is(model: PreTrainedModel) -> None:
    cut = decided(model, layers=(1, 2))
    assert cut.settings is None
    (row,) = profile({"pruned": prune(model, cut)}, ProfileOptions(seq_lens=(4,), new_tokens=1))
    assert row.parameters == cut.parameters["pruned"]
    assert evaluate(prune(model, cut), None, {}) == []  # type: ignore[arg-type]


def test_a_cut_model_can_be_cut_again(model: PreTrainedModel) -> None:
    once = prune(model, decided(model, axes=("mlp",)))
    twice = prune(once, decided(once, axes=("mlp",)))
    assert twice.config.intermediate_size == round(round(84 * 0.6) * 0.6)


def test_sizes_alone_do_not_cut(model: PreTrainedModel) -> None:
    sizes = plan(discover(model.config), CutOptions(ratio=0.4, of="units"), config=model.config)
    with pytest.raises(PlanError, match="says how many units stay, not which"):
        prune(model, sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "layers.9.mlp"}, r"the plan cuts layers\.9\.mlp, which .* does not have: it is of another model"),
        ({"units": 85}, r"the plan counts 85 units of layers\.0\.mlp, the model has 84"),
        ({"keep": (1, 0)}, r"layers\.0\.mlp: keep must be 2 ascending indices below 84, not \(1, 0\)"),
        ({"keep": (0, 84)}, r"keep must be 2 ascending indices below 84"),
        ({"keep": (0, 1, 2)}, r"keep must be 2 ascending indices"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(model: PreTrainedModel, change: dict[str, Any], message: str) -> None:
    good = PlannedGroup("layers.0.mlp", "mlp", 0, 84, 2, (0, 1))
    bad = Plan("m", CutOptions(ratio=0.5, scope="local", shape="uniform"), (replace(good, **change),), {}, {})
    with pytest.raises(PlanError, match=message):
        prune(model, bad)


def test_attributes_that_cannot_be_found_are_an_error() -> None:
    """The value width of a head alone: no attribute makes the code reshape to it."""
    config = family_config("gpt_neox")
    discovery = discover(config)
    group = next(group for group in discovery.groups if group.kind == "head_dim")
    with pytest.raises(DiscoveryError, match=r"does not run with layers\.0\.head_dim.*whatever values"):
        attributes_after(config, discovery, PrunedSizes({group.name: group.units - 1}))
