"""How precisely matrix products are taken, and by what."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from secateur.errors import TrainingError, one_line

HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = 32  # with fewer, converting the weights takes longer than multiplying them as they are
MOST_ENTRIES = 2**24  # of an operand that are in float32 at once
SIZE = 256  # of the product that is looked at
BF16_WIDTH = 64  # of batches in bfloat16 on a CPU: so many positions, or a multiple
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


def width_multiple(device_type: str, *, bf16: bool) -> int:
    """What the width of padded batches should be a multiple of.

    On a CPU, oneDNN writes machine code for every shape of a product in bfloat16, which takes 2 ms: with batches of any
    width, that is a third of a training.

    >>> width_multiple("cpu", bf16=True), width_multiple("cpu", bf16=False), width_multiple("cuda", bf16=True)
    (64, 1, 1)
    """
    return BF16_WIDTH if bf16 and device_type == "cpu" else 1


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


def half_products(model: nn.Module) -> AbstractContextManager[Any]:
    """While open, products of the model's bfloat16 or float16 weights are taken in float32, where that is faster.

    That is so on CPUs without instructions for such numbers: 4 to 8 times faster with hundreds of rows. Results are
    rounded to the weights' dtype, as such instructions do. Weights are converted a block at a time and are not changed.
    On other devices, and for other weights, this does nothing.

    >>> with half_products(nn.Linear(64, 3, dtype=torch.bfloat16)):
    ...     (torch.ones(9, 64, dtype=torch.bfloat16) @ torch.ones(64, 3, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """
    found = {weight.dtype for weight in model.parameters() if weight.device.type in ("cpu", "meta")}
    if not any(each in found and not _has_units(each) for each in HALF):
        return nullcontext()
    return _ProductsInFloat32()  # type: ignore[no-untyped-call]  # torch leaves it untyped


@functools.cache
def _has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies numbers of a half-precision dtype itself, through oneDNN."""
    ops = torch.ops.mkldnn
    asked = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return bool(torch.backends.mkldnn.is_available() and asked())


class _ProductsInFloat32(TorchDispatchMode):
    """Below autograd, which keeps what it keeps without; a backward pass within is changed as a forward pass is."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if types:  # what has a type of its own, as shards have, multiplies itself
            return func(*args, **kwargs)
        if func in _MADE_OF_OTHERS:  # which arrive whole where autograd is off (`torch.inference_mode`)
            with self:
                return func.decompose(*args, **kwargs)
        if (take := _TAKEN.get(func)) is None:
            return func(*args, **kwargs)
        halves = [arg.dtype for arg in args if isinstance(arg, Tensor) and arg.dtype in HALF and arg.is_cpu]
        return take(func, halves[0], args, kwargs) if halves else func(*args, **kwargs)


def _product(func: Any, dtype: torch.dtype, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> Tensor:
    """`mm` and `bmm`."""
    result: Tensor = func(*args, **kwargs) if _is_small(*args) else _by_blocks(*args, dtype)
    return result


def _product_and_sum(func: Any, dtype: torch.dtype, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
    """`addmm` and `baddbmm`."""
    added, left, right = args
    result: Tensor
    if _is_small(left, right):
        result = func(*args, **kwargs)
    else:
        found = _by_blocks(left, right, torch.float32).mul_(kwargs.get("alpha", 1))
        result = found.add_(added, alpha=kwargs.get("beta", 1)).to(dtype)
    return result


def _grouped_product(func: Any, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`_grouped_mm` of experts: each group of rows with a matrix of its own; of its gradient, a product per group."""
    left, right, ends, *others = args
    result: Tensor
    if left.dim() != 2 or ends is None or others or kwargs:
        result = func(*args, **kwargs)
        return result
    groups = [slice(*each) for each in itertools.pairwise([0, *ends.tolist()])]
    if right.dim() == 2:
        return torch.stack([_by_blocks(left[:, some], right[some], dtype) for some in groups])
    result = left.new_zeros(left.shape[0], right.shape[-1])
    for some, matrix in zip(groups, right, strict=True):
        rows = left[some]
        result[some] = rows @ matrix if _is_small(rows, matrix) else _by_blocks(rows, matrix, dtype)
    return result


def _is_small(left: Tensor, right: Tensor) -> bool:
    return min(left.shape[-2], right.shape[-1]) < FEW_ROWS


def _by_blocks(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product, taken in float32 of so much of the operands at a time, and rounded to a dtype."""
    (*batch, rows, inner), columns = left.shape, right.shape[-1]
    blocks = -(-max(left.numel(), right.numel()) // MOST_ENTRIES)
    if blocks <= 1:
        return (left.float() @ right.float()).to(dtype)
    if batch:
        each = zip(left.chunk(blocks), right.chunk(blocks), strict=True)
        return torch.cat([(some.float() @ other.float()).to(dtype) for some, other in each])
    if inner >= max(rows, columns):  # a sum of products, which is rounded once
        total = left.new_zeros(rows, columns, dtype=torch.float32)
        for some, other in zip(left.chunk(blocks, dim=1), right.chunk(blocks), strict=True):
            total.addmm_(some.float(), other.float())
        return total.to(dtype)
    if rows > columns:
        whole = right.float()
        return torch.cat([(some.float() @ whole).to(dtype) for some in left.chunk(blocks)])
    whole = left.float()
    return torch.cat([(whole @ some.float()).to(dtype) for some in right.chunk(blocks, dim=1)], dim=1)


def _all_in_float32(func: Any, dtype: torch.dtype, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on float32 copies; what it returns has the dtype that it would have."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype == dtype else t, (args, kwargs))
    first, *others = found if isinstance(found := func(*args, **kwargs), tuple) else (found,)
    if func is _ATEN._scaled_dot_product_flash_attention_for_cpu.default:
        return first.to(dtype), *others  # with sums of exponentials, which are in float32 in any case
    return tuple(None if each is None else each.to(dtype) for each in (first, *others))


_ATEN = torch.ops.aten
_MADE_OF_OTHERS = {
    _ATEN.linear.default,
    _ATEN.matmul.default,
    _ATEN.einsum.default,
    _ATEN.scaled_dot_product_attention.default,
}
_TAKEN: dict[Any, Callable[..., Any]] = {
    _ATEN.mm.default: _product,
    _ATEN.bmm.default: _product,
    _ATEN.addmm.default: _product_and_sum,
    _ATEN.baddbmm.default: _product_and_sum,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: _all_in_float32,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: _all_in_float32,
    _ATEN._grouped_mm.default: _grouped_product,
}


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
