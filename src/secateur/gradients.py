"""Model and calibration windows -> gradients, one weight at a time; no `.grad` is ever held.

One forward and one backward pass over all samples together. A linear layer's weight gradient is the product of its
input and its output's gradient: when both are known, it is formed a few rows at a time, for every sample where squares
are asked for, given to the visitor and dropped. A table of embeddings scatters its output's gradient in the same way.

Other parameters (norms, stacked experts, convolutions) leave their gradients to autograd. Where every sample's own is
asked for, the smallest module around them that treats samples one by one is computed again, sample by sample, in the
backward pass. Layers may be computed again too, a few samples at a time, so that between the passes only what goes from
layer to layer is held.

Products are taken in float32 whatever the dtype of the model: squares of float16 gradients are zero.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.errors import ScoreError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
# Name of a weight, its rows (along dimension 0), and of these rows, all float32: the weight W, its gradient G of the
# mean loss, and, where asked for, A, the mean over the samples of the square of each one's gradient.
Visit = Callable[[str, slice, Tensor, Tensor, Tensor | None], None]

ROWS_BYTES = 2**21  # of the rows of a gradient that are formed at once: they stay in the cache
RECOMPUTED_TOKENS = 2048  # of a layer that is computed again at once
LOGITS_BYTES = 2**25  # of the logits that are held at once
PROBE_SAMPLES, PROBE_TOKENS = 2, 13
LOSS_SCALE = 2.0**12  # under float16, whose gradients would be zero


def stream_gradients(
    model: PreTrainedModel,
    windows: Tensor,
    visit: Visit,
    *,
    wanted: Sequence[str] | None = None,
    second_order: bool = False,
    recomputed: Sequence[str] = (),
    memory: int = 0,
    progress: Progress | None = None,
) -> float:
    """Visit the gradient of the mean cross-entropy over the windows for every parameter wanted (by default, each).

    Windows are int64, samples x length; their labels are themselves. `recomputed` names modules (layers) that are
    computed again in the backward pass instead of being remembered, except the last ones of them, of which all that
    is remembered takes no more than `memory` bytes. Returns the loss in nats per token. Parameters that the loss does
    not depend on are not visited. Raises `ScoreError` when the loss is NaN or Inf.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, largest = AutoModelForCausalLM.from_config(config), {}
    >>> def visit(name, rows, weight, gradient, squared):
    ...     largest[name] = max(largest.get(name, 0.0), gradient.abs().max().item())
    >>> loss = stream_gradients(model, torch.arange(20).reshape(2, 10), visit)
    >>> largest["model.decoder.layers.0.fc1.weight"] > 0
    True
    """
    names = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    chosen = names if wanted is None else names & set(wanted)
    return _Pass(model, windows, visit, chosen, second_order, recomputed, memory, progress).run()


@dataclass(slots=True)
class _Sums:
    """What autograd gave for a parameter so far: by sample where several modules use it, else added up."""

    gradient: Tensor | None = None
    squared: Tensor | None = None
    by_sample: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Factors:
    """The factors of a weight's gradient, for samples from `first` on: G_n = left_n' right_n."""

    first: int
    left: Tensor  # samples x tokens x rows; for a table of embeddings, the numbers of the rows: samples x tokens
    right: Tensor  # samples x tokens x columns


class _Pass:
    """One forward and one backward pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        visit: Visit,
        wanted: set[str],
        second_order: bool,
        recomputed: Sequence[str],
        memory: int,
        progress: Progress | None,
    ) -> None:
        self.model, self.windows, self.visit, self.second_order = model, windows, visit, second_order
        self.samples, self.length = windows.shape
        self.progress, self.recomputed, self.memory = progress, tuple(recomputed), memory
        self.parameters = {n: p for n, p in model.named_parameters() if n in wanted}
        self.name_of = {id(parameter): name for name, parameter in self.parameters.items()}
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self.scale = LOSS_SCALE if half else 1.0
        self.factors: dict[str, list[_Factors]] = defaultdict(list)
        self.sums: dict[str, _Sums] = defaultdict(_Sums)
        self.seen: Counter[str] = Counter()  # samples of a parameter's uses whose gradient is there
        # What is being computed: pieces within pieces, which samples, and how many.
        self.depth, self.first, self.piece = 0, 0, self.samples
        self.done = 0
        self.remembered: _Remembered | None = None  # while it is measured

    def run(self) -> float:
        """Probe, pass forward and backward, and visit."""
        self.layout = _probe(
            self.model, self.windows, self.parameters, second_order=self.second_order, recomputed=self.recomputed
        )
        self.calls = Counter(self.layout.calls)
        before = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        with ExitStack() as stack, torch.enable_grad():
            stack.callback(self._restore, before)
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for name in self.layout.by_autograd:
                self.parameters[name].requires_grad_(True)
                hook = self.parameters[name].register_post_accumulate_grad_hook(self._take_grad(name))
                stack.callback(hook.remove)
            for path, module in self.model.named_modules():
                names = {attr: name for attr, name in self._own(module) if name not in self.layout.by_autograd}
                if names:
                    take = self._take_lookup if isinstance(module, nn.Embedding) else self._take_product
                    stack.callback(module.register_forward_hook(take(module, names)).remove)
            self.recomputed = self._too_large()
            for path, module in self.model.named_modules():
                chunk = self._chunk_of(path)
                if chunk is not None:
                    stack.enter_context(_replaced_forward(module, self._recomputing(module, path, chunk)))
            loss = self._passes()
            for name in [*self.sums]:
                self._finish_sums(name)
        return loss

    def _restore(self, before: Mapping[str, bool]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None

    def _own(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        for attribute, parameter in module.named_parameters(recurse=False):
            name = self.name_of.get(id(parameter))
            if name is not None:
                yield attribute, name

    def _chunk_of(self, path: str) -> int | None:
        """How many samples at once a module is computed again with; None where it is remembered."""
        if path in self.layout.one_by_one:
            return 1
        if path in self.recomputed:
            return max(1, RECOMPUTED_TOKENS // self.length) if path in self.layout.alone else self.samples
        return None

    def _too_large(self) -> tuple[str, ...]:
        """The layers that do not fit into the memory; the last ones are remembered, since they are needed first."""
        if not self.memory or not self.recomputed:
            return self.recomputed
        self.remembered = _Remembered(self.recomputed, self.windows)
        with self.remembered.watching(self.model):
            self.model(input_ids=_two_samples(self.windows).to(_entrance(self.model)), use_cache=False)
        left, kept = self.memory, len(self.recomputed)
        for path in reversed(self.recomputed):
            left -= self.remembered.bytes[path]
            if left < 0:
                break
            kept -= 1
        self.remembered = None
        return self.recomputed[:kept]

    # --- the passes -------------------------------------------------------------------------------------------------

    def _passes(self) -> float:
        """The forward pass, the loss a few samples at a time, and the backward pass."""
        ids = self.windows.to(_entrance(self.model))
        tail = self.layout.tail
        if self.layout.whole or tail is None:
            at_once = 1 if self.layout.whole else self.samples
            pieces = [(first, ids[first : first + at_once]) for first in range(0, self.samples, at_once)]
            return sum(self._backward_of(first, some) for first, some in pieces)
        hidden = tail.hidden(ids)
        gradient = torch.empty_like(hidden)
        loss = 0.0
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        at_once = max(1, LOGITS_BYTES // (vocabulary * self.length * 4))
        for first in range(0, self.samples, at_once):
            some, given = ids[first : first + at_once], hidden[first : first + at_once].detach()
            given.requires_grad_(True)
            with self.only(first, len(some)):
                part = self._loss(tail.logits(given, some), some)
                part.backward()
            assert given.grad is not None
            gradient[first : first + at_once] = given.grad
            loss += float(part.detach()) / self.scale
        if hidden.requires_grad:
            hidden.backward(gradient)
        return loss

    def _backward_of(self, first: int, ids: Tensor) -> float:
        """The loss of some samples, and their gradients."""
        with self.only(first, len(ids)) if len(ids) < self.samples else nullcontext():
            loss = self._loss(self.model(input_ids=ids, use_cache=False).logits, ids)
            loss.backward()
        return float(loss.detach()) / self.scale

    @contextmanager
    def only(self, first: int, count: int) -> Iterator[None]:
        """While open, what is computed is of these samples only, so gradients of parameters come in pieces."""
        outer = self.depth, self.first, self.piece
        self.depth, self.first, self.piece = self.depth + 1, first, count
        try:
            yield
        finally:
            self.depth, self.first, self.piece = outer

    def _loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        """These samples' part of the mean cross-entropy over all."""
        nll = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device), reduction="sum"
        )
        if not torch.isfinite(nll):
            raise ScoreError(
                f"the loss on the calibration text is {float(nll.detach())}: the model's outputs are not finite. Check "
                "the weights, or use dtype float32 or bfloat16"
            )
        return nll * (self.scale / ((self.length - 1) * self.samples))

    # --- modules that are computed again ------------------------------------------------------------------------------

    def _recomputing(self, module: nn.Module, path: str, chunk: int) -> Callable[..., Any]:
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            given, tensors = _Structure.of((args, kwargs))
            call = _Call(self, path, forward, given, chunk, self.first, self.piece)
            # With nothing before it that asks for a gradient, autograd would not come back here.
            anchor = torch.zeros((), requires_grad=True)
            results = _Recomputed.apply(call, anchor, *tensors)  # type: ignore[no-untyped-call]
            assert call.result is not None
            return call.result.filled(results)

        return wrapped

    def computed_again(self, path: str) -> None:
        """A module has been computed again for all samples of a call."""
        self.calls[path] -= 1
        if self.depth == 0 and self.calls[path] == 0:
            within = [name for name in self.sums if f"{self.layout.homes[name]}.".startswith(f"{path}.")]
            for name in within:
                if name in self.layout.by_autograd and name not in self.layout.shared:
                    self._finish_sums(name)

    # --- what the hooks take ------------------------------------------------------------------------------------------

    def _take_product(self, module: nn.Module, names: Mapping[str, str]) -> Callable[..., Any]:
        turned = isinstance(module, Conv1D)

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            changed = None
            if not output.requires_grad:
                output = changed = output.detach().requires_grad_(True)
            held, first, count = [args[0].detach()], self.first, self.piece
            if self.remembered is not None:
                self.remembered.note(held[0])

            def take(gradient: Tensor) -> None:
                x = held.pop()  # autograd keeps this function to the end of the pass
                d = _by_sample(gradient.detach(), count)
                if "bias" in names:
                    self._add(names["bias"], first, d.float().sum(1))
                if "weight" in names:
                    inputs = _by_sample(x, count)
                    left, right = (inputs, d) if turned else (d, inputs)
                    self._put(names["weight"], _Factors(first, left, right))

            output.register_hook(take)
            return changed

        return hook

    def _take_lookup(self, module: nn.Module, names: Mapping[str, str]) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            ids, first, count = args[0].detach(), self.first, self.piece
            changed = None
            if output.shape[0] == 1 < count:  # the same for every sample, such as positions
                ids = ids.expand(count, -1)
                output = changed = output.expand(count, -1, -1)
            if not output.requires_grad:
                output = changed = output.detach().requires_grad_(True)

            def take(gradient: Tensor) -> None:
                left = ids.reshape(count, -1)
                right = gradient.detach().reshape(*left.shape, -1)
                self._put(names["weight"], _Factors(first, left, right))

            output.register_hook(take)
            return changed

        return hook

    def _take_grad(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            new = parameter.grad.detach().float() / self.scale
            parameter.grad = None
            self._sum(name, self.first, new)
            if self.depth == 0:  # all of its uses are in this one backward pass
                self._finish_sums(name)

        return hook

    def _sum(self, name: str, sample: int, new: Tensor) -> None:
        """Add the gradient of one sample, or where squares are not asked for, of several."""
        sums = self.sums[name]
        if self.second_order and name in self.layout.shared:
            found = sums.by_sample.get(sample)
            sums.by_sample[sample] = new if found is None else found + new
            return
        if self.second_order:
            squared = new.square().mul_(self.samples)
            sums.squared = squared if sums.squared is None else sums.squared.add_(squared)
        sums.gradient = new if sums.gradient is None else sums.gradient.add_(new)

    def _add(self, name: str, first: int, by_sample: Tensor) -> None:
        """Add the gradients of a vector, one for each sample."""
        if not self.second_order:
            self._sum(name, first, by_sample.sum(0) / self.scale)
        else:
            for i, new in enumerate(by_sample):
                self._sum(name, first + i, new / self.scale)
        self.seen[name] += len(by_sample)
        if self.seen[name] == self.samples * self.layout.uses[name]:
            self._finish_sums(name)

    def _put(self, name: str, factors: _Factors) -> None:
        """Keep the factors of a matrix, and visit its gradient when the last are there."""
        self.factors[name].append(factors)
        self.seen[name] += len(factors.left)
        if self.seen[name] == self.samples * self.layout.uses[name]:
            self._finish_factors(name)

    # --- visits -------------------------------------------------------------------------------------------------------

    def _finish_sums(self, name: str) -> None:
        sums = self.sums.pop(name)
        for new in sums.by_sample.values():
            squared = new.square().mul_(self.samples)
            sums.squared = squared if sums.squared is None else sums.squared.add_(squared)
            sums.gradient = new.clone() if sums.gradient is None else sums.gradient.add_(new)
        assert sums.gradient is not None
        weight = self.parameters[name].detach()
        for rows in _row_blocks(weight):
            squared_rows = None if sums.squared is None else sums.squared[rows]
            self.visit(name, rows, weight[rows].float(), sums.gradient[rows], squared_rows)
        self._count(name)

    def _finish_factors(self, name: str) -> None:
        factors = self.factors.pop(name)
        parameter = self.parameters[name].detach()
        for rows in _row_blocks(parameter):
            weight = parameter[rows].float()
            gradient = torch.zeros_like(weight)
            squared = torch.zeros_like(weight) if self.second_order else None
            if squared is None:
                for each in factors:
                    _add_product(gradient, each.left.flatten(0, 1), each.right.flatten(0, 1), rows)
            else:
                own = torch.empty_like(weight)
                for sample in range(self.samples):
                    own.zero_()
                    for each in factors:
                        if 0 <= sample - each.first < len(each.left):
                            _add_product(own, each.left[sample - each.first], each.right[sample - each.first], rows)
                    gradient.add_(own)
                    squared.addcmul_(own, own)
                squared.mul_(self.samples / self.scale**2)
            self.visit(name, rows, weight, gradient.div_(self.scale), squared)
        self._count(name)

    def _count(self, name: str) -> None:
        self.done += self.parameters[name].numel()
        if self.progress is not None:
            self.progress(self.done, sum(parameter.numel() for parameter in self.parameters.values()))


def _by_sample(x: Tensor, samples: int) -> Tensor:
    return x.reshape(samples, -1, x.shape[-1])


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    rows = weight.shape[0]
    at_once = max(1, ROWS_BYTES * rows // max(1, weight.numel() * 4))
    for first in range(0, rows, at_once):
        yield slice(first, min(first + at_once, rows))


def _add_product(total: Tensor, left: Tensor, right: Tensor, rows: slice) -> None:
    """Add left' right to these rows; left may be the numbers of rows instead."""
    if left.is_floating_point():
        total.addmm_(left[:, rows].float().t(), right.float())
    else:
        inside = (left >= rows.start) & (left < rows.stop)
        total.index_add_(0, left[inside] - rows.start, right[inside].float())


# --- a module that is computed again ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Structure:
    """Arguments or results without their tensors."""

    leaves: tuple[Any, ...]
    spec: Any

    @classmethod
    def of(cls, value: Any) -> tuple[_Structure, list[Tensor]]:
        """What is left of a value, and its tensors."""
        leaves, spec = pytree.tree_flatten(value)
        places = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(places, spec), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The value with these tensors."""
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if leaf is Tensor else leaf for leaf in self.leaves], self.spec)


@dataclass(slots=True)
class _Call:
    """One call of such a module; it outlives the pass, so it holds no tensors."""

    owner: _Pass
    path: str
    forward: Callable[..., Any]
    given: _Structure
    chunk: int  # samples at once
    first: int  # sample
    rows: int  # samples
    result: _Structure | None = None

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the result, for these tensors as arguments."""
        args, kwargs = self.given.filled(tensors)
        self.result, results = _Structure.of(self.forward(*args, **kwargs))
        return results

    def part(self, tensor: Tensor, first: int, count: int) -> Tensor:
        """The part of a tensor that belongs to these samples; all of it, where it is the same for all."""
        step = per_sample(tensor, self.rows) if count < self.rows else None
        return tensor if step is None else tensor[first * step : (first + count) * step]


def per_sample(tensor: Tensor, samples: int) -> int | None:
    """How many entries along dimension 0 belong to each sample; None where the tensor is the same for all.

    >>> per_sample(torch.zeros(4, 3), 4), per_sample(torch.zeros(12, 3), 4), per_sample(torch.zeros(1, 3), 4)
    (1, 3, None)
    """
    if tensor.dim() < 2:
        return None
    size = tensor.shape[0]
    return size // samples if size >= samples and size % samples == 0 else None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = call.run(tensors)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        inputs = {id(tensor) for tensor in tensors}
        return tuple(result.view_as(result) if id(result) in inputs else result for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        tensors = ctx.saved_tensors
        needed = [i for i in range(len(tensors)) if ctx.needs_input_grad[i + 2]]
        found: dict[int, Tensor] = {}
        for first in range(0, call.rows, call.chunk):
            count = min(call.chunk, call.rows - first)
            parts = [call.part(tensor, first, count).detach() for tensor in tensors]
            for i in needed:
                parts[i].requires_grad_(True)
            with call.owner.only(call.first + first, count), torch.enable_grad():
                results = call.run(parts)
                pairs = [
                    (result, call.part(gradient, first, count))
                    for result, gradient in zip(results, gradients, strict=True)
                    if gradient is not None and result.requires_grad
                ]
                torch.autograd.backward([result for result, _ in pairs], [gradient for _, gradient in pairs])
            for i in needed:
                new = parts[i].grad
                if new is None:
                    continue
                step = per_sample(tensors[i], call.rows) if count < call.rows else None
                if step is None:
                    found[i] = new if i not in found else found[i] + new
                else:
                    whole = found.setdefault(i, torch.zeros_like(tensors[i]))
                    whole[first * step : (first + count) * step] = new
        call.owner.computed_again(call.path)
        return None, None, *(found.get(i) for i in range(len(tensors)))


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


# --- the probe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tail:
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
        with _replaced_forward(self.base, lambda *_, **__: given):
            result: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return result


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a model uses its parameters."""

    uses: Mapping[str, int]  # how often modules use a parameter in one pass
    homes: Mapping[str, str]  # the path of the module that has a parameter
    shared: frozenset[str]  # parameters that several modules or calls use
    by_autograd: frozenset[str]  # parameters whose gradients are left to autograd
    calls: Mapping[str, int]  # how often modules that are computed again are called in one pass
    one_by_one: frozenset[str]  # of these, those computed again sample by sample, because of such parameters
    alone: frozenset[str]  # modules that treat samples one by one
    whole: bool  # a parameter has no such module around it: the whole model goes sample by sample
    tail: _Tail | None


class _Uses(TorchFunctionMode):
    """Counts the operators that take a parameter and give a tensor."""

    def __init__(self, name_of: Mapping[int, str]) -> None:
        super().__init__()
        self.name_of = name_of
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)):
            for each in pytree.tree_leaves((args, kwargs or {})):
                if isinstance(each, nn.Parameter) and id(each) in self.name_of:
                    self.found[self.name_of[id(each)]] += 1
        return result


def _entrance(model: PreTrainedModel) -> torch.device:
    """Where token ids go in."""
    return next(model.get_input_embeddings().parameters()).device


class _Remembered:
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

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
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


def _two_samples(windows: Tensor) -> Tensor:
    """Two short samples to look at what a model does with them."""
    two = windows[:PROBE_SAMPLES] if len(windows) > 1 else torch.cat([windows, windows.roll(1, 1)])
    return two[:, :PROBE_TOKENS]


@torch.no_grad()
def _probe(
    model: PreTrainedModel,
    windows: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    second_order: bool,
    recomputed: Sequence[str],
) -> _Layout:
    """Pass two short samples through the model, and look at who does what."""
    ids = _two_samples(windows).to(_entrance(model))
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
        logits = model(input_ids=ids, use_cache=False).logits
    by_autograd = {name for name in parameters if name not in factored or uses.found[name] != calls[name]}
    by_autograd |= odd if second_order else set()
    homes = {name: owners[name][0] for name in parameters}
    single = {path for name in by_autograd for path in owners[name]} if second_order else set()
    alone, called = _alone(model, ids, single, recomputed)
    nearest = {home: next((each for each in _ancestors(home) if each in alone), None) for home in single}
    one_by_one = {path for path in nearest.values() if path is not None}
    shared = {name for name in parameters if len(owners[name]) > 1 or calls[name] > 1}
    shared |= {name for name in by_autograd if second_order and called[nearest[homes[name]] or ""] > 1}
    return _Layout(
        uses=calls,
        homes=homes,
        shared=frozenset(shared),
        by_autograd=frozenset(by_autograd),
        calls=called,
        one_by_one=frozenset(one_by_one),
        alone=frozenset(alone),
        whole=None in nearest.values(),
        tail=_tail(model, ids, logits),
    )


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


def _tail(model: PreTrainedModel, ids: Tensor, logits: Tensor) -> _Tail | None:
    """What comes after the base model, where the model can be split there."""
    base = getattr(model, model.base_model_prefix, None)
    if not isinstance(base, nn.Module) or base is model or model.get_output_embeddings() is None:
        return None
    tail = _Tail(model, base)
    try:
        hidden = tail.hidden(ids)
        again, other = tail.logits(hidden, ids), tail.logits(torch.zeros_like(hidden), ids)
    except Exception as error:  # code that is given less than it expects may fail in any way
        logger.debug("%s cannot be split before its head: %s", type(model).__name__, error)
        return None
    same = again.shape == logits.shape and torch.allclose(again.float(), logits.float(), rtol=1e-3, atol=1e-4)
    return tail if same and not torch.equal(other, again) else None  # some models call a part of their base model
