"""Gram matrices -> which inputs of a matrix to leave out, and how the others make up for them, in closed form.

Optimal brain surgeon for whole units (Hassibi and Stork 1992; for units of language models ZipLM, arXiv 2302.04089): a
matrix W reads features x with the Gram matrix H = sum of x x'. To leave out the columns S at the least
squared error of the outputs costs tr(W_S ((H^-1)_SS)^-1 W_S'), when all other columns change by
-W_S ((H^-1)_SS)^-1 (H^-1)_S. All in float64. Names of tensors end in their axes: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of a Gram matrix's diagonal, added to it, as GPTQ does (arXiv 2210.17323)
AT_ONCE = 1 / 64  # of the columns that are there, removed between two updates


def damped(gram_CC: Tensor, damping: float = DAMPING) -> Tensor:
    """A Gram matrix in float64 that can be inverted.

    >>> damped(torch.zeros(2, 2)).diagonal().min() > 0, damped(torch.eye(2), 0.5)[0].tolist()
    (tensor(True), [1.5, 0.0])
    """
    found = gram_CC.double().clone()
    found.diagonal().add_(damping * found.diagonal().mean().clamp_min(1e-12))
    return found


def unit_costs(w_RC: Tensor, gram_CC: Tensor, unit_of: Tensor, *, damping: float = DAMPING) -> Tensor:
    """What it costs to leave out each unit alone: float64, one number per unit, in squares of the output.

    `unit_of` (int64) names the unit of each column, -1 for none.

    >>> unit_costs(torch.tensor([[3.0, 4.0]]), torch.eye(2), torch.tensor([0, 1]), damping=0.0).tolist()
    [9.0, 16.0]
    """
    return _costs(
        w_RC.double(),
        torch.linalg.inv(damped(gram_CC, damping)),
        [place.to(w_RC.device) for place in _places(unit_of)],
    )


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
    w, inverse = w_RC.double().clone(), torch.linalg.inv(damped(gram_CC, damping))
    places = [place.to(w.device) for place in _places(unit_of)]
    removed = max(0, len(places) - keep)
    order = [unit for unit, place in enumerate(places) if not len(place)][:removed]
    costs = [0.0] * len(order)
    alive = [unit for unit, place in enumerate(places) if len(place)]
    at = _columns([places[unit] for unit in alive])
    while len(order) < removed:
        if at is None:
            each, count = _costs(w, inverse, [places[unit] for unit in alive]), 1
        else:
            each, count = _column_costs(w, inverse, at), max(1, int(len(alive) * AT_ONCE))
        count = min(count, removed - len(order))
        going = each.argsort(stable=True)[:count].tolist()
        gone = torch.cat([places[alive[i]] for i in going])
        change = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])  # ((H^-1)_SS)^-1 (H^-1)_S
        w.addmm_(w[:, gone], change, alpha=-1)
        inverse.addmm_(inverse[:, gone], change, alpha=-1)
        w[:, gone] = 0
        inverse[gone] = 0
        inverse[:, gone] = 0
        inverse[gone, gone] = 1
        order += [alive[i] for i in going]
        costs += [float(each[i]) for i in going]
        taken = set(going)
        alive = [unit for i, unit in enumerate(alive) if i not in taken]
        if at is not None:
            left = torch.ones(len(at), dtype=torch.bool, device=at.device)
            left[going] = False
            at = at[left]
    return order, torch.tensor(costs, dtype=torch.float64)


def least_squares(
    w_RC: Tensor, gram_CC: Tensor, kept: Tensor, *, cross_CC: Tensor | None = None, damping: float = DAMPING
) -> Tensor:
    """The columns that stay, so that the outputs come nearest to the target: rows x kept, float64.

    The target is what W itself gives for the same inputs, or for others: then `cross` is the sum of x' of those times x
    of these. The solution minimises the squared error plus damping times its squared distance to the old columns, so
    where nothing is removed and the inputs are the same, nothing changes.

    >>> w, x = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    >>> least_squares(w, x.t() @ x, torch.tensor([0]), damping=0.0)
    tensor([[2.]], dtype=torch.float64)
    """
    w, gram = w_RC.double(), gram_CC.double()
    ridge = damping * float(gram.diagonal().mean().clamp_min(1e-12))
    inner = gram[kept][:, kept]
    inner.diagonal().add_(ridge)
    wanted = w @ (gram if cross_CC is None else cross_CC.double())[:, kept] + ridge * w[:, kept]
    if ridge:
        found: Tensor = torch.cholesky_solve(wanted.t(), torch.linalg.cholesky(inner))
    else:
        found = torch.linalg.solve(inner, wanted.t())
    return found.t()


def output_error(change_RC: Tensor, gram_CC: Tensor) -> float:
    """The squared error of the outputs that a change of the matrix makes, over all the tokens of the Gram matrix.

    >>> output_error(torch.tensor([[1.0, 0.0]]), torch.eye(2))
    1.0
    """
    change = change_RC.to(gram_CC.dtype)
    return float(((change @ gram_CC) * change).sum())


def _places(unit_of: Tensor) -> list[Tensor]:
    """The columns of every unit."""
    units = int(unit_of.max()) + 1 if len(unit_of) else 0
    order = unit_of.argsort(stable=True)
    order = order[unit_of[order] >= 0]
    sizes = torch.bincount(unit_of[order], minlength=units).tolist()
    return list(order.split(sizes))


def _columns(places: Sequence[Tensor]) -> Tensor | None:
    """The column of every unit, where each has exactly one."""
    return torch.cat(list(places)) if places and all(len(place) == 1 for place in places) else None


def _costs(w: Tensor, inverse: Tensor, places: Sequence[Tensor]) -> Tensor:
    at = _columns(places)
    if at is not None:
        return _column_costs(w, inverse, at)
    return torch.stack([_cost(w[:, place], inverse[place][:, place]) for place in places])


def _column_costs(w: Tensor, inverse: Tensor, at: Tensor) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(w, dim=0).square()
    return squares[at] / inverse.diagonal()[at]


def _cost(columns: Tensor, inverse: Tensor) -> Tensor:
    if not columns.shape[1]:
        return columns.new_zeros(())
    found: Tensor = (columns.t() * torch.linalg.solve(inverse, columns.t())).sum()
    return found
