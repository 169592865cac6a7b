"""The contract of every family: in float64, the model with units cut equals the dense model with the same units masked.

Where a norm runs across the axis, the masked model takes the norm's statistics over the units that stay: for an RMS
norm that is the factor sqrt(kept / dense), which has a test of its own.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from contract import StayDouble, masked, with_constants_of
from families import FAMILIES, VOCABULARY, family_config, family_model
from secateur import CutOptions, discover, prune
from secateur.discovery.config_settings import stock_settings
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.planning.plan import Plan, PlannedGroup

KINDS = ("attention", "query", "mlp", "hidden")
TOLERANCE = 1e-10
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
# Heads of these are the hidden width divided by the heads: no config has fewer heads at the same head size, nor
# another width, so such a cut has no stock folder. It is cut in memory all the same.
NO_STOCK = {(family, kind) for family in ("gpt2", "gpt_neox", "opt") for kind in ("attention", "hidden")}


class StatisticsOverKept(TorchDispatchMode):
    """Means and layer norms across a dimension of `size` look at the kept indices only."""

    def __init__(self, size: int, keep: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.keep = size, torch.tensor(keep)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mean.dim and args[0].shape[args[1][0]] == self.size:
            return func(args[0].index_select(args[1][0], self.keep), *args[1:], **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default and args[0].shape[-1] == self.size:
            x, _, weight, bias, eps = args
            normed, *statistics = func(x[..., self.keep], [len(self.keep)], weight[self.keep], bias[self.keep], eps)
            full = torch.zeros_like(x)
            full[..., self.keep] = normed
            return full, *statistics
        return func(*args, **(kwargs or {}))


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


@pytest.mark.parametrize("where", ["everywhere", "one layer"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_mask(family: str, kind: str, where: str) -> None:
    config = family_config(family)
    model, discovery = family_model(config), discover(config)
    if kind == "query" and family in ("gpt2", "gpt_neox", "opt"):
        assert not any(group.kind == "query" for group in discovery.groups)  # they have no grouped queries
        return
    if kind == "hidden" and where == "one layer":
        return  # it runs through all of them
    plan = planned(config, discovery, kind, layers=range(1, 2) if where == "one layer" else None)
    stock = where == "everywhere" and (family, kind) not in NO_STOCK
    assert (plan.settings is not None) == stock
    pruned = prune(model, plan, discovery=discovery)
    reference = masked(model, plan, discovery)
    with_constants_of(pruned, reference)
    norms = StatisticsOverKept(48, plan.groups[0].keep or ()) if kind == "hidden" else nullcontext()
    with norms:
        expected = logits(reference)
    assert (logits(pruned) - expected).abs().max() < TOLERANCE
    assert (expected - logits(model)).abs().max() > 1e-2  # the mask does something


@pytest.mark.parametrize("kind", KINDS)
def test_another_mask_is_told_apart(kind: str) -> None:
    """The contract can fail: the same number of other units gives other logits."""
    config = family_config("llama")
    model, discovery = family_model(config), discover(config)
    one, other = (planned(config, discovery, kind, seed=seed) for seed in (0, 1))
    assert one.groups != other.groups
    norms = StatisticsOverKept(48, other.groups[0].keep or ()) if kind == "hidden" else nullcontext()
    with norms:
        expected = logits(masked(model, other, discovery))
    assert (logits(prune(model, one)) - expected).abs().max() > 1e-2


def test_an_rms_norm_across_the_cut_has_the_known_factor() -> None:
    """Masked, an RMS norm divides by the root of a mean over all units; cut, over those that stay."""
    config = family_config("llama", rms_norm_eps=0.0)
    model, discovery = family_model(config), discover(config)
    plan = planned(config, discovery, "hidden")
    reference = masked(model, plan, discovery)
    for name, parameter in reference.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.mul_((36 / 48) ** 0.5)
    pruned = prune(model, plan)
    reference.model.rotary_emb = pruned.model.rotary_emb  # the same table, in the same precision
    with StayDouble():  # type: ignore[no-untyped-call]
        assert (logits(pruned) - logits(reference)).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_dropped_equal_layers_skipped(family: str) -> None:
    config = family_config(family)
    model, discovery = family_model(config), discover(config)
    group = PlannedGroup("layers", "layer", None, 3, 2, (0, 2))
    plan = Plan(discovery.model, CutOptions(ratio=0.3, of="units"), (group,), {}, {})
    plan = replace(plan, settings=stock_settings(config, discovery, plan.sizes))
    skipped = copy.deepcopy(model)
    layer = skipped.get_submodule(f"{discovery.layer_lists[0]}.1")
    layer.register_forward_hook(
        lambda module, args, kwargs, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0],
        with_kwargs=True,
    )
    pruned = prune(model, plan, discovery=discovery)
    with_constants_of(pruned, skipped, layers=False)
    assert (logits(pruned) - logits(skipped)).abs().max() < TOLERANCE
    assert len(pruned.get_submodule(discovery.layer_lists[0])) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_at_once(family: str) -> None:
    """Attention, queries and MLP together, in one layer and everywhere, in memory or stock."""
    config = family_config(family)
    model, discovery = family_model(config), discover(config)
    parts = [planned(config, discovery, kind) for kind in ("attention", "query", "mlp")]
    groups = tuple(group for part in parts for group in part.groups)
    plan = replace(parts[0], groups=groups, settings=None)
    pruned = prune(model, plan, discovery=discovery)
    assert (logits(pruned) - logits(masked(model, plan, discovery))).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_generates_with_its_cache(family: str) -> None:
    config = family_config(family)
    model, discovery = family_model(config, dtype=torch.float32), discover(config)
    pruned = prune(model, planned(config, discovery, "attention", layers=range(1, 2)), discovery=discovery)
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids, mask = IDS[:1], torch.ones(1, IDS.shape[1], dtype=torch.int64)
    with_cache = pruned.generate(input_ids=ids, attention_mask=mask, use_cache=True, **settings)  # type: ignore[operator]
    without = pruned.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)  # type: ignore[operator]
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_left_alone(family: str) -> None:
    config = family_config(family)
    model, discovery = family_model(config), discover(config)
    before, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, planned(config, discovery, "mlp", layers=range(1, 2)), discovery=discovery)
    prune(model, planned(config, discovery, "mlp"), discovery=discovery)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
