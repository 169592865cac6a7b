"""A discovery as people look at a model: layers that are alike folded, units in words, shares of the parameters.

Nothing here prints; `tables` does, and whoever writes about a model can.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from secateur.discovery.algebra import (
    Concat,
    Expression,
    Fixed,
    Product,
    Variable,
    show,
    size_after,
    substitute,
    variables_in,
)
from secateur.discovery.counting import count_parameters
from secateur.discovery.groups import KINDS, Axis, Discovery, Group, Weight


@dataclass(frozen=True, slots=True)
class Words:
    """A kind of group in plain words."""

    unit: str  # one unit, where its axes say no more
    units: str


KINDS_IN_WORDS = {
    "attention": Words("attention head", "attention heads; a KV head goes with its query heads"),
    "query": Words("query head", "query heads; one goes in every KV head at once"),
    "head_dim": Words("channel of each head", "channels within the attention heads"),
    "latent": Words("channel of a bottleneck", "channels of a bottleneck (low rank) between two matrices"),
    "state": Words("channel of the state", "heads or channels of a recurrent or convolutional state"),
    "mlp": Words("inner channel of the MLP", "inner channels of the MLPs"),
    "expert": Words("whole expert", "whole experts, among which a router chooses"),
    "expert_mlp": Words("inner channel of the experts", "inner channels of the experts"),
    "shared_mlp": Words("inner channel of the MLP beside the experts", "inner channels of the MLPs beside the experts"),
    "other": Words("channel", "channels of no other kind"),
    "hidden": Words("channel that several layers share", "channels that run from layer to layer"),
    "vocabulary": Words("token", "tokens"),
    "layer": Words("whole layer", "whole layers"),
}


@dataclass(frozen=True, slots=True)
class Slice:
    """What one unit is in some weights: `count` rows, columns or entries of each."""

    count: int
    what: str  # "row", "column", "entry", "matrix", "row of each matrix" and so on
    weights: tuple[str, ...]  # names as short as they can be told apart; "q_proj+bias" is both

    def __str__(self) -> str:
        """In words.

        >>> str(Slice(2, "row", ("q_proj", "k_proj")))
        '2 rows of q_proj, k_proj'
        """
        noun, of, rest = self.what.partition(" of ")
        plural = {"entry": "entries", "matrix": "matrices"}.get(noun, f"{noun}s")
        return f"{self.count:,} {noun if self.count == 1 else plural}{of}{rest} of {', '.join(self.weights)}"


@dataclass(frozen=True, slots=True)
class GroupFold:
    """A group of a layer, standing for those of all layers that are alike; or one that runs through the model."""

    name: str  # without its layer: "attention"
    kind: str
    units: int
    unit: str  # one of them in words: "KV head with its 3 query heads"
    slices: tuple[Slice, ...]  # of one unit, in one layer
    parameters: int  # of the weights with an axis in it, all the layers together
    share: float  # of the model's parameters
    normed: bool
    chosen: bool
    least: int


@dataclass(frozen=True, slots=True)
class LayerFold:
    """Layers that are alike."""

    layers: tuple[int, ...]  # none for what runs through the model
    groups: tuple[GroupFold, ...]
    parameters: int  # of the layers together; of what lies in none
    share: float


@dataclass(frozen=True, slots=True)
class Reach:
    """How much of a model some groups reach: the parameters of all weights with an axis in one of them."""

    groups: int
    units: int
    parameters: int
    share: float


@dataclass(frozen=True, slots=True)
class FrozenReason:
    """The axes of parameters that cannot be cut, or not wholly, for one reason."""

    reason: str
    axes: int
    partly: int  # how many of them hold units of a group, too
    weights: tuple[str, ...]  # "model.layers.*.self_attn.q_proj[0]" by its dimension; "model.vision.*" for all in it
    parameters: int  # of the weights with such an axis
    share: float


# --- folding ----------------------------------------------------------------------------------------------------


def fold_layers(discovery: Discovery) -> tuple[LayerFold, ...]:
    """Layers of the same weights, groups and frozen axes, once; at the end what runs through the model.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> layers, whole = fold_layers(discover(AutoConfig.for_model("opt", num_hidden_layers=4, **sizes)))
    >>> layers.layers, layers.groups[-1].name, str(layers.groups[-1].slices[0]), [g.name for g in whole.groups]
    ((0, 1, 2, 3), 'mlp', '1 row of fc1+bias', ['hidden', 'vocabulary', 'layers'])
    """
    alike: dict[Any, list[int]] = {}
    for layer, structure in _structures(discovery).items():
        alike.setdefault(structure, []).append(layer)
    names = _Names(discovery)
    return tuple(_fold(discovery, tuple(layers), names) for layers in [*alike.values(), []])


def _structures(discovery: Discovery) -> dict[int, Any]:
    """For every layer what can be told about it without its number."""
    kinds = {group.name: (group.kind, group.layer) for group in discovery.groups}
    structures: dict[int, list[Any]] = defaultdict(list)

    def without_layer(variable: Variable) -> Expression:
        if variable.name not in kinds:  # the length of the sequence
            return variable
        kind, layer = kinds[variable.name]
        return Variable(kind if layer is None else variable.name.removeprefix(f"layers.{layer}."), variable.size)

    layers = {weight.name: weight.layer for weight in discovery.weights}
    for weight in discovery.weights:
        if weight.layer is not None:
            dims = tuple((show(substitute(dim, without_layer)), dim.size) for dim in weight.dims)
            structures[weight.layer].append((without_number(weight.name, weight.layer), dims, weight.parameter))
    for group in discovery.groups:
        if group.layer is not None:
            name = group.name.removeprefix(f"layers.{group.layer}.")
            structures[group.layer].append((name, group.kind, group.units, group.normed, group.chosen, group.least))
    for frozen in discovery.frozen:
        layer = layers[frozen.weight]
        if layer is not None:
            name, reason = without_number(frozen.weight, layer), without_number(frozen.reason, layer)
            structures[layer].append((name, frozen.dim, frozen.size, reason))
    return {layer: tuple(structures[layer]) for layer in sorted(structures)}


def without_number(text: str, layer: int) -> str:
    """The name of a weight, or a text with such names, with a star for the number of the layer.

    >>> without_number("model.layers.3.mlp.experts.3.up_proj", 3)
    'model.layers.*.mlp.experts.3.up_proj'
    """
    return re.sub(rf"(?<![.\w])((?:[A-Za-z_]\w*\.)+){layer}\.", r"\g<1>*.", text)


def _fold(discovery: Discovery, layers: tuple[int, ...], names: _Names) -> LayerFold:
    within = [weight for weight in discovery.weights if weight.layer in (layers or (None,))]
    members: dict[str, list[Group]] = defaultdict(list)
    for group in discovery.groups:
        if group.layer in (layers or (None,)):
            members[group.name.removeprefix(f"layers.{group.layer}.")].append(group)
    total = count_parameters(discovery)
    folds = []
    for name, groups in members.items():
        group = groups[0]
        parameters = _parameters(_reached(discovery, groups))
        folds.append(
            GroupFold(
                name=name,
                kind=group.kind,
                units=group.units,
                unit=unit_in_words(group, discovery),
                slices=_slices(group, names),
                parameters=parameters,
                share=parameters / total,
                normed=group.normed,
                chosen=group.chosen,
                least=group.least,
            )
        )
    parameters = _parameters(within)
    return LayerFold(layers, tuple(folds), parameters, parameters / total)


# --- one unit ---------------------------------------------------------------------------------------------------


def unit_in_words(group: Group, discovery: Discovery) -> str:
    """What one unit of a group is, told from the expressions of its axes.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
    >>> discovery = discover(AutoConfig.for_model("granite", **sizes))
    >>> for kind in ("attention", "query", "head_dim"):
    ...     unit_in_words(discovery.group(f"layers.0.{kind}"), discovery)
    'KV head with its 3 query heads'
    'query head in each of the 2 KV heads'
    'channel in each of the 6 heads'
    """
    kinds = {other.name: other.kind for other in discovery.groups}
    weights = {weight.name: weight for weight in discovery.weights}
    around: list[tuple[list[Variable], list[Variable]]] = []  # what the unit lies in, and what lies in it
    for axis in group.axes:
        for chain in _chains(axis.expression):
            at = next((i for i, variable in enumerate(chain) if variable.name == group.name), None)
            if at is not None:
                around.append((list(chain[:at]), list(chain[at + 1 :])))

    def most(of: Callable[[tuple[list[Variable], list[Variable]]], list[Variable]], *wanted: str) -> list[Variable]:
        """The most variables of these kinds on one side, over all chains."""
        found = [[v for v in of(pair) if kinds.get(v.name) in wanted] for pair in around]
        return max(found, key=lambda chain: prod(v.size for v in chain), default=[])

    def outer(*wanted: str) -> list[Variable]:
        return most(lambda pair: pair[0], *wanted)

    def inner(*wanted: str) -> list[Variable]:
        return most(lambda pair: pair[1], *wanted)

    match group.kind:
        case "attention":
            if queries := inner("query"):
                return f"KV head with its {_product(queries)} query heads"
        case "query":
            if heads := outer("attention"):
                return f"query head in each of the {_product(heads)} KV heads"
        case "head_dim":
            if heads := outer("attention", "query"):
                return f"channel in each of the {_product(heads)} heads"
        case "state":
            within, without = inner("state"), outer("state")
            noun = ("channel", "head")[len(within)] if len(within) < 2 else f"group of {_product(within[:-1])} heads"
            place = f" in each of the {_product(without)} {'groups' if within else 'heads'}" if without else ""
            return f"{noun} of the state{place}"
        case "expert_mlp":
            across = [v for axis in group.axes for dim in weights[axis.weight].dims for v in variables_in(dim)]
            if experts := [v for v in across if kinds.get(v.name) == "expert"]:
                return f"inner channel in each of the {experts[0].size} experts"
        case "hidden":
            layers = {weight.layer for weight in discovery.weights}
            if {weights[axis.weight].layer for axis in group.axes} >= layers - {None}:
                return "channel that runs through all layers"
    return KINDS_IN_WORDS[group.kind].unit


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


def _slices(group: Group, names: _Names) -> tuple[Slice, ...]:
    """What one unit is in every weight; weights of which it is the same together, a bias with its weight."""
    counts = {(axis.weight, axis.dim): _positions(axis, group) // group.units for axis in group.axes}
    by_weight = {weight: count for (weight, _), count in counts.items()}
    merged: dict[tuple[int, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (weight, dim), count in counts.items():
        base = weight.removesuffix(".bias") + ".weight"
        if weight.endswith(".bias") and by_weight.get(base) == count:
            continue
        bias = weight.removesuffix(".weight") + ".bias"
        with_bias = weight.endswith(".weight") and by_weight.get(bias) == count
        what = _position_in_words(names.shapes[weight], dim)
        merged[count, what]["+bias" if with_bias else ""].append(weight)
    return tuple(
        Slice(count, what, tuple(f"{name}{suffix}" for suffix, found in by.items() for name in names.of(found)))
        for (count, what), by in merged.items()
    )


def _positions(axis: Axis, group: Group) -> int:
    """How many indices of the axis belong to some unit of the group."""
    return axis.expression.size - size_after(axis.expression, {group.name: 0})


def _position_in_words(shape: tuple[int, ...], dim: int) -> str:
    """What one index along a dimension of a weight is called; dimensions of size 1 do not count.

    >>> [_position_in_words((5, 8, 4), dim) for dim in range(3)]
    ['matrix', 'row of each matrix', 'column of each matrix']
    """
    dims = [i for i, size in enumerate(shape) if size > 1 or i == dim]
    from_last = len(dims) - dims.index(dim)
    if len(dims) == 1:
        return "entry"
    if from_last > 2:
        return "matrix" if len(dims) == 3 else "slice"
    return ("column", "row")[from_last - 1] + (" of each matrix" if len(dims) > 2 else "")


# --- names and numbers ------------------------------------------------------------------------------------------


class _Names:
    """Short names for weights: without the layer, and no longer than it takes to tell them apart."""

    def __init__(self, discovery: Discovery) -> None:
        self.shapes = {weight.name: weight.shape for weight in discovery.weights}
        self._all = [weight.name for weight in discovery.weights]
        self._alike = {
            weight.name: (weight.name if weight.layer is None else without_number(weight.name, weight.layer))
            for weight in discovery.weights
        }
        self._members = Counter(self._alike.values())
        layers = f"{discovery.layer_lists[0]}.*." if len(discovery.layer_lists) == 1 else ""
        paths = {name: name.removesuffix(".weight").removesuffix(".*").removeprefix(layers) for name in self._members}
        self._wholes = Counter(paths.values())
        self._ends = Counter(end for path in paths.values() for end in _ends(path))
        self._short = {name: self._shortened(path) or name for name, path in paths.items()}

    def _shortened(self, path: str) -> str | None:
        """The shortest end of the path that no other has and that begins with a word."""
        for end in _ends(path):
            first = end.split(".")[0]
            if self._ends[end] == 1 and first not in ("*", "bias") and not first.isdigit():
                return end
        return path if self._wholes[path] == 1 else None

    def of(self, weights: Sequence[str]) -> tuple[str, ...]:
        """Names for some weights of one layer; for those of several layers, too, if no such layer is left out."""
        layers = Counter(self._alike[weight] for weight in weights)
        one_layer = all(count == 1 for count in layers.values())
        whole = {name for name, count in layers.items() if one_layer or count == self._members[name]}
        short = dict.fromkeys(self._short[self._alike[w]] for w in weights if self._alike[w] in whole)
        rest = [weight.removesuffix(".weight") for weight in weights if self._alike[weight] not in whole]
        return (*short, *fold_names(rest, self._all))


def _ends(path: str) -> list[str]:
    """Every end of a dotted path, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def fold_names(names: Iterable[str], among: Iterable[str] = ()) -> tuple[str, ...]:
    """Names that differ by a number only, once: a star for all the numbers there are `among` these, braces for some.

    >>> fold_names(["h.0.q", "h.2.q", "h.0.k", "h.1.k", "h.2.k"], ["h.0.k", "h.1.k", "h.2.k"])
    ('h.{0,2}.q', 'h.*.k')
    """
    everywhere: dict[str, set[str]] = defaultdict(set)
    for name in among:
        for match in NUMBER.finditer(name):
            everywhere[name[: match.start() - 1]].add(match[0])
    folded = [tuple(name.split(".")) for name in names]
    for place in range(max(map(len, folded), default=0)):
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for path in folded:
            if place < len(path):
                number = path[place].isdigit()
                alike[(*path[:place], "#" if number else path[place], *path[place + 1 :])].append(path[place])
            else:
                alike[path].append("")
        folded = [
            (*path[:place], _numbers(found, everywhere[".".join(path[:place])]), *path[place + 1 :])
            if place < len(path) and path[place] == "#"
            else path
            for path, found in alike.items()
        ]
    return tuple(".".join(path) for path in folded)


def _numbers(found: Sequence[str], all_of_them: set[str]) -> str:
    if len(found) == 1:
        return found[0]
    return "*" if set(found) == all_of_them else "{" + spans(sorted(map(int, found))).replace(", ", ",") + "}"


NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
FEWEST = 4  # numbers that are written as a range with a step


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges, with steps, or as a range and what it lacks, whichever is shorter.

    >>> spans([0, 1, 2, 5]), spans(range(0, 24, 2)), spans([n for n in range(30) if n % 6 != 2])
    ('0-2, 5', '0-22 by 2', '0-29 except 2-26 by 6')
    """
    plain = _ranges(numbers)
    if len(numbers) < FEWEST:
        return plain
    lacking = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
    but = f"{numbers[0]}-{numbers[-1]} except {_ranges(lacking)}"
    return but if lacking and len(but) < len(plain) else plain


def _ranges(numbers: Sequence[int]) -> str:
    found = []
    at = 0
    while at < len(numbers):
        end = at + 1
        step = numbers[end] - numbers[at] if end < len(numbers) else 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        if end - at < (2 if step == 1 else FEWEST):
            end = at + 1
            found.append(str(numbers[at]))
        else:
            found.append(f"{numbers[at]}-{numbers[end - 1]}" + (f" by {step}" if step > 1 else ""))
        at = end
    return ", ".join(found)


# --- shares of the model ----------------------------------------------------------------------------------------


def reach(discovery: Discovery) -> dict[str, Reach]:
    """For every kind of group, how much of the model it reaches; a parameter may be reached by several.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> found = reach(discover(AutoConfig.for_model("opt", num_hidden_layers=2, vocab_size=50, **sizes)))
    >>> found["mlp"].groups, found["mlp"].units, found["mlp"].parameters  # 2 x (12 x 24 + 24 + 24 x 12)
    (2, 48, 1200)
    """
    return {
        kind: _reach(discovery, groups)
        for kind in KINDS
        if (groups := [group for group in discovery.groups if group.kind == kind])
    }


def reach_of_all(discovery: Discovery, *, layers: bool = True) -> Reach:
    """How much of the model all groups reach together, counted once; or all but whole `layers`."""
    return _reach(discovery, [group for group in discovery.groups if layers or group.kind != "layer"])


def reach_as_json(discovery: Discovery) -> dict[str, dict[str, Any]]:
    """The reach of every kind, and that of all together as "any", as plain data."""
    return {kind: asdict(found) for kind, found in [*reach(discovery).items(), ("any", reach_of_all(discovery))]}


def frozen_reasons(discovery: Discovery) -> tuple[FrozenReason, ...]:
    """Why axes of parameters cannot be cut, or not wholly; the reason that holds most parameters first.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
    >>> (rotary,) = frozen_reasons(discover(AutoConfig.for_model("granite", num_key_value_heads=2, **sizes)))
    >>> rotary.axes, rotary.weights
    (6, ('model.layers.*.self_attn.q_proj[0]', 'model.layers.*.self_attn.k_proj[0]'))
    """
    weights = {weight.name: weight for weight in discovery.weights}
    names = [weight.name for weight in discovery.weights]
    held = {(axis.weight, axis.dim) for group in discovery.groups for axis in group.axes}
    total = count_parameters(discovery)
    axes: dict[str, dict[tuple[str, int], Weight]] = defaultdict(dict)  # by reason
    for frozen in discovery.frozen:
        weight = weights[frozen.weight]
        if weight.parameter:
            reason = frozen.reason if weight.layer is None else without_number(frozen.reason, weight.layer)
            axes[reason][frozen.weight, frozen.dim] = weight
    found = []
    for reason, at in axes.items():
        parameters = _parameters({weight.name: weight for weight in at.values()}.values())
        found.append(
            FrozenReason(
                reason=reason,
                axes=len(at),
                partly=sum((name, dim) in held for name, dim in at),
                weights=fold_names(_axes_or_modules(at, discovery), names),
                parameters=parameters,
                share=parameters / total,
            )
        )
    return tuple(sorted(found, key=lambda reason: -reason.parameters))


def _axes_or_modules(axes: Iterable[tuple[str, int]], discovery: Discovery) -> Iterator[str]:
    """The names of axes; instead of them that of the outermost module with nothing but such axes, if it has several."""
    frozen = dict.fromkeys(axes)
    inside: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for weight in discovery.weights:
        if weight.parameter:
            for module in _modules(weight.name):
                inside[module] |= {(weight.name, dim) for dim, size in enumerate(weight.shape) if size > 1}
    whole = {module for module, held in inside.items() if held <= frozen.keys() and len({name for name, _ in held}) > 1}
    for name, dim in frozen:
        outermost = next((module for module in _modules(name) if module in whole), None)
        yield f"{name.removesuffix('.weight')}[{dim}]" if outermost is None else f"{outermost}.*"


def _modules(weight: str) -> list[str]:
    """The modules that a weight lies in, the outermost first."""
    return list(itertools.accumulate(weight.split(".")[:-1], "{}.{}".format))


def _reach(discovery: Discovery, groups: Sequence[Group]) -> Reach:
    parameters = _parameters(_reached(discovery, groups))
    total = count_parameters(discovery)
    return Reach(len(groups), sum(group.units for group in groups), parameters, parameters / total)


def _reached(discovery: Discovery, groups: Iterable[Group]) -> list[Weight]:
    """The weights with an axis in one of the groups; a group of layers reaches all that lies in a layer."""
    groups = list(groups)
    names = {axis.weight for group in groups for axis in group.axes}
    layers = any(group.kind == "layer" for group in groups)
    return [weight for weight in discovery.weights if weight.name in names or (layers and weight.layer is not None)]


def _parameters(weights: Iterable[Weight]) -> int:
    return sum(prod(weight.shape) for weight in weights if weight.parameter)
