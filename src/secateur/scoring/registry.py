"""Every score with its formula and its paper. To add one, decorate its salience with `register_score`.

A score gives every element of a weight a salience s. A channel (one index of an axis) adds up its elements, a unit its
channels, and the axes of a group are reduced by sum, mean, max, prod, first or last. The higher, the more the unit is
worth. W is the weight, G its gradient, A the mean over the samples of the square of each one's gradient, x its inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from secateur.errors import ScoreError, did_you_mean
from secateur.scoring.saliences import Evidence, Salience

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # axes x units -> units
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "prod": lambda x: x.prod(0),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
}

SALIENCE_NEEDS = ("weights", "inputs", "gradient", "second order")  # what a salience may ask for
Needs = Literal["weights", "inputs", "gradient", "second order", "masks", "grams", "layers", "losses"]


@dataclass(frozen=True, slots=True)
class Score:
    """How units are scored, what that needs, and where it comes from."""

    salience: Salience | None
    """None where units are scored as wholes, by what a pass collects for them."""
    needs: Needs
    """Which pass over the calibration windows, if any."""
    signed: bool = False
    """A channel is |sum s|, not sum |s|."""
    reduce: str = "sum"
    """How the axes of a group are reduced, unless the user says otherwise."""
    formula: str = ""
    paper: str = ""
    """Its address."""
    own: bool = False
    """The user's, not one of Secateur's."""


SCORES: dict[str, Score] = {}


def register_score(
    name: str, *, needs: Needs = "weights", signed: bool = False, reduce: str = "sum", paper: str = ""
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
    check_known(needs, SALIENCE_NEEDS, "need of a score")
    check_known(reduce, REDUCTIONS, "reduction")
    if name in SCORES and not SCORES[name].own:
        raise ScoreError(f"the score {name!r} is Secateur's own; give yours another name")
    if not name.isidentifier():
        raise ScoreError(f"{name!r} is no name of a score; use letters, digits and underscores, for example my_score")

    def register(salience: Salience) -> Salience:
        formula = (inspect.getdoc(salience) or "").partition("\n")[0].rstrip(".")
        own = salience.__module__ != __name__
        SCORES[name] = Score(salience, needs, signed, reduce, formula, paper, own)
        return salience

    return register


def check_known(name: str, known: Iterable[str], kind: str) -> None:
    """Raise `ScoreError` with a suggestion when `name` is not among the known names.

    >>> check_known("wonda", SCORES, "score")
    Traceback (most recent call last):
    secateur.errors.ScoreError: unknown score 'wonda'. Did you mean wanda? Known: random, l1, l2, ...
    """
    names = list(known)
    if name not in names:
        raise ScoreError(f"unknown {kind} {name!r}{did_you_mean(name, names) or '.'} Known: {', '.join(names)}")


# --- without calibration ----------------------------------------------------------------------------------------------

SCORES["random"] = Score(None, "weights", formula="Uniform, seeded")


@register_score("l1", reduce="mean", paper="https://arxiv.org/abs/2305.11627")
def l1(evidence: Evidence) -> Tensor:
    """L1 norm: sum |W|."""
    return evidence.weight


@register_score("l2", reduce="mean", paper="https://arxiv.org/abs/2305.11627")
def l2(evidence: Evidence) -> Tensor:
    """L2 norm, squared: sum W^2."""
    return evidence.weight.square()


# --- one forward and backward pass ------------------------------------------------------------------------------------


@register_score("vectorize", needs="gradient", signed=True, paper="https://arxiv.org/abs/2305.11627")
def vectorize(evidence: Evidence) -> Tensor:
    """LLM-Pruner, equation 3: |sum W G|."""
    return evidence.first


@register_score("param_first", needs="gradient", paper="https://arxiv.org/abs/2305.11627")
def param_first(evidence: Evidence) -> Tensor:
    """LLM-Pruner, equation 5, first order: sum |W G|."""
    return evidence.first


@register_score("param_second", needs="second order", paper="https://arxiv.org/abs/2305.11627")
def param_second(evidence: Evidence) -> Tensor:
    """LLM-Pruner, equation 5, second order: sum |W A W|."""
    return evidence.second


@register_score("param_mix", needs="second order", paper="https://arxiv.org/abs/2305.11627")
def param_mix(evidence: Evidence) -> Tensor:
    """LLM-Pruner, equation 5: sum |W G - W A W / 2|."""
    return evidence.first.sub(evidence.second, alpha=0.5)


SCORES["fisher"] = Score(
    None,
    "masks",
    formula="Fisher information, equations 6-8, nats per token: 1/2 sum over samples of (dL/dm)^2, m a unit's mask",
    paper="https://arxiv.org/abs/2204.09656",
)

# --- one forward pass -------------------------------------------------------------------------------------------------


@register_score("wanda", needs="inputs", paper="https://arxiv.org/abs/2306.11695")
def wanda(evidence: Evidence) -> Tensor:
    """Wanda, equation 1: sum |W| norm(x)."""
    return evidence.weight * evidence.inputs.norm


@register_score("fluctuation", needs="inputs", paper="https://arxiv.org/abs/2312.11983")
def fluctuation(evidence: Evidence) -> Tensor:
    """FLAP, WIFV: sum W^2 var(x)."""
    return evidence.weight.square() * evidence.inputs.variance


SCORES["obs"] = Score(
    None,
    "grams",
    formula="Optimal brain surgeon (ZipLM): tr(W_u ((X'X)^-1)_uu^-1 W_u'), each unit u alone",
    paper="https://arxiv.org/abs/2302.04089",
)
SCORES["obs_greedy"] = Score(
    None,
    "grams",
    formula="Optimal brain surgeon (ZipLM): the same as obs, one unit after the other",
    paper="https://arxiv.org/abs/2302.04089",
)
SCORES["block_influence"] = Score(
    None, "layers", formula="ShortGPT: 1 - mean cos(h, layer(h))", paper="https://arxiv.org/abs/2403.03853"
)

# --- one forward pass for every layer ---------------------------------------------------------------------------------

SCORES["layer_loss"] = Score(None, "losses", formula="Nats per token: loss without the layer - loss")
