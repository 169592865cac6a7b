"""What a case of an operator says, and shorthands that the cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

VOCABULARY, HIDDEN, OUTPUTS = 26, 6, 7


@dataclass(frozen=True)
class Case:
    """An operator between two linear layers, and the axes that its rule should find.

    `run(x, n, w)` gets what `up` gives, (B, T, rows), and returns what `head` takes, (B, T, columns). `n.a` is the
    number of units of group a, `w.name` a weight. In `axes` groups are a, b, ... in the order in which they are met:
    in the rows of `up`, in the columns of `head`, then elsewhere; "frozen" stands for what cannot be cut.
    """

    ops: str  # names without "aten.", those of other libraries with theirs
    run: Callable[[Tensor, Any, Any], Tensor]
    axes: dict[str, str]
    units: dict[str, int] = field(default_factory=dict)
    rows: int = 12
    columns: int = 12
    outputs: int = OUTPUTS
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reason: str = ""  # part of the reason why the frozen axes are
    numbers: bool = True  # whether the operator runs on the CPU


SAME = {"up": "a", "head": "a"}  # unit by unit
LOST = {"up": "frozen", "head": "frozen"}
HEADS = {"a": 3, "b": 4}
HEADS_ALONE = {"a": 3}


def heads(x: Tensor, n: int) -> Tensor:
    """(B, T, n·D) -> (B, n, T, D)."""
    split: Tensor = x.unflatten(-1, (n, -1))
    return split.transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(B, n, T, D) -> (B, T, n·D)."""
    return x.transpose(1, 2).flatten(2)


def below(x: Tensor) -> Tensor:
    """Numbers below zero, except for masked units: a choice that saw those would take them."""
    return x.abs().neg()
