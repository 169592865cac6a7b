"""Calibration windows -> a forward pass in parts: where token ids go in, the base model, the output head.

Logits (tokens x vocabulary) are the largest tensor of a forward pass. So the base model runs on all samples at once,
and the output head on a few at a time. Axes: B samples, T tokens, N tokens of all samples, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.models.as_written import as_written
from secateur.models.classes import objective
from secateur.models.inputs import arguments

logger = logging.getLogger(__name__)

PROBE_SAMPLES, PROBE_TOKENS = 2, 7
LOGITS_BYTES = 2**25  # float32 logits that are held at once
EAGER = "eager"  # transformers' name for code that computes experts one after the other


def embedding_device(model: PreTrainedModel) -> torch.device:
    """The device of the input embeddings, where token ids go in."""
    return next(model.get_input_embeddings().parameters()).device


def probe_windows(windows_BT: Tensor, tokens: int = PROBE_TOKENS) -> Tensor:
    """Two short samples (2 x 7), to see what a model does with its parameters before a long pass."""
    two_BT = windows_BT[:PROBE_SAMPLES] if len(windows_BT) > 1 else torch.cat([windows_BT, windows_BT.roll(1, 1)])
    return two_BT[:, :tokens]


def rows_per_sample(tensor: Tensor, samples: int) -> int | None:
    """How many entries along dimension 0 belong to each sample; None where all samples share the tensor.

    >>> [rows_per_sample(torch.zeros(rows, 3), samples=4) for rows in (4, 12, 1)]
    [1, 3, None]
    """
    if tensor.dim() < 2:
        return None
    size = tensor.shape[0]
    return size // samples if size >= samples and size % samples == 0 else None


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, the module's `forward` is another function."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def plain_products(model: PreTrainedModel) -> Iterator[None]:
    """While open, compiled functions run as written, and stacked experts in turn where the model supports that."""
    with as_written():
        before = getattr(model.config, "_experts_implementation", None)
        if before in (None, EAGER):
            yield
            return
        try:
            model.set_experts_implementation(EAGER)
        except (ValueError, RuntimeError) as error:
            logger.debug("%s computes its experts as %s: %s", type(model).__name__, before, error)
        try:
            yield
        finally:
            model.set_experts_implementation(before)


@dataclass(frozen=True, slots=True)
class OutputHead:
    """A model split in two: its base model, and the output head with whatever is done with the logits."""

    model: PreTrainedModel
    base: nn.Module
    base_output: list[Any] = field(default_factory=list)
    """The last output of the base model, if any: the head may read more of it than the hidden states."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> OutputHead | None:
        """The head of a model with a base model and output embeddings; None for any other."""
        base = getattr(model, model.base_model_prefix, None)
        if objective(model) not in ("next token", "masked tokens"):  # else the hidden states are of other tokens
            return None
        if not isinstance(base, nn.Module) or base is model or model.get_output_embeddings() is None:
            return None
        return cls(model, base)

    def chunks(self, ids_BT: Tensor) -> Iterator[slice]:
        """Ranges of samples whose float32 logits fit into `LOGITS_BYTES`; at least one sample each."""
        samples, length = ids_BT.shape
        vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        at_once = max(1, LOGITS_BYTES // (vocabulary * length * 4))
        for first in range(0, samples, at_once):
            yield slice(first, min(first + at_once, samples))

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Run the base model: the last hidden states, B x T x D."""
        self.base_output[:] = [self.base(**arguments(self.model, ids_BT))]
        hidden_BTD: Tensor = self.base_output[0][0]
        return hidden_BTD

    def logits(self, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """Run the output head on hidden states: logits, B x T x V."""
        output = type(self.base_output[0])(**{**self.base_output[0], "last_hidden_state": hidden_BTD})
        with replaced_forward(self.base, lambda *_, **__: output):
            logits_BTV: Tensor = self.model(**arguments(self.model, ids_BT)).logits
        return logits_BTV

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While open, `base_output` is what the base model gave last in a pass of the whole model."""

        def record(_: nn.Module, __: Any, output: Any) -> None:
            self.base_output[:] = [output]

        with self.base.register_forward_hook(record):
            yield

    def reproduces(self, ids_BT: Tensor, logits_BTV: Tensor) -> bool:
        """Whether the recorded hidden states alone decide the logits of the whole model."""
        if not self.base_output:
            return False
        some = slice(0, 2)  # tokens: each goes through the head by itself
        try:
            hidden_BTD, ids_BT = self.base_output[0][0].detach()[:, some], ids_BT[:, some]
            again_BTV = self.logits(hidden_BTD, ids_BT)
            of_zeros_BTV = self.logits(torch.zeros_like(hidden_BTD), ids_BT)
        except Exception as error:  # model code that is run in parts may fail in any way
            logger.debug("%s cannot be split before its head: %s", type(self.model).__name__, error)
            return False
        logits_BTV = logits_BTV[:, some]
        same = again_BTV.shape == logits_BTV.shape and torch.allclose(
            again_BTV.float(), logits_BTV.float(), rtol=1e-3, atol=1e-4
        )
        return same and not torch.equal(of_zeros_BTV, again_BTV)  # some models call a part of their base model


@torch.no_grad()
def split_output_head(model: PreTrainedModel, ids_BT: Tensor) -> OutputHead | None:
    """The model split before its output head, where these ids give the same logits in both ways; otherwise None."""
    head = OutputHead.of(model)
    if head is None:
        return None
    with head.recording():
        logits_BTV = model(**arguments(model, ids_BT)).logits
    return head if head.reproduces(ids_BT, logits_BTV) else None


def pass_to_hidden(model: PreTrainedModel, windows_BT: Tensor) -> Callable[[], Any]:
    """A forward pass over the windows, to be run; without the output head, where the model can be split before it."""
    ids_BT = windows_BT.to(embedding_device(model))
    head = split_output_head(model, probe_windows(ids_BT))
    return partial(model, **arguments(model, ids_BT)) if head is None else partial(head.hidden, ids_BT)
