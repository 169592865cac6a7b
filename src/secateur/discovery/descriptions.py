"""Groups in words: what the units of each kind are, and what one unit of a group holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from secateur.discovery.algebra import Concat, Expression, Fixed, Product, Variable, variables_in
from secateur.discovery.groups import Discovery, Group


@dataclass(frozen=True, slots=True)
class KindDescription:
    """A kind of group in plain words."""

    unit: str
    """One unit, where its axes say no more."""
    units: str
    """All units."""


KIND_DESCRIPTIONS = {
    "attention": KindDescription("attention head", "attention heads; a KV head goes with its query heads"),
    "query": KindDescription("query head", "query heads; one goes in every KV head at once"),
    "head_dim": KindDescription("channel of each head", "channels within the attention heads"),
    "latent": KindDescription("channel of a bottleneck", "channels of a bottleneck (low rank) between two matrices"),
    "state": KindDescription("channel of the state", "heads or channels of a recurrent or convolutional state"),
    "mlp": KindDescription("inner channel of the MLP", "inner channels of the MLPs"),
    "expert": KindDescription("whole expert", "whole experts, among which a router chooses"),
    "expert_mlp": KindDescription("inner channel of the experts", "inner channels of the experts"),
    "shared_mlp": KindDescription(
        "inner channel of the MLP beside the experts", "inner channels of the MLPs beside the experts"
    ),
    "other": KindDescription("channel", "channels of no other kind"),
    "hidden": KindDescription("channel that several layers share", "channels that run from layer to layer"),
    "vocabulary": KindDescription("token", "tokens"),
    "layer": KindDescription("whole layer", "whole layers"),
}


def describe_unit(group: Group, discovery: Discovery) -> str:
    """One unit of a group in words, from the expressions of its axes.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
    >>> discovery = discover(AutoConfig.for_model("granite", **sizes))
    >>> for kind in ("attention", "query", "head_dim"):
    ...     describe_unit(discovery.group(f"layers.0.{kind}"), discovery)
    'KV head with its 3 query heads'
    'query head in each of the 2 KV heads'
    'channel in each of the 6 heads'
    """
    kinds = {other.name: other.kind for other in discovery.groups}
    weights = {weight.name: weight for weight in discovery.weights}
    chains = [chain for axis in group.axes for chain in _chains(axis.expression)]
    found = [(chain, at) for chain in chains for at, v in enumerate(chain) if v.name == group.name]
    outer, inner = [chain[:at] for chain, at in found], [chain[at + 1 :] for chain, at in found]

    def largest(sides: Iterable[Sequence[Variable]], *wanted: str) -> list[Variable]:
        """The most variables of these kinds on one side of the unit, over all chains."""
        return max(([v for v in side if kinds.get(v.name) in wanted] for side in sides), key=_product, default=[])

    match group.kind:
        case "attention":
            if queries := largest(inner, "query"):
                return f"KV head with its {_product(queries)} query heads"
        case "query":
            if heads := largest(outer, "attention"):
                return f"query head in each of the {_product(heads)} KV heads"
        case "head_dim":
            if heads := largest(outer, "attention", "query"):
                return f"channel in each of the {_product(heads)} heads"
        case "state":
            inside, around = largest(inner, "state"), largest(outer, "state")
            noun = ("channel", "head")[len(inside)] if len(inside) < 2 else f"group of {_product(inside[:-1])} heads"
            place = f" in each of the {_product(around)} {'groups' if inside else 'heads'}" if around else ""
            return f"{noun} of the state{place}"
        case "expert_mlp":
            across = [v for axis in group.axes for dim in weights[axis.weight].dims for v in variables_in(dim)]
            if experts := [v for v in across if kinds.get(v.name) == "expert"]:
                return f"inner channel in each of the {experts[0].size} experts"
        case "hidden":
            layers = {weight.layer for weight in discovery.weights}
            if {weights[axis.weight].layer for axis in group.axes} >= layers - {None}:
                return "channel that runs through all layers"
    return KIND_DESCRIPTIONS[group.kind].unit


def _chains(expression: Expression) -> Iterator[tuple[Variable, ...]]:
    """The variables that an index is made of, outermost first, for every part of the dimension."""
    match expression:
        case Variable():
            yield (expression,)
        case Fixed():
            yield ()
        case Concat(parts=parts):
            for part in parts:
                yield from _chains(part)
        case Product(factors=factors):
            for chains in itertools.product(*map(_chains, factors)):
                yield tuple(itertools.chain(*chains))


def _product(variables: Iterable[Variable]) -> int:
    return prod(variable.size for variable in variables)


def position_name(shape: tuple[int, ...], dim: int) -> str:
    """What one index along a dimension of a weight is called; dimensions of size 1 do not count.

    >>> [position_name((5, 8, 4), dim) for dim in range(3)]
    ['matrix', 'row of each matrix', 'column of each matrix']
    """
    dims = [i for i, size in enumerate(shape) if size > 1 or i == dim]
    from_last = len(dims) - dims.index(dim)
    if len(dims) == 1:
        return "entry"
    if from_last > 2:
        return "matrix" if len(dims) == 3 else "slice"
    return ("column", "row")[from_last - 1] + (" of each matrix" if len(dims) > 2 else "")
