"""In float64, a model cut in one layer, or in everything at once, equals the dense model with the same units masked.

The contract of every type (`test_contract`) cuts all layers alike, one kind at a time. Here are the cuts that no
config can say, on one family of each structure.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from contract import masked
from families import DISTINCT, VOCABULARY, family_config, family_model
from masked_pass import StayDouble
from secateur import CutOptions, discover, prune
from secateur.discovery.config_settings import stock_settings
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.planning.plan import Plan, PlannedGroup

TOLERANCE = 1e-10
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
GROUPED = ("llama", "qwen3", "gemma2", "phi3")  # several query heads for each KV head


@functools.cache
def dense(family: str) -> tuple[PreTrainedConfig, PreTrainedModel, Discovery]:
    """A model that all tests share; none may change it."""
    config = family_config(family)
    return config, family_model(config), discover(config)


def planned(
    config: PreTrainedConfig,
    discovery: Discovery,
    kind: str,
    *,
    layers: range | None = None,
    seed: int = 0,
) -> Plan:
    """A plan that keeps random units of every group of a kind (in `layers`), a quarter to a half of them removed."""
    chooser = random.Random(seed)
    groups = []
    for group in discovery.groups:
        if group.kind != kind or (layers is not None and group.layer not in layers):
            continue
        kept = 36 if kind == "hidden" else max(1, group.units - 1 - group.units // 4)
        keep = tuple(sorted(chooser.sample(range(group.units), kept)))
        groups.append(PlannedGroup(group.name, group.kind, group.layer, group.units, kept, keep))
    plan = Plan(discovery.model, CutOptions(ratio=0.5, of="units"), tuple(groups), {}, {})
    try:
        return replace(plan, settings=stock_settings(config, discovery, plan.sizes))
    except PlanError as error:
        return replace(plan, refusal=str(error))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, kind)
        for family in DISTINCT
        for kind in ("attention", "query", "mlp")
        if kind != "query" or family in GROUPED
    ],
)
def test_a_cut_of_one_layer_equals_the_mask(family: str, kind: str) -> None:
    config, model, discovery = dense(family)
    plan = planned(config, discovery, kind, layers=range(1, 2))
    assert plan.settings is None
    expected = logits(masked(model, plan, discovery))
    assert (logits(prune(model, plan, discovery=discovery)) - expected).abs().max() < TOLERANCE
    assert (expected - logits(model)).abs().max() > 1e-2  # the mask does something


@pytest.mark.parametrize("family", [family for family in DISTINCT if family not in GROUPED])
def test_heads_that_read_their_own_keys_have_no_grouped_queries(family: str) -> None:
    assert not any(group.kind == "query" for group in dense(family)[2].groups)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_attention_queries_and_mlp_cut_together_equal_the_mask(family: str) -> None:
    config, model, discovery = dense(family)
    parts = [planned(config, discovery, kind) for kind in ("attention", "query", "mlp")]
    groups = tuple(group for part in parts for group in part.groups)
    plan = replace(parts[0], groups=groups, settings=None)
    pruned = prune(model, plan, discovery=discovery)
    assert (logits(pruned) - logits(masked(model, plan, discovery))).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_another_mask_gives_other_logits(kind: str) -> None:
    """The contract can fail: the same number of other units is told apart."""
    config, model, discovery = dense("llama")
    one, other = (planned(config, discovery, kind, seed=seed) for seed in (0, 1))
    assert one.groups != other.groups
    expected = logits(masked(model, other, discovery))
    assert (logits(prune(model, one, discovery=discovery)) - expected).abs().max() > 1e-2


def test_an_rms_norm_across_the_cut_has_the_known_factor() -> None:
    """Masked, an RMS norm divides by the root of a mean over all units; cut, over those that stay."""
    config = family_config("llama", rms_norm_eps=0.0)
    model, discovery = family_model(config), discover(config)
    plan = planned(config, discovery, "hidden")
    reference = masked(model, plan, discovery)
    for name, parameter in reference.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.mul_((36 / 48) ** 0.5)
    pruned = prune(model, plan, discovery=discovery)
    reference.model.rotary_emb = pruned.model.rotary_emb  # the same table, in the same precision
    with StayDouble():  # type: ignore[no-untyped-call]
        assert (logits(pruned) - logits(reference)).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_model_cut_in_one_layer_generates_with_its_cache(family: str) -> None:
    config, model, discovery = dense(family)
    pruned = prune(model, planned(config, discovery, "attention", layers=range(1, 2)), discovery=discovery)
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids, mask = IDS[:1], torch.ones(1, IDS.shape[1], dtype=torch.int64)
    with_cache = pruned.generate(input_ids=ids, attention_mask=mask, use_cache=True, **settings)  # type: ignore[operator]
    without = pruned.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)  # type: ignore[operator]
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_dense_model_is_left_alone(family: str) -> None:
    config, model, discovery = dense(family)
    before, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, planned(config, discovery, "mlp", layers=range(1, 2)), discovery=discovery)
    prune(model, planned(config, discovery, "mlp"), discovery=discovery)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
