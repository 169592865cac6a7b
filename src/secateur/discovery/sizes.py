"""A discovery and the sizes that a plan leaves -> names, shapes and structure of the weights afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from secateur.discovery.algebra import Expression, Fixed, Variable, show, size_after, substitute
from secateur.discovery.groups import Discovery, Weight
from secateur.discovery.layers import layer_of

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PrunedSizes:
    """The sizes that a plan leaves."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Units kept by group name; a group that is not named keeps all of its units."""
    dropped_layers: frozenset[int] = frozenset()
    """Numbers of the layers that go as a whole."""

    @property
    def emptied(self) -> tuple[str, ...]:
        """The groups that lose all of their units."""
        return tuple(name for name, units in self.sizes.items() if units == 0)

    def without_emptied(self) -> PrunedSizes:
        """The same, with the emptied groups left whole."""
        return PrunedSizes({name: units for name, units in self.sizes.items() if units}, self.dropped_layers)


def names_left(weight: Weight, discovery: Discovery, dropped_layers: frozenset[int]) -> list[str]:
    """The names, its own first, under which a weight is in layers that stay; none where it goes with its layer."""
    names = [weight.name, *(other for other, name in discovery.tied.items() if name == weight.name)]
    return [name for name in names if layer_of(name, discovery.layer_lists) not in dropped_layers]


def weights_after(discovery: Discovery, pruned: PrunedSizes) -> Iterator[tuple[Weight, list[str]]]:
    """Every weight that stays, with the names that it has when the layers left are numbered anew, its own first."""
    for weight in discovery.weights:
        if names := names_left(weight, discovery, pruned.dropped_layers):
            yield weight, [name_after(name, discovery, pruned) for name in names]


def shapes_after(discovery: Discovery, pruned: PrunedSizes) -> Shapes:
    """The shape of every weight after the cut, under the name it has then."""
    return {
        name: tuple(size_after(dim, pruned.sizes) for dim in weight.dims)
        for weight, (name, *_) in weights_after(discovery, pruned)
    }


def structure_after(discovery: Discovery, pruned: PrunedSizes) -> dict[str, list[str]]:
    """How each axis is made of units after the cut, by size: "2·3·(64)" for 2 KV heads of 3 query heads of 64.

    Shapes alone do not tell: a model may have them and read one head as another.
    """

    def by_size(variable: Variable) -> Expression:
        after = pruned.sizes.get(variable.name, variable.size)
        return Variable(str(after), after) if after > 1 else Fixed(after)

    return {
        name: [show(substitute(dim, by_size)) for dim in weight.dims]
        for weight, (name, *_) in weights_after(discovery, pruned)
    }


def name_after(name: str, discovery: Discovery, pruned: PrunedSizes) -> str:
    """The name of a weight or module after dropped layers have left the numbering."""
    layer = layer_of(name, discovery.layer_lists)
    if layer is None:
        return name
    prefix = next(prefix for prefix in discovery.layer_lists if name.startswith(f"{prefix}."))
    after = layer - sum(dropped < layer for dropped in pruned.dropped_layers)
    return f"{prefix}.{after}{name[len(f'{prefix}.{layer}') :]}"


def resized(discovery: Discovery, name: str, units: int) -> Discovery:
    """The discovery of the same model with another number of units in one group.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> smaller = resized(discover(config), "vocabulary", 100)
    >>> smaller.group("vocabulary").units, shapes_after(smaller, PrunedSizes())["model.decoder.embed_tokens.weight"]
    (100, (100, 12))
    """

    def by_name(variable: Variable) -> Expression:
        return Variable(name, units) if variable.name == name else variable

    def after(dims: tuple[Expression, ...]) -> tuple[Expression, ...]:
        return tuple(substitute(dim, by_name) for dim in dims)

    return replace(
        discovery,
        groups=tuple(
            replace(
                group,
                units=units if group.name == name else group.units,
                axes=tuple(replace(axis, expression=substitute(axis.expression, by_name)) for axis in group.axes),
            )
            for group in discovery.groups
        ),
        weights=tuple(replace(weight, dims=after(weight.dims)) for weight in discovery.weights),
        operations=tuple(replace(operation, dims=after(operation.dims)) for operation in discovery.operations),
    )


def shapes_of(model: nn.Module) -> Shapes:
    """The shape of every parameter (a tied one once) and saved buffer, by name.

    >>> shapes_of(nn.Linear(3, 2))
    {'weight': (2, 3), 'bias': (2,)}
    """
    persistent = model.state_dict().keys()
    tensors = itertools.chain(
        model.named_parameters(), ((name, b) for name, b in model.named_buffers() if name in persistent)
    )
    return {name: tuple(tensor.shape) for name, tensor in tensors}
