"""Experts that stay are fitted to what all experts of the dense layer give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from contract import logits
from every_type import tiny_config, tiny_type_model
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.models.silence import quiet
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup
from secateur.pruning.experts import DAMPINGS, HELD_OUT, fit_experts_in_place
from secateur.pruning.prune import prune
from secateur.pruning.repair import repair

WINDOWS = torch.randint(3, 101, (40, 24), generator=torch.Generator().manual_seed(2))


def tiny(model_type: str, **settings: Any) -> PreTrainedModel:
    config = tiny_config(model_type)
    for name, value in settings.items():
        setattr(config, name, value)
    with quiet():
        model = tiny_type_model(model_type, config=config)
    model.to(dtype=torch.float64)  # type: ignore[call-arg]
    return model


def fewer_experts(discovery: Discovery, keep: dict[int, tuple[int, ...]]) -> Plan:
    """A plan by hand: layer -> the experts that stay."""
    groups = tuple(
        PlannedGroup(
            group.name, "expert", group.layer, units=group.units, kept=len(keep[group.layer]), keep=keep[group.layer]
        )
        for group in discovery.groups
        if group.kind == "expert" and group.layer in keep
    )
    return Plan("tiny", CutOptions(ratio=0.2, axes=("experts",)), groups, {}, {})


def last_matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 2 and name.endswith("down_proj")}


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_smaller_model_is_nearer_to_the_dense_one(model_type: str) -> None:
    """Plain, transposed with biases, and beside shared experts."""
    model = tiny(model_type)
    discovery = discover(model.config)
    plan = fewer_experts(discovery, {1: (0, 2, 4), 2: (1, 2, 3, 4)})
    repaired = repair(model, plan, discovery, WINDOWS)
    cut, fitted = (prune(model, plan, discovery=discovery, weights=weights) for weights in ({}, repaired.weights))
    dense = logits(model, {"input_ids": WINDOWS})
    off = [(logits(each, {"input_ids": WINDOWS}) - dense).square().mean() for each in (cut, fitted)]
    assert off[1] < 0.8 * off[0]
    assert {name.split(".")[2] for name in repaired.weights} == {"1", "2"}
    for name, weight in repaired.weights.items():
        gone = [0, 2, 4] if ".1." in name else [1, 2, 3, 4]
        assert weight.shape == model.get_parameter(name).shape
        assert [i for i in range(5) if weight[i].any()] == gone


def test_one_expert_that_is_left_is_ridge_regression() -> None:
    model = tiny("mixtral", num_experts_per_tok=1)
    discovery = discover(model.config)
    plan = fewer_experts(discovery, {0: (3,)})
    pruned = prune(model, plan, discovery=discovery)
    path = "model.layers.0.mlp.experts"
    dense_experts: Any = model.get_submodule(path)
    seen: dict[str, Tensor] = {}
    hooks = [
        dense_experts.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output)),
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS)
    hooks[0].remove()
    errors = fit_experts_in_place(model, pruned, [path], WINDOWS)
    # by hand, on the windows that are not left out
    x_ND, y_ND = seen["x"].detach(), seen["y"].detach()
    gate_up, down = dense_experts.gate_up_proj[3].detach(), dense_experts.down_proj[3].detach()
    gate_NI, up_NI = (x_ND @ gate_up.T).chunk(2, -1)
    a_NI = torch.nn.functional.silu(gate_NI) * up_NI
    fitted_on = (torch.arange(len(x_ND)) // WINDOWS.shape[1]) % HELD_OUT != HELD_OUT - 1
    a, r = a_NI[fitted_on], (y_ND - a_NI @ down.T)[fitted_on]
    candidates = []
    for damping in DAMPINGS:
        gram, change = a.T @ a, torch.zeros_like(down.T)
        ridge = damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        for _ in range(2):
            change = change + torch.linalg.solve(gram + ridge, a.T @ (r - a @ change))
        error = (y_ND - a_NI @ (down.T + change))[~fitted_on].square().sum()
        candidates.append((float(error), down + change.T))
    expected = min(candidates, key=lambda candidate: candidate[0])
    ((name, (_, after)),) = errors.items()
    torch.testing.assert_close(pruned.get_parameter(name)[0].detach(), expected[1], rtol=1e-5, atol=1e-7)
    assert after == pytest.approx(expected[0] / float(y_ND[~fitted_on].square().sum()), rel=1e-4)


def test_what_does_not_help_is_left_out() -> None:
    model = tiny("mixtral")
    discovery = discover(model.config)
    pruned = prune(model, fewer_experts(discovery, {0: (0, 1, 2)}), discovery=discovery)
    before = {name: weight.detach().clone() for name, weight in last_matrices(pruned).items()}
    few = WINDOWS[:1]  # none is left to judge by
    assert fit_experts_in_place(model, pruned, ["model.layers.0.mlp.experts"], few) == {}
    assert all(torch.equal(weight, before[name]) for name, weight in last_matrices(pruned).items())


def test_the_dense_model_stays_as_it_is() -> None:
    model = tiny("mixtral")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    discovery = discover(model.config)
    repair(model, fewer_experts(discovery, {0: (0, 1, 2)}), discovery, WINDOWS)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_model_that_was_trained_with_a_loss_over_its_routers() -> None:
    """The loss is no part of what is cut, and cannot be taken over layers of different numbers of experts."""
    model = tiny("mixtral", output_router_logits=True)
    discovery = discover(model.config)
    assert [group.kind for group in discovery.groups].count("expert") == 3
    pruned = prune(model, fewer_experts(discovery, {0: (0, 1, 2)}), discovery=discovery)
    assert pruned(input_ids=WINDOWS[:1], use_cache=False).logits.isfinite().all()
    assert model.config.output_router_logits
