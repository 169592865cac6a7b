"""Products that are to be exact are, on whatever units this machine takes them; attention is the same by products."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from secateur.errors import TrainingError
from secateur.models.precision import bfloat16_attention, bfloat16_products, matmul_precision


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


def test_code_that_mixes_dtypes_in_bfloat16_is_one_line() -> None:
    one, total = torch.ones(1, 2), torch.zeros(3, 2)
    said = r"does not run in bfloat16 \(RuntimeError: index_add_.*\)\. Train in float32: --dtype float32"
    with pytest.raises(TrainingError, match=said), bfloat16_products("cpu", enabled=True):
        total.index_add_(0, torch.tensor([1]), one @ torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), bfloat16_products("cpu", enabled=True):
        one @ one


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_products_is_attention(masked: bool) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 40, 16, requires_grad=True) for _ in range(3)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    mask_TT = torch.ones(40, 40, dtype=torch.bool).tril() & (torch.arange(40) != 7) if masked else None
    gradient = torch.randn(2, 3, 40, 16)

    def attend(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        q_BHTD, k_BHTD, v_BHTD = inputs
        out = functional.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask_TT, is_causal=not masked)
        grads = torch.autograd.grad(out, inputs, gradient.to(out.dtype))
        return [out.detach(), *grads]

    expected = attend(exact)
    with bfloat16_attention(by_products=True):
        found = attend(rounded)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() < 0.02 * other.norm()


def test_attention_is_as_before_afterwards() -> None:
    def backends() -> list[bool]:
        cuda = torch.backends.cuda
        return [
            cuda.flash_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.fp16_bf16_reduction_math_sdp_allowed(),
        ]

    before = backends()
    with bfloat16_attention(by_products=False):
        assert backends() == before
    with bfloat16_attention(by_products=True):
        assert backends() == [False, True, False, True]
    assert backends() == before
    with pytest.raises(ZeroDivisionError), bfloat16_attention(by_products=True):
        assert 1 / 0
    assert backends() == before
