"""Products of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from operator_cases.case import HEADS, LOST, SAME, Case


def solved(x: Tensor) -> Tensor:
    """Positions of the sequence from the ones before them, by a triangular system."""
    system = (x @ x.mT).tril() + 9 * torch.eye(x.shape[1], dtype=x.dtype)
    result: Tensor = torch.linalg.solve_triangular(system, x, upper=False)
    return result


CASES = (
    # matrix products
    Case(
        "mm",
        lambda x, n, w: torch.mm(x.flatten(0, 1), w.w).unflatten(0, x.shape[:2]),
        {**SAME, "head": "b", "w": "a, b"},
        columns=5,
        weights={"w": (12, 5)},
    ),
    Case(
        "addmm",
        lambda x, n, w: F.linear(x, w.w, w.b),
        {**SAME, "head": "b", "w": "b, a", "b": "b"},
        columns=5,
        weights={"w": (5, 12), "b": (5,)},
    ),
    Case(
        "bmm",
        lambda x, n, w: (
            torch.bmm(x.flatten(0, 1).unflatten(-1, (n.a, -1)).transpose(0, 1), w.w)
            .transpose(0, 1)
            .flatten(1)
            .unflatten(0, x.shape[:2])
        ),
        {"up": "a·b", "head": "a·c", "w": "a, b, c"},
        HEADS,
        columns=15,
        weights={"w": (3, 4, 5)},
    ),
    Case(
        "baddbmm",
        lambda x, n, w: (
            torch.baddbmm(w.b, x.flatten(0, 1).unflatten(-1, (n.a, -1)).transpose(0, 1), w.w)
            .transpose(0, 1)
            .flatten(1)
            .unflatten(0, x.shape[:2])
        ),
        {"up": "a·b", "head": "a·c", "w": "a, b, c", "b": "a, (1), c"},
        HEADS,
        columns=15,
        weights={"w": (3, 4, 5), "b": (3, 1, 5)},
    ),
    Case(
        "mv",
        lambda x, n, w: x.flatten(0, 1).mv(w.w).unflatten(0, x.shape[:2])[..., None],
        {"up": "a", "head": "(1)", "w": "a"},
        columns=1,
        weights={"w": (12,)},
    ),
    Case(
        "dot",
        lambda x, n, w: x * w.w.dot(w.v),
        {**SAME, "w": "b", "v": "b"},
        weights={"w": (5,), "v": (5,)},
    ),
    Case(
        "transformers.grouped_mm_fallback",  # all tokens are the first expert's
        lambda x, n, w: torch.ops.transformers.grouped_mm_fallback(
            x.flatten(0, 1), w.w, torch.full((n.c,), x.shape[:2].numel(), dtype=torch.int32)
        ).unflatten(0, x.shape[:2]),
        {"up": "a", "head": "b", "w": "c, a, b"},
        {"c": 3},
        columns=5,
        weights={"w": (3, 12, 5)},
        numbers=False,
    ),
    Case(
        "_grouped_mm",
        lambda x, n, w: (
            torch._grouped_mm(
                x.flatten(0, 1).bfloat16(),
                w.w.bfloat16(),
                offs=torch.full((n.c,), x.shape[:2].numel(), dtype=torch.int32),
            )
            .unflatten(0, x.shape[:2])
            .to(x.dtype)
        ),
        {"up": "a", "head": "b", "w": "c, a, b"},
        {"c": 3},
        rows=16,
        columns=8,
        weights={"w": (3, 16, 8)},
        numbers=False,
    ),
    Case("linalg_solve_triangular", lambda x, n, w: solved(x), SAME),
    Case(
        "linalg_solve_triangular",
        lambda x, n, w: torch.linalg.solve_triangular(w.w, x, upper=True, left=False),
        {**LOST, "w": "frozen, frozen"},
        weights={"w": (12, 12)},
        reason="no rule for this use of the operator aten.linalg_solve_triangular",
    ),
)
