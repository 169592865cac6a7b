"""A running model -> each matrix product with one of its weights: the inputs, and the weight's dimension they meet.

Products are observed where they are computed, not by the module that computes them: a weight, or one matrix of a stack
of weights, that is an operand of `linear`, `matmul`, `mm`, `addmm` or `bmm`. So linear layers of any kind, `Conv1D` and
stacked experts look alike. All samples go forward together, so when a layer is done, all inputs of its weights have
been seen. Axes: B samples, T tokens, N tokens of all samples, C features (columns of the weight), D hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from secateur.models.inputs import arguments, hidden_in, hidden_read
from secateur.models.streaming import moves
from secateur.progress import Progress
from secateur.scoring.passes.forward import embedding_device, plain_products, probe_windows, split_output_head


class Operands(NamedTuple):
    """Positions of an operator's arguments."""

    inputs: int
    matrix: int
    bias: int | None = None


OPERATORS: dict[Any, Operands] = {
    functional.linear: Operands(0, 1, bias=2),
    torch.addmm: Operands(1, 2, bias=0),
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), Operands(0, 1)
    ),
}


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """A product that is about to be computed: its inputs, and the weight or the matrices of a stack that they meet."""

    weight: str  # its name
    dim: int  # the weight's dimension that meets the inputs
    parts: tuple[tuple[int | None, Tensor], ...]  # index of the matrix in a stack (or None), inputs N x C
    operator: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    weight_offset: int  # of the weight in its storage

    @property
    def inputs(self) -> Tensor:
        """All inputs, in the shape of the call."""
        inputs: Tensor = self.args[OPERATORS[self.operator].inputs]
        return inputs

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the call, if it is a parameter."""
        at = OPERATORS[self.operator].bias
        bias = self.args[at] if at is not None and len(self.args) > at else self.kwargs.get("bias")
        return bias if isinstance(bias, nn.Parameter) else None

    def of(self, inputs: Tensor) -> Tensor:
        """The same product of other inputs."""
        args = list(self.args)
        args[OPERATORS[self.operator].inputs] = inputs
        result: Tensor = self.operator(*args, **self.kwargs)
        return result

    def compute(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same product of other inputs with another weight, laid out in memory as the first, and its bias."""
        operands, args, kwargs = OPERATORS[self.operator], list(self.args), dict(self.kwargs)
        view: Tensor = args[operands.matrix]
        args[operands.inputs] = inputs
        weight, bias = weight.to(view.device), None if bias is None else bias.to(view.device)
        args[operands.matrix] = weight.as_strided(view.shape, view.stride(), view.storage_offset() - self.weight_offset)
        if operands.bias is not None and len(args) > operands.bias:
            args[operands.bias] = bias
        elif "bias" in kwargs:
            kwargs["bias"] = bias
        result: Tensor = self.operator(*args, **kwargs)
        return result


class WeightProducts(TorchFunctionMode):
    """While open, `observe` sees each product with one of the weights; if it returns a tensor, that is the result."""

    def __init__(self, weights: Mapping[str, nn.Parameter], observe: Callable[[WeightProduct], Tensor | None]) -> None:
        super().__init__()
        self.observe, self._weights = observe, weights
        self._find()

    def _find(self) -> None:
        """Note where the weights lie."""
        self._moves = moves()
        self.by_storage: dict[int, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, weight in self._weights.items():
            self.by_storage[weight.untyped_storage().data_ptr()].append((name, weight))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = OPERATORS.get(func)
        if operands is not None and len(args) > operands.matrix:
            inputs, matrix = args[operands.inputs], args[operands.matrix]
            if isinstance(inputs, Tensor) and isinstance(matrix, Tensor):
                product = self._product(func, args, kwargs, inputs, matrix)
                result = None if product is None else self.observe(product)
                if result is not None:
                    return result
        return func(*args, **kwargs)

    def _product(
        self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Tensor, matrix: Tensor
    ) -> WeightProduct | None:
        if self._moves != moves():  # a layer was brought to the device
            self._find()
        features = inputs.shape[-1]
        contracted = matrix.dim() - (1 if operator is functional.linear else 2)  # `linear` transposes its matrix
        for name, weight in self.by_storage.get(matrix.untyped_storage().data_ptr(), ()):
            index = _index_in_stack(matrix, weight)
            if index == ():
                continue
            # The weight's dimension that is contracted has the stride of the matrix's, whatever views lie between.
            stride = matrix.stride(contracted)
            dims = [d for d in range(weight.dim()) if weight.stride(d) == stride and weight.shape[d] == features]
            if len(dims) != 1 or matrix.shape[contracted] != features:
                continue
            parts: tuple[tuple[int | None, Tensor], ...]
            if matrix.dim() == 3:  # a stack: each matrix has inputs of its own
                parts = tuple((i, inputs[i].detach()) for i in range(len(matrix)))
            else:
                parts = ((index[0] if index is not None else None, inputs.detach().reshape(-1, features)),)
            return WeightProduct(name, dims[0], parts, operator, args, kwargs, int(weight.storage_offset()))
        return None


def _index_in_stack(matrix: Tensor, weight: Tensor) -> tuple[int, ...] | None:
    """Which matrix of a stack of weights this is; None where it is the whole weight, () where it is another part."""
    offset = matrix.storage_offset() - weight.storage_offset()
    if matrix.numel() == weight.numel() and (matrix.dim() == weight.dim() or len(weight) > 1):
        return None if offset == 0 else ()
    if weight.dim() != 3 or matrix.dim() != 2 or matrix.numel() * len(weight) != weight.numel():
        return ()
    index, rest = divmod(int(offset), int(weight.stride(0)))
    return (index,) if rest == 0 and 0 <= index < len(weight) else ()


# Name of a weight, its dimension that meets the inputs, the index in a stack (or None), and the inputs N x C.
InputVisit = Callable[[str, int, int | None, Tensor], None]
# Path of a layer and the hidden states before and after it, B x T x D.
LayerVisit = Callable[[str, Tensor, Tensor], None]


@torch.no_grad()
def stream_inputs(
    model: PreTrainedModel,
    windows: Tensor,
    visit: InputVisit,
    *,
    wanted: Collection[str] | None = None,
    layers: Sequence[str] = (),
    visit_layer: LayerVisit | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the windows (int64, samples x length) through the model and visit the inputs of each product with a weight.

    `wanted` names the weights (by default, all of two or more dimensions), `layers` the modules that are visited.
    """
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and (wanted is None or n in wanted)}
    ids_BT = windows.to(embedding_device(model))

    def observe(product: WeightProduct) -> None:
        for index, x_NC in product.parts:
            visit(product.weight, product.dim, index, x_NC)

    def hook(path: str, done: int, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        before, after = hidden_read(args, kwargs), hidden_in(output)
        if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape and visit_layer:
            visit_layer(path, before, after)
        if progress is not None:
            progress(done, len(layers))

    with ExitStack() as stack:
        stack.enter_context(plain_products(model))
        head = split_output_head(model, probe_windows(windows).to(ids_BT.device))
        for done, path in enumerate(layers, 1):
            module = model.get_submodule(path)
            stack.callback(module.register_forward_hook(partial(hook, path, done), with_kwargs=True).remove)
        stack.enter_context(WeightProducts(weights, observe))
        if head is None:
            model(**arguments(model, ids_BT))
            return
        hidden_BTD = head.hidden(ids_BT)
        for some in head.chunks(ids_BT):
            head.logits(hidden_BTD[some], ids_BT[some])


def input_dims(model: PreTrainedModel, ids: Tensor) -> dict[str, int]:
    """The dimension along which each weight meets its inputs, seen in a pass over these ids (samples x length)."""
    dims: dict[str, int] = {}
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    with torch.no_grad(), plain_products(model), WeightProducts(weights, lambda p: dims.update({p.weight: p.dim})):
        model(**arguments(model, ids.to(embedding_device(model))))
    return dims
