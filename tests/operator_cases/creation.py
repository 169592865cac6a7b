"""Tensors that the code makes."""

from __future__ import annotations

import torch

from operator_cases.case import LOST, SAME, Case
from secateur.discovery.rules.indexing import COMPUTED_WITH

CONSTANT = "makes a constant for each of its positions"


CASES = (
    # tensors made by the code
    Case("zeros", lambda x, n, w: x + torch.zeros(n.a), SAME, {"a": 12}),
    Case("ones", lambda x, n, w: x + torch.ones(n.a), SAME, {"a": 12}),
    Case("full", lambda x, n, w: x + torch.full((n.a,), 2.0), SAME, {"a": 12}),
    Case("empty zero", lambda x, n, w: x + torch.empty(n.a).zero_(), SAME, {"a": 12}),
    Case("scalar_tensor", lambda x, n, w: x * torch.scalar_tensor(2.0), SAME),
    Case("new_ones", lambda x, n, w: x + x.new_ones(n.a), SAME, {"a": 12}),
    Case("new_zeros", lambda x, n, w: x + x.new_zeros(n.a), SAME, {"a": 12}),
    Case("new_full", lambda x, n, w: x + x.new_full((n.a,), 2.0), SAME, {"a": 12}),
    Case("new_empty zero", lambda x, n, w: x + x.new_empty(n.a).zero_(), SAME, {"a": 12}),
    Case("empty_permuted zero", lambda x, n, w: x + torch.empty_permuted((n.a,), (0,)).zero_(), SAME, {"a": 12}),
    Case("rand", lambda x, n, w: x + torch.rand(n.a).ge(0), SAME, {"a": 12}),
    Case("randn", lambda x, n, w: x + torch.randn(n.a).isfinite(), SAME, {"a": 12}),
    Case("arange", lambda x, n, w: x * torch.arange(12), LOST, reason=COMPUTED_WITH),
    Case("linspace", lambda x, n, w: x * torch.linspace(0, 1, 12), LOST, reason=CONSTANT),
    Case("eye", lambda x, n, w: x @ torch.eye(12, dtype=x.dtype), LOST, reason=CONSTANT),
    Case("tril_indices", lambda x, n, w: x * torch.tril_indices(12, 1)[0], LOST, reason=CONSTANT),
    Case("triu_indices", lambda x, n, w: x * torch.triu_indices(1, 12)[1], LOST, reason=CONSTANT),
)
