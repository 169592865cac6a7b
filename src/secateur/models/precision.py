"""How precisely matrix products are taken, and by what."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.errors import TrainingError, one_line

SIZE = 256  # of the product that is looked at
EXACT = 1e-5  # of float32's own products: those of TF32 or bfloat16 are off by 1e-3


@contextmanager
def matmul_precision(*, exact: bool) -> Iterator[None]:
    """While open, float32 products are taken by the fastest units of the machine, or the fastest exact ones.

    The fastest are TF32 on a GPU and bfloat16 on a CPU with AMX. On others oneDNN's products, which PyTorch takes when
    they need not be exact, are so all the same, and often faster than MKL's. Products of bfloat16 numbers are exact in
    all of them, since they add up in float32.

    >>> with matmul_precision(exact=False):
    ...     torch.get_float32_matmul_precision()
    'medium'
    >>> torch.get_float32_matmul_precision()
    'highest'
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if exact and not _exact_at_medium() else "medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def bfloat16_products(device_type: str, *, enabled: bool) -> Iterator[None]:
    """While open and enabled, products are taken in bfloat16; raises as `bfloat16_code` does.

    >>> with bfloat16_products("cpu", enabled=True):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    with bfloat16_code(), torch.autocast(device_type, torch.bfloat16, enabled=enabled):
        yield


@contextmanager
def bfloat16_code() -> Iterator[None]:
    """While open, a model whose code mixes bfloat16 with another dtype raises `TrainingError`."""
    try:
        yield
    except RuntimeError as error:
        if "BFloat16" not in str(error):
            raise
        raise TrainingError(
            f"the model's code does not run in bfloat16 ({one_line(error)}). Train in float32: --dtype float32"
        ) from error


@contextmanager
def bfloat16_attention(*, by_products: bool) -> Iterator[None]:
    """While open, attention is taken by matrix products of all positions, in the precision of its inputs.

    On a CPU that multiplies bfloat16 fast, forward and backward take half the time of PyTorch's fused kernel; the
    probabilities of all pairs of positions are in memory. Otherwise nothing changes.

    >>> with bfloat16_attention(by_products=True):
    ...     torch.backends.cuda.flash_sdp_enabled()  # of CPUs, too
    False
    """
    if not by_products:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@functools.cache
def _exact_at_medium() -> bool:
    """Whether this machine takes exact products when it is allowed others."""
    if torch.cuda.is_available():
        return False
    x_NN = torch.linspace(-1, 2, SIZE * SIZE).reshape(SIZE, SIZE)
    with matmul_precision(exact=False):
        found_NN = x_NN @ x_NN
    expected_NN = x_NN.double() @ x_NN.double()
    return float((found_NN - expected_NN).norm() / expected_NN.norm()) < EXACT
