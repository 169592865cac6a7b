"""Scores are LLM-Pruner's formulas, unit by unit; grouped queries are added to the right group."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from families import family_config, family_model
from secateur import CalibrationOptions, discover, score
from secateur.errors import ScoreError
from secateur.scoring.gradients import stream_gradients
from secateur.scoring.scores import REDUCTIONS, SCORES, Scores, read_scores, statistics_for, unit_scores, write_scores

WINDOWS = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(2))
LAYER = "model.layers.1"
OF_ALL_AXES = ("weights", "gradient", "second order")  # scores of inputs are in test_activations.py


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return family_model(family_config("llama"), dtype=torch.float32)


def reference_gradients(model: PreTrainedModel, windows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """G of one batched loss, and A as the mean of squared gradients of the samples' own losses; plain autograd."""

    def backward(ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    batched = backward(windows)
    single = [backward(ids[None]) for ids in windows]
    model.zero_grad(set_to_none=True)
    return batched, {name: torch.stack([g[name].square() for g in single]).mean(0) for name in batched}


def collected(
    model: PreTrainedModel, windows: Tensor, *, second_order: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `stream_gradients` visits, put together."""
    gradients: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def visit(name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        parameter = model.get_parameter(name).detach()
        assert torch.equal(weight, parameter[rows].float())
        assert {weight.dtype, gradient.dtype} == {torch.float32}
        gradients.setdefault(name, torch.full(parameter.shape, torch.nan))[rows] = gradient
        if squared is not None:
            squares.setdefault(name, torch.full(parameter.shape, torch.nan))[rows] = squared

    stream_gradients(model, windows, visit, second_order=second_order)
    return gradients, squares


@pytest.mark.parametrize("second_order", [False, True])
def test_gradients_are_those_of_plain_autograd(model: PreTrainedModel, second_order: bool) -> None:
    gradient, squared = reference_gradients(model, WINDOWS)
    gradients, squares = collected(model, WINDOWS, second_order=second_order)
    assert gradients.keys() == gradient.keys()
    for name in gradient:
        torch.testing.assert_close(gradients[name], gradient[name], rtol=1e-4, atol=1e-6)
        if second_order:
            torch.testing.assert_close(squares[name], squared[name], rtol=1e-4, atol=1e-7)
    assert bool(squares) == second_order
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_pass_leaves_the_model_as_it_was() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    model.requires_grad_(False)
    assert collected(model, WINDOWS, second_order=True)[0]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_statistics_report_progress(model: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    statistics_for(
        "param_mix", model, discover(model), WINDOWS, progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    done, total = seen[-1]
    assert 0.9 * total < done <= total


def test_squares_do_not_underflow_in_half_precision() -> None:
    """The square of a gradient of 1e-5 is below what float16 can hold; in float32 it is not lost."""
    half = family_model(family_config("llama"), dtype=torch.float16)
    gradients, squares = collected(half, WINDOWS, second_order=True)
    name = f"{LAYER}.mlp.up_proj.weight"
    tiny = (gradients[name].abs() < 1e-4) & (gradients[name] != 0)
    assert tiny.any()
    assert (squares[name][tiny] > 0).all()


def salience(name: str, weight: Tensor, gradient: Tensor, squared: Tensor) -> Tensor:
    """The table of formulas, written out once more."""
    return {
        "l1": weight.abs(),
        "l2": weight**2,
        "vectorize": weight * gradient,
        "param_first": (weight * gradient).abs(),
        "param_second": (weight * squared * weight).abs(),
        "param_mix": (weight * gradient - weight * squared * weight / 2).abs(),
    }[name]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(
    "name", [name for name, how in SCORES.items() if how.needs in OF_ALL_AXES and name != "random"]
)
def test_units_score_as_the_paper_says(model: PreTrainedModel, name: str, reduce: str) -> None:
    gradient, squared = reference_gradients(model, WINDOWS)
    weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
    discovery = discover(model)
    found = unit_scores(discovery, statistics_for(name, model, discovery, WINDOWS), name=name, reduce=reduce)

    def channels(weight: str, dim: int) -> Tensor:
        key = f"{LAYER}.{weight}.weight"
        s = salience(name, weights[key], gradient[key], squared[key])
        return s.sum(1 - dim).abs() if name == "vectorize" else s.sum(1 - dim)

    def combined(axes: list[Tensor]) -> Tensor:
        stacked = torch.stack(axes)
        return {
            "sum": stacked.sum(0),
            "mean": stacked.mean(0),
            "max": stacked.max(0).values,
            "prod": stacked.prod(0),
            "first": stacked[0],
            "last": stacked[-1],
        }[reduce]

    mlp = combined([channels("mlp.gate_proj", 0), channels("mlp.up_proj", 0), channels("mlp.down_proj", 1)])
    torch.testing.assert_close(found["layers.1.mlp"], mlp, rtol=1e-4, atol=0)
    heads = combined(
        [
            channels("self_attn.q_proj", 0).reshape(3, 2 * 10).sum(1),  # KV head g has query heads 2g and 2g + 1
            channels("self_attn.k_proj", 0).reshape(3, 10).sum(1),
            channels("self_attn.v_proj", 0).reshape(3, 10).sum(1),
            channels("self_attn.o_proj", 1).reshape(3, 2 * 10).sum(1),
        ]
    )
    torch.testing.assert_close(found["layers.1.attention"], heads, rtol=1e-4, atol=0)


@pytest.mark.parametrize("marked", range(6))
def test_a_query_head_counts_for_its_own_kv_head(marked: int) -> None:
    """Marker weights: of 6 query heads on 3 KV heads, heads 2g and 2g + 1 belong to KV head g."""
    config = family_config("llama")
    model = family_model(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".self_attn." in name:
                parameter.zero_()
        model.get_parameter(f"{LAYER}.self_attn.q_proj.weight")[marked * 10 : (marked + 1) * 10] = 1.0
    found = score(model, name="l1")
    attention, query = found.units["layers.1.attention"], found.units["layers.1.query"]
    assert attention.nonzero().flatten().tolist() == [marked // 2]
    assert query.nonzero().flatten().tolist() == [marked % 2]


def test_only_the_groups_asked_for_are_scored(model: PreTrainedModel) -> None:
    whole = score(model, windows=WINDOWS, name="param_mix")
    some = score(model, windows=WINDOWS, name="param_mix", groups=["layers.0.mlp", "layers.2.attention"])
    assert some.units.keys() == {"layers.0.mlp", "layers.2.attention"}
    for group, units in some.units.items():
        torch.testing.assert_close(units, whole.units[group], rtol=1e-5, atol=0)


def test_a_layer_scores_the_sum_of_its_weights(model: PreTrainedModel) -> None:
    found = score(model, name="l1", reduce="sum").units["layers"]
    for i in range(3):
        total = sum(
            p.detach().abs().sum() for name, p in model.named_parameters() if name.startswith(f"model.layers.{i}.")
        )
        assert float(found[i]) == pytest.approx(float(total), rel=1e-5)


def test_random_scores_follow_the_seed_and_not_the_model(model: PreTrainedModel) -> None:
    def drawn(seed: int) -> Scores:
        return score(model, name="random", calibration=CalibrationOptions(seed=seed))

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(one.units[group], again.units[group]) for group in one.units)
    assert not torch.equal(one.units["layers.0.mlp"], other.units["layers.0.mlp"])
    assert not torch.equal(one.units["layers.0.mlp"], one.units["layers.1.mlp"])
    assert one.calibration is None


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 83), st.floats(1.5, 1e3))
def test_a_larger_unit_scores_higher(unit: int, factor: float) -> None:
    """Scaling one MLP channel of every axis up raises its norm score and no other."""
    config = family_config("llama", num_hidden_layers=1)
    model, discovery = family_model(config, dtype=torch.float32), discover(config)
    before = score(model, name="l2", discovery=discovery).units["layers.0.mlp"]
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[unit] *= factor
    after = score(model, name="l2", discovery=discovery).units["layers.0.mlp"]
    assert after[unit] > before[unit]
    others = [i for i in range(84) if i != unit]
    assert torch.equal(after[others], before[others])


def test_scores_survive_a_file(model: PreTrainedModel, tmp_path: Path) -> None:
    found = score(model, windows=WINDOWS, name="param_mix")
    write_scores(tmp_path / "scores.safetensors", found)
    again = read_scores(tmp_path / "scores.safetensors")
    assert (again.score, again.reduce, again.calibration, again.seed) == ("param_mix", "sum", found.calibration, 0)
    assert again.options == found.options
    assert again.loss == pytest.approx(found.loss)
    assert {name: tensor.tolist() for name, tensor in again.units.items()} == {
        name: tensor.tolist() for name, tensor in found.units.items()
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    model.get_parameter(f"{LAYER}.mlp.up_proj.weight").data[3, 4] = bad
    with pytest.raises(
        ScoreError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight has 1 values that are NaN or Inf"
    ):
        score(model, name="l1")


def test_a_loss_that_is_not_finite_is_told() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    model.get_parameter("model.norm.weight").data[0] = math.inf
    with pytest.raises(ScoreError, match=r"the loss on the calibration text is (nan|inf): .*float32 or bfloat16"):
        score(model, windows=WINDOWS)


def test_gradients_that_are_all_zero_are_told() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    model.get_parameter("model.norm.weight").data.zero_()
    model.get_parameter("model.embed_tokens.weight").data.zero_()
    model.get_output_embeddings().weight.data.zero_()
    with pytest.raises(ScoreError, match=r"all gradients are zero \(loss 4\.\d+\)"):
        score(model, windows=WINDOWS)


def test_unknown_names_get_a_suggestion(model: PreTrainedModel) -> None:
    with pytest.raises(ScoreError, match=r"unknown score 'param_frist'. Did you mean param_first\? Known: random, l1"):
        score(model, name="param_frist")
    with pytest.raises(ScoreError, match=r"unknown reduction 'som'. Did you mean sum\? Known: sum, mean"):
        score(model, name="l1", reduce="som")


def test_gradient_scores_need_text(model: PreTrainedModel) -> None:
    with pytest.raises(ScoreError, match="score param_second needs calibration text: give a tokenizer, or windows"):
        score(model)


def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scores.safetensors").write_bytes(b"no")
    with pytest.raises(ScoreError, match="holds no scores"):
        read_scores(tmp_path / "scores.safetensors")
    with pytest.raises(ScoreError, match="holds no scores"):
        read_scores(tmp_path / "missing.safetensors")
