"""The module lists whose items are layers, and those of which an item can be dropped."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from secateur.discovery.discover import discover_groups
from secateur.discovery.layers import layer_lists, residual_lists
from secateur.discovery.tracing import trace
from small_models import Block, Plain, in_turn


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ([Block(), Block()], ("blocks",)),
        ([Block(), Block(residual=False)], ()),
        ([Block(residual=False), Block()], ()),
        ([nn.Linear(6, 6), nn.ReLU()], ()),
        ([nn.Identity(), nn.Identity()], ()),
        ([Block(blocks=2), Block(blocks=2)], ("blocks",)),  # the outer list alone
    ],
    ids=["residual", "the last is not", "the first is not", "plain", "nothing added", "nested"],
)
def test_only_lists_of_residual_blocks_lose_layers(blocks: list[nn.Module], found: tuple[str, ...]) -> None:
    model = Plain(in_turn, blocks=nn.ModuleList(blocks))
    assert residual_lists(trace(model)) == found
    discovery = discover_groups(model)
    assert [g.units for g in discovery.groups if g.kind == "layer"] == [2] * len(found)


class InTurn(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.items = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.items:
            x = module(x)
        return x


@pytest.mark.parametrize(
    ("parts", "found", "depth"),
    [
        ({"a": InTurn(Block(), Block())}, ("a.items",), 2),
        ({"a": InTurn(Block(residual=False), Block())}, ("a.items",), None),
        ({"a": InTurn(nn.Linear(6, 6), nn.ReLU())}, ("a.items",), None),
        # beside a list of residual blocks, no other list is one of layers
        ({"a": InTurn(nn.Linear(6, 6)), "b": InTurn(Block(), Block())}, ("b.items",), 2),
        # several lists of layers: none can lose a layer alone
        ({"a": InTurn(Block(), Block()), "b": InTurn(Block())}, ("a.items", "b.items"), None),
        ({"a": InTurn(nn.Linear(6, 6)), "b": InTurn(nn.Linear(6, 6))}, ("a.items", "b.items"), None),
        # a list within an item of a list is none
        ({"a": InTurn(InTurn(nn.Linear(6, 6)), nn.Linear(6, 6))}, ("a.items",), None),
    ],
    ids=["residual", "mixed", "plain", "plain and residual", "two residual", "two plain", "nested"],
)
def test_the_lists_of_layers(parts: dict[str, nn.Module], found: tuple[str, ...], depth: int | None) -> None:
    def run(x: Tensor, module: Any) -> Tensor:
        for name in parts:
            x = getattr(module, name)(x)
        return x

    discovery = discover_groups(Plain(run, 6, **parts))
    assert discovery.layer_lists == found == layer_lists(trace(Plain(run, 6, **parts)))
    for weight in discovery.weights:
        inside = weight.name.startswith(tuple(f"{name}." for name in found))
        assert (weight.layer is not None) == inside
    assert [g.units for g in discovery.groups if g.kind == "layer"] == ([depth] if depth else [])
