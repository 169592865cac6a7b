"""Repair: the error of every repaired matrix on text it has not seen, biases, stacks, choices, and what it leaves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from families import GROUPED, family_config, family_model
from secateur import CutOptions, discover, plan, prune, score
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.planning.plan import Plan
from secateur.pruning.closed_form import REPAIRS, CutMatrix, damping_for, fit_columns, inputs_of
from secateur.pruning.norms import narrowed, scaled_weight
from secateur.pruning.repair import Repaired, repair
from secateur.scoring.scores import Scores

GENERATOR = torch.Generator().manual_seed(0)
WINDOWS = torch.randint(3, 97, (24, 16), generator=GENERATOR)
HELD_OUT = torch.randint(3, 97, (24, 16), generator=GENERATOR)
MIXTURE = AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "phi3", "mixtral")


def planned(family: str, **options: Any) -> tuple[PreTrainedModel, Discovery, Plan]:
    """A model in float64 and a plan by magnitude."""
    config = MIXTURE if family == "mixtral" else family_config(family)
    model = family_model(config, dtype=torch.float64)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the other ways know no float64
    with torch.no_grad():  # sizeable differences between the units
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    discovery = discover(model)
    wanted = CutOptions(**{"ratio": 0.4, "of": "units", "axes": ("mlp",), "score": "l2", **options})
    return model, discovery, plan(discovery, wanted, scores=score(model, discovery=discovery, name="l2"))


def by_score(decided: Plan) -> Plan:
    """The plan with nothing left to choose."""
    return replace(decided, groups=tuple(replace(group, spare=None) for group in decided.groups))


def matrices(found: Repaired) -> list[str]:
    """The names of the matrices among the new weights, in the order of the pass."""
    return [name for name, weight in found.weights.items() if weight.dim() == 2]


def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=windows, use_cache=False).logits
    return found


def read_by(model: PreTrainedModel, weight: str, windows: Tensor) -> Tensor:
    """What the module of a weight reads, by a hook."""
    seen: list[Tensor] = []
    features = model.get_parameter(weight).numel() // model.config.hidden_size

    def see(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().reshape(-1, features))

    handle = model.get_submodule(weight.rpartition(".")[0]).register_forward_pre_hook(see)
    logits(model, windows)
    handle.remove()
    return seen[0]


def masked(model: PreTrainedModel, found: Repaired) -> PreTrainedModel:
    """The dense model with repaired weights, which are zero where units go."""
    other: PreTrainedModel = type(model)(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    for name, weight in found.weights.items():
        other.get_parameter(name).data = weight
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_the_repaired_model_is_nearer_to_the_dense_one_and_the_cut_model_is_the_masked_one(family: str) -> None:
    model, discovery, decided = planned(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = repair(model, decided, discovery, WINDOWS)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    cut, left_out = (prune(model, found.plan, discovery=discovery, weights=each) for each in (found.weights, {}))
    dense, repaired, without = (logits(each, WINDOWS) for each in (model, cut, left_out))
    assert (repaired - dense).square().sum() < (without - dense).square().sum()
    # What no token reached (experts) is left as it is, so only there the masked model may differ from the cut one.
    assert torch.allclose(repaired, logits(masked(model, found), WINDOWS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_repaired_layer_is_nearer_on_text_that_was_not_seen(family: str) -> None:
    model, discovery, decided = planned(family)
    found = repair(model, decided, discovery, WINDOWS)
    repaired = masked(model, found)
    for name in matrices(found):
        module: Any = model.get_submodule(name.rpartition(".")[0])
        x = read_by(repaired, name, HELD_OUT)
        wanted, given = module(x), repaired.get_submodule(name.rpartition(".")[0])(x)
        gone = found.weights[name].abs().sum(0) == 0
        left_out = torch.nn.functional.linear(x.masked_fill(gone, 0), module.weight, module.bias)
        assert (given - wanted).square().sum() < (left_out - wanted).square().sum()


def test_heads_are_repaired_too() -> None:
    model, discovery, decided = planned("llama", axes=("attention", "mlp"), ratio=0.5)
    found = repair(model, decided, discovery, WINDOWS)
    assert any("o_proj" in name for name in found.weights)
    cut = prune(model, found.plan, discovery=discovery, weights=found.weights)
    assert torch.allclose(logits(cut, WINDOWS), logits(masked(model, found), WINDOWS), rtol=1e-9, atol=1e-9)


def test_bias_makes_up_for_the_mean() -> None:
    model, discovery, decided = planned("opt")
    found = repair(model, decided, discovery, WINDOWS, method="bias")
    name = "model.decoder.layers.0.fc2.weight"
    x = read_by(model, name, WINDOWS)
    gone = found.weights[name].abs().sum(0) == 0
    lost = model.get_parameter(name)[:, gone] @ x[:, gone].mean(0)
    change = found.weights["model.decoder.layers.0.fc2.bias"] - model.get_parameter("model.decoder.layers.0.fc2.bias")
    assert torch.allclose(change, lost, rtol=1e-9, atol=1e-12)


def test_without_a_bias_there_is_no_shift() -> None:
    model, discovery, decided = planned("llama")
    found = repair(model, decided, discovery, WINDOWS, method="bias")
    assert found.weights
    for name, weight in found.weights.items():
        kept = weight.abs().sum(0) > 0
        assert torch.equal(weight[:, kept], model.get_parameter(name)[:, kept])


def test_units_are_chosen_where_one_matrix_reads_them() -> None:
    model, discovery, decided = planned("llama", choose="obs")
    found = repair(model, decided, discovery, WINDOWS)
    kept = {group.name: group for group in found.plan.groups}
    for group in decided.groups:
        assert kept[group.name].kept == len(kept[group.name].keep or ()) == group.kept
        assert len(group.spare or ()) == min(group.kept, group.units - group.kept) / 2
        assert {*(group.keep or ())} - {*(kept[group.name].keep or ())} <= {*(group.spare or ())}
    assert any(kept[group.name].keep != group.keep for group in decided.groups)
    scored = repair(model, by_score(decided), discovery, WINDOWS)
    first = matrices(found)[0]
    x, dense = read_by(model, first, WINDOWS), model.get_parameter(first)
    off = [(x @ (each.weights[first] - dense).t()).square().sum() for each in (found, scored)]
    assert off[0] < off[1]


def test_units_that_many_matrices_read_are_left_as_planned() -> None:
    model, discovery, decided = planned("mixtral", choose="obs")
    assert repair(model, decided, discovery, WINDOWS).plan.groups == by_score(decided).groups


def test_later_layers_are_fitted_to_what_the_repaired_ones_before_them_give() -> None:
    model, discovery, decided = planned("llama")
    found = repair(model, decided, discovery, WINDOWS)
    last = matrices(found)[-1]
    dense, kept = model.get_parameter(last).detach(), torch.nonzero(found.weights[last].abs().sum(0)).flatten()

    def fitted_to(other: PreTrainedModel) -> Tensor:
        cut = CutMatrix(dense, inputs_of(read_by(other, last, WINDOWS), len(WINDOWS)), kept, has_bias=False)
        return fit_columns(replace(cut, damping=damping_for(cut))).columns_RK

    assert torch.allclose(found.weights[last][:, kept], fitted_to(masked(model, found)), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found.weights[last][:, kept], fitted_to(model), rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_may_run_on_a_few_windows_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its activations over all windows do not fit into memory."""
    model, discovery, decided = planned(family, axes=("mlp",) if family == "mixtral" else ("attention", "mlp"))
    if family == "mixtral":  # which tokens an expert's damping is chosen by depends on what runs together
        monkeypatch.setattr("secateur.pruning.repair.damping_for", lambda _: 0.1)
        monkeypatch.setattr("secateur.pruning.repair.SUMS_AT_ONCE", 3 * 16 * model.config.intermediate_size**2)
    whole = repair(model, decided, discovery, WINDOWS)
    monkeypatch.setattr("secateur.scoring.passes.layers.activation_budget", lambda _: 0)
    monkeypatch.setattr("secateur.scoring.passes.layers.LEAST_TOKENS", 5 * WINDOWS.shape[1])
    tokens: list[int] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens.append([*args, *kwargs.values()][0].shape[:-1].numel())

    for path in discovery.layer_paths:
        for part in model.get_submodule(path).children():
            part.register_forward_pre_hook(see, with_kwargs=True)
    found = repair(model, decided, discovery, WINDOWS)
    assert max(tokens) == 5 * WINDOWS.shape[1]
    assert found.plan == whole.plan
    assert found.weights.keys() == whole.weights.keys()
    for name, weight in whole.weights.items():
        assert torch.allclose(found.weights[name], weight, rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("tokens", "common", "expected"), [(4000, 3, 0.01), (160, 1, 0.1), (160, 0, math.inf)])
def test_a_fit_is_damped_as_tokens_that_it_does_not_see_want_it(
    tokens: int, common: float, expected: float, has_bias: bool
) -> None:
    """Few tokens for 60 columns, or columns that have little in common: the fit moves less, or not at all."""
    generator = torch.Generator().manual_seed(0)
    shared, mixing, own, w = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, 8), (8, 80), (tokens, 80), (6, 80))
    )
    x = common * shared @ mixing + own + 0.5 * has_bias
    cut = CutMatrix(w, inputs_of(x, windows=16), torch.arange(60), has_bias=has_bias)
    left_out = torch.arange(tokens) * 16 // tokens % 4 == 3
    seen, unseen = (x[which] - has_bias * x[which].mean(0) for which in (~left_out, left_out))

    def error(damping: float) -> float:
        """On the tokens left out, by the normal equations of the others."""
        moved = torch.zeros(60, 6, dtype=x.dtype)
        if not math.isinf(damping):
            ridge = damping * seen.square().sum(0).mean() * torch.eye(60, dtype=x.dtype)
            gram = seen[:, :60].T @ seen[:, :60] + ridge
            moved = torch.linalg.solve(gram, seen[:, :60].T @ (seen[:, 60:] @ w[:, 60:].T))
        return float((unseen[:, :60] @ moved - unseen[:, 60:] @ w[:, 60:].T).square().sum())

    found = damping_for(cut)
    assert found == expected == min([0.01, 0.1, 1.0, 10.0, math.inf], key=error)
    fit = fit_columns(replace(cut, damping=found))
    assert torch.equal(fit.columns_RK, w[:, :60]) == math.isinf(found)
    assert (fit.shift_R is not None) == has_bias


def test_removing_nothing_changes_nothing() -> None:
    """What reads nothing that goes is not looked at."""
    model, discovery, decided = planned("llama")
    first, *others = decided.groups
    whole = tuple(replace(group, kept=group.units, keep=tuple(range(group.units)), spare=None) for group in others)
    found = repair(model, replace(decided, groups=(first, *whole)), discovery, WINDOWS)
    assert [*found.weights] == ["model.layers.0.mlp.down_proj.weight"]


def test_new_weights_may_lie_in_files(tmp_path: Path) -> None:
    model, discovery, decided = planned("llama")
    expected, found = (repair(model, decided, discovery, WINDOWS, room=room).weights for room in (None, tmp_path))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name])
        assert str(weight.untyped_storage().filename).startswith(("/proc/self/fd", "/dev/fd"))
    assert not [*tmp_path.iterdir()]


def test_a_plan_of_layers_needs_no_repair() -> None:
    model, discovery, _ = planned("llama")
    scores = Scores("l2", "sum", {"layers": torch.arange(discovery.depth).float()})
    options = CutOptions(ratio=0.5, of="units", axes=("layers",), score="l2")
    found = repair(model, plan(discovery, options, scores=scores), discovery, WINDOWS)
    assert not found.weights


def test_every_repair_that_the_options_offer_is_registered() -> None:
    assert ("auto", *REPAIRS) == get_args(get_type_hints(CutOptions)["repair"])


def test_an_unknown_repair_is_refused() -> None:
    model, discovery, decided = planned("llama")
    with pytest.raises(PlanError, match=r"repair='bais' is unknown\. Expected none, bias, .*Did you mean bias\?"):
        repair(model, decided, discovery, WINDOWS, method="bais")


# --- the hidden width -------------------------------------------------------------------------------------------------


class OneMore(nn.Module):
    """A norm that multiplies by one more than its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x / x.square().mean(-1, keepdim=True).sqrt() * (1 + self.weight)
        return found


@pytest.mark.parametrize("kind", ["rms", "layer", "one more"])
def test_the_weight_of_a_norm_is_scaled_to_what_it_gave(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.rand(12, generator=generator), torch.randn(3, 50, 12, generator=generator)
    x[..., 5:] *= 3  # features that go are larger than those that stay
    norm: Any = OneMore(weight)
    if kind != "one more":
        norm = nn.RMSNorm(12, eps=1e-6) if kind == "rms" else nn.LayerNorm(12)
        norm.weight.data = weight
    if kind == "layer":
        norm.bias.data = torch.randn(12, generator=generator)
    at = torch.arange(5)
    wanted = norm(x)[..., at].detach()
    smaller = narrowed(norm, at)
    before = (smaller(x[..., at]) - wanted).square().sum()
    found = scaled_weight(smaller, wanted, x[..., at])
    assert found is not None
    errors = []
    for factor in (1.0, 0.98, 1.02):
        other = (1 + found) * factor - 1 if kind == "one more" else found * factor
        smaller.weight = nn.Parameter(other)
        errors.append((smaller(x[..., at]) - wanted).square().sum().item())
    assert errors[0] == min(errors)
    assert errors[0] < before
    assert torch.equal(norm.weight, weight)


@torch.no_grad()
def test_a_norm_may_read_a_gate() -> None:
    class Gated(OneMore):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            assert gate is not None
            return super().forward(x) * gate

    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 3, 50, 12, generator=generator)
    norm, at = Gated(torch.rand(12, generator=generator)), torch.arange(5)
    wanted, smaller = norm(x, gate)[..., at].detach(), narrowed(norm, at)
    positional = scaled_weight(smaller, wanted, x[..., at], gate[..., at])
    plain = scaled_weight(narrowed(OneMore(norm.weight.detach()), at), OneMore(norm.weight)(x)[..., at], x[..., at])
    assert positional is not None
    assert plain is not None
    assert torch.allclose(positional, plain, atol=0.1)
    smaller.weight = nn.Parameter(norm.weight[at].detach())
    by_name = scaled_weight(smaller, wanted, x[..., at], gate=gate[..., at])
    assert by_name is not None
    assert torch.equal(positional, by_name)


@torch.no_grad()
def test_a_norm_that_no_weight_scales_is_left_as_it_is() -> None:
    class Clamped(OneMore):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    generator = torch.Generator().manual_seed(0)
    norm, x = Clamped(torch.rand(12, generator=generator)), torch.randn(2, 3, 12, generator=generator)
    assert scaled_weight(norm, 5 * torch.ones(2, 3, 12), x) is None


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_hidden_cut_comes_nearer_to_the_dense_model(family: str) -> None:
    model, discovery, decided = planned(family, axes=("hidden",), ratio=0.2)
    found = repair(model, decided, discovery, WINDOWS)
    assert any("norm" in name or "ln_" in name for name in found.weights)
    assert not any(weight.name in found.weights for weight in discovery.weights if weight.embedding)
    dense = logits(model, WINDOWS)
    errors = []
    for weights in ({}, found.weights):
        cut = prune(model, found.plan, discovery=discovery, weights=weights)
        errors.append(float((logits(cut, WINDOWS) - dense).square().sum()))
    assert errors[1] < errors[0]
