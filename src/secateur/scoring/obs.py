"""Gram matrices -> which inputs of a matrix to leave out, and how the others make up for them, in closed form.

Optimal brain surgeon for whole units (Hassibi and Stork 1992; for units of language models ZipLM, arXiv 2302.04089): a
matrix W reads features x with the Gram matrix H = sum of x x'. To leave out the columns S at the least
squared error of the outputs costs tr(W_S ((H^-1)_SS)^-1 W_S'), when all other columns change by
-W_S ((H^-1)_SS)^-1 (H^-1)_S. All in float64. Axes: R rows (outputs), C columns
(inputs), S the columns of one unit, K the columns that are kept, U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of a Gram matrix's diagonal, added to it, as GPTQ does (arXiv 2210.17323)
AT_ONCE = 1 / 64  # of the units that are left, removed between two updates


def damped(gram_CC: Tensor, damping: float = DAMPING) -> Tensor:
    """A Gram matrix in float64 that can be inverted.

    >>> damped(torch.zeros(2, 2)).diagonal().min() > 0, damped(torch.eye(2), 0.5)[0].tolist()
    (tensor(True), [1.5, 0.0])
    """
    gram_CC = gram_CC.double().clone()
    gram_CC.diagonal().add_(damping * gram_CC.diagonal().mean().clamp_min(1e-12))
    return gram_CC


def unit_costs(w_RC: Tensor, gram_CC: Tensor, unit_of: Tensor, *, damping: float = DAMPING) -> Tensor:
    """What it costs to leave out each unit alone: float64, one number per unit, in squares of the output.

    `unit_of` (int64) names the unit of each column, -1 for none.

    >>> unit_costs(torch.tensor([[3.0, 4.0]]), torch.eye(2), torch.tensor([0, 1]), damping=0.0).tolist()
    [9.0, 16.0]
    """
    columns = [each.to(w_RC.device) for each in _columns_of_units(unit_of)]
    return _costs(w_RC.double(), torch.linalg.inv(damped(gram_CC, damping)), columns)


def removal_costs(
    w_RC: Tensor, gram_CC: Tensor, unit_of: Tensor, *, keep: int = 0, damping: float = DAMPING
) -> tuple[list[int], Tensor]:
    """Remove the cheapest units one after the other, correcting the rest each time, until `keep` are left.

    Returns the units in the order of their removal and, float64, what each removal cost with those before it gone. Many
    units of one column go a few at a time (a 64th of those left).

    >>> twins = torch.tensor([[1.0, 1.0, 0.9], [1.0, 1.0, 0.9], [0.9, 0.9, 1.0]]) + 1e-6 * torch.eye(3)
    >>> order, costs = removal_costs(torch.tensor([[1.0, 1.0, 0.5]]), twins, torch.arange(3), keep=1, damping=0.0)
    >>> order, bool(costs[1] > 100 * costs[0])  # one of the twins goes for nothing, the other does not
    ([0, 2], True)
    """
    w_RC, inverse_CC = w_RC.double().clone(), torch.linalg.inv(damped(gram_CC, damping))
    columns = [each.to(w_RC.device) for each in _columns_of_units(unit_of)]
    n_removed = max(0, len(columns) - keep)
    # Units without columns go first and cost nothing.
    order = [unit for unit, own in enumerate(columns) if not len(own)][:n_removed]
    costs = [0.0] * len(order)
    left = [unit for unit, own in enumerate(columns) if len(own)]
    single_U = _single_columns([columns[unit] for unit in left])
    while len(order) < n_removed:
        # 1. Score the units that are left; of units with one column, a few go at a time.
        if single_U is None:
            cost_U, count = _costs(w_RC, inverse_CC, [columns[unit] for unit in left]), 1
        else:
            cost_U, count = _column_costs(w_RC, inverse_CC, single_U), max(1, int(len(left) * AT_ONCE))
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
        # 3. Note them.
        order += [left[i] for i in cheapest]
        costs += [float(cost_U[i]) for i in cheapest]
        removed = set(cheapest)
        left = [unit for i, unit in enumerate(left) if i not in removed]
        if single_U is not None:
            stays = torch.ones(len(single_U), dtype=torch.bool, device=single_U.device)
            stays[cheapest] = False
            single_U = single_U[stays]
    return order, torch.tensor(costs, dtype=torch.float64)


def least_squares(w_RC: Tensor, gram_CC: Tensor, kept: Tensor, *, damping: float = DAMPING) -> Tensor:
    """The columns that stay, so that the outputs come nearest to what all columns give: rows x kept, float64.

    The solution minimises the squared error plus damping times its squared distance to the old columns, so where
    nothing is removed, nothing changes.

    >>> w, x = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    >>> least_squares(w, x.t() @ x, torch.tensor([0]), damping=0.0)
    tensor([[2.]], dtype=torch.float64)
    """
    w_RC, gram_CC = w_RC.double(), gram_CC.double()
    ridge = damping * float(gram_CC.diagonal().mean().clamp_min(1e-12))
    inner_KK = gram_CC[kept][:, kept]
    inner_KK.diagonal().add_(ridge)
    target_RK = w_RC @ gram_CC[:, kept] + ridge * w_RC[:, kept]
    if ridge:
        fitted_KR: Tensor = torch.cholesky_solve(target_RK.t(), torch.linalg.cholesky(inner_KK))
    else:
        fitted_KR = torch.linalg.solve(inner_KK, target_RK.t())
    return fitted_KR.t()


def output_error(change_RC: Tensor, gram_CC: Tensor) -> float:
    """The squared error of the outputs when the matrix changes so, over all tokens of the Gram matrix.

    >>> output_error(torch.tensor([[1.0, 0.0]]), torch.eye(2))
    1.0
    """
    change_RC = change_RC.to(gram_CC.dtype)
    return float(((change_RC @ gram_CC) * change_RC).sum())


def _columns_of_units(unit_of: Tensor) -> list[Tensor]:
    """The columns of each unit."""
    units = int(unit_of.max()) + 1 if len(unit_of) else 0
    order = unit_of.argsort(stable=True)
    order = order[unit_of[order] >= 0]
    sizes = torch.bincount(unit_of[order], minlength=units).tolist()
    return list(order.split(sizes))


def _single_columns(columns: Sequence[Tensor]) -> Tensor | None:
    """The column of each unit, where each has exactly one."""
    return torch.cat(list(columns)) if columns and all(len(own) == 1 for own in columns) else None


def _costs(w_RC: Tensor, inverse_CC: Tensor, columns: Sequence[Tensor]) -> Tensor:
    single_U = _single_columns(columns)
    if single_U is not None:
        return _column_costs(w_RC, inverse_CC, single_U)
    return torch.stack([_cost(w_RC[:, own], inverse_CC[own][:, own]) for own in columns])


def _column_costs(w_RC: Tensor, inverse_CC: Tensor, single_U: Tensor) -> Tensor:
    squares_C: Tensor = torch.linalg.vector_norm(w_RC, dim=0).square()
    return squares_C[single_U] / inverse_CC.diagonal()[single_U]


def _cost(w_RS: Tensor, inverse_SS: Tensor) -> Tensor:
    if not w_RS.shape[1]:
        return w_RS.new_zeros(())
    cost: Tensor = (w_RS.t() * torch.linalg.solve(inverse_SS, w_RS.t())).sum()
    return cost
