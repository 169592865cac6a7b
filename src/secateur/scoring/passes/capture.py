"""Hooks in a running model -> for each parameter, what its gradient is made of, handed to a visitor at once.

A linear layer y = x W' has the gradient G = d' x, with d the gradient of its output: the hooks take x in the forward
pass and d in the backward pass, as the factors of G. An embedding adds d to the rows that its token ids name. All other
parameters leave their gradients to autograd, whose result is taken from `.grad` at once.
Axes: B samples, T tokens, R rows of a weight (dimension 0), C columns (dimension 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.progress import Progress
from secateur.scoring.passes.probe import Layout, has_product_gradient
from secateur.scoring.passes.recomputation import LayerCache, SampleRange

BACKWARD = 3  # times the work of the forward pass, for the progress bar


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of a weight's gradient for the samples from `first` on: G_RC = sum over B of left_TR' right_TC."""

    first: int
    left: Tensor  # B x T x R; for an embedding, the number of the row that each token looks up, B x T (int64)
    right: Tensor  # B x T x C
    left_is_input: bool = False  # left is x and right d (`Conv1D`, which stores W transposed), not the other way round

    def of_sample(self, sample: int) -> tuple[Tensor, Tensor] | None:
        """The factors of one sample's gradient, T x R and T x C, if it is among these."""
        at = sample - self.first
        return (self.left[at], self.right[at]) if 0 <= at < len(self.left) else None


class GradientVisitor(Protocol):
    """What takes gradients as they come, and makes its visit when all of a parameter's are there."""

    def add_factors(self, name: str, factors: Factors) -> None:
        """Of a matrix."""

    def add_vector(self, name: str, first: int, gradient_BR: Tensor) -> None:
        """Of a bias: one gradient (times the loss scale) for each sample from `first` on."""

    def add_gradient(self, name: str, sample: int, gradient: Tensor) -> None:
        """From autograd, float32: of one sample, or where no squares are asked for, of several."""

    def finish(self, name: str) -> None:
        """All gradients of a parameter are there."""

    def finish_rest(self) -> None:
        """The pass is over."""


class PassProgress:
    """Work that is done, in parameters: once for the forward pass, three times for the backward pass."""

    def __init__(self, parameters: Mapping[str, Tensor], report: Progress | None) -> None:
        self._sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        self._report, self._done = report, 0
        self.finished: set[str] = set()

    def advance(self, work: int) -> None:
        """So much more is done."""
        self._done += work
        if self._report is not None:
            total = (1 + BACKWARD) * sum(self._sizes.values())
            self._report(min(self._done, total), total)

    def finish(self, *names: str) -> None:
        """The backward pass is done with these parameters."""
        for name in names:
            if name not in self.finished:
                self.finished.add(name)
                self.advance(BACKWARD * self._sizes[name])


@dataclass(frozen=True, slots=True)
class PassContext:
    """What hooks and visitors have to know of the pass."""

    parameters: Mapping[str, nn.Parameter]  # those whose gradients are wanted, by name
    layout: Layout
    running: SampleRange  # the samples that are running
    samples: int  # of this process
    all_samples: int  # of all processes
    loss_scale: float  # the loss was multiplied with it, so gradients have to be divided by it
    layer_cache: LayerCache | None
    progress: PassProgress

    def is_cached(self, name: str) -> bool:
        """Whether a weight's results come from the layer cache, so it needs no visit."""
        return self.layer_cache is not None and name in self.layer_cache.finished


class Capture:
    """The hooks of one pass."""

    def __init__(self, context: PassContext, visitor: GradientVisitor) -> None:
        self.context, self.visitor = context, visitor
        self._name_of = {id(parameter): name for name, parameter in context.parameters.items()}
        self._samples_seen: Counter[str] = Counter()  # parameter -> samples, over all of its uses

    def register_hooks(self, model: nn.Module, stack: ExitStack) -> None:
        """Capture the gradients of the model's parameters until the stack is closed."""
        by_autograd = self.context.layout.by_autograd
        for name in by_autograd:
            hook = self.context.parameters[name].register_post_accumulate_grad_hook(partial(self._grad_hook, name))
            stack.callback(hook.remove)
        for module in model.modules():
            own = {key: self._name_of.get(id(parameter)) for key, parameter in module.named_parameters(recurse=False)}
            names = {key: name for key, name in own.items() if name is not None and name not in by_autograd}
            if names and has_product_gradient(module):  # a module around one may hold the same bias
                hook_of = self._embedding_hook if isinstance(module, nn.Embedding) else self._linear_hook
                stack.callback(module.register_forward_hook(partial(hook_of, names)).remove)

    def _linear_hook(self, names: Mapping[str, str], module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None  # a forward pass without a graph: it runs again in the backward pass
        left_is_input = isinstance(module, Conv1D)
        output = output if output.requires_grad else output.detach().requires_grad_(True)
        held, first, samples = [args[0].detach()], self.context.running.first, self.context.running.count

        def take(d: Tensor) -> None:
            x = held.pop()  # autograd keeps this function to the end of the pass
            x_BTC, d_BTR = (each.reshape(samples, -1, each.shape[-1]) for each in (x, d.detach()))
            if "bias" in names:
                self.visitor.add_vector(names["bias"], first, d_BTR.float().sum(1))
                self._count(names["bias"], samples)
            if "weight" in names:
                left, right = (x_BTC, d_BTR) if left_is_input else (d_BTR, x_BTC)
                self.visitor.add_factors(names["weight"], Factors(first, left, right, left_is_input))
                self._count(names["weight"], samples)

        output.register_hook(take)
        return output

    def _embedding_hook(self, names: Mapping[str, str], _: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        ids, first, samples = args[0].detach(), self.context.running.first, self.context.running.count
        if output.shape[0] == 1 < samples:  # the same for every sample, such as positions: each gets its gradient
            ids, output = ids.expand(samples, -1), output.expand(samples, -1, -1)
        output = output if output.requires_grad else output.detach().requires_grad_(True)

        def take(d: Tensor) -> None:
            ids_BT = ids.reshape(samples, -1)
            self.visitor.add_factors(names["weight"], Factors(first, ids_BT, d.detach().reshape(*ids_BT.shape, -1)))
            self._count(names["weight"], samples)

        output.register_hook(take)
        return output

    def _grad_hook(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        running, gradient = self.context.running, parameter.grad.detach().float() / self.context.loss_scale
        parameter.grad = None
        self.visitor.add_gradient(name, running.first, gradient)
        # With all samples in one backward pass, autograd has added up all uses, unless other text has more of them.
        if running.depth == 0 and name not in self.context.layout.conditional:
            self.visitor.finish(name)

    def _count(self, name: str, samples: int) -> None:
        self._samples_seen[name] += samples
        if self._samples_seen[name] == self.context.samples * self.context.layout.uses[name]:
            self.visitor.finish(name)
