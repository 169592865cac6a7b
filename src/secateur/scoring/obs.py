"""Inputs of a matrix -> Gram matrix -> which inputs to leave out, and how the others make up for them in closed form.

Optimal brain surgeon for whole units (Hassibi and Stork 1992; for units of language models ZipLM, arXiv 2302.04089): a
matrix W reads features x with the Gram matrix H = sum of x x'. To leave out the columns S at the least squared error of
the outputs costs tr(W_S ((H^-1)_SS)^-1 W_S'), when all other columns change by -W_S ((H^-1)_SS)^-1 (H^-1)_S. A damping
d on the diagonal of H holds these changes back; that of W_S itself is none, so its d tr(W_S W_S') is not counted.

All in float64, but for the Gram matrix of a repair, which solves a well-damped system: float32 is exact enough for it,
at half the memory and a fraction of the time. Scores divide by entries of an inverse, which with fewer tokens than
columns would show float32's rounding. Axes: N tokens, R rows (outputs), C columns (inputs), S the columns of one unit,
K the columns that are kept, U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.models.precision import matmul_precision

DAMPING = 0.01  # of the mean of a Gram matrix's diagonal, added to it, as GPTQ does (arXiv 2210.17323)
UNITS_AT_ONCE = 1 / 64  # of the units that are left, removed between two updates
TOKENS_AT_ONCE = 2048  # that are converted to the dtype of the sum
STRIP = 256  # columns of a Gram matrix that are computed at once


def add_gram(total_CC: Tensor, x_NC: Tensor) -> None:
    """Add X'X to `total_CC` in place, on and below the diagonal alone (`fill_above` does the rest), in its dtype.

    Where x is bfloat16 and the total float32, products are exact, and processors with such units take them twice as
    fast.

    >>> total_CC = torch.zeros(2, 2)
    >>> add_gram(total_CC, torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> fill_above(total_CC)
    >>> total_CC.tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    columns = x_NC.shape[1]
    with matmul_precision(exact=x_NC.dtype != torch.bfloat16):
        for part_NC in x_NC.split(TOKENS_AT_ONCE):
            part_NC = part_NC.to(total_CC.dtype)
            for first in range(0, columns, STRIP):
                strip = slice(first, first + STRIP)
                total_CC[first:, strip].addmm_(part_NC[:, first:].t(), part_NC[:, strip])


def fill_above(total_CC: Tensor) -> None:
    """Copy what is below the diagonal to above it, in place."""
    for first in range(0, len(total_CC), STRIP):
        strip = slice(first, first + STRIP)
        square = total_CC[strip, strip]
        square.copy_(square.tril() + square.tril(-1).t())
        total_CC[strip, first + STRIP :] = total_CC[first + STRIP :, strip].t()


def gram_dtype(x_NC: Tensor) -> torch.dtype:
    """In which to add up a Gram matrix that a well-damped system is solved with: float64 where x is, else float32."""
    return torch.promote_types(x_NC.dtype, torch.float32)


def unit_costs(w_RC: Tensor, gram_CC: Tensor, unit_of: Tensor, *, damping: float = DAMPING) -> Tensor:
    """What it costs to leave out each unit alone: float64, one number per unit, in squares of the output.

    With damping, the error and the damping times the squared changes of the others. `unit_of` (int64) names the unit of
    each column, -1 for none.

    >>> unit_costs(torch.tensor([[3.0, 4.0]]), torch.eye(2), torch.tensor([0, 1]), damping=0.0).tolist()
    [9.0, 16.0]
    """
    w_RC, inverse_CC, columns = _of_units(w_RC, gram_CC, unit_of, damping)
    not_counted_U = _ridge(gram_CC.diagonal().mean(), damping) * _squares(w_RC, columns)
    return _costs(w_RC, inverse_CC, columns, _single_columns(columns)) - not_counted_U


def removal_costs(
    w_RC: Tensor, gram_CC: Tensor, unit_of: Tensor, *, keep: int = 0, damping: float = DAMPING
) -> tuple[list[int], Tensor]:
    """Remove the cheapest units one after the other, correcting the rest each time, until `keep` are left.

    `unit_of` is that of `unit_costs`: columns of no unit stay. Returns the units in the order of their removal and,
    float64, what each removal cost with those before it gone. Many units of one column go a few at a time (a 64th of
    those left).

    >>> twins = torch.tensor([[1.0, 1.0, 0.9], [1.0, 1.0, 0.9], [0.9, 0.9, 1.0]]) + 1e-6 * torch.eye(3)
    >>> order, costs = removal_costs(torch.tensor([[1.0, 1.0, 0.5]]), twins, torch.arange(3), keep=1, damping=0.0)
    >>> order, bool(costs[1] > 100 * costs[0])  # one of the twins goes for nothing, the other does not
    ([0, 2], True)
    """
    w_RC, inverse_CC, columns = _of_units(w_RC, gram_CC, unit_of, damping)
    not_counted_U = _ridge(gram_CC.diagonal().mean(), damping) * _squares(w_RC, columns)
    n_removed = max(0, len(columns) - keep)
    # Units without columns go first and cost nothing.
    order = [unit for unit, own in enumerate(columns) if not len(own)][:n_removed]
    costs = [0.0] * len(order)
    left = [unit for unit, own in enumerate(columns) if len(own)]
    single_U = _single_columns([columns[unit] for unit in left])
    while len(order) < n_removed:
        # 1. Score the units that are left; of units with one column, a few go at a time.
        cost_U = _costs(w_RC, inverse_CC, [columns[unit] for unit in left], single_U) - not_counted_U[left]
        count = 1 if single_U is None else max(1, int(len(left) * UNITS_AT_ONCE))
        cheapest = cost_U.argsort(stable=True)[: min(count, n_removed - len(order))].tolist()
        # 2. The other columns make up for them, and the inverse becomes that of the Gram matrix without them.
        gone = torch.cat([columns[left[i]] for i in cheapest])
        change = torch.linalg.solve(inverse_CC[gone][:, gone], inverse_CC[gone])  # ((H^-1)_SS)^-1 (H^-1)_S
        w_RC.addmm_(w_RC[:, gone], change, alpha=-1)
        inverse_CC.addmm_(inverse_CC[:, gone], change, alpha=-1)
        w_RC[:, gone] = 0
        inverse_CC[gone] = 0
        inverse_CC[:, gone] = 0
        inverse_CC[gone, gone] = 1
        order += [left[i] for i in cheapest]
        costs += cost_U[cheapest].tolist()
        stays = sorted(set(range(len(left))) - set(cheapest))
        left = [left[i] for i in stays]
        single_U = None if single_U is None else single_U[stays]
    return order, torch.tensor(costs, dtype=torch.float64)


def least_squares(
    w_RC: Tensor, gram_CC: Tensor, kept: Tensor, *, damping: float = DAMPING, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The columns that stay, so that the outputs come nearest to what all columns give: rows x kept, in the dtype.

    The solution minimises the squared error plus damping times its squared distance to the old columns, so where
    nothing is removed, nothing changes.

    >>> w, x = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    >>> least_squares(w, x.t() @ x, torch.tensor([0]), damping=0.0)
    tensor([[2.]], dtype=torch.float64)
    """
    return w_RC[:, kept].to(dtype) + NormalEquations(w_RC, gram_CC, kept, dtype).change_RK(damping)


class NormalEquations:
    """What the columns that stay take over of those that go, by `least_squares` with one damping or several."""

    def __init__(self, w_RC: Tensor, gram_CC: Tensor, kept: Tensor, dtype: torch.dtype) -> None:
        gone_C = torch.ones(len(gram_CC), dtype=torch.bool, device=gram_CC.device)
        gone_C[kept] = False
        self.mean_square = gram_CC.diagonal().mean().to(dtype)
        rows_KC = gram_CC[kept]
        self.inner_KK = rows_KC[:, kept].to(dtype)
        self.diagonal_K = self.inner_KK.diagonal().clone()
        self.lost_KR = rows_KC[:, gone_C].to(dtype) @ w_RC[:, gone_C].to(dtype).t()  # change = lost / inner

    def change_RK(self, damping: float) -> Tensor:
        """What is added to the columns that stay."""
        ridge = float(_ridge(self.mean_square, damping))
        self.inner_KK.diagonal().copy_(self.diagonal_K + ridge)
        if not ridge:
            change_KR: Tensor = torch.linalg.solve(self.inner_KK, self.lost_KR)
        else:
            change_KR = torch.cholesky_solve(self.lost_KR, torch.linalg.cholesky(self.inner_KK))
        return change_KR.t()


def output_error(change_RC: Tensor, gram_CC: Tensor) -> float:
    """The squared error of the outputs when the matrix changes so, over all tokens of the Gram matrix."""
    change_RC = change_RC.to(gram_CC.dtype)
    return float(((change_RC @ gram_CC) * change_RC).sum())


def _ridge(mean_square: Tensor, damping: float) -> Tensor:
    """What a damping adds to the diagonal of a Gram matrix, whose diagonal has this mean."""
    return damping * mean_square.clamp_min(1e-12)


def _of_units(w_RC: Tensor, gram_CC: Tensor, unit_of: Tensor, damping: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The matrix and the inverse of the damped Gram matrix where units have columns, and where each unit's lie."""
    order_C = unit_of.argsort(stable=True)  # columns of no unit come first
    n_others, at_C = int((unit_of < 0).sum()), order_C.to(w_RC.device)
    ordered_CC = gram_CC[at_C][:, at_C].double()
    ordered_CC.diagonal().add_(_ridge(gram_CC.diagonal().mean(), damping))
    lower_CC = torch.linalg.cholesky(ordered_CC)
    del ordered_CC  # as large as the Gram matrix
    inverse_CC = torch.cholesky_inverse(lower_CC[n_others:, n_others:])  # what the others make up for is in it
    sizes = torch.bincount(unit_of[order_C[n_others:]]).tolist()
    places = torch.arange(len(inverse_CC), device=w_RC.device)
    return w_RC[:, at_C[n_others:]].double(), inverse_CC, list(places.split(sizes))


def _single_columns(columns: Sequence[Tensor]) -> Tensor | None:
    """The column of each unit, where each has exactly one."""
    return torch.cat(list(columns)) if columns and all(len(own) == 1 for own in columns) else None


def _squares(w_RC: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each unit's columns."""
    unit_of_C = torch.arange(len(columns)).repeat_interleave(torch.tensor([len(own) for own in columns]))
    squares_C: Tensor = torch.linalg.vector_norm(w_RC, dim=0).square()
    return squares_C.new_zeros(len(columns)).index_add_(0, unit_of_C.to(w_RC.device), squares_C)


def _costs(w_RC: Tensor, inverse_CC: Tensor, columns: Sequence[Tensor], single_U: Tensor | None) -> Tensor:
    if single_U is not None:
        squares_C: Tensor = torch.linalg.vector_norm(w_RC, dim=0).square()
        return squares_C[single_U] / inverse_CC.diagonal()[single_U]
    solved = (torch.linalg.solve(inverse_CC[own][:, own], w_RC[:, own].t()) for own in columns)
    return torch.stack([(w_RC[:, own].t() * each_SR).sum() for own, each_SR in zip(columns, solved, strict=True)])
