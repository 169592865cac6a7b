"""Two short samples -> how a model uses its parameters and its memory: what has to be known before a long pass.

The gradient of a linear layer's weight is a product of its input and its output's gradient. The probe finds which
parameters have such a gradient, and for all others the smallest module around them that can be run sample by sample.
It also measures the bytes of each layer's activations and scales them to all windows. From them follows which layers
are recomputed (gradient checkpointing), or how many windows go through the model together.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur import processes
from secateur.discovery.layers import path_and_parents
from secateur.discovery.weight_names import without_numbers
from secateur.models.as_written import as_written
from secateur.models.classes import is_encoder_decoder, objective
from secateur.models.inputs import arguments, predicted
from secateur.models.streaming import streamed_layers
from secateur.scoring.passes.forward import (
    PROBE_SAMPLES,
    PROBE_TOKENS,
    OutputHead,
    embedding_device,
    probe_windows,
    rows_per_sample,
)

logger = logging.getLogger(__name__)

PAIR_TOKENS = 5  # of each half of a probe window
LEAST_BYTES = 3 * 2**29  # weights and activations together may always take this much


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model uses its parameters, and which modules the backward pass computes again."""

    uses: Mapping[str, int]  # parameter -> how often linear layers or embeddings use it in one forward pass
    tied: frozenset[str]  # parameters that several modules or calls use
    by_autograd: frozenset[str]  # parameters whose gradients are left to autograd: norms, stacked experts, convolutions
    conditional: frozenset[str]  # of these, those whose use depends on the text: experts not all of it is routed to
    recomputed: tuple[str, ...]  # layers that are computed again because their activations take too much memory
    one_by_one: frozenset[str]  # modules that are computed again one sample at a time, for the gradient of each
    independent: frozenset[str]  # modules that treat each sample independently of the others
    calls: Mapping[str, int]  # module that is computed again -> its calls in one forward pass
    whole_model: bool  # some parameter has no independent module around it: the whole model runs sample by sample
    head: OutputHead | None  # the output head, where the model can be split before it


@torch.no_grad()
def probe(
    model: PreTrainedModel,
    windows: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    second_order: bool,
    layers: Sequence[str],
    memory: int,
) -> Layout:
    """Run two short samples through the model and see how it uses the parameters (name -> parameter).

    With `second_order`, the squared gradient of each sample is needed. Of the layers, the last ones whose activations
    fit into `memory` bytes are held, the others recomputed. The parameters must require gradients as in the real pass.
    """
    ids_BT = probe_windows(windows, probe_tokens(model)).to(embedding_device(model))
    given = [each for each in arguments(model, ids_BT).values() if isinstance(each, Tensor)]
    products = _ProductModules(parameters, len(ids_BT), text_lengths(given))
    head, activations = OutputHead.of(model), ActivationMemory(layers if memory else (), windows, text_lengths(given))

    # 1. One forward pass, watched: which operators and which modules use a parameter, and what autograd saves.
    with ExitStack() as stack:
        products.register_hooks(model, stack)
        stack.enter_context(as_written())
        uses = stack.enter_context(_OperatorUses(products.name_of))
        if head is not None:
            stack.enter_context(head.recording())
        stack.enter_context(activations.recording(model))
        stack.enter_context(torch.set_grad_enabled(bool(memory and layers)))
        logits_BTV = predicted(model(**arguments(model, ids_BT))).detach()
    recomputed = activations.recomputed(memory) if memory else tuple(layers)

    # 2. A gradient is left to autograd unless every use of its parameter is in a linear layer or an embedding.
    by_autograd = {n for n in parameters if n not in products.owned or uses.counts[n] != products.calls[n]}
    used = {without_numbers(name) for name in parameters if uses.counts[name]}
    unused = {name for name in parameters if not uses.counts[name] and without_numbers(name) in used}
    conditional = products.irregular | unused
    by_autograd |= conditional

    # 3. Autograd adds up samples. For squares, the smallest independent module around each such parameter is run
    #    sample by sample; where there is none, the whole model.
    apart = {path for name in by_autograd for path in products.owners[name]} if second_order else set()
    around = {path for each in apart for path in path_and_parents(each)}
    independent, calls = independent_modules(model, ids_BT, around | {*recomputed})
    nearest = {path: next((p for p in path_and_parents(path) if p in independent), None) for path in apart}
    tied = {name for name in parameters if len(products.owners[name]) > 1 or products.calls[name] > 1}
    tied |= {name for name in by_autograd if second_order and calls[nearest[products.owners[name][0]] or ""] > 1}
    return Layout(
        uses=products.calls,
        tied=frozenset(tied),
        by_autograd=frozenset(by_autograd),
        conditional=frozenset(conditional),
        recomputed=recomputed,
        one_by_one=frozenset(path for path in nearest.values() if path is not None),
        independent=frozenset(independent),
        calls=calls,
        whole_model=None in nearest.values(),
        head=head if head is not None and head.reproduces(ids_BT, logits_BTV) else None,
    )


class _OperatorUses(TorchFunctionMode):
    """Counts the operators that take a parameter and return tensors."""

    def __init__(self, name_of: Mapping[int, str]) -> None:
        super().__init__()
        self.name_of = name_of
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)):
            for argument in itertools.chain(args, (kwargs or {}).values()):
                for each in argument if isinstance(argument, (tuple, list)) else (argument,):
                    if isinstance(each, nn.Parameter) and id(each) in self.name_of:
                        self.counts[self.name_of[id(each)]] += 1
        return result


class _ProductModules:
    """Linear layers and embeddings: which parameters they own, and how often each is called."""

    def __init__(self, parameters: Mapping[str, Tensor], samples: int, lengths: set[int]) -> None:
        self.samples, self.lengths = samples, lengths  # an encoder and a decoder read texts of their own
        self.name_of = {id(parameter): name for name, parameter in parameters.items()}
        self.calls: Counter[str] = Counter()  # by parameter
        self.irregular: set[str] = set()  # parameters of modules whose rows are not samples
        self.owned: set[str] = set()
        self.owners: dict[str, list[str]] = defaultdict(list)  # of every parameter, whatever module has it

    def register_hooks(self, model: nn.Module, stack: ExitStack) -> None:
        """Watch the modules until the stack is closed."""
        for path, module in model.named_modules():
            own = self._own(module)
            for name in own:
                self.owners[name].append(path)
            if own and has_product_gradient(module):
                self.owned.update(own)
                stack.callback(module.register_forward_hook(self._count).remove)

    def _own(self, module: nn.Module) -> list[str]:
        own = (self.name_of.get(id(parameter)) for parameter in module.parameters(recurse=False))
        return [name for name in own if name is not None]

    def _count(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            regular = False
        elif isinstance(module, nn.Embedding):
            regular = output.dim() == 3 and x.shape[0] in (self.samples, 1) and x.shape[1] in self.lengths
        else:
            regular = x.shape[0] in (self.samples, *(self.samples * length for length in self.lengths))
        for name in self._own(module):
            self.calls[name] += 1
            if not regular:
                self.irregular.add(name)


def has_product_gradient(module: nn.Module) -> bool:
    """Whether the weight's gradient follows from the module's input and its output's gradient."""
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward and module.max_norm is None
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def probe_tokens(model: PreTrainedModel) -> int:
    """The length of probe windows: odd for every text, so that none is taken for a multiple of the two samples."""
    return 2 * PAIR_TOKENS if is_encoder_decoder(model.config) and objective(model) != "class" else PROBE_TOKENS


def text_lengths(inputs: Sequence[Tensor]) -> set[int]:
    """The lengths of the texts in a forward pass: an encoder and a decoder read texts of their own."""
    return {each.shape[1] for each in inputs}


def independent_modules(
    model: PreTrainedModel, ids_BT: Tensor, candidates: Collection[str]
) -> tuple[set[str], Counter[str]]:
    """Modules that treat each sample independently of the others, as two samples show; the calls of each."""
    calls: Counter[str] = Counter()
    dependent: set[str] = set()
    testing = False  # the test runs modules, whose hooks must not test in turn

    def test(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal testing
        if testing:
            return
        testing = True
        calls[path] += 1
        if path not in dependent and not _is_independent(module, (args, kwargs), output, len(ids_BT)):
            dependent.add(path)
        testing = False

    if candidates:
        with ExitStack() as stack:
            for path in candidates:
                hook = model.get_submodule(path).register_forward_hook(partial(test, path), with_kwargs=True)
                stack.callback(hook.remove)
            model(**arguments(model, ids_BT))
    return calls.keys() - dependent, calls


def _is_independent(module: nn.Module, arguments: tuple[Any, Any], output: Any, samples: int) -> bool:
    """Whether the first sample alone gives the first part of the output."""
    leaves, spec = pytree.tree_flatten(arguments)
    results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    steps = [rows_per_sample(result, samples) for result in results]
    if None in steps or not any(isinstance(leaf, Tensor) and rows_per_sample(leaf, samples) for leaf in leaves):
        return False
    of_first = [
        leaf[:step] if isinstance(leaf, Tensor) and (step := rows_per_sample(leaf, samples)) is not None else leaf
        for leaf in leaves
    ]
    try:
        args, kwargs = pytree.tree_unflatten(of_first, spec)
        again = [leaf for leaf in pytree.tree_leaves(module.forward(*args, **kwargs)) if isinstance(leaf, Tensor)]
    except Exception as error:  # model code with fewer samples than it expects may fail in any way
        logger.debug("%s takes no single sample: %s", type(module).__name__, error)
        return False
    return len(again) == len(results) and all(
        part.shape == result[:step].shape and torch.allclose(part.float(), result[:step].float(), rtol=1e-2, atol=1e-3)
        for part, result, step in zip(again, results, steps, strict=True)
    )


def activation_budget(model: nn.Module) -> int:
    """Bytes of activations that may be held instead of computed again: a fifth of the weights, more of a small model.

    Layers that are streamed are all computed again: the backward pass needs their weights on the device.

    >>> activation_budget(nn.Linear(2**12, 2**12, bias=False)) / 2**20
    1472.0
    """
    if streamed_layers(model) is not None:
        return 0
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return max(int(weights * 0.2), LEAST_BYTES - weights)


class ActivationMemory:
    """Bytes that layers hold for the backward pass over all windows, measured on the probe windows."""

    def __init__(self, layers: Sequence[str], windows: Tensor, lengths: set[int]) -> None:
        self.layers, self.windows = tuple(layers), windows
        self.probe_lengths, self.probe_tokens = lengths, min(lengths)  # of the texts in the probe windows
        self.bytes: Counter[str] = Counter()  # layer -> bytes
        self._seen: dict[int, Tensor] = {}  # storages that are counted; holding them keeps their addresses theirs
        self._layer: str | None = None  # that is running

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """While open, a forward pass over the probe windows (with gradients) is measured."""
        self._seen.update({weight.untyped_storage().data_ptr(): weight for weight in model.parameters()})

        def running(layer: str | None, *_: Any) -> None:
            self._layer = layer

        with ExitStack() as stack:
            for path in self.layers:
                module = model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(partial(running, path)).remove)
                stack.callback(module.register_forward_hook(partial(running, None)).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._count, lambda nothing: nothing))
            stack.callback(self._seen.clear)
            yield

    def _count(self, tensor: Tensor) -> None:
        """Count a tensor that autograd would save, once. Nothing is saved: a graph that holds its own results stays."""
        address = tensor.untyped_storage().data_ptr()
        if self._layer is not None and address not in self._seen and not isinstance(tensor, nn.Parameter):
            self._seen[address] = tensor
            samples, length = self.windows.shape
            # Attention maps are tokens x tokens, so they grow with the square of the length.
            token_dims = max(1, sum(size in self.probe_lengths for size in tensor.shape))
            scale = samples / PROBE_SAMPLES * (length / min(length, self.probe_tokens)) ** token_dims
            self.bytes[self._layer] += int(tensor.untyped_storage().nbytes() * scale)

    def recomputed(self, memory: int) -> tuple[str, ...]:
        """The layers that do not fit into the memory (bytes). The last ones stay: backward, they are freed first."""
        count = len(self.layers)
        for path in reversed(self.layers) if memory else ():
            memory -= self.bytes[path]
            if memory < 0:
                break
            count -= 1
        return self.layers[:count]


def fitting_batches(model: PreTrainedModel, windows: Tensor, layers: Sequence[str], memory: int) -> list[Tensor]:
    """The windows in batches whose activations fit into the memory (bytes); at least one window for each process."""
    of_each = max(1, sum(activation_bytes_by_layer(model, windows, layers).values()) // len(windows))
    at_once = -processes.largest(-max(1, int(memory // of_each))) * processes.count()
    parts = min(-(-len(windows) // at_once), len(windows) // processes.count())
    return list(windows.tensor_split(max(1, parts)))


def activation_bytes_by_layer(model: PreTrainedModel, windows: Tensor, layers: Sequence[str]) -> Counter[str]:
    """Bytes of activations of each layer over all windows (int64, samples x length)."""
    inputs = arguments(model, probe_windows(windows, probe_tokens(model)).to(embedding_device(model)))
    activations = ActivationMemory(layers, windows, text_lengths([x for x in inputs.values() if isinstance(x, Tensor)]))
    with torch.enable_grad(), activations.recording(model):
        model(**inputs)
    return activations.bytes
