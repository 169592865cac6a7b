"""Scores of activations are their papers' formulas, on what plain hooks see; stacked experts too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from every_type import tiny_type_model
from families import family_config, family_model
from secateur import CalibrationOptions, CutOptions, discover, score
from secateur.errors import PlanError, ScoreError
from secateur.models.silence import quiet
from secateur.planning.options import check_score
from secateur.scoring.obs import DAMPING, removal_costs
from secateur.scoring.scores import SCORES, register_score, statistics_for, unit_scores
from secateur.scoring.statistics import activation_statistics, gram_matrices

WINDOWS = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(2))
DOWN, OUT = "model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return family_model(family_config("llama"), dtype=torch.float32)


def seen_by_hooks(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weight of a linear layer -> all it reads, tokens x features, float64."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def keep(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            found.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

        return keep

    hooks = [
        module.register_forward_hook(hook(f"{path}.weight"))
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    with torch.no_grad():
        for ids in WINDOWS:
            model(input_ids=ids[None], use_cache=False)
    for each in hooks:
        each.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def found_scores(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    discovery = discover(model)
    return unit_scores(discovery, statistics_for(name, model, discovery, WINDOWS), name=name, reduce="sum")


def test_wanda(model: PreTrainedModel) -> None:
    """Sum |W_ij| ||X_j|| over the rows of what reads the units, and over a head's columns."""
    x, found = seen_by_hooks(model), found_scores(model, "wanda")
    down, out = (model.get_parameter(n).detach().double() for n in (DOWN, OUT))
    torch.testing.assert_close(
        found["layers.1.mlp"].double(), down.abs().sum(0) * x[DOWN].norm(dim=0), rtol=1e-5, atol=0
    )
    columns = out.abs().sum(0) * x[OUT].norm(dim=0)
    torch.testing.assert_close(found["layers.1.attention"].double(), columns.reshape(3, 20).sum(1), rtol=1e-5, atol=0)


def test_fluctuation(model: PreTrainedModel) -> None:
    """var(X_j) ||W_:j||^2, the variance over all tokens."""
    x, found = seen_by_hooks(model), found_scores(model, "fluctuation")
    down = model.get_parameter(DOWN).detach().double()
    expected = down.square().sum(0) * x[DOWN].var(0)
    torch.testing.assert_close(found["layers.1.mlp"].double(), expected, rtol=1e-5, atol=0)


def least_loss(weight: Tensor, gram: Tensor, removed: list[int]) -> float:
    """The least increase of sum ||x W' - x V'||^2 for V that does not read what is removed, found by least squares."""
    kept = [i for i in range(len(gram)) if i not in removed]
    # V = argmin tr((W - V) H (W - V)') with V[:, removed] = 0
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(gram[kept][:, kept], (weight @ gram)[:, kept].t()).t()
    change = weight - best
    return float((change @ gram * change).sum())


def test_obs_is_what_least_squares_cannot_make_up_for(model: PreTrainedModel) -> None:
    x, found = seen_by_hooks(model), found_scores(model, "obs")
    for name, group, channels in ((DOWN, "layers.1.mlp", 1), (OUT, "layers.1.attention", 20)):
        weight, gram = model.get_parameter(name).detach().double(), x[name].t() @ x[name] / len(x[name])
        gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        for unit, value in enumerate(found[group].tolist()):
            removed = list(range(unit * channels, (unit + 1) * channels))
            assert value == pytest.approx(least_loss(weight, gram, removed), rel=1e-4)


def test_block_influence(model: PreTrainedModel) -> None:
    with torch.no_grad():
        states = model.model(input_ids=WINDOWS, output_hidden_states=True, use_cache=False).hidden_states
    before_last = torch.cosine_similarity(states[0], states[1], dim=-1).mean()
    found = found_scores(model, "block_influence")
    assert list(found) == ["layers"]
    assert found["layers"][0].item() == pytest.approx(1 - before_last.item(), abs=1e-5)
    assert len(found["layers"]) == model.config.num_hidden_layers


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "falcon", "phi3"])
def test_gram_matrices_of_linear_layers_of_any_kind(model_type: str) -> None:
    with quiet():
        model = tiny_type_model(model_type, dtype=torch.float32)
    seen = seen_by_hooks(model)
    found = gram_matrices(model, WINDOWS, [name for name in seen if name in dict(model.named_parameters())])
    assert len(found) > 4
    for name, gram in found.items():
        assert gram.dtype == torch.float64
        torch.testing.assert_close(gram[0], seen[name].t() @ seen[name], rtol=1e-4, atol=1e-4)


class Expert(nn.Module):
    """What one expert of a stack would be as a module."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = up, down


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_stacked_experts_know_what_each_of_them_reads(model_type: str) -> None:
    """All tokens that reach a stack are counted, each expert's apart; the model computes its experts as before."""
    with quiet():
        model = tiny_type_model(model_type, dtype=torch.float32)
    before = model.config._experts_implementation
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n]
    found = activation_statistics(
        model, WINDOWS, {"count": lambda seen: torch.ones_like(seen.weight) * seen.inputs.tokens}
    )
    assert model.config._experts_implementation == before
    assert len(stacks) >= 2
    top = model.config.num_experts_per_tok
    for name in stacks:
        shape = model.get_parameter(name).shape
        tokens = found.sums["count"][name][0] / (shape[1] * shape[2])  # of each expert
        assert tokens.sum().item() == WINDOWS.numel() * top
        assert len(tokens) == shape[0]
    scores = found_scores(model, "wanda")
    assert any("expert" in name for name in scores)


def test_tokens_in_several_pieces_have_the_variance_of_all() -> None:
    from secateur.scoring.statistics import _Features

    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 3 + 100
    features = _Features(1, 3, x.device, grams=True)
    for part in (x[:7], x[7:7], x[7:30], x[30:]):
        features.add(0, part)
    moments = features.moments(torch.ones(2, 3), 1)
    torch.testing.assert_close(moments.variance, x.double().var(0, keepdim=True).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.norm, x.double().norm(dim=0, keepdim=True).float(), rtol=1e-6, atol=0)
    assert moments.tokens.item() == 50


# --- the user's own ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_scores() -> Iterator[None]:
    before = dict(SCORES)
    yield
    SCORES.clear()
    SCORES.update(before)


@pytest.mark.usefixtures("clean_scores")
def test_the_users_own_score_is_one_function(model: PreTrainedModel) -> None:
    @register_score("squared_gradient", needs="gradient")
    def squared_gradient(seen):  # type: ignore[no-untyped-def]
        return seen.gradient.square()

    found = score(model, windows=WINDOWS, name="squared_gradient")
    assert found.score == "squared_gradient"
    assert found.units["layers.1.mlp"].gt(0).all()
    assert CutOptions(ratio=0.2, score="squared_gradient", scope="local", shape="uniform").score == "squared_gradient"


@pytest.mark.usefixtures("clean_scores")
@pytest.mark.parametrize(
    ("needs", "looks", "told"),
    [
        ("weights", lambda seen: seen.gradient, 'needs="gradient"'),
        ("gradient", lambda seen: seen.squared, 'needs="second order"'),
        ("gradient", lambda seen: seen.inputs.norm, 'needs="inputs"'),
        ("weights", lambda seen: seen.weight.sum(0), "expected one number for each"),
    ],
)
def test_an_own_score_that_looks_at_what_it_has_not_asked_for(model: PreTrainedModel, needs, looks, told) -> None:  # type: ignore[no-untyped-def]
    register_score("odd", needs=needs)(looks)
    with pytest.raises(ScoreError, match=told):
        score(model, windows=WINDOWS, name="odd")


def test_names_of_own_scores() -> None:
    with pytest.raises(ScoreError, match="'l1' is Secateur's own"):
        register_score("l1")
    with pytest.raises(ScoreError, match="'my score' is no name"):
        register_score("my score")
    with pytest.raises(ScoreError, match=r"unknown need of a score 'gradients'\. Did you mean gradient"):
        register_score("mine", needs="gradients")  # type: ignore[arg-type]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_scores_of_other_kinds_of_groups_are_refused() -> None:
    with pytest.raises(PlanError, match="block_influence compares whole layers: use axes=layers"):
        check_score(CutOptions(ratio=0.2, score="block_influence", scope="local", shape="uniform"))
    with pytest.raises(PlanError, match="obs is not for whole layers: use score=block_influence"):
        check_score(CutOptions(ratio=0.2, score="obs", axes=("layers",)))


def test_groups_that_no_product_reads_are_named(model: PreTrainedModel) -> None:
    with pytest.raises(ScoreError, match="wanda knows nothing of vocabulary"):
        score(model, windows=WINDOWS, name="wanda", groups=["vocabulary"])
    assert "vocabulary" not in score(model, windows=WINDOWS, name="wanda").units


def test_inputs_that_are_not_finite_are_named() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = torch.inf
    with pytest.raises(ScoreError, match=r"layers\.0\.mlp\.down_proj\.weight has .* NaN or Inf"):
        score(model, windows=WINDOWS, name="wanda", groups=["layers.0.mlp"], calibration=CalibrationOptions())


def test_greedy_costs_rank_units_in_the_order_of_their_removal() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    found = found_scores(model, "obs_greedy")
    weight, x = model.get_parameter(DOWN).detach(), seen_by_hooks(model)[DOWN]
    order, costs = removal_costs(weight, x.t().double() @ x.double() / len(x), torch.arange(84))
    assert found["layers.1.mlp"].argsort(stable=True).tolist()[:40] == order[:40]
    assert float(found["layers.1.mlp"].max()) == pytest.approx(float(costs.max()), rel=1e-3)


def test_layer_loss_is_what_the_loss_gains() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    scores = score(model, name="layer_loss", windows=WINDOWS)
    with torch.no_grad():
        dense = model(WINDOWS, labels=WINDOWS).loss
        layers = model.model.layers
        for dropped in range(3):
            model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != dropped)
            gained = model(WINDOWS, labels=WINDOWS, use_cache=False).loss - dense
            assert float(scores.units["layers"][dropped]) == pytest.approx(float(gained), rel=1e-3, abs=1e-5)
            model.model.layers = layers
    with pytest.raises(ScoreError, match="compares whole layers"):
        statistics_for("layer_loss", model, discover(model), WINDOWS, groups=[discover(model).group("layers.0.mlp")])
