"""Products that are to be exact are, on whatever units this machine takes them."""

from __future__ import annotations

import pytest
import torch

from secateur.models.precision import matmul_precision


@pytest.mark.parametrize(("rows", "inner", "columns"), [(3, 5, 7), (256, 256, 256), (512, 1000, 300)])
def test_exact_products_are_exact(rows: int, inner: int, columns: int) -> None:
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    with matmul_precision(exact=True):
        found = left @ right
    expected = left.double() @ right.double()
    assert (found - expected).norm() / expected.norm() < 1e-6


def test_the_precision_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), matmul_precision(exact=False):
        assert 1 / 0
    assert torch.get_float32_matmul_precision() == "highest"
