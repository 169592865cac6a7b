"""Every score with its formula and its paper, in `SCORES`. Users add theirs with `register_score`.

A score gives every element of a weight a salience s. A channel (one index of an axis) adds up its elements, a unit its
channels, and the axes of a group are reduced by sum, mean, max, prod, first or last. The higher, the more the unit is
worth. W is the weight, G its gradient, A the mean over the samples of the square of each one's gradient, x its inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from secateur.errors import ScoreError, check_known
from secateur.scoring.saliences import Salience

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # axes x units -> units
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "prod": lambda x: x.prod(0),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
}

SALIENCE_NEEDS = ("weights", "inputs", "gradient", "second order")  # what a salience may ask for
Needs = Literal["weights", "inputs", "gradient", "second order", "masks", "grams", "experts", "layers", "losses"]


@dataclass(frozen=True, slots=True)
class Score:
    """How units are scored, what that needs, and where it comes from."""

    salience: Salience | None
    """None where units are scored as wholes, by what a pass collects for them."""
    needs: Needs
    """Which pass over the calibration windows, if any."""
    formula: str = ""
    paper: str = ""
    """Its address."""
    signed: bool = False
    """A channel is |sum s|, not sum |s|."""
    reduce: str = "sum"
    """How the axes of a group are reduced, unless the user says otherwise."""
    own: bool = False
    """The user's, not one of Secateur's."""


LLM_PRUNER, ZIPLM = "https://arxiv.org/abs/2305.11627", "https://arxiv.org/abs/2302.04089"
SHORTGPT, FISHER = "https://arxiv.org/abs/2403.03853", "https://arxiv.org/abs/2204.09656"
WANDA, FLAP = "https://arxiv.org/abs/2306.11695", "https://arxiv.org/abs/2312.11983"
REAP = "https://arxiv.org/abs/2510.13999"

# fmt: off  # a table: one to three lines for each score
SCORES: dict[str, Score] = {
    # without calibration
    "random": Score(None, "weights", "Uniform, seeded"),
    "l1": Score(lambda of: of.weight, "weights", "L1 norm: sum |W|", LLM_PRUNER, reduce="mean"),
    "l2": Score(lambda of: of.weight.square(), "weights", "L2 norm, squared: sum W^2", LLM_PRUNER, reduce="mean"),
    # one forward and backward pass
    "vectorize": Score(lambda of: of.first, "gradient", "LLM-Pruner, equation 3: |sum W G|", LLM_PRUNER, signed=True),
    "param_first": Score(lambda of: of.first, "gradient", "LLM-Pruner, equation 5, first order: sum |W G|", LLM_PRUNER),
    "param_second": Score(
        lambda of: of.second, "second order", "LLM-Pruner, equation 5, second order: sum |W A W|", LLM_PRUNER
    ),
    "param_mix": Score(
        lambda of: of.first.sub(of.second, alpha=0.5),
        "second order",
        "LLM-Pruner, equation 5: sum |W G - W A W / 2|",
        LLM_PRUNER,
    ),
    "fisher": Score(
        None,
        "masks",
        "Fisher information, equations 6-8, nats per token: 1/2 sum over spans of tokens of (dL/dm)^2, m a unit's mask",
        FISHER,
    ),
    # one forward pass
    "wanda": Score(lambda of: of.weight * of.inputs.norm, "inputs", "Wanda, equation 1: sum |W| norm(x)", WANDA),
    "fluctuation": Score(
        lambda of: of.weight.square() * of.inputs.variance, "inputs", "FLAP, WIFV: sum W^2 var(x)", FLAP
    ),
    "obs": Score(
        None, "grams", "Optimal brain surgeon (ZipLM): tr(W_u ((X'X)^-1)_uu^-1 W_u'), each unit u alone", ZIPLM
    ),
    "obs_greedy": Score(
        None, "grams", "Optimal brain surgeon (ZipLM): the same as obs, one unit after the other", ZIPLM
    ),
    "reap": Score(None, "experts", "REAP, of an expert: mean over its tokens of gate x norm(output)", REAP),
    "block_influence": Score(None, "layers", "ShortGPT: 1 - mean cos(h, layer(h))", SHORTGPT),
    # one forward pass for every layer
    "layer_loss": Score(None, "losses", "Nats per token: loss without the layer - loss"),
}
# fmt: on


def register_score(
    name: str, *, needs: Needs = "weights", signed: bool = False, reduce: str = "sum"
) -> Callable[[Salience], Salience]:
    """Make a function of a weight's `Evidence` the score `name`, for Python and the command line alike.

    The function gives one number for each element of the weight; a channel is the sum of their absolute values, or with
    `signed` the absolute value of their sum. `needs` says what the function looks at: "weights", "inputs" (one forward
    pass), "gradient" or "second order" (one forward and backward pass). `reduce` is the default over a group's axes.
    The first line of its docstring is its formula. Raises `ScoreError` for an unknown need or reduction, or a name that
    is taken.

    >>> @register_score("magnitude_times_input", needs="inputs")
    ... def magnitude_times_input(evidence):
    ...     "Sum |W mean(x)|."
    ...     return evidence.weight * evidence.inputs.mean
    >>> SCORES.pop("magnitude_times_input").formula
    'Sum |W mean(x)|'
    """
    check_known(ScoreError, "needs", needs, SALIENCE_NEEDS)
    check_known(ScoreError, "reduce", reduce, REDUCTIONS)
    if name in SCORES and not SCORES[name].own:
        raise ScoreError(f"the score {name!r} is Secateur's own; give yours another name")
    if not name.isidentifier():
        raise ScoreError(f"{name!r} is no name of a score; use letters, digits and underscores, for example my_score")

    def register(salience: Salience) -> Salience:
        formula = (inspect.getdoc(salience) or "").partition("\n")[0].rstrip(".")
        SCORES[name] = Score(salience, needs, formula, signed=signed, reduce=reduce, own=True)
        return salience

    return register
