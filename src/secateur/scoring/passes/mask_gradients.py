"""Factors of gradients -> derivatives of the loss by masks over what each weight reads, sample by sample.

A mask m (a factor for each channel) multiplies the inputs x of a product y = (m x) W'. At m = 1 its derivative is the
sum over the tokens of x times (d W), the gradient by x, with d the gradient by y. No gradient of W is formed. Where
only autograd's gradient G of a whole weight is known (stacked experts), the same is the sum of W G over the weight's
other dimensions.
Axes: B samples, T tokens, R rows of a weight (dimension 0), C columns (dimension 1), S the size of any one dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from secateur import processes
from secateur.scoring.passes.capture import Factors, PassContext

# Name of a weight, one of its dimensions, and B x S, float32: each sample's derivatives of the mean loss by a mask over
# the weight along that dimension.
MaskVisit = Callable[[str, int, Tensor], None]


class MaskGradients:
    """Takes the gradients of one pass and shows the derivatives by masks to the visit."""

    def __init__(self, context: PassContext, visit: MaskVisit) -> None:
        self.context, self._visit = context, visit
        self._derivatives: dict[str, dict[int, Tensor]] = defaultdict(dict)  # weight -> dimension -> B x S

    def add_factors(self, name: str, factors: Factors) -> None:
        """Add the derivatives by the inputs of a product, for some samples; an embedding has no inputs."""
        if not factors.left.is_floating_point() or self.context.is_cached(name):
            return
        weight_RC = self.context.parameters[name].detach()
        if factors.left_is_input:
            dim, x, gradient = 0, factors.left, factors.right.to(weight_RC.dtype) @ weight_RC.t()
        else:
            dim, x, gradient = 1, factors.right, factors.left.to(weight_RC.dtype) @ weight_RC
        self._add(name, dim, factors.first, (gradient.float() * x.float()).sum(1) / self.context.loss_scale)

    def add_vector(self, name: str, first: int, gradient_BR: Tensor) -> None:
        """A bias reads nothing."""

    def add_gradient(self, name: str, sample: int, gradient: Tensor) -> None:
        """Add the derivatives of one sample along every dimension of a weight, from its gradient."""
        if gradient.dim() < 2 or self.context.is_cached(name):
            return
        terms = self.context.parameters[name].detach().float() * gradient
        for dim in range(terms.dim()):
            others = [other for other in range(terms.dim()) if other != dim]
            self._add(name, dim, sample, terms.sum(others)[None])

    def _add(self, name: str, dim: int, first: int, derivatives_BS: Tensor) -> None:
        if dim not in self._derivatives[name]:
            self._derivatives[name][dim] = derivatives_BS.new_zeros(self.context.samples, derivatives_BS.shape[-1])
        self._derivatives[name][dim][first : first + len(derivatives_BS)] += derivatives_BS

    def finish(self, name: str) -> None:
        """Visit a weight whose derivatives are all there; of several processes, each has to wait for the others."""
        self.context.progress.finish(name)
        if processes.count() == 1 and not self.context.is_cached(name):
            for dim, derivatives_BS in sorted(self._derivatives.pop(name, {}).items()):
                self._visit(name, dim, derivatives_BS)

    def finish_rest(self) -> None:
        """Visit what is left; of several processes, all weights, with the samples in the order of all windows."""
        for name, parameter in self.context.parameters.items():
            for dim, size in enumerate(parameter.shape):
                own_BS = self._derivatives[name].get(dim)
                if not processes.largest(int(own_BS is not None)):
                    continue
                all_BS = torch.zeros(self.context.all_samples, size, device=parameter.device)
                if own_BS is not None:
                    all_BS[processes.rank() :: processes.count()] = own_BS
                processes.add_up(all_BS)
                self._visit(name, dim, all_BS)
