"""Attention by products of all positions is PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from secateur.models.attention_products import bfloat16_attention

OWN = functional.scaled_dot_product_attention


def attention(tensors: Sequence[Tensor], **options: Any) -> Tensor:
    query, key, value = tensors
    return functional.scaled_dot_product_attention(query, key, value, **options)


def inputs(
    *, heads: int = 4, key_heads: int = 4, queries: int = 12, keys: int = 12, value_width: int = 8
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, queries, 8), (key_heads, keys, 8), (key_heads, keys, value_width)
    return [torch.randn(2, *shape, generator=generator) for shape in shapes]


def outcome(tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The result, and gradients of query, key and value."""
    given = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    result = attention(given, **options)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result.detach(), *torch.autograd.grad(result, given, weights.to(result.dtype))]


def compare(tensors: list[Tensor], **options: Any) -> None:
    expected = outcome(tensors, torch.float32, **options)
    with bfloat16_attention(by_products=True):
        found = outcome(tensors, torch.bfloat16, **options)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() < 0.02 * other.norm() + 1e-5


@settings(max_examples=30)
@given(
    st.sampled_from([1, 7, 12]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["none", "causal", "rows", "each", "added"]),
    st.sampled_from([None, 0.5]),
    st.sampled_from([8, 5]),
)
def test_it_is_attention(queries: int, key_heads: int, mask: str, scale: float | None, value_width: int) -> None:
    options: dict[str, Any] = {"scale": scale, "enable_gqa": key_heads != 4, "is_causal": mask == "causal"}
    generator = torch.Generator().manual_seed(2)
    if mask == "rows":
        options["attn_mask"] = torch.rand(queries, 12, generator=generator) < 0.5
        options["attn_mask"][:, 3] = True
    elif mask == "each":
        options["attn_mask"] = torch.rand(2, 1, queries, 12, generator=generator) < 0.5
        options["attn_mask"][..., 3] = True
    elif mask == "added":
        options["attn_mask"] = torch.randn(1, 4, queries, 12, generator=generator)
        options["attn_mask"][..., 5] = -torch.inf
    tensors = inputs(key_heads=key_heads, queries=queries, value_width=value_width)
    if mask == "added":  # of the inputs' dtype
        expected = outcome(tensors, torch.float32, **options)
        options["attn_mask"] = options["attn_mask"].bfloat16()
        with bfloat16_attention(by_products=True):
            found = outcome(tensors, torch.bfloat16, **options)
        assert all(
            (one.float() - other).norm() < 0.03 * other.norm() for one, other in zip(found, expected, strict=True)
        )
    else:
        compare(tensors, **options)


def test_under_autocast_it_takes_float32() -> None:
    tensors = inputs()
    expected = outcome(tensors, torch.float32, is_causal=True)
    with bfloat16_attention(by_products=True), torch.autocast("cpu", torch.bfloat16):
        found = outcome(tensors, torch.float32, is_causal=True)
    assert [each.dtype for each in found] == [torch.bfloat16, *3 * [torch.float32]]
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() < 0.02 * other.norm() + 1e-5


def test_a_position_that_reads_none_is_finite() -> None:
    """And nothing else changes by it."""
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[:4] = False
    with bfloat16_attention(by_products=True):
        found = outcome(inputs(), torch.bfloat16, attn_mask=mask)
    expected = outcome(inputs(), torch.float32, attn_mask=mask)
    assert all(torch.isfinite(each).all() for each in found)
    assert (found[0][:, :, 4:].float() - expected[0][:, :, 4:]).norm() < 0.02 * expected[0].norm()


@pytest.mark.parametrize("case", ["float32", "dropout", "learned", "three dimensions"])
def test_the_rest_is_left_to_pytorch(case: str) -> None:
    tensors = [each.to(torch.float32 if case == "float32" else torch.bfloat16) for each in inputs()]
    options: dict[str, Any] = {"dropout_p": 0.5} if case == "dropout" else {}
    if case == "learned":
        options["attn_mask"] = torch.zeros(12, 12, dtype=torch.bfloat16, requires_grad=True)
    if case == "three dimensions":
        tensors = [each[0] for each in tensors]
    torch.manual_seed(0)
    expected = attention(tensors, **options)
    torch.manual_seed(0)
    with bfloat16_attention(by_products=True):
        found = attention(tensors, **options)
    assert torch.equal(found, expected)
    assert type(found.grad_fn) is type(expected.grad_fn)


def test_attention_is_as_before_afterwards() -> None:
    with bfloat16_attention(by_products=False):
        assert functional.scaled_dot_product_attention is OWN
    with bfloat16_attention(by_products=True):
        assert functional.scaled_dot_product_attention is not OWN
    assert functional.scaled_dot_product_attention is OWN
    with pytest.raises(ZeroDivisionError), bfloat16_attention(by_products=True):
        assert 1 / 0
    assert functional.scaled_dot_product_attention is OWN
