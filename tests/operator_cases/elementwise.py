"""Element-wise operators and copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from operator_cases.case import LOST, SAME, Case


def stored(x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of x whose first half along the last dimension is overwritten."""
    half = x.shape[-1] // 2
    copy = x.clone()
    copy[..., :half].copy_(value(x[..., half:]))
    return copy


CASES = (
    # copies, and tensors made like another
    Case("alias", lambda x, n, w: torch.ops.aten.alias(x), SAME),
    Case("detach", lambda x, n, w: x.detach(), SAME),
    Case("clone", lambda x, n, w: x.clone(), SAME),
    Case("_to_copy", lambda x, n, w: x.to(x.dtype, copy=True), SAME),
    Case("lift_fresh", lambda x, n, w: x * torch.tensor(2.0), SAME),
    Case("lift_fresh", lambda x, n, w: x * torch.tensor([1.0, 2.0] * 6), LOST, reason="a constant of the code"),
    Case("zeros_like", lambda x, n, w: x + torch.zeros_like(x), SAME),
    Case("ones_like", lambda x, n, w: x + torch.ones_like(x), SAME),
    Case("full_like", lambda x, n, w: x + torch.full_like(x, 2.0), SAME),
    Case("empty_like fill", lambda x, n, w: x + torch.empty_like(x).fill_(2.0), SAME),
    Case("rand_like", lambda x, n, w: x + torch.rand_like(x).ge(0), SAME),
    Case("randn_like", lambda x, n, w: x + torch.randn_like(x).isfinite(), SAME),
    Case("log_sigmoid_forward", lambda x, n, w: F.logsigmoid(x), SAME),
    Case("native_dropout", lambda x, n, w: torch.native_dropout(x, 0.0, True)[0], SAME),
    # complex numbers
    Case(
        "view_as_complex view_as_real",
        lambda x, n, w: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)))).flatten(2),
        {"up": "a·frozen", "head": "a·(2)"},
        reason="real and imaginary part",
    ),
    Case(
        "polar view_as_real",
        lambda x, n, w: torch.view_as_real(torch.polar(x, w.w.expand_as(x))).flatten(2),
        {"up": "a", "head": "a·(2)", "w": "a"},
        columns=24,
        weights={"w": (12,)},
    ),
    # written in place
    Case("add", lambda x, n, w: x.clone().add_(w.w), {**SAME, "w": "a"}, weights={"w": (12,)}),
    Case("masked_fill", lambda x, n, w: x.clone().masked_fill_(w.w > 0, 0.0), {**SAME, "w": "a"}, weights={"w": (12,)}),
    Case("copy", lambda x, n, w: stored(x, torch.sigmoid), {"up": "(2)·a", "head": "(2)·a"}),
    Case("copy", lambda x, n, w: torch.empty_like(x).copy_(w.w) * x, {**SAME, "w": "a"}, weights={"w": (12,)}),
)
