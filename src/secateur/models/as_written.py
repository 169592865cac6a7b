"""Compiled functions -> the Python that they were written in, for passes that watch operators and weights.

What `torch.compile` or TorchScript has made of a function hides from a mode which operators it runs on which weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def as_written() -> Iterator[None]:
    """While open, functions compiled by `torch.compile`, `torch.jit.script` or `torch.jit.trace` run as Python.

    A scripted module has no Python any more, nor has a function that was read from a file: these run as they are.

    >>> from torch.overrides import TorchFunctionMode
    >>> class Names(TorchFunctionMode):
    ...     def __torch_function__(self, func, types, args=(), kwargs=None):
    ...         print(func.__name__)
    ...         return func(*args, **(kwargs or {}))
    >>> x = torch.ones(1, 1)
    >>> compiled = torch.jit.trace(lambda x: torch.mm(x, x), x)
    >>> with as_written(), Names():
    ...     y = compiled(x)
    mm
    """
    scripted: Any = torch.jit.ScriptFunction
    compiled_call = scripted.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        written = getattr(function, "_torchdynamo_inline", None)  # where TorchScript leaves what it has compiled
        return compiled_call(function, *args, **kwargs) if written is None else written(*args, **kwargs)

    # Without the stance the compiler would skip these functions, and go on to do so afterwards.
    with torch.compiler.set_stance("force_eager"):
        scripted.__call__ = call
        try:
            yield
        finally:
            scripted.__call__ = compiled_call
