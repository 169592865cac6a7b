"""Model and calibration windows -> what goes into every matrix product with a weight, in one forward pass.

The products are found where they are computed, not by the module that computes them: a weight, or one matrix of a stack
of weights, that stands in `linear`, `matmul`, `mm`, `addmm` or `bmm`. So linear layers of any kind, `Conv1D` and
stacked experts are seen alike. All samples go forward together, so when a layer is done, all is known of its inputs.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from secateur.progress import Progress
from secateur.scoring.gradients import LOGITS_BYTES
from secateur.scoring.probe import entrance, split_before_head, two_samples

logger = logging.getLogger(__name__)

EXPERTS_ONE_BY_ONE = "eager"  # transformers' name for code that computes experts one after the other


class Observer(Protocol):
    """What looks at a forward pass."""

    def reads(self, weight: str, dim: int, index: int | None, inputs: Tensor) -> None:
        """A weight, or the matrix `index` of its stack, has been multiplied along its dimension `dim`.

        Inputs are tokens x features, in the model's dtype.
        """

    def passed(self, layer: str, before: Tensor, after: Tensor) -> None:
        """A layer has made one hidden state (samples x tokens x features) of another."""


@torch.no_grad()
def stream_inputs(
    model: PreTrainedModel,
    windows: Tensor,
    observer: Observer,
    *,
    wanted: Collection[str] | None = None,
    layers: Sequence[str] = (),
    progress: Progress | None = None,
) -> None:
    """Pass the windows (int64, samples x length) through the model and show the observer what its weights read.

    `wanted` names the weights (by default, all of two or more dimensions), `layers` the modules that are reported when
    they are passed.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, seen = AutoModelForCausalLM.from_config(config), {}
    >>> class Shapes:
    ...     def reads(self, weight, dim, index, inputs):
    ...         seen[weight] = dim, tuple(inputs.shape)
    ...     def passed(self, layer, before, after):
    ...         pass
    >>> stream_inputs(model, torch.arange(20).reshape(2, 10), Shapes())
    >>> seen["model.decoder.layers.0.fc2.weight"]
    (1, (20, 24))
    """
    every = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    chosen = {name: parameter for name, parameter in every.items() if wanted is None or name in wanted}
    ids = windows.to(entrance(model))
    with ExitStack() as stack:
        stack.enter_context(experts_one_by_one(model))
        tail = split_before_head(model, two_samples(windows).to(ids.device))
        for done, path in enumerate(layers, 1):
            hook = _passed(path, observer, functools.partial(progress, done, len(layers)) if progress else None)
            stack.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(Products(chosen, functools.partial(_show, observer)))
        if tail is None:
            model(input_ids=ids, use_cache=False)
            return
        hidden = tail.hidden(ids)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        at_once = max(1, LOGITS_BYTES // (vocabulary * windows.shape[1] * 4))
        for first in range(0, len(ids), at_once):
            tail.logits(hidden[first : first + at_once], ids[first : first + at_once])


def _show(observer: Observer, product: Product) -> None:
    for index, inputs in product.parts:
        observer.reads(product.weight, product.dim, index, inputs)


def reading_dims(model: PreTrainedModel, ids: Tensor) -> dict[str, int]:
    """The dimension along which each weight multiplies its inputs, found with these ids (samples x length).

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> reading_dims(model, torch.arange(20).reshape(2, 10))["model.decoder.layers.0.fc2.weight"]
    1
    """
    found = _Dims()
    stream_inputs(model, ids, found)
    return found.dims


class _Dims:
    def __init__(self) -> None:
        self.dims: dict[str, int] = {}

    def reads(self, weight: str, dim: int, index: int | None, inputs: Tensor) -> None:
        del index, inputs
        self.dims[weight] = dim

    def passed(self, layer: str, before: Tensor, after: Tensor) -> None:
        del layer, before, after


def _passed(path: str, observer: Observer, done: Callable[[], None] | None) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs.get("hidden_states")
        after = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape:
            observer.passed(path, before, after)
        if done is not None:
            done()

    return hook


@contextmanager
def experts_one_by_one(model: PreTrainedModel) -> Iterator[None]:
    """Let stacked experts be computed one after the other, where the model can do that."""
    before = getattr(model.config, "_experts_implementation", None)
    if before in (None, EXPERTS_ONE_BY_ONE):
        yield
        return
    try:
        model.set_experts_implementation(EXPERTS_ONE_BY_ONE)
    except (ValueError, RuntimeError) as error:
        logger.debug("%s computes its experts as %s: %s", type(model).__name__, before, error)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


PRODUCTS: dict[Any, tuple[int, int]] = {  # operator -> the positions of the inputs and of the matrix
    functional.linear: (0, 1),
    torch.matmul: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
    Tensor.mm: (0, 1),
    torch.bmm: (0, 1),
    Tensor.bmm: (0, 1),
    torch.addmm: (1, 2),
}


@dataclass(frozen=True, slots=True)
class Product:
    """A product that is about to be computed: its inputs, and the weight or the matrices of a stack that they meet."""

    weight: str
    dim: int  # of the weight: the one that meets the inputs
    parts: tuple[tuple[int | None, Tensor], ...]  # number of the matrix in its stack, tokens x features
    inputs: Tensor
    bias: nn.Parameter | None
    again: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of inputs, the whole weight and the bias


class Products(TorchFunctionMode):
    """While open, `look` sees every product whose second factor is a weight named, or one matrix of a stack.

    What `look` returns, if anything, is the result instead.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], look: Callable[[Product], Tensor | None]) -> None:
        super().__init__()
        self.look = look
        self.weights: dict[int, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in weights.items():
            self.weights[parameter.untyped_storage().data_ptr()].append((name, parameter))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            at_inputs, at_matrix = PRODUCTS[func]
            if len(args) > at_matrix and isinstance(args[at_inputs], Tensor) and isinstance(args[at_matrix], Tensor):
                found = self._find(func, args, kwargs)
                result = None if found is None else self.look(found)
                if result is not None:
                    return result
        return func(*args, **kwargs)

    def _find(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
        at_inputs, at_matrix = PRODUCTS[func]
        inputs, matrix = args[at_inputs], args[at_matrix]
        for name, weight in self.weights.get(matrix.untyped_storage().data_ptr(), ()):
            index = _index_in(matrix, weight)
            if index == ():
                continue
            # The product runs over the matrix's last dimension in `linear`, over the one before in all others.
            contracted = matrix.dim() - 1 if func is functional.linear else matrix.dim() - 2
            step = matrix.stride(contracted)
            dims = [d for d in range(weight.dim()) if weight.stride(d) == step and weight.shape[d] == inputs.shape[-1]]
            if len(dims) != 1 or matrix.shape[contracted] != inputs.shape[-1]:
                continue
            parts: tuple[tuple[int | None, Tensor], ...]
            if matrix.dim() == 3:  # every matrix of the stack has inputs of its own
                parts = tuple((i, inputs[i].detach()) for i in range(len(matrix)))
            else:
                at = index[0] if index is not None else None
                parts = ((at, inputs.detach().reshape(-1, inputs.shape[-1])),)
            at_bias = {functional.linear: 2, torch.addmm: 0}.get(func)
            bias = kwargs.get("bias")
            if at_bias is not None and len(args) > at_bias:
                bias = args[at_bias]
            return Product(
                name,
                dims[0],
                parts,
                inputs,
                bias if isinstance(bias, nn.Parameter) else None,
                functools.partial(_again, func, args, kwargs, matrix, int(weight.storage_offset()), at_bias),
            )
        return None


def _again(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    matrix: Tensor,
    start: int,
    at_bias: int | None,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The same product of other inputs, with another weight that lies in memory as the first does."""
    at_inputs, at_matrix = PRODUCTS[func]
    new = list(args)
    new[at_inputs] = inputs
    new[at_matrix] = weight.as_strided(matrix.shape, matrix.stride(), matrix.storage_offset() - start)
    if at_bias is not None and len(args) > at_bias:
        new[at_bias] = bias
    elif "bias" in kwargs:
        kwargs = {**kwargs, "bias": bias}
    result: Tensor = func(*new, **kwargs)
    return result


def _index_in(matrix: Tensor, weight: Tensor) -> tuple[int, ...] | None:
    """Which matrix of the stack this is; None where it is all of the weight, () where it is another part."""
    offset = matrix.storage_offset() - weight.storage_offset()
    if matrix.numel() == weight.numel():
        return None if offset == 0 else ()
    if weight.dim() != 3 or matrix.dim() != 2 or matrix.numel() * len(weight) != weight.numel():
        return ()
    at, rest = divmod(int(offset), int(weight.stride(0)))
    return (at,) if rest == 0 and 0 <= at < len(weight) else ()
