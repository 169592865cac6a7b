"""A discovery and the sizes that a cut leaves -> multiply-accumulates by kind of group."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import prod

from secateur.discovery.algebra import size_after, variables_in
from secateur.discovery.groups import BATCH, KINDS, SEQUENCE, Discovery, Operation
from secateur.discovery.layers import layer_of
from secateur.discovery.sizes import PrunedSizes

UNGROUPED = "frozen"  # operations over dimensions of which none can be cut
# An operation over the units of several groups belongs to the first of these kinds: what lies inside experts, MLPs,
# attention and states comes before what runs through the whole model.
_INNERMOST = ("expert", "expert_mlp", "shared_mlp", "mlp", "state", "latent", "attention", "query", "head_dim", "other")
_PART_OF = {"query": "attention", "head_dim": "attention", "latent": "attention", "expert_mlp": "expert"}


def count_macs_by_kind(discovery: Discovery, pruned: PrunedSizes | None = None, *, tokens: int = 64) -> dict[str, int]:
    """Multiply-accumulates of one pass over `tokens` tokens by kind of group, as `count_macs` counts them.

    Operations over the units of several groups belong to the innermost: a projection of attention to attention, though
    it reads `hidden` as well. What runs over `hidden` alone is norms; the output head is `vocabulary`. Operations of
    which no dimension can be cut are `frozen`.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> discovery = discover(AutoConfig.for_model("opt", num_hidden_layers=1, vocab_size=50, **sizes))
    >>> macs = count_macs_by_kind(discovery, tokens=1)
    >>> macs["mlp"], macs["vocabulary"]  # 2 x 12 x 24 and one activation of each; 12 x 50
    (600, 600)
    """
    pruned = pruned or PrunedSizes()
    sizes = {**pruned.sizes, BATCH: 1, SEQUENCE: tokens}
    macs: Counter[str] = Counter()
    for operation, kind in zip(discovery.operations, _kinds(discovery), strict=True):
        if layer_of(operation.module, discovery.layer_lists) not in pruned.dropped_layers:
            macs[kind] += prod(size_after(dim, sizes) for dim in operation.dims)
    order = [*KINDS, UNGROUPED]
    return dict(sorted(macs.items(), key=lambda item: order.index(item[0])))


def _kinds(discovery: Discovery) -> list[str]:
    """The kind of group that each operation belongs to, in order."""
    kind_of = {group.name: group.kind for group in discovery.groups}
    all_kinds = [
        {kind_of[v.name] for dim in operation.dims for v in variables_in(dim) if v.name in kind_of}
        for operation in discovery.operations
    ]
    own = [_innermost(kinds) for kinds in all_kinds]
    # A single head or expert is no group. Its operations belong to what their module computes; a module with a softmax
    # over positions by positions is attention.
    inside: dict[str, set[str]] = defaultdict(set)  # module -> kinds of the operations in it
    for operation, kind in zip(discovery.operations, own, strict=True):
        if kind is None and operation.kind == "softmax" and _times(operation, SEQUENCE) > 1:
            kind = "attention"
        if kind is not None:
            for module in _modules_around(operation, discovery):
                inside[module].add(kind)
    result = []
    for operation, kinds, kind in zip(discovery.operations, all_kinds, own, strict=True):
        if kind is None and not (operation.kind == "norm" and "hidden" in kinds) and "vocabulary" not in kinds:
            around = (_innermost(inside[module]) for module in _modules_around(operation, discovery))
            kind = next((each for each in around if each is not None), None)
        result.append(kind or next((each for each in ("vocabulary", "hidden") if each in kinds), UNGROUPED))
    return result


def _innermost(kinds: set[str]) -> str | None:
    kind = next((kind for kind in _INNERMOST if kind in kinds), None)
    return None if kind is None else _PART_OF.get(kind, kind)


def _times(operation: Operation, name: str) -> int:
    return sum(v.name == name for dim in operation.dims for v in variables_in(dim))


def _modules_around(operation: Operation, discovery: Discovery) -> list[str]:
    """The modules that an operation runs in, innermost first, within its layer; outside layers, none."""
    if layer_of(operation.module, discovery.layer_lists) is None:
        return []
    prefix = next(name for name in discovery.layer_lists if operation.module.startswith(f"{name}."))
    parts = operation.module.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), len(prefix.split(".")) + 1, -1)]
