"""Factors of gradients -> derivatives of the loss by masks over what each weight reads, span by span of each sample.

A mask m (a factor for each channel) multiplies the inputs x of a product y = (m x) W' at the tokens of one span. At
m = 1 its derivative is the sum over these tokens of x times (d W), the gradient by x, with d the gradient by y. No
gradient of W is formed. Where only autograd's gradient G of a whole weight is known (stacked experts), the derivative
by one mask over the whole sample is the sum of W G over the weight's other dimensions; it stands in the first span.
Axes: B samples, T tokens, P spans of a sample, R rows of a weight (dimension 0), C columns (dimension 1), S the size of
any one dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from secateur import processes
from secateur.scoring.passes.capture import Factors, PassContext

# Name of a weight, one of its dimensions, and B x P x S, float32: derivatives of the mean loss by a mask over the
# weight along that dimension, at each span of each sample.
MaskVisit = Callable[[str, int, Tensor], None]


class MaskGradients:
    """Takes the gradients of one pass and shows the derivatives by masks to the visit."""

    def __init__(self, context: PassContext, visit: MaskVisit, spans: int) -> None:
        self.context, self._visit, self.spans = context, visit, spans
        self._derivatives: dict[str, dict[int, Tensor]] = defaultdict(dict)  # weight -> dimension -> B x P x S

    def add_factors(self, name: str, factors: Factors) -> None:
        """Add the derivatives by the inputs of a product, for some samples; an embedding has no inputs."""
        if not factors.left.is_floating_point() or self.context.is_cached(name):
            return
        weight_RC = self.context.parameters[name].detach()
        if factors.left_is_input:
            dim, x, gradient = 0, factors.left, factors.right.to(weight_RC.dtype) @ weight_RC.t()
        else:
            dim, x, gradient = 1, factors.right, factors.left.to(weight_RC.dtype) @ weight_RC
        by_token_BTS = (gradient.float() * x.float()).div_(self.context.loss_scale)
        by_span = [part.sum(1) for part in by_token_BTS.tensor_split(self.spans, dim=1)]
        self._add(name, dim, factors.first, torch.stack(by_span, dim=1))

    def add_vector(self, name: str, first: int, gradient_BR: Tensor) -> None:
        """A bias reads nothing."""

    def add_gradient(self, name: str, sample: int, gradient: Tensor) -> None:
        """Add the derivatives of one sample along every dimension of a weight, from its gradient."""
        if gradient.dim() < 2 or self.context.is_cached(name):
            return
        terms = self.context.parameters[name].detach().float() * gradient
        for dim in range(terms.dim()):
            others = [other for other in range(terms.dim()) if other != dim]
            self._add(name, dim, sample, terms.sum(others)[None, None])

    def _add(self, name: str, dim: int, first: int, derivatives_BPS: Tensor) -> None:
        """Add derivatives at the first spans of some samples."""
        if dim not in self._derivatives[name]:
            size = derivatives_BPS.shape[-1]
            self._derivatives[name][dim] = derivatives_BPS.new_zeros(self.context.samples, self.spans, size)
        samples, spans = derivatives_BPS.shape[:2]
        self._derivatives[name][dim][first : first + samples, :spans] += derivatives_BPS

    def finish(self, name: str) -> None:
        """Visit a weight whose derivatives are all there; of several processes, each has to wait for the others."""
        self.context.progress.finish(name)
        if processes.count() == 1 and not self.context.is_cached(name):
            for dim, derivatives_BPS in sorted(self._derivatives.pop(name, {}).items()):
                self._visit(name, dim, derivatives_BPS)

    def finish_rest(self) -> None:
        """Visit what is left; of several processes, all weights, with the samples in the order of all windows."""
        for name, parameter in self.context.parameters.items():
            for dim, size in enumerate(parameter.shape):
                own_BPS = self._derivatives[name].get(dim)
                if not processes.largest(int(own_BPS is not None)):
                    continue
                all_BPS = torch.zeros(self.context.all_samples, self.spans, size, device=parameter.device)
                if own_BPS is not None:
                    all_BPS[processes.rank() :: processes.count()] = own_BPS
                processes.add_up(all_BPS)
                self._visit(name, dim, all_BPS)
