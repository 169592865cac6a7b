"""Measured damage is that of the cut model, whatever is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from families import GROUPED, family_config, family_model
from secateur import CutOptions, discover, prune, score
from secateur.errors import PlanError, ScoreError
from secateur.planning.plan import Plan, PlannedGroup
from secateur.planning.selection import top_units
from secateur.pruning.sensitivity import SHARES, _DenseOutputs, damage_curves

WINDOWS = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
MIXTURE = AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)


def sensitive_model(family: str) -> PreTrainedModel:
    """A model in float64 whose answers depend on its weights noticeably."""
    model = family_model(MIXTURE if family == "mixtral" else family_config(family), dtype=torch.float64)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the other ways know no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def divergence(model: PreTrainedModel, cut: PreTrainedModel) -> float:
    with torch.no_grad():
        dense, other = (each(input_ids=WINDOWS, use_cache=False).logits.log_softmax(-1) for each in (model, cut))
    return float(functional.kl_div(other, dense, reduction="sum", log_target=True)) / WINDOWS.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_damage_is_the_divergence_of_the_cut_model(family: str) -> None:
    model = sensitive_model(family)
    discovery = discover(model)
    scores = score(model, discovery=discovery, name="l2")
    kinds, layer = ("attention", "mlp", "expert", "expert_mlp"), 0 if family == "gpt2" else 2
    groups = [group for group in discovery.groups if group.kind in kinds and group.layer == layer]
    curves = damage_curves(model, discovery, groups, scores, WINDOWS)
    assert curves.keys() == {group.name for group in groups}
    for group in groups:
        *points, last = curves[group.name]
        assert last == (group.units, 0.0)
        for kept, damage in points:
            keep = top_units(scores.units[group.name], kept)
            one = PlannedGroup(group.name, group.kind, group.layer, group.units, kept, keep)
            cut = prune(
                model,
                Plan("", CutOptions(ratio=0.0, scope="local", shape="uniform"), (one,), {}, {}),
                discovery=discovery,
            )
            assert damage == pytest.approx(divergence(model, cut), rel=1e-3, abs=1e-6)
            assert damage > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_what_lies_before_the_cut_is_computed_once(family: str) -> None:
    model = sensitive_model(family)
    paths = [f"{path}.{i}" for path in discover(model).layer_lists for i in range(3)]
    dense = _DenseOutputs(model, WINDOWS, paths)
    assert len(dense.outputs) == model.config.num_hidden_layers
    ran: list[str] = []
    for path in dense.outputs:
        layer = model.get_submodule(path)
        child = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm))
        child.register_forward_hook(lambda *_, path=path: ran.append(path))
    assert dense.divergence(model, 2) == pytest.approx(0.0, abs=1e-12)
    assert set(ran) == {[*dense.outputs][2]}


def test_layers_that_share_what_they_compute_are_all_computed() -> None:
    """A layer that hands something on beside its output cannot be replaced by that."""
    model = sensitive_model("llama")
    first, second = model.model.layers[:2]
    handed: list[Tensor] = []
    own_first, own_second = first.forward, second.forward

    def hands_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        handed[:] = [hidden]
        return own_first(hidden, *args, **kwargs)

    def takes(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        found: Any = own_second(hidden, *args, **kwargs)
        return found + handed.pop()

    first.forward, second.forward = hands_on, takes
    dense = _DenseOutputs(model, WINDOWS, [f"model.layers.{i}" for i in range(3)])
    assert dense.outputs
    third = model.model.layers[2]
    own_third = third.forward
    third.forward = lambda hidden, *args, **kwargs: own_third(hidden, *args, **kwargs) + handed.pop()
    second.forward = own_second
    assert not _DenseOutputs(model, WINDOWS, [f"model.layers.{i}" for i in range(3)]).outputs


def test_a_model_that_cannot_be_split_is_run_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sensitive_model("llama")
    discovery = discover(model)
    scores = score(model, discovery=discovery, name="l2")
    groups = [discovery.group("layers.1.mlp"), discovery.group("layers.0.attention")]
    usual = damage_curves(model, discovery, groups, scores, WINDOWS)
    monkeypatch.setattr("secateur.pruning.sensitivity.split_output_head", lambda *_: None)
    whole = damage_curves(model, discovery, groups, scores, WINDOWS)
    for name, points in usual.items():
        assert [kept for kept, _ in whole[name]] == [kept for kept, _ in points]
        assert [damage for _, damage in whole[name]] == pytest.approx([damage for _, damage in points], rel=1e-6)


def test_sizes_that_are_measured() -> None:
    model = sensitive_model("llama")
    discovery = discover(model)
    scores = score(model, discovery=discovery, name="l2")
    group = discovery.group("layers.0.mlp")
    seen: list[tuple[int, int]] = []
    (points,) = damage_curves(
        model, discovery, [group], scores, WINDOWS, progress=lambda done, total: seen.append((done, total))
    ).values()
    assert [kept for kept, _ in points] == [*(round(group.units * share) for share in SHARES), group.units]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_damage_that_is_not_a_number() -> None:
    model = sensitive_model("llama")
    discovery = discover(model)
    scores = score(model, discovery=discovery, name="l2")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ScoreError, match=r"layers\.0\.mlp cut to \d+ units gives NaN or Inf"):
        damage_curves(model, discovery, [discovery.group("layers.0.mlp")], scores, WINDOWS)


def test_groups_of_all_layers_are_refused() -> None:
    model = sensitive_model("llama")
    discovery = discover(model)
    scores = score(model, discovery=discovery, name="l2")
    for name in ("hidden", "layers"):
        with pytest.raises(PlanError, match=f"{name} runs through all layers"):
            damage_curves(model, discovery, [discovery.group(name)], scores, WINDOWS)
