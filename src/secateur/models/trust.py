"""Errors of loaders -> one line that names the model, and a type of its own for custom code that may not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from secateur.errors import ModelError, UntrustedCodeError, one_line
from secateur.models.gguf import gguf_reader
from secateur.models.hub import hub_problem
from secateur.models.options import DEMO
from secateur.models.silence import quiet
from secateur.models.sources import Source


def runs_remote_code(model: torch.nn.Module) -> bool:
    """Tell whether the model's class is custom code: Python files that lie beside the weights.

    Such a model exists only where that code was trusted, so more models of it may be built.
    """
    return any(base.__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME for base in type(model).__mro__)


@contextmanager
def model_errors(source: Source, failure: str, *, trust_remote_code: bool) -> Iterator[None]:
    """Let loaders of transformers run silently, and turn any exception into a `ModelError` of one line."""
    try:
        with quiet(), gguf_reader():
            yield
    except Exception as error:  # the code of models raises anything
        check_trust(error, source.argument, trust_remote_code=trust_remote_code)
        reason = f"{one_line(error)}."
        if source.kind == "hub":
            problem = hub_problem(error, source.argument)
            usual = f"{reason} Check the name and the network, or use a local folder or {DEMO!r}."
            reason = usual if problem is None else f"no file or folder here has that name; {problem}, or use {DEMO!r}."
        raise ModelError(f"{source.argument!r}: {failure}; {reason}") from error


def check_trust(error: Exception, model: str, *, trust_remote_code: bool) -> None:
    """Raise `UntrustedCodeError` when a loader has stopped before custom code."""
    # transformers has no exception of its own for that.
    if not trust_remote_code and isinstance(error, ValueError) and "trust_remote_code=True" in str(error):
        raise UntrustedCodeError(
            f"{model!r}: the model comes with custom code, Python files that would run on this machine. Read them, "
            "and if you trust them let them run: --trust-remote-code (trust_remote_code=True)"
        ) from error
