"""Gram matrices in strips and over blocks of tokens are X'X."""

from __future__ import annotations

import pytest
import torch

from secateur.scoring.gram import STRIP, TOKENS_AT_ONCE, add_gram, gram


@pytest.mark.parametrize("columns", [1, 5, STRIP, STRIP + 1, 3 * STRIP - 7])
def test_a_gram_matrix_in_strips(columns: int) -> None:
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(gram(x), x.t() @ x, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_over_blocks_of_tokens(dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS_AT_ONCE + 9, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    total, exact = torch.ones(5, 5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    add_gram(total, x)
    add_gram(exact, x, dtype=torch.float64)
    assert torch.allclose(total, 1 + x.double().t() @ x.double(), rtol=1e-5, atol=1e-3)
    assert torch.allclose(exact, x.double().t() @ x.double(), rtol=1e-12, atol=1e-9)
