"""Scores of inputs are their papers' formulas, on what plain hooks see; stacked experts too."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from every_type import tiny_type_model
from families import family_config, family_model
from secateur import discover, score
from secateur.discovery.groups import Discovery
from secateur.errors import ScoreError
from secateur.models.silence import quiet
from secateur.scoring.collect_forward import FeatureMoments, activation_statistics
from secateur.scoring.obs import DAMPING, removal_costs
from secateur.scoring.passes.products import stream_inputs
from secateur.scoring.scores import statistics_for
from secateur.scoring.unit_scores import unit_scores

WINDOWS = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(2))
DOWN, OUT = "model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return family_model(family_config("llama"), dtype=torch.float32)


@pytest.fixture(scope="module")
def discovery(model: PreTrainedModel) -> Discovery:
    return discover(model)


@pytest.fixture(scope="module")
def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    return hooked_inputs(model)


@pytest.fixture(scope="module")
def scores(model: PreTrainedModel, discovery: Discovery) -> dict[str, dict[str, Tensor]]:
    """Every score of one forward pass: name -> group -> units."""
    found = {}
    for name in ("obs", "obs_greedy"):
        statistics = statistics_for(name, model, discovery, WINDOWS)
        for each in (name, "wanda", "fluctuation", "block_influence"):
            found[each] = unit_scores(discovery, statistics, name=each, reduce="sum")
    return found


def hooked_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weight of a linear layer -> all that it reads, tokens x features, float64."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str):  # type: ignore[no-untyped-def]  # a hook
        def keep(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            found[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

        return keep

    linear = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    hooks = [module.register_forward_hook(hook(f"{path}.weight")) for path, module in linear.items()]
    with torch.no_grad():
        for ids in WINDOWS:
            model(input_ids=ids[None], use_cache=False)
    for each in hooks:
        each.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_wanda_sums_weights_times_norms_of_inputs(
    model: PreTrainedModel, inputs: dict[str, Tensor], scores: dict[str, dict[str, Tensor]]
) -> None:
    """Sum |W_ij| ||x_j|| over the rows of what reads the units, and over a head's columns."""
    down, out = (model.get_parameter(n).detach().double().abs().sum(0) * inputs[n].norm(dim=0) for n in (DOWN, OUT))
    torch.testing.assert_close(scores["wanda"]["layers.1.mlp"].double(), down, rtol=1e-5, atol=0)
    heads = out.reshape(3, 20).sum(1)
    torch.testing.assert_close(scores["wanda"]["layers.1.attention"].double(), heads, rtol=1e-5, atol=0)


def test_fluctuation_sums_squared_weights_times_variances_of_inputs(
    model: PreTrainedModel, inputs: dict[str, Tensor], scores: dict[str, dict[str, Tensor]]
) -> None:
    expected = model.get_parameter(DOWN).detach().double().square().sum(0) * inputs[DOWN].var(0)
    torch.testing.assert_close(scores["fluctuation"]["layers.1.mlp"].double(), expected, rtol=1e-5, atol=0)


def least_loss(weight: Tensor, gram: Tensor, removed: list[int]) -> float:
    """The least increase of sum ||x W' - x V'||^2 for V that does not read what is removed, found by least squares."""
    kept = [i for i in range(len(gram)) if i not in removed]
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(gram[kept][:, kept], (weight @ gram)[:, kept].t()).t()
    change = weight - best
    return float((change @ gram * change).sum())


@pytest.mark.parametrize(("name", "group", "channels"), [(DOWN, "layers.1.mlp", 1), (OUT, "layers.1.attention", 20)])
def test_obs_is_what_least_squares_cannot_make_up_for(
    name: str,
    group: str,
    channels: int,
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    scores: dict[str, dict[str, Tensor]],
) -> None:
    weight, gram = model.get_parameter(name).detach().double(), inputs[name].t() @ inputs[name] / len(inputs[name])
    ridge = float(DAMPING * gram.diagonal().mean())  # holds back the changes of what stays, not of what goes
    gram += ridge * torch.eye(len(gram), dtype=torch.float64)
    for unit, value in enumerate(scores["obs"][group].tolist()):
        removed = list(range(unit * channels, (unit + 1) * channels))
        of_removed = ridge * float(weight[:, removed].square().sum())
        assert value == pytest.approx(least_loss(weight, gram, removed) - of_removed, rel=1e-4)


def test_greedy_costs_rank_units_in_the_order_of_their_removal(
    model: PreTrainedModel, inputs: dict[str, Tensor], scores: dict[str, dict[str, Tensor]]
) -> None:
    found, x = scores["obs_greedy"]["layers.1.mlp"], inputs[DOWN]
    order, costs = removal_costs(model.get_parameter(DOWN).detach(), x.t() @ x / len(x), torch.arange(84))
    assert bool((found[order].diff() >= 0).all())  # of two that cost the same, either may be first
    assert found.argsort(stable=True).tolist()[:20] == order[:20]
    assert float(found.max()) == pytest.approx(float(costs.max()), rel=1e-3)


def test_block_influence_is_one_minus_the_cosine_of_hidden_states(model: PreTrainedModel, discovery: Discovery) -> None:
    statistics = statistics_for("block_influence", model, discovery, WINDOWS)
    found = unit_scores(discovery, statistics, name="block_influence")
    with torch.no_grad():
        states = model.model(input_ids=WINDOWS, output_hidden_states=True, use_cache=False).hidden_states
    first = torch.cosine_similarity(states[0], states[1], dim=-1).mean()
    assert list(found) == ["layers"]
    assert found["layers"][0].item() == pytest.approx(1 - first.item(), abs=1e-5)
    assert len(found["layers"]) == model.config.num_hidden_layers


def test_layer_loss_is_the_loss_without_the_layer_minus_that_with_it(
    model: PreTrainedModel, discovery: Discovery
) -> None:
    found = score(model, name="layer_loss", windows=WINDOWS, discovery=discovery).units["layers"]
    with torch.no_grad():
        dense = model(WINDOWS, labels=WINDOWS).loss
        layers = model.model.layers
        try:
            for removed in range(3):
                model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != removed)
                gained = model(WINDOWS, labels=WINDOWS, use_cache=False).loss - dense
                assert float(found[removed]) == pytest.approx(float(gained), rel=1e-3, abs=1e-5)
        finally:
            model.model.layers = layers


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "falcon", "phi3"])
def test_inputs_of_linear_layers_of_any_kind_are_seen(model_type: str) -> None:
    with quiet():
        model = tiny_type_model(model_type, dtype=torch.float32)
    expected, inputs_of = hooked_inputs(model), defaultdict(list)
    stream_inputs(model, WINDOWS, lambda weight, _, __, x_NC: inputs_of[weight].append(x_NC.double()))
    parameters = dict(model.named_parameters())
    names = [name for name in expected if name in parameters]  # a tied head has another name
    assert len(names) > 4
    for name in names:
        torch.testing.assert_close(torch.cat(inputs_of[name]), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_stacked_experts_have_statistics_of_the_tokens_of_each(model_type: str) -> None:
    """All tokens that reach a stack are counted, each expert's apart; the model computes its experts as before."""
    with quiet():
        model = tiny_type_model(model_type, dtype=torch.float32)
    before = model.config._experts_implementation
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n]
    found = activation_statistics(
        model, WINDOWS, {"count": lambda evidence: torch.ones_like(evidence.weight) * evidence.inputs.tokens}
    )
    assert model.config._experts_implementation == before
    assert len(stacks) >= 2
    for name in stacks:
        shape = model.get_parameter(name).shape
        tokens = found.sums["count"][name][0] / (shape[1] * shape[2])  # of each expert
        assert tokens.sum().item() == WINDOWS.numel() * model.config.num_experts_per_tok
        assert len(tokens) == shape[0]
    discovery = discover(model)
    scores = unit_scores(discovery, statistics_for("wanda", model, discovery, WINDOWS), name="wanda")
    assert any("expert" in name for name in scores)


def test_moments_of_tokens_in_pieces_are_those_of_all() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 3 + 100
    features = FeatureMoments(1, 3, x.device, gram=True)
    for part in (x[:7], x[7:7], x[7:30], x[30:]):
        features.add(0, part)
    moments = features.moments(torch.ones(2, 3), 1)
    torch.testing.assert_close(moments.variance, x.double().var(0, keepdim=True).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.norm, x.double().norm(dim=0, keepdim=True).float(), rtol=1e-6, atol=0)
    assert moments.tokens.item() == 50


def test_groups_that_no_product_reads_are_named(model: PreTrainedModel, scores: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(ScoreError, match="wanda knows nothing of vocabulary"):
        score(model, windows=WINDOWS, name="wanda", groups=["vocabulary"])
    assert "vocabulary" not in scores["wanda"]


def test_inputs_that_are_not_finite_are_named() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = torch.inf
    with pytest.raises(ScoreError, match=r"layers\.0\.mlp\.down_proj\.weight has .* NaN or Inf"):
        score(model, windows=WINDOWS, name="wanda", groups=["layers.0.mlp"])
