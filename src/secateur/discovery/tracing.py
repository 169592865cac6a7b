"""Model -> graph of ATen operators, recorded from one forward pass that allocates nothing.

The forward pass runs on fake tensors (shapes and dtypes, no storage) while a dispatch mode writes down every operator
that reaches the ATen level. A 7B model takes half a second and no weights; `torch.export` on the same model takes
nine seconds, refuses models that this accepts, and yields the same operators. The batch and sequence lengths are
primes that divide no size of the model, so that a dimension is never mistaken for another because their sizes agree.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call

from secateur.discovery.graph import Graph
from secateur.discovery.recorder import Recorder, tensors_in
from secateur.errors import DiscoveryError, one_line
from secateur.models.as_written import as_written
from secateur.models.classes import objective
from secateur.models.inputs import is_numbers, predicted, traced_inputs, with_end, without_extras

logger = logging.getLogger(__name__)

FAKE_TENSORS = "torch._subclasses.fake_tensor"  # the logger that tells of every pass that fails
NO_INPUTS = "there is nothing that its forward pass takes: no input_ids, pixel_values or sound"
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


def trace(model: nn.Module, *, start_tokens: Sequence[int] = ()) -> Graph:
    """Record the operators of one forward pass of `model`; its weights may be on `meta`.

    The model should use eager attention, so that its attention is written in plain matrix products. Each row that it
    reads begins with the start tokens, for code that looks for them. Raises `DiscoveryError` when the forward pass
    fails or branches on the values of tensors.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=12)
    >>> with torch.device("meta"):
    ...     model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    >>> graph = trace(model)
    >>> [node.op for node in graph.nodes if node.module.endswith("layers.0.fc1")]
    ['aten.t', 'aten.addmm']
    """
    sizes = {size for tensor in itertools.chain(model.parameters(), model.buffers()) for size in tensor.shape}
    lengths = unlike(sizes, 3, least=len(start_tokens) + 1)
    inputs, (recorder, numbers, result) = _first_that_runs(model, lengths, start_tokens)
    buffers = {name: numbers[name] for name, _ in model.named_buffers()}
    return Graph(
        nodes=tuple(recorder.nodes),
        shapes=tuple(recorder.shapes),
        parameters={name: numbers[name] for name, _ in model.named_parameters()},
        buffers=buffers,
        constants=tuple(recorder.unregistered),
        literal_indices=dict(recorder.literal_indices),
        inputs={name: numbers[name] for name in inputs},
        outputs=(recorder.number(predicted(result)),),
        tied=_tied_names(model),
        computed_buffers=frozenset(buffers.keys() - model.state_dict().keys()),
        item_calls=dict(recorder.item_calls),
        returns_states=objective(model) == "embedding",
    )


def run_without_memory(model: nn.Module, *, sequence: int, start_tokens: Sequence[int] = (), **options: Any) -> Any:
    """Return what one forward pass over a row of `sequence` tokens gives; its tensors are fake: shapes, no storage.

    The model's weights may be on `meta`; the row begins with `start_tokens`; `options` go to its forward. Raises
    `DiscoveryError` when the pass fails.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 12}
    >>> config = AutoConfig.for_model("opt", num_hidden_layers=1, vocab_size=9, **sizes)
    >>> with torch.device("meta"):
    ...     model = AutoModelForCausalLM.from_config(config).eval()
    >>> tuple(run_without_memory(model, sequence=3, use_cache=False).logits.shape)
    (1, 3, 9)
    """
    shapes = next(traced_inputs(model, 1, sequence, sequence), None)
    if shapes is None:
        raise DiscoveryError(f"{type(model).__name__}: {NO_INPUTS}")
    _, _, result = _run_on_fake_tensors(model, shapes, start_tokens, **options)
    return result


def _first_that_runs(
    model: nn.Module, lengths: Sequence[int], start_tokens: Sequence[int]
) -> tuple[Mapping[str, Any], tuple[Recorder, dict[str, int], Any]]:
    """The first inputs with which the model runs, and the pass with them; where none does, why not with the first."""
    failure: DiscoveryError | None = None
    batch, sequence, written = lengths
    for shapes in traced_inputs(model, batch, sequence, written):
        try:
            return shapes, _run_on_fake_tensors(model, shapes, start_tokens, **without_extras(model))
        except DiscoveryError as error:
            failure = failure or error
    raise failure or DiscoveryError(f"{type(model).__name__}: {NO_INPUTS}")


def _run_on_fake_tensors(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...] | Tensor],
    start_tokens: Sequence[int],
    *,
    follow_values: bool = False,
    **options: Any,
) -> tuple[Recorder, dict[str, int], Any]:
    """One forward pass without memory: its record, the numbers of weights and inputs in it, and its result."""
    recorder = Recorder(follow_values=follow_values)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        weights = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in named}
        dtype = next((weight.dtype for weight in weights.values() if weight.is_floating_point()), None)
        inputs = {name: _fake_input(name, shape, dtype) for name, shape in shapes.items()}
    numbers = {name: recorder.number(tensor) for name, tensor in {**weights, **inputs}.items()}
    # 0, 1, 2, ..., starting again so that each id is a row of every embedding table.
    rows = min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=1)
    for name, tensor in inputs.items():
        if isinstance(given := shapes[name], Tensor):
            if not given.is_floating_point():
                recorder.set_values(tensor, given)
        elif not is_numbers(name):
            ids = torch.arange(tensor.numel()).reshape(tensor.shape) % max(rows, 1)
            ids[:, : len(start_tokens)] = torch.tensor(start_tokens, dtype=torch.long)[: tensor.shape[1]]
            recorder.set_values(tensor, with_end(model, ids))
    try:
        with torch.no_grad(), as_written(), fake_mode, _module_names(model, recorder), recorder:
            result = functional_call(model, weights, (), {**inputs, **options}, tie_weights=True)
    except Exception as error:  # any model code may raise anything
        if isinstance(error, DATA_DEPENDENT) and not follow_values:
            # Slower, but for the few models whose code looks at numbers.
            logger.debug("%s branches on data (%s); following values", type(model).__name__, error)
            return _run_on_fake_tensors(model, shapes, start_tokens, follow_values=True, **options)
        raise DiscoveryError(
            f"{type(model).__name__}: the forward pass could not be traced; it failed in "
            f"{recorder.module or 'the model'!r} with {one_line(error)}"  # the outermost has no name
        ) from error
    return recorder, numbers, result


def _fake_input(name: str, given: tuple[int, ...] | Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor without storage of a given shape, or like a given tensor; what holds no ids has the model's dtype."""
    if isinstance(given, Tensor):
        return torch.zeros(given.shape, dtype=dtype if given.is_floating_point() else given.dtype)
    return torch.zeros(given, dtype=dtype if is_numbers(name) else torch.long)


def unlike(sizes: set[int], count: int, *, least: int = 0) -> tuple[int, ...]:
    """Different primes, from 5 up, that divide none of `sizes`: the batch and the lengths of texts in a trace.

    All but the first, the batch, are at least `least`.

    >>> unlike({10, 14, 64}, 2)
    (11, 13)
    """
    primes = (n for n in itertools.count(5, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2)))
    others = (prime for prime in primes if all(size % prime for size in sizes if size))
    batch = next(others)
    return (batch, *itertools.islice((prime for prime in others if prime >= least), count - 1))


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Every further name of a tied parameter -> its first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


@contextmanager
def _module_names(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep the names of the modules whose forward runs, innermost last; note the tensors into and out of list items."""

    def entering(name: str, *_: Any) -> None:
        recorder.modules.append(name)

    def leaving(name: str, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        recorder.modules.pop()
        enters = next(tensors_in((args, tuple(kwargs.values()))), None)
        leaves = next(tensors_in(output), None)
        if name.rpartition(".")[2].isdigit() and enters is not None and leaves is not None:
            recorder.item_calls[name] = recorder.number(enters), recorder.number(leaves)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its operators are recorded all the same
                continue
            stack.enter_context(module.register_forward_pre_hook(partial(entering, name)))
            stack.enter_context(module.register_forward_hook(partial(leaving, name), with_kwargs=True))
        yield
