"""Scores are found by name, with a suggestion for a wrong one; the user's own is one function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from families import family_config, family_model
from secateur import CutOptions, discover, score
from secateur.errors import PlanError, ScoreError
from secateur.planning.plan import check_score
from secateur.scoring.registry import SCORES, register_score
from secateur.scoring.saliences import Salience
from secateur.scoring.scores import scores_from
from secateur.scoring.statistics import Statistics

WINDOWS = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(2))
WITHOUT_PAPER = {"random", "layer_loss"}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return family_model(family_config("llama", num_hidden_layers=1), dtype=torch.float32)


@pytest.fixture
def registry() -> Iterator[None]:
    """Scores that a test registers are gone after it."""
    before = dict(SCORES)
    yield
    SCORES.clear()
    SCORES.update(before)


def test_every_score_has_its_formula_and_its_paper() -> None:
    assert all(how.formula and not how.own for how in SCORES.values())
    assert {name for name, how in SCORES.items() if not how.paper.startswith("https://arxiv.org/")} == WITHOUT_PAPER


@pytest.mark.usefixtures("registry")
def test_the_users_own_score_is_one_function(model: PreTrainedModel) -> None:
    @register_score("squared_gradient", needs="gradient")
    def squared_gradient(evidence):  # type: ignore[no-untyped-def]  # as a user would write it
        """Sum G^2."""
        return evidence.gradient.square()

    found = score(model, windows=WINDOWS, name="squared_gradient")
    assert found.score == "squared_gradient"
    assert found.units["layers.0.mlp"].gt(0).all()
    assert CutOptions(ratio=0.2, score="squared_gradient", scope="local", shape="uniform").score == "squared_gradient"
    assert (SCORES["squared_gradient"].formula, SCORES["squared_gradient"].own) == ("Sum G^2", True)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("needs", "salience", "message"),
    [
        ("weights", lambda evidence: evidence.gradient, 'needs="gradient"'),
        ("gradient", lambda evidence: evidence.squared, 'needs="second order"'),
        ("gradient", lambda evidence: evidence.inputs.norm, 'needs="inputs"'),
        ("weights", lambda evidence: evidence.weight.sum(0), "expected one number for each"),
    ],
)
def test_a_score_that_looks_at_what_it_has_not_asked_for_is_refused(
    model: PreTrainedModel, needs: Any, salience: Salience, message: str
) -> None:
    register_score("odd", needs=needs)(salience)
    with pytest.raises(ScoreError, match=message):
        score(model, windows=WINDOWS, name="odd")


def test_names_that_cannot_be_registered() -> None:
    with pytest.raises(ScoreError, match="'l1' is Secateur's own"):
        register_score("l1")
    with pytest.raises(ScoreError, match="'my score' is no name"):
        register_score("my score")
    with pytest.raises(ScoreError, match=r"needs='gradients' is unknown.*Did you mean gradient\?"):
        register_score("mine", needs="gradients")  # type: ignore[arg-type]  # that is the error


def test_unknown_names_get_a_suggestion(model: PreTrainedModel) -> None:
    with pytest.raises(
        ScoreError, match=r"score='param_frist' is unknown. Expected random, l1.* Did you mean param_first\?"
    ):
        score(model, name="param_frist")
    with pytest.raises(ScoreError, match=r"reduce='som' is unknown. Expected sum, mean.* Did you mean sum\?"):
        scores_from(discover(model), Statistics({}), name="l1", reduce="som")


def test_scores_of_other_kinds_of_groups_are_refused() -> None:
    with pytest.raises(PlanError, match="block_influence compares whole layers: use axes=layers"):
        check_score(CutOptions(ratio=0.2, score="block_influence", scope="local", shape="uniform"))
    with pytest.raises(PlanError, match="reap compares whole experts: use axes=experts"):
        check_score(CutOptions(ratio=0.2, score="reap"))
    with pytest.raises(PlanError, match="obs is not for whole layers: use score=block_influence"):
        check_score(CutOptions(ratio=0.2, score="obs", axes=("layers",)))
