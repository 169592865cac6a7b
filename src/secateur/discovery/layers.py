"""Graph -> the module lists whose items are the layers; name of a weight -> the number of its layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from secateur.discovery.graph import Graph, Node, Ref
from secateur.discovery.rules.registry import aten

# A residual sum goes through these alone.
ADDITIONS_AND_COPIES = frozenset(aten("add add_ clone alias detach _to_copy view _unsafe_view"))


def layer_of(name: str, layer_lists: Iterable[str]) -> int | None:
    """The number of the layer that a weight or module belongs to, or None.

    >>> layer_of("model.layers.12.mlp.up_proj.weight", ["model.layers"])
    12
    """
    for prefix in layer_lists:
        if name.startswith(f"{prefix}."):
            head = name[len(prefix) + 1 :].split(".")[0]
            if head.isdigit():
                return int(head)
    return None


def path_and_parents(path: str) -> list[str]:
    """A path and those of the modules around it, the innermost first; without that of the model itself, which is empty.

    >>> path_and_parents("layers.0.fc1")
    ['layers.0.fc1', 'layers.0', 'layers']
    """
    pieces = path.split(".") if path else []
    return [".".join(pieces[:i]) for i in range(len(pieces), 0, -1)]


def layer_lists(graph: Graph) -> tuple[str, ...]:
    """The module lists whose items are the layers: those of residual blocks, or else all that lie in no other."""
    return residual_lists(graph) or _outermost({name.rpartition(".")[0] for name in graph.item_calls})


def residual_lists(graph: Graph) -> tuple[str, ...]:
    """Module lists whose every item adds to its input, so that removing the item leaves an identity."""
    producers = {number: node for node in graph.nodes for number in node.outputs}
    residual: dict[str, bool] = {}
    for name, (entering, leaving) in graph.item_calls.items():
        prefix = name.rpartition(".")[0]
        residual[prefix] = residual.get(prefix, True) and _adds_to(entering, leaving, producers)
    return tuple(prefix for prefix in _outermost(residual) if residual[prefix])


def _outermost(lists: Iterable[str]) -> tuple[str, ...]:
    lists = sorted(lists)
    return tuple(prefix for prefix in lists if not any(prefix.startswith(f"{other}.") for other in lists))


def _adds_to(entering: int, leaving: int, producers: Mapping[int, Node]) -> bool:
    """Whether the tensor that leaves is the one that enters plus something, through additions and copies alone."""
    waiting, seen = [leaving], set()
    while waiting:
        number = waiting.pop()
        if number == entering:
            return leaving != entering
        node = producers.get(number)
        if number in seen or node is None or node.op not in ADDITIONS_AND_COPIES:
            continue
        seen.add(number)
        waiting += [value.tensor for value in node.arguments.values() if isinstance(value, Ref)]
    return False
