"""Which layer a weight or a module belongs to."""

from __future__ import annotations

from collections.abc import Iterable


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
