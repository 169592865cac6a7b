"""Compiled functions run as the Python that they were written in, while the context is open and not after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.models.as_written import as_written


def doubled(x: Tensor) -> Tensor:
    return x.mul(2)


def compiled_by(how: str, graphs: list[Any]) -> Callable[[Tensor], Tensor]:
    """A function compiled in one of three ways; `graphs` are those that torch.compile makes of it."""

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def written(x: Tensor) -> Tensor:  # another function each time: the compiler remembers those that it has seen
        return x.mul(2)

    if how == "compile":
        compiled: Callable[[Tensor], Tensor] = torch.compile(written, backend=backend, fullgraph=True)
        return compiled
    return torch.jit.script(doubled) if how == "script" else torch.jit.trace(doubled, torch.ones(2))


class Names(TorchFunctionMode):
    """The names of functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["script", "trace", "compile"])
def test_what_runs_is_seen_inside_and_compiled_outside(how: str) -> None:
    graphs: list[Any] = []
    compiled = compiled_by(how, graphs)
    names, x = Names(), torch.ones(2)
    with as_written(), names:
        y = compiled(x)
    assert y.tolist() == [2, 2]
    assert names.seen == ["mul"]
    assert graphs == []
    assert compiled(x).tolist() == [2, 2]
    assert len(graphs) == (how == "compile")  # the compiler does not go on to skip it


def test_an_error_inside_leaves_nothing_behind() -> None:
    before: Any = vars(torch.jit.ScriptFunction)["__call__"]
    with pytest.raises(ValueError, match="odd"), as_written():
        raise ValueError("odd")
    assert vars(torch.jit.ScriptFunction)["__call__"] is before


def test_a_scripted_function_without_its_python_runs_as_it_is() -> None:
    compiled: Any = torch.jit.script(doubled)
    del compiled._torchdynamo_inline
    with as_written():
        assert compiled(torch.ones(2)).tolist() == [2, 2]
