"""REAP's score is its paper's formula; the contract has it on every type of model whose experts can be cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from every_type import tiny_config, tiny_type_model
from secateur import discover, score
from secateur.errors import ScoreError
from secateur.models.silence import quiet
from secateur.scoring.collect_experts import expert_statistics

WINDOWS = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(2))


def tiny(model_type: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    with quiet():
        model = tiny_type_model(model_type)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    return model


def formula(model: PreTrainedModel, layer: int) -> Tensor:
    """The mean over the tokens of each expert of Mixtral of gate times norm of its output, from its weights alone."""
    block: Any = model.get_submodule(f"model.layers.{layer}.mlp")
    seen: list[Tensor] = []
    with block.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        model(input_ids=WINDOWS)
    x_ND = seen[0].reshape(-1, seen[0].shape[-1])
    gates_NE = functional.softmax(x_ND @ block.gate.weight.T, -1)
    best_N2 = gates_NE.topk(model.config.num_experts_per_tok).indices
    chosen_NE = torch.zeros_like(gates_NE).scatter(1, best_N2, 1.0)
    gates_NE = gates_NE * chosen_NE / (gates_NE * chosen_NE).sum(1, keepdim=True)
    means = []
    for expert in range(gates_NE.shape[1]):
        gate_up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
        gate_NI, up_NI = (x_ND @ gate_up.T).chunk(2, -1)
        norm_N = (functional.silu(gate_NI) * up_NI @ down.T).norm(dim=-1)
        means.append((gates_NE[:, expert] * norm_N).sum() / chosen_NE[:, expert].sum().clamp_min(1))
    return torch.stack(means).detach()


def test_it_is_the_formula() -> None:
    model = tiny("mixtral")
    scores = score(model, name="reap", windows=WINDOWS, groups=["layers.0.expert", "layers.2.expert"])
    assert set(scores.units) == {"layers.0.expert", "layers.2.expert"}
    for layer in (0, 2):
        expected = formula(model, layer)
        torch.testing.assert_close(scores.units[f"layers.{layer}.expert"].double(), expected, rtol=1e-6, atol=0.0)
        assert expected.std() > 0.01 * expected.mean()


def test_an_expert_without_tokens_is_worth_nothing() -> None:
    model = tiny("mixtral")
    with torch.no_grad():  # all tokens are alike to the router, which takes the first two experts of five
        model.get_parameter("model.layers.0.mlp.gate.weight").zero_()
    scores = score(model, name="reap", windows=WINDOWS, groups=["layers.0.expert"]).units["layers.0.expert"]
    assert sorted((scores > 0).tolist()) == [False, False, False, True, True]


def test_units_of_several_experts_have_their_sum() -> None:
    """Where a router chooses among groups of experts first, whole groups go, or as many of each."""
    scores = {}
    for groups in (1, 4):
        config = tiny_config("deepseek_v3")
        config.n_routed_experts, config.num_experts_per_tok = 8, 4
        config.n_group, config.topk_group = groups, groups
        with quiet():
            model = tiny_type_model("deepseek_v3", config=config)
        names = [group.name for group in discover(config).groups if group.kind == "expert" and group.layer == 1]
        scores[groups] = score(model, name="reap", windows=WINDOWS, groups=names).units
    each_E = scores[1]["layers.1.expert"].reshape(4, 2)
    torch.testing.assert_close(scores[4]["layers.1.expert.0"], each_E.sum(1))
    torch.testing.assert_close(scores[4]["layers.1.expert.1"], each_E.sum(0))


def test_experts_that_are_called_otherwise_are_refused() -> None:
    class Other(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    model = tiny("mixtral")
    block: Any = model.get_submodule("model.layers.0.mlp")
    block.forward = lambda hidden: block.experts(hidden)
    block.experts = Other()
    expected = "experts is called with tensors of .4, 9, 48.; expected tokens, .* --score param_first"
    with pytest.raises(ScoreError, match=expected):
        expert_statistics(model, WINDOWS, {"model.layers.0.mlp.experts": {"layers.0.expert": torch.arange(5)}})


def test_outputs_that_are_not_finite_are_an_error() -> None:
    model = tiny("mixtral", torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.down_proj")[:, 0, 0] = torch.inf
    with pytest.raises(ScoreError, match=r"experts model\.layers\.1\.mlp\.experts have values that are NaN or Inf"):
        score(model, name="reap", windows=WINDOWS, groups=["layers.1.expert"])


def test_other_units_have_no_such_score() -> None:
    model = tiny("mixtral", torch.float32)
    with pytest.raises(ScoreError, match="reap compares whole experts, not attention: cut experts"):
        score(model, name="reap", windows=WINDOWS, groups=["layers.0.attention"])
