"""Model -> graph of ATen operators, recorded from one forward pass that allocates nothing.

The forward pass runs on fake tensors (shapes and dtypes, no storage) while a dispatch mode writes down every operator
that reaches the ATen level. A 7B model takes half a second and no weights; `torch.export` on the same model takes
nine seconds, refuses models that this accepts, and yields the same operators. The batch and sequence lengths are
primes that divide no size of the model, so that a dimension is never mistaken for another because their sizes agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import DiscoveryError


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
    sizes = {size for tensor in itertools.chain(model.parameters(), model.buffers()) for size in tensor.shape}
    batch, sequence = colliding_with_nothing(sizes)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with fake_mode:
        fakes = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in named.items()}
        input_ids = torch.zeros(batch, sequence, dtype=torch.long)
    parameters = {name: recorder.number(fakes[name]) for name, _ in model.named_parameters()}
    buffers = {name: recorder.number(fakes[name]) for name, _ in model.named_buffers()}
    inputs = {"input_ids": recorder.number(input_ids)}
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
        inputs=inputs,
        outputs=(recorder.number(logits),),
        batch=batch,
        sequence=sequence,
        tied=aliases,
        computed_buffers=frozenset(name for name in buffers if name not in persistent),
        calls=dict(recorder.calls),
    )


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


class _Recorder(TorchDispatchMode):
    """Writes down every operator; tensors are numbered in the order in which they are first seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.shapes: list[tuple[int, ...]] = []
        self.modules: list[str] = []
        self.unknown: list[int] = []
        self.calls: dict[str, tuple[int, int]] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives

    def number(self, tensor: Tensor) -> int:
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
        result = func(*args, **kwargs)
        outputs = tuple(self.number(tensor) for tensor in _tensors(result))
        if outputs:
            node = Node(
                op=f"{func.namespace}.{func._schema.name.split('::')[-1]}",
                arguments=arguments,
                outputs=outputs,
                module=self.modules[-1] if self.modules else "",
                pointwise=torch.Tag.pointwise in func.tags,
                in_place=next((a.name for a in schema if a.alias_info is not None and a.alias_info.is_write), None),
            )
            self.nodes.append(node)
        return result

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Ref(self.number(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._plain(item) for item in value)
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return str(value)
        return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@contextmanager
def _module_stack(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
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
