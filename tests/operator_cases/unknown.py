"""Operators without a rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from operator_cases.case import LOST, Case

CASES = (
    # operators without a rule
    Case(
        "kthvalue",
        lambda x, n, w: x - x.kthvalue(2, keepdim=True).values,
        LOST,
        reason="there is no rule for this use of the operator aten.kthvalue (in the model)",
    ),
    Case("glu", lambda x, n, w: F.glu(x), LOST, columns=6, reason="no rule for this use of the operator aten.glu"),
    Case(
        "_fft_r2c",
        lambda x, n, w: torch.fft.fft(x).abs(),
        LOST,
        reason="no rule for this use of the operator aten._fft_r2c",
    ),
)
