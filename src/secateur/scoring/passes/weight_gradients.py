"""Factors of gradients -> each weight's gradient G and mean squared gradient A, a few rows at a time.

G is the gradient of the mean loss over all samples, A the mean over the samples of the square of each one's gradient.
No gradient is held whole: when all factors of a weight are there, some rows of G are multiplied out and shown to the
visit, and their memory is used for the next rows. For A, rows are multiplied out once for every sample. Products are
taken in float32 whatever the dtype of the model: squares of float16 gradients are zero.
Axes: B samples, T tokens, R rows of a weight (dimension 0), C columns (dimension 1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from secateur import processes
from secateur.models.precision import matmul_precision
from secateur.scoring.passes.capture import Factors, PassContext

# Name of a weight, its rows (along dimension 0), and of these rows, all float32: the weight W, its gradient G, and,
# where asked for, A. The tensors are good for as long as the visit lasts.
WeightVisit = Callable[[str, slice, Tensor, Tensor, Tensor | None], None]

ROW_ELEMENTS = 2**21  # of a gradient that are formed at once


@dataclass(slots=True)
class _Sums:
    """What has come so far of a gradient that has no factors: vectors, and what autograd gives."""

    gradient: Tensor | None = None
    squared: Tensor | None = None
    by_sample: dict[int, Tensor] = field(default_factory=dict)  # of tied weights: uses are added, then squared

    def add(self, gradient: Tensor, squared: Tensor | None) -> None:
        """Add a gradient to the sum (kept as it is, so it must be the caller's to give), and its square."""
        if squared is not None:
            self.squared = squared if self.squared is None else self.squared.add_(squared)
        self.gradient = gradient if self.gradient is None else self.gradient.add_(gradient)


class WeightGradients:
    """Takes the gradients of one pass and shows each weight's rows to the visit."""

    def __init__(self, context: PassContext, visit: WeightVisit, *, second_order: bool) -> None:
        self.context, self.second_order, self._visit_rows = context, second_order, visit
        self._factors: dict[str, list[Factors]] = defaultdict(list)
        self._sums: dict[str, _Sums] = defaultdict(_Sums)
        self._buffers: dict[str, Tensor] = {}

    def add_factors(self, name: str, factors: Factors) -> None:
        """Hold the factors of a matrix's gradient until the last are there."""
        self._factors[name].append(factors)

    def add_vector(self, name: str, first: int, gradient_BR: Tensor) -> None:
        """Add the gradients of a bias, one for each sample from `first` on."""
        for i, gradient_R in enumerate(gradient_BR if self.second_order else gradient_BR.sum(0)[None]):
            self.add_gradient(name, first + i, gradient_R / self.context.loss_scale)

    def add_gradient(self, name: str, sample: int, gradient: Tensor) -> None:
        """Add the gradient of one sample, or where squares are not asked for, of several."""
        sums = self._sums[name]
        if self.second_order and name in self.context.layout.tied:
            earlier = sums.by_sample.get(sample)
            sums.by_sample[sample] = gradient if earlier is None else earlier + gradient
            return
        sums.add(gradient, self._squared(gradient) if self.second_order else None)

    def _squared(self, gradient: Tensor) -> Tensor:
        # A sample's gradient is of its own mean loss; here it is of its part of the mean over all samples, 1/n of it.
        # The mean over n samples of (n g)^2 is the sum of n g^2.
        return gradient.square().mul_(self.context.all_samples)

    def finish(self, name: str) -> None:
        """Visit a parameter whose gradients are all there."""
        factors = self._factors.pop(name, None)
        if factors is None:
            self._finish_sums(name)
            return
        if not self.context.is_cached(name):
            with _exact(factors):
                self._multiply_out(name, [replace(each, right=each.right.float()) for each in factors])
        self.context.progress.finish(name)

    def finish_rest(self) -> None:
        """Visit what may be complete only now: tied weights, and experts that other text could have used more."""
        unfinished = self.context.layout.by_autograd - self.context.progress.finished
        for name in [*self._sums] if processes.count() == 1 else sorted(unfinished):  # all processes in one order
            self._finish_sums(name)

    def _finish_sums(self, name: str) -> None:
        sums = self._sums.pop(name, _Sums())
        for gradient in sums.by_sample.values():
            sums.add(gradient.clone(), self._squared(gradient))
        if not processes.largest(int(sums.gradient is not None)):
            return  # the loss does not depend on it
        parameter = self.context.parameters[name].detach()
        for rows in row_blocks(parameter, ROW_ELEMENTS):
            weight = parameter[rows] if sums.gradient is None else parameter[rows].to(sums.gradient.device)
            gradient, squared = (
                torch.zeros_like(weight, dtype=torch.float32) if total is None else total[rows]
                for total in (sums.gradient, sums.squared)
            )
            self._visit(name, rows, weight.float(), gradient, squared if self.second_order else None)
        self.context.progress.finish(name)

    def _multiply_out(self, name: str, factors: list[Factors]) -> None:
        """Form the gradient from its factors, block by block of its rows, and visit each block."""
        parameter = self.context.parameters[name].detach()
        for rows in row_blocks(parameter, ROW_ELEMENTS):
            weight_RC = parameter[rows].float().to(factors[0].right.device)
            gradient_RC, squared_RC = self._buffer("gradient", weight_RC), None
            if self.second_order:
                squared_RC = self._buffer("squared", weight_RC)
                self._multiply_samples(gradient_RC, squared_RC, factors, rows)
            else:
                gradient_RC.zero_()
                for each in factors:  # all samples in one product: the sum over tokens is a sum over samples, too
                    _add_product(gradient_RC, each.left.flatten(0, 1), each.right.flatten(0, 1), rows)
            if self.context.loss_scale != 1:
                gradient_RC.div_(self.context.loss_scale)
            self._visit(name, rows, weight_RC, gradient_RC, squared_RC)

    def _multiply_samples(self, gradient_RC: Tensor, squared_RC: Tensor, factors: list[Factors], rows: slice) -> None:
        """Write into the first two tensors the sum of the samples' gradients and the mean of their squares."""
        own_RC = self._buffer("own", gradient_RC)
        for sample in range(self.context.samples):
            of_sample = [pair for each in factors if (pair := each.of_sample(sample)) is not None]
            if sample == 0:
                _set_product(gradient_RC, of_sample, rows)
                torch.mul(gradient_RC, gradient_RC, out=squared_RC)
            else:
                _set_product(own_RC, of_sample, rows)
                gradient_RC.add_(own_RC)
                squared_RC.addcmul_(own_RC, own_RC)
        squared_RC.mul_(self.context.all_samples / self.context.loss_scale**2)

    def _buffer(self, purpose: str, like: Tensor) -> Tensor:
        """Memory for rows of a gradient, used again: to get new memory would take as long as the product."""
        key = f"{purpose} {like.device}"
        if key not in self._buffers or self._buffers[key].numel() < like.numel():
            self._buffers[key] = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
        return self._buffers[key][: like.numel()].view(like.shape)

    def _visit(self, name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        if self.context.is_cached(name):
            return
        if processes.count() > 1:
            gradient = gradient.contiguous()
            processes.add_up(gradient, *([] if squared is None else [squared]))
        self._visit_rows(name, rows, weight, gradient, squared)


def row_blocks(weight: Tensor, elements: int) -> Iterator[slice]:
    """The rows of a weight, so many at a time that they have at most that many elements; none of a scalar.

    >>> list(row_blocks(torch.zeros(3, 2), 4))
    [slice(0, 2, None), slice(2, 3, None)]
    """
    rows = weight.shape[0] if weight.dim() else 0
    at_once = max(1, elements * rows // max(1, weight.numel()))
    for first in range(0, rows, at_once):
        yield slice(first, min(first + at_once, rows))


def _exact(factors: Sequence[Factors]) -> AbstractContextManager[None]:
    """While open, products of these factors are exact to float32, on the fastest units that give that."""
    all_bfloat16 = all(x.dtype == torch.bfloat16 for each in factors for x in (each.left, each.right))
    return matmul_precision(exact=not all_bfloat16)


def _set_product(total_RC: Tensor, factors: Sequence[tuple[Tensor, Tensor]], rows: slice) -> None:
    """Write the sum over the factors of left' right, of these rows."""
    if len(factors) == 1 and factors[0][0].is_floating_point():
        left_TR, right_TC = factors[0]
        torch.mm(left_TR[:, rows].float().t(), right_TC, out=total_RC)
        return
    total_RC.zero_()
    for left, right_TC in factors:
        _add_product(total_RC, left, right_TC, rows)


def _add_product(total_RC: Tensor, left: Tensor, right_TC: Tensor, rows: slice) -> None:
    """Add left' right, of these rows; left is T x R, or for an embedding the row that each token looks up, T."""
    if left.is_floating_point():
        total_RC.addmm_(left[:, rows].float().t(), right_TC)
    else:
        inside_T = (left >= rows.start) & (left < rows.stop)
        total_RC.index_add_(0, left[inside_T] - rows.start, right_TC[inside_T])
