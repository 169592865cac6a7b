"""A discovery and the sizes that a cut leaves -> parameters and multiply-accumulates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

from secateur.discovery.algebra import size_after
from secateur.discovery.groups import BATCH, SEQUENCE, Discovery
from secateur.discovery.layers import layer_of
from secateur.discovery.sizes import names_left


def count_parameters(
    discovery: Discovery,
    kept: Mapping[str, int] | None = None,
    *,
    dropped_layers: frozenset[int] = frozenset(),
    embeddings: bool = True,
) -> int:
    """Number of parameters when each group keeps `kept[name]` of its units (all, where it is not named).

    Tied parameters count once, also where only one of the layers that share them stays. Without `embeddings`, token
    and position tables and the output head do not count.
    """
    sizes = dict(kept or {})
    return sum(
        prod(size_after(dim, sizes) for dim in weight.dims)
        for weight in discovery.weights
        if weight.parameter and (embeddings or not weight.embedding)
        if weight.layer not in dropped_layers or names_left(weight, discovery, dropped_layers)
    )


def count_macs(
    discovery: Discovery,
    kept: Mapping[str, int] | None = None,
    *,
    dropped_layers: frozenset[int] = frozenset(),
    tokens: int = 64,
) -> dict[str, int]:
    """Multiply-accumulates of one forward pass over `tokens` tokens, by kind of operator.

    The convention is the one of LLM-Pruner's measurements (ptflops with its hooks): matrix products in full, 2 per
    element that a norm reads, 1 per element of a softmax, of an activation, and of each product with a rotary table.
    """
    macs: Counter[str] = Counter()
    for operation, count in zip(discovery.operations, macs_by_operation(discovery, kept, tokens=tokens), strict=True):
        if layer_of(operation.module, discovery.layer_lists) not in dropped_layers:
            macs[operation.kind] += count
    return dict(macs)


def macs_by_operation(discovery: Discovery, kept: Mapping[str, int] | None = None, *, tokens: int = 64) -> list[int]:
    """Multiply-accumulates of each operation of the discovery, in order.

    Channels within heads count in products with weights alone: most code runs attention with heads of the dense size,
    whatever values have (see `padding`).
    """
    sizes = {**(kept or {}), BATCH: 1, SEQUENCE: tokens}
    heads = {group.name for group in discovery.groups if group.kind == "head_dim"}
    around = {name: size for name, size in sizes.items() if name not in heads}
    with_weights = {weight.name.rpartition(".")[0] for weight in discovery.weights}
    return [
        prod(size_after(dim, sizes if operation.module in with_weights else around) for dim in operation.dims)
        for operation in discovery.operations
    ]
