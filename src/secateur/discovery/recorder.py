"""Records every ATen operator of a forward pass on fake tensors, and follows integer values where code reads them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.discovery.graph import Node, Ref

logger = logging.getLogger(__name__)

MOST_VALUES = 1 << 22  # elements of a tensor whose values are followed


class Recorder(TorchDispatchMode):
    """Writes down every operator; tensors are numbered in the order in which they are first seen.

    With `follow_values` it also knows numbers: those of the inputs, of what is made from them, and of every choice.
    Weights and activations stay fake. Code that takes the experts that were hit, or splits tokens by how many each
    expert got, then runs as it would: what depends on the inputs alone is computed, and where a choice depends on
    activations (`topk`, a comparison) some choice is made: the first ones, or True.
    """

    def __init__(self, *, follow_values: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.follow_values = follow_values
        self.nodes: list[Node] = []
        self.shapes: list[tuple[int, ...]] = []
        self.modules: list[str] = []  # whose forward is running, innermost last
        self.unregistered: list[int] = []  # tensors that came from nowhere: constants of the code
        self.literal_indices: dict[int, tuple[int, ...]] = {}
        self.item_calls: dict[str, tuple[int, int]] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives
        self._values: dict[int, Tensor] = {}  # tensor -> its values
        self._just_read: tuple[Any, Ref] | None = None  # a number that the code has just read, and from which tensor

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; a new one where it is new."""
        known, shape = self._numbers.get(id(tensor)), tuple(tensor.shape)
        if known is None or self.shapes[known] != shape:  # an operator may change a shape in place
            self._numbers[id(tensor)] = len(self.shapes)
            self._alive.append(tensor)
            self.shapes.append(shape)
        return self._numbers[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((args, tuple(kwargs.values()))):
            if id(tensor) not in self._numbers:
                self.unregistered.append(self.number(tensor))
        # Arguments by their schema names, whether given by position, by name or not at all.
        defaults, written = _signature(func)
        given = [args[i] if i < len(args) else kwargs.get(name, value) for i, (name, value) in enumerate(defaults)]
        arguments = {name: self._with_refs(value) for (name, _), value in zip(defaults, given, strict=True)}
        result = self._run_on_values(func, args, kwargs) if self.follow_values else func(*args, **kwargs)
        outputs = tuple(self.number(tensor) for tensor in tensors_in(result))
        # `x[..., [0, 2]]` lifts a tensor of the code into the trace, or indexes by it at once: its numbers are real.
        if func is torch.ops.aten.lift_fresh.default:
            self._note_literal_indices(args[0], result)
        elif func is torch.ops.aten.index.Tensor:
            for index in args[1]:
                self._note_literal_indices(index, index)
        elif written is not None and isinstance(arguments[written], Ref):
            self.literal_indices.pop(arguments[written].tensor, None)
        op, arguments = self._described(func, arguments)
        if outputs:
            pointwise = torch.Tag.pointwise in func.tags
            self.nodes.append(Node(op, arguments, outputs, self.module, pointwise, in_place=written))
        return result

    @property
    def module(self) -> str:
        """The innermost module whose forward is running."""
        return self.modules[-1] if self.modules else ""

    def _note_literal_indices(self, known: Tensor | None, of: Tensor | None) -> None:
        """Keep the numbers of a one-dimensional integer tensor of the code (a fake tensor has none)."""
        if known is None or of is None or isinstance(known, FakeTensor) or known.dim() != 1:
            return
        if known.dtype in (torch.int32, torch.int64) and known.device.type == "cpu":
            with unset_fake_temporarily():
                self.literal_indices[self.number(of)] = tuple(int(i) for i in known.tolist())

    def _with_refs(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Ref(self.number(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._with_refs(item) for item in value)
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return str(value)
        return value

    def set_values(self, tensor: Tensor, values: Tensor) -> None:
        """Note the values that a fake tensor would have."""
        self._values[self.number(tensor)] = values

    def _run_on_values(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator on fake tensors, and on the values where they are known."""
        values = self._computed(func, args, kwargs)
        # The code reads a number (`.item()`, a branch): give it the known one, or one that takes the branch.
        if func is torch.ops.aten._local_scalar_dense.default:
            number = 1.0 if values is None else values
            self._note_read(self._just_read)
            self._just_read = number, Ref(self.number(args[0]))
            return number
        # Indexing by a mask gives as many positions as are true: index by these positions instead.
        if func in INDEXED_BY_MASKS:
            args = (args[0], [piece for index in args[1] for piece in self._as_positions(index)], *args[2:])
        if values is not None and torch.Tag.dynamic_output_shape in func.tags and func not in INDEXED_BY_MASKS:
            result = self._fake(values) if isinstance(values, Tensor) else tuple(self._fake(v) for v in values)
        else:
            result = func(*args, **kwargs)
        known = list(tensors_in(values)) if values is not None else []
        for i, tensor in enumerate(tensors_in(result)):
            value = known[i] if i < len(known) else _some_choice(func, args, tensor)
            if value is not None:
                self.set_values(tensor, value)
            else:
                self._values.pop(self.number(tensor), None)
        return result

    def _described(self, func: Any, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The name of an operator and its arguments as the node has them.

        `x[i]` with a tensor i reads the number and selects: record that it is a lookup by that tensor.
        """
        if func is not torch.ops.aten._local_scalar_dense.default:
            just_read, self._just_read = self._just_read, None
            if func is torch.ops.aten.select.int and just_read is not None and just_read[0] == arguments["index"]:
                indices = (*[None] * arguments["dim"], just_read[1])
                return "aten.index", {"self": arguments["self"], "indices": indices}
            self._note_read(just_read)
        return f"{func.namespace}.{func._schema.name.split('::')[-1]}", arguments

    def _note_read(self, read: tuple[Any, Ref] | None) -> None:
        """Record that the code has read a number for more than a lookup."""
        if read is not None:
            self.nodes.append(Node("aten._local_scalar_dense", {"self": read[1]}, (), self.module))

    def _computed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The values of the outputs, when those of all inputs are known and few."""
        inputs = list(tensors_in((args, tuple(kwargs.values()))))
        if any(self.number(t) not in self._values and isinstance(t, FakeTensor) for t in inputs):
            return None
        if any(t.numel() > MOST_VALUES for t in inputs) or (not inputs and prod(_sizes(args)) > MOST_VALUES):
            return None
        with unset_fake_temporarily():
            try:
                values_of = partial(pytree.tree_map_only, Tensor, lambda t: self._values.get(self.number(t), t))
                return func(*values_of(tuple(args)), **values_of(kwargs))
            except RuntimeError as error:  # a division by a number that was some choice, say
                logger.debug("%s cannot be computed: %s", func, error)
                return None

    def _as_positions(self, index: Any) -> list[Any]:
        """A mask among indices as the positions where it is true; anything else as it is."""
        if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        with unset_fake_temporarily():
            values = self._values.get(self.number(index), torch.ones(index.shape, dtype=torch.bool))
            columns = values.nonzero().unbind(1)
        return [self._fake(column) for column in columns]

    def _fake(self, values: Tensor) -> Tensor:
        fake: Tensor = torch.empty(values.shape, dtype=values.dtype)
        self.set_values(fake, values)
        return fake


INDEXED_BY_MASKS = frozenset(
    {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
)


def _some_choice(func: Any, args: Sequence[Any], output: Tensor) -> Tensor | None:
    """Values of an integer or boolean output whose inputs are not known: positions in order, True, or zero."""
    if output.dtype.is_floating_point or output.dtype.is_complex or output.numel() > MOST_VALUES:
        return None
    with unset_fake_temporarily():
        if output.dtype == torch.bool:
            return torch.ones(output.shape, dtype=output.dtype)
        values = torch.zeros(output.shape, dtype=output.dtype)
        if func in (torch.ops.aten.topk.default, torch.ops.aten.sort.default) and values.dim():
            along = next((a for a in args[1 if func is torch.ops.aten.sort.default else 2 :] if type(a) is int), -1)
            size = values.shape[along]
            shape = [size if i == along % values.dim() else 1 for i in range(values.dim())]
            values += torch.arange(size, dtype=output.dtype).reshape(shape)
        return values


def _sizes(args: Sequence[Any]) -> list[int]:
    return [n for a in args if isinstance(a, (list, tuple)) for n in a if isinstance(n, int)]


@functools.cache
def _signature(func: Any) -> tuple[tuple[tuple[str, Any], ...], str | None]:
    """The names and defaults of an operator's arguments, and the argument that it writes to."""
    schema = func._schema.arguments
    written = next((a.name for a in schema if a.alias_info is not None and a.alias_info.is_write), None)
    return tuple((a.name, a.default_value) for a in schema), written


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
