"""Two short samples -> how a model uses its parameters: what has to be known before gradients can be streamed."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

PROBE_SAMPLES, PROBE_TOKENS = 2, 7


def per_sample(tensor: Tensor, samples: int) -> int | None:
    """How many entries along dimension 0 belong to each sample; None where the tensor is the same for all.

    >>> per_sample(torch.zeros(4, 3), 4), per_sample(torch.zeros(12, 3), 4), per_sample(torch.zeros(1, 3), 4)
    (1, 3, None)
    """
    if tensor.dim() < 2:
        return None
    size = tensor.shape[0]
    return size // samples if size >= samples and size % samples == 0 else None


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, a module has another `forward`."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@dataclass(frozen=True, slots=True)
class Tail:
    """What comes after the base model: the output head, and whatever is done with its logits."""

    model: PreTrainedModel
    base: nn.Module
    given: list[Any] = field(default_factory=list)  # what the base model gave last

    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states."""
        self.given[:] = [self.base(input_ids=ids, use_cache=False)]
        result: Tensor = self.given[0][0]
        return result

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The logits of hidden states."""
        given = type(self.given[0])(**{**self.given[0], "last_hidden_state": hidden})
        with replaced_forward(self.base, lambda *_, **__: given):
            result: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return result


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model uses its parameters."""

    uses: Mapping[str, int]  # how often modules use a parameter in one pass
    homes: Mapping[str, str]  # the path of the module that has a parameter
    shared: frozenset[str]  # parameters that several modules or calls use
    by_autograd: frozenset[str]  # parameters whose gradients are left to autograd
    uncertain: frozenset[str]  # of these, those whose use depends on the text: experts that not all of it hits
    calls: Mapping[str, int]  # how often modules that are computed again are called in one pass
    one_by_one: frozenset[str]  # of these, those computed again sample by sample, because of such parameters
    alone: frozenset[str]  # modules that treat samples one by one
    recomputed: tuple[str, ...]  # layers that are computed again because they remember too much
    whole: bool  # a parameter has no such module around it: the whole model goes sample by sample
    tail: Tail | None


class _Uses(TorchFunctionMode):
    """Counts the operators that take a parameter and give a tensor."""

    def __init__(self, name_of: Mapping[int, str]) -> None:
        super().__init__()
        self.name_of = name_of
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)):
            for argument in itertools.chain(args, (kwargs or {}).values()):
                for each in argument if isinstance(argument, (tuple, list)) else (argument,):
                    if isinstance(each, nn.Parameter) and id(each) in self.name_of:
                        self.found[self.name_of[id(each)]] += 1
        return result


def entrance(model: PreTrainedModel) -> torch.device:
    """Where token ids go in."""
    return next(model.get_input_embeddings().parameters()).device


class Remembered:
    """Measures on two short samples what layers remember for the backward pass, in bytes for all windows."""

    def __init__(self, layers: Sequence[str], windows: Tensor) -> None:
        self.layers, self.windows = layers, windows
        self.bytes: Counter[str] = Counter()
        self.seen: dict[int, Tensor] = {}
        self.layer: str | None = None

    def note(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is remembered, once."""
        at = tensor.untyped_storage().data_ptr()
        if self.layer is not None and at not in self.seen and not isinstance(tensor, nn.Parameter):
            self.seen[at] = tensor
            samples, length = self.windows.shape
            lengths = max(1, sum(size == PROBE_TOKENS for size in tensor.shape))  # two, in maps of attention
            scale = samples / PROBE_SAMPLES * (length / min(length, PROBE_TOKENS)) ** lengths
            self.bytes[self.layer] += int(tensor.untyped_storage().nbytes() * scale)
        return tensor

    def too_large(self, layers: Sequence[str], memory: int) -> tuple[str, ...]:
        """The layers that do not fit into the memory; the last ones are remembered, since they are needed first."""
        kept = len(layers)
        for path in reversed(layers) if memory else ():
            memory -= self.bytes[path]
            if memory < 0:
                break
            kept -= 1
        return tuple(layers[:kept])

    @contextmanager
    def progress_bars(self, model: nn.Module) -> Iterator[None]:
        """While open, what the layers remember is counted."""
        weights = {tensor.untyped_storage().data_ptr(): tensor for tensor in model.parameters()}
        self.seen.update(weights)

        def enter(path: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self.layer = path

            return hook

        def leave(*_: Any) -> None:
            self.layer = None

        with ExitStack() as stack:
            for path in self.layers:
                module = model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(enter(path)).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor))
            yield


def two_samples(windows: Tensor) -> Tensor:
    """Two short samples to look at what a model does with them."""
    two = windows[:PROBE_SAMPLES] if len(windows) > 1 else torch.cat([windows, windows.roll(1, 1)])
    return two[:, :PROBE_TOKENS]


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
    """Pass two short samples through the model, and look at who does what.

    Of the layers, the last ones are to be remembered whose activations fit into `memory` bytes; the others are to be
    computed again. The parameters must ask for gradients where the pass will.
    """
    ids = two_samples(windows).to(entrance(model))
    rows, tokens = ids.shape
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    calls: Counter[str] = Counter()  # by parameter, of modules whose gradients are products
    odd: set[str] = set()  # parameters of modules whose rows are not samples
    owners: dict[str, list[str]] = defaultdict(list)
    factored: set[str] = set()

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            fits = False
        elif isinstance(module, nn.Embedding):
            fits = output.dim() == 3 and tuple(x.shape) in ((rows, tokens), (1, tokens))
        else:
            fits = x.shape[0] in (rows, rows * tokens)
        for _, parameter in module.named_parameters(recurse=False):
            if id(parameter) in name_of:
                calls[name_of[id(parameter)]] += 1
                if not fits:
                    odd.add(name_of[id(parameter)])

    with ExitStack() as stack:
        for path, module in model.named_modules():
            own = [name_of[id(p)] for _, p in module.named_parameters(recurse=False) if id(p) in name_of]
            for name in own:
                owners[name].append(path)
            if own and _has_factors(module):
                factored.update(own)
                stack.callback(module.register_forward_hook(look).remove)
        uses = stack.enter_context(_Uses(name_of))
        base = _BaseOutput(model)
        stack.enter_context(base.kept())
        remembered = Remembered(layers if memory else (), windows)
        stack.enter_context(remembered.progress_bars(model))
        stack.enter_context(torch.set_grad_enabled(bool(memory and layers)))
        logits = model(input_ids=ids, use_cache=False).logits.detach()
    recomputed = remembered.too_large(layers, memory)
    by_autograd = {name for name in parameters if name not in factored or uses.found[name] != calls[name]}
    used = {_alike(name) for name in parameters if uses.found[name]}
    uncertain = odd | {name for name in parameters if not uses.found[name] and _alike(name) in used}
    by_autograd |= uncertain
    homes = {name: owners[name][0] for name in parameters}
    single = {path for name in by_autograd for path in owners[name]} if second_order else set()
    alone, called = _alone(model, ids, single, recomputed)
    nearest = {home: next((each for each in _ancestors(home) if each in alone), None) for home in single}
    one_by_one = {path for path in nearest.values() if path is not None}
    shared = {name for name in parameters if len(owners[name]) > 1 or calls[name] > 1}
    shared |= {name for name in by_autograd if second_order and called[nearest[homes[name]] or ""] > 1}
    return Layout(
        uses=calls,
        homes=homes,
        shared=frozenset(shared),
        by_autograd=frozenset(by_autograd),
        uncertain=frozenset(uncertain),
        calls=called,
        one_by_one=frozenset(one_by_one),
        alone=frozenset(alone),
        whole=None in nearest.values(),
        recomputed=recomputed,
        tail=_split(base, ids, logits),
    )


def _alike(name: str) -> str:
    """A name without its numbers: the same for all experts.

    >>> _alike("layers.0.experts.3.weight")
    'layers.*.experts.*.weight'
    """
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def _has_factors(module: nn.Module) -> bool:
    """Whether a module is one whose weight gradient is a product, or a table's."""
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward and module.max_norm is None
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def _alone(
    model: PreTrainedModel, ids: Tensor, homes: set[str], recomputed: Sequence[str]
) -> tuple[set[str], Counter[str]]:
    """Which of these modules, and of those around `homes`, treat samples one by one; how often each is called."""
    candidates = {path for home in homes for path in _ancestors(home)} | set(recomputed)
    verdicts: dict[str, bool] = {}
    called: Counter[str] = Counter()
    busy = False

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal busy
            if not busy:
                busy = True
                called[path] += 1
                verdicts[path] = verdicts.get(path, True) and _treats_alone(module, args, kwargs, output, len(ids))
                busy = False

        return hook

    if candidates:
        with ExitStack() as stack:
            for path in candidates:
                hook = model.get_submodule(path).register_forward_hook(look(path), with_kwargs=True)
                stack.callback(hook.remove)
            model(input_ids=ids, use_cache=False)
    return {path for path, verdict in verdicts.items() if verdict}, called


def _ancestors(path: str) -> list[str]:
    """A path and those around it, but for the model's own.

    >>> _ancestors("model.layers.0")
    ['model.layers.0', 'model.layers', 'model']
    """
    pieces = path.split(".") if path else []
    return [".".join(pieces[:i]) for i in range(len(pieces), 0, -1)]


def _treats_alone(module: nn.Module, args: Any, kwargs: Any, output: Any, samples: int) -> bool:
    """Whether the first sample alone gives the first part of the output."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    steps = [per_sample(result, samples) for result in results]
    if not any(isinstance(leaf, Tensor) and per_sample(leaf, samples) for leaf in leaves) or None in steps:
        return False
    one = [
        leaf[:step] if isinstance(leaf, Tensor) and (step := per_sample(leaf, samples)) is not None else leaf
        for leaf in leaves
    ]
    try:
        some_args, some_kwargs = pytree.tree_unflatten(one, spec)
        again = [x for x in pytree.tree_leaves(module.forward(*some_args, **some_kwargs)) if isinstance(x, Tensor)]
    except Exception as error:  # code that is given less than it expects may fail in any way
        logger.debug("%s takes no single sample: %s", type(module).__name__, error)
        return False
    return len(again) == len(results) and all(
        part.shape == result[:step].shape and torch.allclose(part.float(), result[:step].float(), rtol=1e-2, atol=1e-3)
        for part, result, step in zip(again, results, steps, strict=True)
    )


class _BaseOutput:
    """Keeps what the base model gives, if the model has one and an output head."""

    def __init__(self, model: PreTrainedModel) -> None:
        base = getattr(model, model.base_model_prefix, None)
        usable = isinstance(base, nn.Module) and base is not model and model.get_output_embeddings() is not None
        self.tail = Tail(model, base) if usable and isinstance(base, nn.Module) else None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While open, it is kept."""
        if self.tail is None:
            yield
            return
        given = self.tail.given

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            given[:] = [output]

        handle = self.tail.base.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@torch.no_grad()
def split_before_head(model: PreTrainedModel, ids: Tensor) -> Tail | None:
    """What comes after the base model, where the model can be split there: tried with these ids (samples x length)."""
    base = _BaseOutput(model)
    with base.kept():
        logits = model(input_ids=ids, use_cache=False).logits
    return _split(base, ids, logits)


def _split(base: _BaseOutput, ids: Tensor, logits: Tensor) -> Tail | None:
    tail = base.tail
    if tail is None or not tail.given:
        return None
    try:
        few = slice(0, 2)  # of the tokens: every one goes through the head by itself
        hidden, ids, logits = tail.given[0][0].detach()[:, few], ids[:, few], logits[:, few]
        again, other = tail.logits(hidden, ids), tail.logits(torch.zeros_like(hidden), ids)
    except Exception as error:  # code that is given less than it expects may fail in any way
        logger.debug("%s cannot be split before its head: %s", type(tail.model).__name__, error)
        return None
    same = again.shape == logits.shape and torch.allclose(again.float(), logits.float(), rtol=1e-3, atol=1e-4)
    return tail if same and not torch.equal(other, again) else None  # some models call a part of their base model
