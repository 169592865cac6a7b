"""A running model -> each matrix product with one of its weights: the inputs, and the weight's dimension they meet.

Products are observed where they are computed, not by the module that computes them: a weight, or one matrix of a stack
of weights, that is an operand of `linear`, `matmul`, `mm`, `addmm` or `bmm`. So linear layers of any kind, `Conv1D` and
stacked experts look alike. Axes: N tokens, C features (columns of the weight).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Operands(NamedTuple):
    """Positions of an operator's arguments."""

    inputs: int
    matrix: int
    bias: int | None = None


OPERATORS: dict[Any, Operands] = {
    functional.linear: Operands(0, 1, bias=2),
    torch.matmul: Operands(0, 1),
    Tensor.matmul: Operands(0, 1),
    Tensor.__matmul__: Operands(0, 1),
    torch.mm: Operands(0, 1),
    Tensor.mm: Operands(0, 1),
    torch.bmm: Operands(0, 1),
    Tensor.bmm: Operands(0, 1),
    torch.addmm: Operands(1, 2, bias=0),
}


@dataclass(frozen=True, slots=True)
class _OperatorCall:
    """An operator with its arguments, one of which is a view of a weight."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def inputs(self) -> Tensor:
        inputs: Tensor = self.args[OPERATORS[self.operator].inputs]
        return inputs

    @property
    def matrix(self) -> Tensor:
        matrix: Tensor = self.args[OPERATORS[self.operator].matrix]
        return matrix

    @property
    def bias(self) -> Any:
        at = OPERATORS[self.operator].bias
        return self.args[at] if at is not None and len(self.args) > at else self.kwargs.get("bias")

    @property
    def contracted(self) -> int:
        """The matrix's dimension that is summed over: the last one in `linear`, the one before in all others."""
        return self.matrix.dim() - (1 if self.operator is functional.linear else 2)

    def repeat(self, inputs: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """The same product with other operands."""
        operands = OPERATORS[self.operator]
        args, kwargs = list(self.args), dict(self.kwargs)
        args[operands.inputs], args[operands.matrix] = inputs, matrix
        if operands.bias is not None and len(args) > operands.bias:
            args[operands.bias] = bias
        elif "bias" in kwargs:
            kwargs["bias"] = bias
        result: Tensor = self.operator(*args, **kwargs)
        return result


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """A product that is about to be computed: its inputs, and the weight or the matrices of a stack that they meet."""

    weight: str  # its name
    dim: int  # the weight's dimension that meets the inputs
    parts: tuple[tuple[int | None, Tensor], ...]  # index of the matrix in a stack (or None), inputs N x C
    call: _OperatorCall
    weight_offset: int  # of the weight in its storage

    @property
    def inputs(self) -> Tensor:
        """All inputs, in the shape of the call."""
        return self.call.inputs

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the call, if it is a parameter."""
        return self.call.bias if isinstance(self.call.bias, nn.Parameter) else None

    def compute(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same product of other inputs with another weight, laid out in memory as the first, and its bias."""
        view = self.call.matrix
        matrix = weight.as_strided(view.shape, view.stride(), view.storage_offset() - self.weight_offset)
        return self.call.repeat(inputs, matrix, bias)


class WeightProducts(TorchFunctionMode):
    """While open, `observe` sees each product with one of the weights; if it returns a tensor, that is the result."""

    def __init__(self, weights: Mapping[str, nn.Parameter], observe: Callable[[WeightProduct], Tensor | None]) -> None:
        super().__init__()
        self.observe = observe
        self.by_storage: dict[int, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, weight in weights.items():
            self.by_storage[weight.untyped_storage().data_ptr()].append((name, weight))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS:
            operands = OPERATORS[func]
            if (
                len(args) > operands.matrix
                and isinstance(args[operands.inputs], Tensor)
                and isinstance(args[operands.matrix], Tensor)
            ):
                product = self._product(_OperatorCall(func, args, kwargs))
                result = None if product is None else self.observe(product)
                if result is not None:
                    return result
        return func(*args, **kwargs)

    def _product(self, call: _OperatorCall) -> WeightProduct | None:
        inputs, matrix = call.inputs, call.matrix
        features = inputs.shape[-1]
        for name, weight in self.by_storage.get(matrix.untyped_storage().data_ptr(), ()):
            index = _index_in_stack(matrix, weight)
            if index == ():
                continue
            # The weight's dimension that is contracted has the stride of the matrix's, whatever views lie between.
            stride = matrix.stride(call.contracted)
            dims = [d for d in range(weight.dim()) if weight.stride(d) == stride and weight.shape[d] == features]
            if len(dims) != 1 or matrix.shape[call.contracted] != features:
                continue
            parts: tuple[tuple[int | None, Tensor], ...]
            if matrix.dim() == 3:  # a stack: each matrix has inputs of its own
                parts = tuple((i, inputs[i].detach()) for i in range(len(matrix)))
            else:
                parts = ((index[0] if index is not None else None, inputs.detach().reshape(-1, features)),)
            return WeightProduct(name, dims[0], parts, call, int(weight.storage_offset()))
        return None


def _index_in_stack(matrix: Tensor, weight: Tensor) -> tuple[int, ...] | None:
    """Which matrix of a stack of weights this is; None where it is the whole weight, () where it is another part."""
    offset = matrix.storage_offset() - weight.storage_offset()
    if matrix.numel() == weight.numel():
        return None if offset == 0 else ()
    if weight.dim() != 3 or matrix.dim() != 2 or matrix.numel() * len(weight) != weight.numel():
        return ()
    index, rest = divmod(int(offset), int(weight.stride(0)))
    return (index,) if rest == 0 and 0 <= index < len(weight) else ()
