"""Model -> graph of ATen operators, recorded from one forward pass that allocates nothing.

The forward pass runs on fake tensors (shapes and dtypes, no storage) while a dispatch mode writes down every operator
that reaches the ATen level. A 7B model takes half a second and no weights; `torch.export` on the same model takes
nine seconds, refuses models that this accepts, and yields the same operators. The batch and sequence lengths are
primes that divide no size of the model, so that a dimension is never mistaken for another because their sizes agree.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import DiscoveryError

logger = logging.getLogger(__name__)

ON_DATA = (DataDependentOutputException, DynamicOutputShapeException)
MOST_VALUES = 1 << 22  # elements of a tensor whose values are followed


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the graph, by number; `Graph.shapes[number]` is its shape."""

    tensor: int


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call: its arguments by their schema names, with tensors replaced by `Ref`."""

    op: str  # "aten.mm"
    arguments: dict[str, Any]
    outputs: tuple[int, ...]  # tensors, in order
    module: str  # "model.layers.0.mlp", the innermost module whose forward ran it
    pointwise: bool = False
    in_place: str | None = None  # the argument it writes to


@dataclass(frozen=True, slots=True)
class Graph:
    """The operators of one forward pass in order, and which tensors are weights, inputs and outputs."""

    nodes: tuple[Node, ...]
    shapes: tuple[tuple[int, ...], ...]
    parameters: dict[str, int]  # canonical name -> tensor
    buffers: dict[str, int]
    constants: tuple[int, ...]  # tensors the code holds outside parameters and buffers
    values: dict[int, tuple[int, ...]]  # the positions that the code writes out, as in x[..., [-2, -1], :]
    inputs: dict[str, int]
    outputs: tuple[int, ...]
    batch: int
    sequence: int
    tied: dict[str, str] = field(default_factory=dict)  # other name -> canonical name
    computed_buffers: frozenset[str] = frozenset()  # buffers that are not in the checkpoint
    calls: dict[str, tuple[int, int]] = field(default_factory=dict)  # list item -> its first input and output tensor


def trace(model: nn.Module) -> Graph:
    """Record the operators of one causal-LM forward pass of `model`; its weights may be on `meta`.

    The model should use eager attention, so that its attention is written in plain matrix products. Raises
    `DiscoveryError` when the forward pass fails or branches on the values of tensors.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=12)
    >>> with torch.device("meta"):
    ...     model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    >>> graph = trace(model)
    >>> [node.op for node in graph.nodes if node.module.endswith("layers.0.fc1")]
    ['aten.t', 'aten.addmm']
    """
    try:
        return _trace(model, Recorder())
    except ON_DATA as error:  # slower, but for the few models whose code looks at numbers
        logger.debug("%s branches on data (%s); following values", type(model).__name__, error)
    return _trace(model, ValueRecorder())


def run_without_memory(model: nn.Module, *, sequence: int, **options: Any) -> Any:
    """Return what one forward pass over a row of `sequence` tokens gives; its tensors are fake: shapes, no storage.

    The model's weights may be on `meta`; `options` go to its forward. Raises `DiscoveryError` when the pass fails.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 12}
    >>> config = AutoConfig.for_model("opt", num_hidden_layers=1, vocab_size=9, **sizes)
    >>> with torch.device("meta"):
    ...     model = AutoModelForCausalLM.from_config(config).eval()
    >>> tuple(run_without_memory(model, sequence=3, use_cache=False).logits.shape)
    (1, 3, 9)
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for recorder in (None, ValueRecorder()):  # the second for code that looks at numbers
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        with fake_mode:
            fakes = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in named.items()}
            input_ids = torch.zeros(1, sequence, dtype=torch.long)
        if recorder is not None:
            recorder.knows(input_ids, torch.arange(sequence)[None] % max(_least_rows(model), 1))
        with torch.no_grad(), fake_mode, recorder if recorder is not None else nullcontext():
            try:
                return functional_call(model, fakes, (), {"input_ids": input_ids, **options}, tie_weights=True)
            except Exception as error:  # any model code may raise anything
                if isinstance(error, ON_DATA) and recorder is None:
                    continue
                raise DiscoveryError(
                    f"{type(model).__name__}: the forward pass cannot be run without weights; it failed with "
                    f"{type(error).__name__}: {_first_line(error)}"
                ) from error
    raise AssertionError("unreachable: the second pass returns or raises")


def _trace(model: nn.Module, recorder: Recorder) -> Graph:
    sizes = {size for tensor in itertools.chain(model.parameters(), model.buffers()) for size in tensor.shape}
    batch, sequence = colliding_with_nothing(sizes)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with fake_mode:
        fakes = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in named.items()}
        input_ids = torch.zeros(batch, sequence, dtype=torch.long)
    parameters = {name: recorder.number(fakes[name]) for name, _ in model.named_parameters()}
    buffers = {name: recorder.number(fakes[name]) for name, _ in model.named_buffers()}
    inputs = {"input_ids": recorder.number(input_ids)}
    recorder.knows(input_ids, torch.arange(batch * sequence).reshape(batch, sequence) % max(_least_rows(model), 1))
    first_constant = len(recorder.shapes)
    aliases = _aliases(model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(fake_mode)
        stack.enter_context(_module_stack(model, recorder))
        stack.enter_context(recorder)
        try:
            result = functional_call(model, fakes, (), {"input_ids": input_ids, "use_cache": False}, tie_weights=True)
        except Exception as error:  # any model code may raise anything
            if isinstance(error, ON_DATA) and not isinstance(recorder, ValueRecorder):
                raise
            where = (recorder.modules and recorder.modules[-1]) or "the model"  # the outermost has no name
            raise DiscoveryError(
                f"{type(model).__name__}: the forward pass could not be traced; it failed in {where!r} with "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
    logits = result.logits if hasattr(result, "logits") else result[0]
    persistent = set(model.state_dict().keys())
    return Graph(
        nodes=tuple(recorder.nodes),
        shapes=tuple(recorder.shapes),
        parameters=parameters,
        buffers=buffers,
        constants=tuple(c for c in recorder.unknown if c >= first_constant),
        values=dict(recorder.positions),
        inputs=inputs,
        outputs=(recorder.number(logits),),
        batch=batch,
        sequence=sequence,
        tied=aliases,
        computed_buffers=frozenset(name for name in buffers if name not in persistent),
        calls=dict(recorder.calls),
    )


def _least_rows(model: nn.Module) -> int:
    """Numbers below this are rows of every embedding table."""
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=1)


def colliding_with_nothing(sizes: set[int]) -> tuple[int, int]:
    """Two different primes, from 5 up, that divide none of `sizes`: the batch and the sequence length of a trace.

    >>> colliding_with_nothing({10, 14, 64})
    (11, 13)
    """
    primes = (n for n in itertools.count(5, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2)))
    free = (prime for prime in primes if all(size % prime for size in sizes if size))
    return next(free), next(free)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every second name of a tied parameter -> its canonical (first) name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


class Recorder(TorchDispatchMode):
    """Writes down every operator; tensors are numbered in the order in which they are first seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.shapes: list[tuple[int, ...]] = []
        self.modules: list[str] = []
        self.unknown: list[int] = []
        self.positions: dict[int, tuple[int, ...]] = {}
        self.calls: dict[str, tuple[int, int]] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; a new one where it is new."""
        known, shape = self._numbers.get(id(tensor)), tuple(int(size) for size in tensor.shape)
        if known is None or self.shapes[known] != shape:  # an operator may change a shape in place
            self._numbers[id(tensor)] = len(self.shapes)
            self._alive.append(tensor)
            self.shapes.append(shape)
        return self._numbers[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, tuple(kwargs.values()))):
            if id(tensor) not in self._numbers:
                self.unknown.append(self.number(tensor))
        schema = func._schema.arguments
        given = [args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(schema)]
        arguments = {a.name: self._plain(value) for a, value in zip(schema, given, strict=True)}
        result = self.run(func, args, kwargs)
        outputs = tuple(self.number(tensor) for tensor in _tensors(result))
        written = next((arguments[a.name] for a in schema if a.alias_info is not None and a.alias_info.is_write), None)
        if func is torch.ops.aten.lift_fresh.default:
            self._note_positions(args[0], result)
        elif func is torch.ops.aten.index.Tensor:
            for index in args[1]:
                self._note_positions(index, index)
        elif isinstance(written, Ref):
            self.positions.pop(written.tensor, None)
        op, arguments = self.recorded(func, arguments)
        if outputs:
            node = Node(
                op=op,
                arguments=arguments,
                outputs=outputs,
                module=self.modules[-1] if self.modules else "",
                pointwise=torch.Tag.pointwise in func.tags,
                in_place=next((a.name for a in schema if a.alias_info is not None and a.alias_info.is_write), None),
            )
            self.nodes.append(node)
        return result

    def _note_positions(self, known: Tensor | None, of: Tensor | None) -> None:
        """Keep the numbers of a list that the code holds (a fake tensor has none)."""
        if known is None or of is None or isinstance(known, FakeTensor) or known.dim() != 1:
            return
        if known.dtype in (torch.int32, torch.int64) and known.device.type == "cpu":
            with unset_fake_temporarily():
                self.positions[self.number(of)] = tuple(int(i) for i in known.tolist())

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Execute an operator on fake tensors."""
        return func(*args, **kwargs)

    def recorded(self, func: Any, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The name of an operator and its arguments as they are written down."""
        return f"{func.namespace}.{func._schema.name.split('::')[-1]}", arguments

    def knows(self, tensor: Tensor, values: Tensor) -> None:
        """Take note of the values that a fake tensor would have."""

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Ref(self.number(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._plain(item) for item in value)
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return str(value)
        return value


class ValueRecorder(Recorder):
    """A recorder that also knows numbers: those of the inputs, of what is made from them, and of every choice.

    Weights and activations stay fake. Code that takes the experts that were hit, or splits tokens by how many each
    expert got, then runs as it would: what depends on the inputs alone is computed, and where a choice depends on
    activations (`topk`, a comparison) some choice is made: the first ones, or True.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[int, Tensor] = {}  # tensor -> its values
        self._just_read: tuple[Any, Ref] | None = None  # a number that the code has just read, and from which tensor

    def knows(self, tensor: Tensor, values: Tensor) -> None:
        """Take note of the values that a fake tensor would have."""
        self._values[self.number(tensor)] = values

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Execute an operator on fake tensors, and on the values where they are known."""
        values = self._computed(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            number = 1.0 if values is None else values
            self._note_read(self._just_read)
            self._just_read = number, Ref(self.number(args[0]))
            return number
        if func in WHERE_TRUE:
            mask = args[1]
            args = (args[0], [piece for index in mask for piece in self._as_numbers(index)], *args[2:])
        if values is not None and torch.Tag.dynamic_output_shape in func.tags and func not in WHERE_TRUE:
            result = self._fake(values) if isinstance(values, Tensor) else tuple(self._fake(v) for v in values)
        else:
            result = func(*args, **kwargs)
        known = list(_tensors(values)) if values is not None else []
        for i, tensor in enumerate(_tensors(result)):
            found = known[i] if i < len(known) else _some_choice(func, args, tensor)
            if found is not None:
                self.knows(tensor, found)
            else:
                self._values.pop(self.number(tensor), None)
        return result

    def recorded(self, func: Any, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """`x[i]` with a tensor i reads the number and selects: record that it is a lookup by that tensor."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return super().recorded(func, arguments)
        just_read, self._just_read = self._just_read, None
        if func is torch.ops.aten.select.int and just_read is not None and just_read[0] == arguments["index"]:
            indices = (*[None] * arguments["dim"], just_read[1])
            return "aten.index", {"self": arguments["self"], "indices": indices}
        self._note_read(just_read)
        return super().recorded(func, arguments)

    def _note_read(self, read: tuple[Any, Ref] | None) -> None:
        """Record that the code has read a number for more than a lookup."""
        if read is not None:
            module = self.modules[-1] if self.modules else ""
            self.nodes.append(Node("aten._local_scalar_dense", {"self": read[1]}, (), module))

    def _computed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The values of the outputs, when those of all inputs are known and few."""
        inputs = list(_tensors((args, tuple(kwargs.values()))))
        if any(self.number(t) not in self._values and isinstance(t, FakeTensor) for t in inputs):
            return None
        if any(t.numel() > MOST_VALUES for t in inputs) or (not inputs and prod(_sizes(args)) > MOST_VALUES):
            return None

        def real(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._values.get(self.number(value), value)
            return type(value)(real(item) for item in value) if isinstance(value, (list, tuple)) else value

        with unset_fake_temporarily():
            try:
                return func(*real(tuple(args)), **{name: real(value) for name, value in kwargs.items()})
            except RuntimeError as error:  # a division by a number that was some choice, say
                logger.debug("%s cannot be computed: %s", func, error)
                return None

    def _as_numbers(self, index: Any) -> list[Any]:
        """A mask among indices as the positions where it is true; anything else as it is."""
        if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        with unset_fake_temporarily():
            values = self._values.get(self.number(index), torch.ones(index.shape, dtype=torch.bool))
            columns = values.nonzero().unbind(1)
        return [self._fake(column) for column in columns]

    def _fake(self, values: Tensor) -> Tensor:
        fake: Tensor = torch.empty(values.shape, dtype=values.dtype)
        self.knows(fake, values)
        return fake


WHERE_TRUE = frozenset(
    {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
)


def _some_choice(func: Any, args: Sequence[Any], output: Tensor) -> Tensor | None:
    """Numbers that an operator might give whose inputs are not known: positions in order, True, or zero."""
    if output.dtype.is_floating_point or output.dtype.is_complex or output.numel() > MOST_VALUES:
        return None
    with unset_fake_temporarily():
        if output.dtype == torch.bool:
            return torch.ones(output.shape, dtype=output.dtype)
        found = torch.zeros(output.shape, dtype=output.dtype)
        if func in (torch.ops.aten.topk.default, torch.ops.aten.sort.default) and found.dim():
            along = next((a for a in args[1 if func is torch.ops.aten.sort.default else 2 :] if type(a) is int), -1)
            size = found.shape[along]
            shape = [size if i == along % found.dim() else 1 for i in range(found.dim())]
            found += torch.arange(size, dtype=output.dtype).reshape(shape)
        return found


def _sizes(args: Sequence[Any]) -> list[int]:
    return [n for a in args if isinstance(a, (list, tuple)) for n in a if isinstance(n, int)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@contextmanager
def _module_stack(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep the names of the modules whose forward is running, innermost last; note what list items take and give."""

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: recorder.modules.append(name)

    def leaving(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            recorder.modules.pop()
            enters = next(_tensors((args, tuple(kwargs.values()))), None)
            leaves = next(_tensors(output), None)
            if name.rpartition(".")[2].isdigit() and enters is not None and leaves is not None:
                recorder.calls[name] = recorder.number(enters), recorder.number(leaves)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leaving(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or "no message"
