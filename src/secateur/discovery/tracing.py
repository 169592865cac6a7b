"""Model -> graph of ATen operators, recorded from one forward pass that allocates nothing.

The forward pass runs on fake tensors (shapes and dtypes, no storage) while a dispatch mode writes down every operator
that reaches the ATen level. A 7B model takes half a second and no weights; `torch.export` on the same model takes
nine seconds, refuses models that this accepts, and yields the same operators. The batch and sequence lengths are
primes that divide no size of the model, so that a dimension is never mistaken for another because their sizes agree.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call

from secateur.discovery.graph import Graph
from secateur.discovery.recorder import Recorder, ValueRecorder, tensors_in
from secateur.errors import DiscoveryError

logger = logging.getLogger(__name__)

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


def trace(model: nn.Module) -> Graph:
    """Record the operators of one causal-LM forward pass of `model`; its weights may be on `meta`.

    The model should use eager attention, so that its attention is written in plain matrix products. Raises
    `DiscoveryError` when the forward pass fails or branches on the values of tensors.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=12)
    >>> with torch.device("meta"):
    ...     model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    >>> graph = trace(model)
    >>> [node.op for node in graph.nodes if node.module.endswith("layers.0.fc1")]
    ['aten.t', 'aten.addmm']
    """
    try:
        return _trace(model, Recorder())
    except DATA_DEPENDENT as error:  # slower, but for the few models whose code looks at numbers
        logger.debug("%s branches on data (%s); following values", type(model).__name__, error)
    return _trace(model, ValueRecorder())


def run_without_memory(model: nn.Module, *, sequence: int, **options: Any) -> Any:
    """Return what one forward pass over a row of `sequence` tokens gives; its tensors are fake: shapes, no storage.

    The model's weights may be on `meta`; `options` go to its forward. Raises `DiscoveryError` when the pass fails.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 12}
    >>> config = AutoConfig.for_model("opt", num_hidden_layers=1, vocab_size=9, **sizes)
    >>> with torch.device("meta"):
    ...     model = AutoModelForCausalLM.from_config(config).eval()
    >>> tuple(run_without_memory(model, sequence=3, use_cache=False).logits.shape)
    (1, 3, 9)
    """
    for recorder in (None, ValueRecorder()):  # the second for code that looks at numbers
        fake_mode, weights, input_ids = _fake_weights_and_ids(model, 1, sequence)
        if recorder is not None:
            recorder.set_values(input_ids, _token_ids(model, 1, sequence))
        with torch.no_grad(), fake_mode, recorder if recorder is not None else nullcontext():
            try:
                return functional_call(model, weights, (), {"input_ids": input_ids, **options}, tie_weights=True)
            except Exception as error:  # any model code may raise anything
                if isinstance(error, DATA_DEPENDENT) and recorder is None:
                    continue
                raise DiscoveryError(
                    f"{type(model).__name__}: the forward pass cannot be run without weights; it failed with "
                    f"{type(error).__name__}: {_first_line(error)}"
                ) from error
    raise AssertionError("unreachable: the second pass returns or raises")


def _trace(model: nn.Module, recorder: Recorder) -> Graph:
    batch, sequence = batch_and_sequence(
        {size for tensor in itertools.chain(model.parameters(), model.buffers()) for size in tensor.shape}
    )
    fake_mode, weights, input_ids = _fake_weights_and_ids(model, batch, sequence)
    parameters = {name: recorder.number(weights[name]) for name, _ in model.named_parameters()}
    buffers = {name: recorder.number(weights[name]) for name, _ in model.named_buffers()}
    inputs = {"input_ids": recorder.number(input_ids)}
    recorder.set_values(input_ids, _token_ids(model, batch, sequence))
    first_constant = len(recorder.shapes)
    with torch.no_grad(), fake_mode, _module_names(model, recorder), recorder:
        try:
            result = functional_call(model, weights, (), {"input_ids": input_ids, "use_cache": False}, tie_weights=True)
        except Exception as error:  # any model code may raise anything
            if isinstance(error, DATA_DEPENDENT) and not isinstance(recorder, ValueRecorder):
                raise
            where = (recorder.modules and recorder.modules[-1]) or "the model"  # the outermost has no name
            raise DiscoveryError(
                f"{type(model).__name__}: the forward pass could not be traced; it failed in {where!r} with "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
    logits = result.logits if hasattr(result, "logits") else result[0]
    return Graph(
        nodes=tuple(recorder.nodes),
        shapes=tuple(recorder.shapes),
        parameters=parameters,
        buffers=buffers,
        constants=tuple(number for number in recorder.unregistered if number >= first_constant),
        literal_indices=dict(recorder.literal_indices),
        inputs=inputs,
        outputs=(recorder.number(logits),),
        batch=batch,
        sequence=sequence,
        tied=_tied_names(model),
        computed_buffers=frozenset(buffers.keys() - model.state_dict().keys()),
        item_calls=dict(recorder.item_calls),
    )


def _fake_weights_and_ids(
    model: nn.Module, batch: int, sequence: int
) -> tuple[FakeTensorMode, dict[str, Tensor], Tensor]:
    """Tensors without storage: every parameter and buffer by name, and token ids (batch, sequence)."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with fake_mode:
        weights = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in named.items()}
        input_ids = torch.zeros(batch, sequence, dtype=torch.long)
    return fake_mode, weights, input_ids


def _token_ids(model: nn.Module, batch: int, sequence: int) -> Tensor:
    """0, 1, 2, ... (batch, sequence), starting again so that each id is a row of every embedding table."""
    rows = min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=1)
    return torch.arange(batch * sequence).reshape(batch, sequence) % max(rows, 1)


def batch_and_sequence(sizes: set[int]) -> tuple[int, int]:
    """Two different primes, from 5 up, that divide none of `sizes`: the batch and the sequence length of a trace.

    >>> batch_and_sequence({10, 14, 64})
    (11, 13)
    """
    primes = (n for n in itertools.count(5, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2)))
    unlike = (prime for prime in primes if all(size % prime for size in sizes if size))
    return next(unlike), next(unlike)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Every further name of a tied parameter -> its first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


@contextmanager
def _module_names(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep the names of the modules whose forward runs, innermost last; note the tensors into and out of list items."""

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: recorder.modules.append(name)

    def leaving(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            recorder.modules.pop()
            enters = next(tensors_in((args, tuple(kwargs.values()))), None)
            leaves = next(tensors_in(output), None)
            if name.rpartition(".")[2].isdigit() and enters is not None and leaves is not None:
                recorder.item_calls[name] = recorder.number(enters), recorder.number(leaves)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leaving(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or "no message"
