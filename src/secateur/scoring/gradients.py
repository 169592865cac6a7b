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

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur import processes
from secateur.errors import ScoreError
from secateur.progress import Progress
from secateur.scoring.probe import entrance, per_sample, probe, replaced_forward

# Name of a weight, its rows (along dimension 0), and of these rows, all float32: the weight W, its gradient G of the
# mean loss, and, where asked for, A, the mean over the samples of the square of each one's gradient. They are good for
# as long as the visit lasts.
Visit = Callable[[str, slice, Tensor, Tensor, Tensor | None], None]

# Name of a weight, one of its dimensions, and samples x size, float32: how fast each sample's part of the mean loss
# changes with a mask (a factor of 1) over the weight along that dimension.
MaskVisit = Callable[[str, int, Tensor], None]

ROWS_BYTES = 2**23  # of the rows of a gradient that are formed at once
RECOMPUTED_TOKENS = 2048  # of a layer that is computed again at once
LOGITS_BYTES = 2**25  # of the logits that are held at once
BACKWARD = 3  # times the work of the forward pass, for the progress bar
LOSS_ROWS = 64  # of logits that are made probabilities at once
NO_LABEL = -100
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
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> float:
    """Visit the gradient of the mean cross-entropy over the windows for every parameter wanted (by default, each).

    Windows are int64, samples x length; their labels are themselves. `recomputed` names modules (layers) that are
    computed again in the backward pass instead of being remembered, except the last ones of them, of which all that
    is remembered takes no more than `memory` bytes. With a journal, every layer that has been computed is written to it
    or read from it, and none is remembered. Where several processes run this (see `processes`), each takes its share of
    the windows, and all visit the gradients over all of them. Returns the loss in nats per token. Parameters that the
    loss does not depend on are not visited. Raises `ScoreError` when the loss is NaN or Inf.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, largest = AutoModelForCausalLM.from_config(config), {}
    >>> def visit(name, rows, weight, gradient, squared):
    ...     largest[name] = max(largest.get(name, 0.0), gradient.abs().max().item())
    >>> loss = stream_gradients(model, torch.arange(20).reshape(2, 10), visit)
    >>> largest["model.decoder.layers.0.fc1.weight"] > 0
    True
    """
    _check_there(model)
    names = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    chosen = names if wanted is None else names & set(wanted)
    memory = memory if journal is None else 0
    return _Pass(model, windows, visit, chosen, second_order, recomputed, memory, journal, progress).run()


def stream_masks(
    model: PreTrainedModel,
    windows: Tensor,
    visit: MaskVisit,
    *,
    wanted: Sequence[str] | None = None,
    recomputed: Sequence[str] = (),
    memory: int = 0,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> float:
    """Visit the derivatives by masks over what each weight wanted reads, sample by sample.

    A mask m multiplies the inputs x of a product with the weight W; at m = 1 its derivative is the sum over the tokens
    of x times the gradient by x, which is also the sum of W times its gradient over the other dimensions. Weights of
    linear layers are visited along the dimension that reads, and no gradient of theirs is formed; those whose gradients
    autograd has to form (stacked experts) along every dimension. All else is as in `stream_gradients`.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, seen = AutoModelForCausalLM.from_config(config), {}
    >>> def visit(name, dim, derivatives):
    ...     seen[name, dim] = tuple(derivatives.shape)
    >>> loss = stream_masks(model, torch.arange(20).reshape(2, 10), visit)
    >>> seen["model.decoder.layers.0.fc2.weight", 1]
    (2, 24)
    """
    _check_there(model)
    names = {name for name, p in model.named_parameters() if p.is_floating_point() and p.dim() > 1}
    chosen = names if wanted is None else names & set(wanted)

    def nothing(name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        del name, rows, weight, gradient, squared

    memory = memory if journal is None else 0
    return _Pass(model, windows, nothing, chosen, True, recomputed, memory, journal, progress, masks=visit).run()


def _check_there(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ScoreError(
                f"the weight {name} is not there (it is on meta, as accelerate leaves those it offloads). Load the "
                "model on the CPU, where weights are read from the disk as they are used: --device cpu"
            )


class Journal(Protocol):
    """What a pass has done so far, kept so that one that was killed can go on."""

    @property
    def finished(self) -> Collection[str]:
        """Weights that need no visit any more."""

    def read(self, key: str) -> tuple[list[Tensor], str] | None:
        """The tensors written under a key, and what was said of them."""

    def write(self, key: str, tensors: Sequence[Tensor], about: str) -> None:
        """Keep these tensors, and with them what all visits since the last time have led to."""


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
    turned: bool = False  # left are the inputs, right the gradients of the outputs

    def of_sample(self, sample: int) -> tuple[Tensor, Tensor] | None:
        """The factors of one sample's gradient, if they are among these."""
        at = sample - self.first
        return (self.left[at], self.right[at]) if 0 <= at < len(self.left) else None


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
        journal: Journal | None,
        progress: Progress | None,
        masks: MaskVisit | None = None,
    ) -> None:
        self.masks = masks
        self.by_mask: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.model, self.visit, self.second_order, self.journal = model, visit, second_order, journal
        self.windows = processes.share_of(windows)
        self.samples, self.length = self.windows.shape  # of this process
        self.all_samples = len(windows)
        self.progress, self.layers, self.memory = progress, tuple(recomputed), memory
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
        self.visited: set[str] = set()
        self.scratch: dict[str, Tensor] = {}
        self.numbered = 0  # calls of modules that are computed again, so far

    def run(self) -> float:
        """Probe, pass forward and backward, and visit."""
        before = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        with ExitStack() as stack, torch.enable_grad():
            stack.callback(self._restore, before)
            first = id(self.model.get_input_embeddings().weight)
            for parameter in self.model.parameters():
                parameter.requires_grad_(id(parameter) in self.name_of or id(parameter) == first)
            self.layout = probe(
                self.model,
                self.windows,
                self.parameters,
                second_order=self.second_order,
                layers=self.layers,
                memory=self.memory,
            )
            self.calls = Counter(self.layout.calls)
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for name in self.layout.by_autograd:
                self.parameters[name].requires_grad_(True)
                hook = self.parameters[name].register_post_accumulate_grad_hook(self._take_grad(name))
                stack.callback(hook.remove)
            for module in self.model.modules():
                names = {attr: name for attr, name in self._own(module) if name not in self.layout.by_autograd}
                if names:
                    take = self._take_lookup if isinstance(module, nn.Embedding) else self._take_product
                    stack.callback(module.register_forward_hook(take(module, names)).remove)
            for path in self.layers:
                hook = self.model.get_submodule(path).register_forward_hook(self._passed(path))
                stack.callback(hook.remove)
            for path, module in self.model.named_modules():
                chunk = self._chunk_of(path)
                if chunk is not None:
                    stack.enter_context(replaced_forward(module, self._recomputing(module, path, chunk)))
            loss = torch.tensor(self._passes(), dtype=torch.float64)
            if self.layout.tail is not None:
                self.layout.tail.given.clear()  # through which the graph would hold itself
            processes.add_up(loss)
            if self.masks is not None:
                self._finish_masks()
                return float(loss)
            for name in [*self.sums] if processes.count() == 1 else sorted(self.layout.by_autograd - self.visited):
                self._finish_sums(name)
        return float(loss)

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
        if path in self.layout.recomputed:
            return max(1, RECOMPUTED_TOKENS // self.length) if path in self.layout.alone else self.samples
        return None

    # --- the passes -------------------------------------------------------------------------------------------------

    def _passes(self) -> float:
        """The forward pass, the loss a few samples at a time, and the backward pass."""
        ids = self.windows.to(entrance(self.model))
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
        labels = functional.pad(ids[:, 1:], (0, 1), value=NO_LABEL).flatten().to(logits.device)
        weight = self.scale / ((self.length - 1) * self.all_samples)
        nll: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), labels, weight)  # type: ignore[no-untyped-call]
        if not torch.isfinite(nll) and processes.count() == 1:  # of several, all meet it in the gradients
            raise ScoreError(
                f"the loss on the calibration text is {float(nll.detach())}: the model's outputs are not finite. Check "
                "the weights, or use dtype float32 or bfloat16"
            )
        return nll

    # --- modules that are computed again ------------------------------------------------------------------------------

    def _recomputing(self, module: nn.Module, path: str, chunk: int) -> Callable[..., Any]:
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            given, tensors = _Structure.of((args, kwargs))
            number = None
            if self.depth == 0 and self.journal is not None and path in self.layout.recomputed:
                number, self.numbered = self.numbered, self.numbered + 1
            call = _Call(self, path, forward, given, chunk, self.first, self.piece, number)
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
            begun = self.sums if self.masks is None else self.by_mask
            within = [name for name in begun if f"{self.layout.homes[name]}.".startswith(f"{path}.")]
            for name in within:
                if name in self.layout.by_autograd - self.layout.uncertain and name not in self.layout.shared:
                    self._finish_sums(name)

    def passed_over(self, path: str) -> None:
        """A module was done before this pass began."""
        self.calls[path] -= 1
        for parameter in self.model.get_submodule(path).parameters():
            if id(parameter) in self.name_of:
                self._count(self.name_of[id(parameter)])

    def may_skip(self, path: str) -> bool:
        """Whether the backward pass of a module whose gradients are known gives nothing that is needed elsewhere."""
        inside = {self.name_of.get(id(parameter)) for parameter in self.model.get_submodule(path).parameters()}
        return not inside & self.layout.shared

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

            def take(gradient: Tensor) -> None:
                x = held.pop()  # autograd keeps this function to the end of the pass
                d = _by_sample(gradient.detach(), count)
                if "bias" in names:
                    self._add(names["bias"], first, d.float().sum(1))
                if "weight" in names:
                    inputs = _by_sample(x, count)
                    left, right = (inputs, d) if turned else (d, inputs)
                    self._put(names["weight"], _Factors(first, left, right, turned))

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
            if self.depth == 0 and name not in self.layout.uncertain:  # all of its uses are in this one backward pass
                self._finish_sums(name)

        return hook

    def _sum(self, name: str, sample: int, new: Tensor) -> None:
        """Add the gradient of one sample, or where squares are not asked for, of several."""
        if self.masks is not None:
            if new.dim() > 1 and not self._is_finished(name):
                terms = self.parameters[name].detach().float() * new
                for dim in range(new.dim()):
                    self._add_masks(name, dim, sample, terms.sum([d for d in range(new.dim()) if d != dim])[None])
            return
        sums = self.sums[name]
        if self.second_order and name in self.layout.shared:
            found = sums.by_sample.get(sample)
            sums.by_sample[sample] = new if found is None else found + new
            return
        if self.second_order:
            squared = new.square().mul_(self.all_samples)
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
        if self.masks is not None:
            self._finish_masks_of(name)
            return
        sums = self.sums.pop(name, _Sums())
        for new in sums.by_sample.values():
            squared = new.square().mul_(self.all_samples)
            sums.squared = squared if sums.squared is None else sums.squared.add_(squared)
            sums.gradient = new.clone() if sums.gradient is None else sums.gradient.add_(new)
        if not processes.largest(int(sums.gradient is not None)):
            return  # the loss does not depend on it
        weight = self.parameters[name].detach()
        for rows in _row_blocks(weight):
            gradient, squared_rows = (
                torch.zeros_like(weight[rows], dtype=torch.float32) if found is None else found[rows]
                for found in (sums.gradient, sums.squared)
            )
            self._visit(name, rows, weight[rows].float(), gradient, squared_rows if self.second_order else None)
        self._count(name)

    def _finish_factors(self, name: str) -> None:
        given = self.factors.pop(name)
        if self.masks is not None:
            for each in given:
                if each.left.is_floating_point() and not self._is_finished(name):
                    self._masks_of(name, each)
            self._finish_masks_of(name)
            return
        if not self._is_finished(name):
            with _exact_products(given):
                self._visit_products(name, [replace(each, right=each.right.float()) for each in given])
        self._count(name)

    def _masks_of(self, name: str, factors: _Factors) -> None:
        """The derivatives by masks over the inputs of a product, for some samples."""
        inputs, outer = (factors.left, factors.right) if factors.turned else (factors.right, factors.left)
        weight = self.parameters[name].detach()
        found = outer.to(weight.dtype) @ (weight.t() if factors.turned else weight)
        self._add_masks(
            name, 0 if factors.turned else 1, factors.first, (found.float() * inputs.float()).sum(1) / self.scale
        )

    def _add_masks(self, name: str, dim: int, first: int, derivatives: Tensor) -> None:
        if dim not in self.by_mask[name]:
            self.by_mask[name][dim] = derivatives.new_zeros(self.samples, derivatives.shape[-1])
        self.by_mask[name][dim][first : first + len(derivatives)] += derivatives

    def _finish_masks_of(self, name: str) -> None:
        """Visit a weight of which all is known; of several processes, all do so at the end."""
        self._count(name)
        if self.masks is not None and processes.count() == 1 and not self._is_finished(name):
            for dim, derivatives in sorted(self.by_mask.pop(name, {}).items()):
                self.masks(name, dim, derivatives)

    def _finish_masks(self) -> None:
        """Visit what all processes have, in the order of all windows."""
        assert self.masks is not None
        for name, parameter in self.parameters.items():
            for dim, size in enumerate(parameter.shape):
                mine = self.by_mask[name].get(dim)
                if not processes.largest(int(mine is not None)):
                    continue
                every = torch.zeros(self.all_samples, size, device=parameter.device)
                if mine is not None:
                    every[processes.rank() :: processes.count()] = mine
                processes.add_up(every)
                self.masks(name, dim, every)

    def _visit_products(self, name: str, factors: Sequence[_Factors]) -> None:
        parameter = self.parameters[name].detach()
        for rows in _row_blocks(parameter):
            weight = parameter[rows].float()
            squared = None
            gradient = self._scratch("gradient", weight)
            if not self.second_order:
                gradient.zero_()
                for each in factors:
                    _add_product(gradient, each.left.flatten(0, 1), each.right.flatten(0, 1), rows)
            else:
                squared, own = self._scratch("squared", weight), self._scratch("own", weight)
                for sample in range(self.samples):
                    of_sample = [each.of_sample(sample) for each in factors]
                    _set_product(own if sample else gradient, [each for each in of_sample if each is not None], rows)
                    if sample:
                        gradient.add_(own)
                        squared.addcmul_(own, own)
                    else:
                        torch.mul(gradient, gradient, out=squared)
                squared.mul_(self.all_samples / self.scale**2)
            if self.scale != 1:
                gradient.div_(self.scale)
            self._visit(name, rows, weight, gradient, squared)

    def _scratch(self, what: str, like: Tensor) -> Tensor:
        """Room for rows of a gradient; memory that is new for each would take as long to get as the gradient."""
        key = f"{what} {like.device}"
        if key not in self.scratch or self.scratch[key].numel() < like.numel():
            self.scratch[key] = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
        return self.scratch[key][: like.numel()].view(like.shape)

    def _is_finished(self, name: str) -> bool:
        return self.journal is not None and name in self.journal.finished

    def _visit(self, name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        if self._is_finished(name):
            return
        if processes.count() > 1:
            gradient = gradient.contiguous()
            processes.add_up(gradient, *([] if squared is None else [squared]))
        self.visit(name, rows, weight, gradient, squared)

    def _count(self, name: str) -> None:
        if name in self.visited:
            return
        self.visited.add(name)
        self._advance(BACKWARD * self.parameters[name].numel())

    def _passed(self, path: str) -> Callable[..., None]:
        size = sum(p.numel() for p in self.model.get_submodule(path).parameters() if id(p) in self.name_of)

        def hook(*_: Any) -> None:
            if self.depth == 0:
                self._advance(size)

        return hook

    def _advance(self, work: int) -> None:
        self.done += work
        if self.progress is not None:
            total = (1 + BACKWARD) * sum(parameter.numel() for parameter in self.parameters.values())
            self.progress(min(self.done, total), total)


def _by_sample(x: Tensor, samples: int) -> Tensor:
    return x.reshape(samples, -1, x.shape[-1])


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    rows = weight.shape[0]
    at_once = max(1, ROWS_BYTES * rows // max(1, weight.numel() * 4))
    for first in range(0, rows, at_once):
        yield slice(first, min(first + at_once, rows))


@contextmanager
def _exact_products(factors: Sequence[_Factors]) -> Iterator[None]:
    """While open, products of these factors are taken in float32, as fast as may be.

    The products of two bfloat16 numbers are exact whether the units take float32 or bfloat16, and are added up in
    float32 by both; units of bfloat16 are faster.
    """
    before = torch.get_float32_matmul_precision()
    halves = all(x.dtype == torch.bfloat16 for each in factors for x in (each.left, each.right))
    torch.set_float32_matmul_precision("medium" if halves else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _set_product(total: Tensor, factors: Sequence[tuple[Tensor, Tensor]], rows: slice) -> None:
    """Write the sum of the products' rows."""
    if len(factors) == 1 and factors[0][0].is_floating_point():
        left, right = factors[0]
        torch.mm(left[:, rows].float().t(), right, out=total)
        return
    total.zero_()
    for left, right in factors:
        _add_product(total, left, right, rows)


def _add_product(total: Tensor, left: Tensor, right: Tensor, rows: slice) -> None:
    """Add left' right to these rows; left may be the numbers of rows instead."""
    if left.is_floating_point():
        total.addmm_(left[:, rows].float().t(), right)
    else:
        inside = (left >= rows.start) & (left < rows.stop)
        total.index_add_(0, left[inside] - rows.start, right[inside])


class _CrossEntropy(torch.autograd.Function):
    """The sum of the labelled rows' cross-entropies, times a weight; beside the logits, only their gradient is held."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weight: float) -> Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float64)
        for first in range(0, len(logits), LOSS_ROWS):
            rows = slice(first, min(first + LOSS_ROWS, len(logits)))
            labelled = (labels[rows] != NO_LABEL)[:, None]
            mine = labels[rows, None].clamp_min(0)
            share = torch.log_softmax(logits[rows].float(), -1)
            total -= share.gather(1, mine).where(labelled, 0).sum().double().cpu()
            share.exp_().scatter_add_(1, mine, torch.full_like(mine, -1, dtype=share.dtype))
            gradient[rows] = share.mul_(labelled * weight)
        ctx.save_for_backward(gradient)
        return (total * weight).to(logits.device)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None, None  # the loss is where the backward pass begins: `outer` is 1


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

    def dumped(self) -> str | None:
        """As a line of text; None where there is more in it than tensors and nothing."""
        if any(leaf is not Tensor and leaf is not None for leaf in self.leaves):
            return None
        return json.dumps([[leaf is Tensor for leaf in self.leaves], pytree.treespec_dumps(self.spec)])

    @classmethod
    def loaded(cls, text: str) -> _Structure:
        """Read back what `dumped` gave."""
        tensors, spec = json.loads(text)
        return cls(tuple(Tensor if is_tensor else None for is_tensor in tensors), pytree.treespec_loads(spec))

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
    number: int | None = None  # of the call, where it is written to a journal
    result: _Structure | None = None

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the result, for these tensors as arguments."""
        args, kwargs = self.given.filled(tensors)
        self.result, results = _Structure.of(self.forward(*args, **kwargs))
        return results

    def kept(self, stage: str) -> list[Tensor] | None:
        """What the journal has of this call's stage, forward or backward."""
        journal = self.owner.journal
        found = None if journal is None or self.number is None else journal.read(f"{stage}/{self.number}")
        if found is None:
            return None
        tensors, about = found
        if stage == "forward":
            self.result = _Structure.loaded(about)
        return tensors

    def keep(self, stage: str, tensors: Sequence[Tensor], about: str | None) -> None:
        """Write a stage of this call to the journal, if there is one."""
        if self.owner.journal is not None and self.number is not None and about is not None:
            self.owner.journal.write(f"{stage}/{self.number}", tensors, about)

    def part(self, tensor: Tensor, first: int, count: int) -> Tensor:
        """The part of a tensor that belongs to these samples; all of it, where it is the same for all."""
        step = per_sample(tensor, self.rows) if count < self.rows else None
        return tensor if step is None else tensor[first * step : (first + count) * step]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = call.kept("forward")
        if results is None:
            results = call.run(tensors)
            assert call.result is not None
            call.keep("forward", results, call.result.dumped())
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
        kept = call.kept("backward") if call.owner.may_skip(call.path) else None
        if kept is not None:
            call.owner.passed_over(call.path)
            given = dict(zip(needed, kept, strict=True))
            return None, None, *(given.get(i) for i in range(len(tensors)))
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
        if all(i in found for i in needed):
            call.keep("backward", [found[i] for i in needed], "")
        return None, None, *(found.get(i) for i in range(len(tensors)))
