"""Gradient checkpointing: a module keeps its inputs instead of its activations, and runs again in the backward pass.

In the forward pass the module runs without a graph, and only its inputs are saved. When the backward pass reaches it,
it runs again with a graph, a few samples at a time, and the gradients go on to its inputs. There are two reasons to
recompute a module: its activations do not fit into memory, or autograd is to give the gradient of every single sample.
With a layer cache, outputs and input gradients of layers are also saved, and a pass that was killed reads them instead
of running those layers: one safetensors file for each layer and direction. `forward-0` holds the layer's output,
`backward-0` the gradients of its inputs and all results of weights that were finished since the file before.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import CheckpointError
from secateur.models.tensor_files import read_tensors, write_tensors
from secateur.scoring.passes.forward import rows_per_sample

RESULT, TENSOR = "found", "given"  # first part of a tensor's name in a file: found/WEIGHT/KIND, given/NUMBER


class LayerCache:
    """The files of finished layers in a folder, and what the pass has found: weight -> kind -> tensor.

    Opening it restores the results of the layers that are there.
    """

    def __init__(self, folder: Path, results: dict[str, dict[str, Tensor]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.results = folder, results
        for path in sorted(folder.glob("*.safetensors")):
            try:
                tensors, _ = read_tensors(path)
            except CheckpointError:  # damaged: that layer is computed again
                path.unlink()
                continue
            for key, tensor in tensors.items():
                if key.startswith(f"{RESULT}/"):
                    _, weight, kind = key.split("/", 2)
                    results.setdefault(weight, {})[kind] = tensor.clone()
        self.finished: set[str] = set(results)
        """Weights whose results are in files: the pass need not form their gradients."""

    def read(self, key: str) -> tuple[list[Tensor], str] | None:
        """The tensors saved under a key and the text that was saved with them; None where there is no file."""
        path = self._path(key)
        if not path.exists():
            return None
        tensors, text = read_tensors(path)
        count = sum(name.startswith(f"{TENSOR}/") for name in tensors)
        return [tensors[f"{TENSOR}/{i}"] for i in range(count)], text

    def write(self, key: str, tensors: Sequence[Tensor], text: str) -> None:
        """Save tensors, a text and all results that are in no file yet; whole or not at all.

        Raises `DiskError` when the file cannot be written.
        """
        content = {
            f"{RESULT}/{weight}/{kind}": tensor
            for weight, kinds in self.results.items()
            if weight not in self.finished
            for kind, tensor in kinds.items()
        }
        content |= {f"{TENSOR}/{i}": tensor.detach() for i, tensor in enumerate(tensors)}
        write_tensors(self._path(key), content, text)
        self.finished |= set(self.results)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key.replace('/', '-')}.safetensors"


@dataclass(frozen=True, slots=True)
class Recompute:
    """Which layers may be computed again in the backward pass, and what limits that."""

    layers: Sequence[str] = ()  # paths
    memory: int = 0  # bytes: the last layers whose activations fit are not recomputed; 0: all are
    layer_cache: LayerCache | None = None  # saves every layer when it is done; then all layers are recomputed


@dataclass(slots=True)
class SampleRange:
    """Which samples are running: all of a pass, or a chunk of them while a module is computed again."""

    first: int
    count: int
    depth: int = 0  # how many chunks within chunks; 0 where all samples run together

    @contextmanager
    def narrowed(self, first: int, count: int) -> Iterator[None]:
        """While open, only `count` samples from `first` on are running."""
        outer = self.first, self.count
        self.first, self.count, self.depth = first, count, self.depth + 1
        try:
            yield
        finally:
            (self.first, self.count), self.depth = outer, self.depth - 1


@dataclass(slots=True)
class Recomputation:
    """The modules of one pass that are computed again, and how far the backward pass is with them."""

    samples: SampleRange
    open_calls: Counter[str]  # path -> calls of its module that the backward pass has not reached
    layer_cache: LayerCache | None
    may_skip: Callable[[str], bool]  # whether a cached layer need not run again
    on_done: Callable[[str], None]  # called with a path when its last call has been computed again for all samples
    on_skipped: Callable[[str], None]  # called with a path when a call was read from the cache
    cached_calls: int = 0  # so far: a call's number is its name in the cache

    def wrap(self, module: nn.Module, path: str, chunk: int, *, cached: bool) -> Callable[..., Any]:
        """A `forward` for the module that is recomputed, `chunk` samples at a time."""
        forward = module.forward

        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            arguments, tensors = TensorTree.of((args, kwargs))
            call = ModuleCall(path, forward, arguments, chunk, self.samples.first, self.samples.count, self)
            if cached and self.layer_cache is not None and self.samples.depth == 0:
                call.number, self.cached_calls = self.cached_calls, self.cached_calls + 1
            # Autograd comes back to a function only if one of its inputs requires a gradient; token ids do not.
            anchor = torch.zeros((), requires_grad=True)
            outputs = _Checkpoint.apply(call, anchor, *tensors)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
            assert call.result is not None
            return call.result.filled(outputs)

        return checkpointed

    def done(self, path: str) -> None:
        """A call of a module has been computed again for all of its samples."""
        self.open_calls[path] -= 1
        if self.samples.depth == 0 and self.open_calls[path] == 0:
            self.on_done(path)

    def skipped(self, path: str) -> None:
        """A call of a module was done by an earlier process."""
        self.open_calls[path] -= 1
        self.on_skipped(path)


@dataclass(frozen=True, slots=True)
class TensorTree:
    """Arguments or results of a module with their tensors taken out: what is left is small."""

    leaves: tuple[Any, ...]  # `Tensor` where a tensor was
    spec: Any

    @classmethod
    def of(cls, value: Any) -> tuple[TensorTree, list[Tensor]]:
        """Take the tensors out of a value."""
        leaves, spec = pytree.tree_flatten(value)
        without = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(without, spec), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The value with these tensors."""
        remaining = iter(tensors)
        return pytree.tree_unflatten([next(remaining) if leaf is Tensor else leaf for leaf in self.leaves], self.spec)

    def to_json(self) -> str | None:
        """One line of JSON; None where the value holds more than tensors and None."""
        if any(leaf is not Tensor and leaf is not None for leaf in self.leaves):
            return None
        return json.dumps([[leaf is Tensor for leaf in self.leaves], pytree.treespec_dumps(self.spec)])

    @classmethod
    def from_json(cls, text: str) -> TensorTree:
        """Read what `to_json` wrote."""
        is_tensor, spec = json.loads(text)
        return cls(tuple(Tensor if each else None for each in is_tensor), pytree.treespec_loads(spec))


@dataclass(slots=True)
class ModuleCall:
    """One call of a recomputed module. Autograd keeps it to the end of the pass, so it holds no tensors."""

    path: str
    forward: Callable[..., Any]
    arguments: TensorTree
    chunk: int  # samples that are computed again at once
    first: int  # the first sample of the call
    samples: int  # how many samples the call has
    recomputation: Recomputation = field(repr=False)
    number: int | None = None  # among the calls that the layer cache holds; None for a call that it does not
    result: TensorTree | None = None

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run the module with these tensors as arguments; returns the tensors of its result."""
        args, kwargs = self.arguments.filled(tensors)
        self.result, results = TensorTree.of(self.forward(*args, **kwargs))
        return results

    def part(self, tensor: Tensor, first: int, count: int) -> Tensor:
        """The part of a tensor that belongs to some of the samples; all of it, where they share it."""
        step = rows_per_sample(tensor, self.samples) if count < self.samples else None
        return tensor if step is None else tensor[first * step : (first + count) * step]

    def load(self, direction: str) -> tuple[list[Tensor], str] | None:
        """The outputs (forward) or input gradients (backward) of this call in the layer cache, and a text."""
        cache = self.recomputation.layer_cache
        return None if cache is None or self.number is None else cache.read(f"{direction}/{self.number}")

    def save(self, direction: str, tensors: Sequence[Tensor], text: str) -> None:
        """Save outputs or input gradients to the layer cache, if there is one."""
        cache = self.recomputation.layer_cache
        if cache is not None and self.number is not None:
            cache.write(f"{direction}/{self.number}", tensors, text)


class _Checkpoint(torch.autograd.Function):
    """One module call as a single node of the graph."""

    @staticmethod
    def forward(ctx: Any, call: ModuleCall, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        # Autograd builds no graph in here, so the module's activations are freed when it returns.
        cached = call.load("forward")
        if cached is not None:
            outputs, call.result = cached[0], TensorTree.from_json(cached[1])
        else:
            outputs = call.run(inputs)
            text = call.result.to_json() if call.result else None
            if text is not None:
                call.save("forward", outputs, text)
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        own = {id(tensor) for tensor in inputs}  # a function must not return its inputs themselves
        return tuple(output.view_as(output) if id(output) in own else output for output in outputs)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: ModuleCall = ctx.call
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        needed = [i for i in range(len(inputs)) if ctx.needs_input_grad[i + 2]]
        cached = None
        if call.number is not None and call.recomputation.may_skip(call.path):
            cached = call.load("backward")
        if cached is not None:
            call.recomputation.skipped(call.path)
            gradients = dict(zip(needed, cached[0], strict=True))
        else:
            gradients = _input_gradients(call, inputs, output_gradients, needed)
            call.recomputation.done(call.path)
            if all(i in gradients for i in needed):
                call.save("backward", [gradients[i] for i in needed], "")
        return None, None, *(gradients.get(i) for i in range(len(inputs)))


def _input_gradients(
    call: ModuleCall, inputs: Sequence[Tensor], output_gradients: Sequence[Tensor | None], needed: Sequence[int]
) -> dict[int, Tensor]:
    """Run a module again, chunk by chunk, and back: number of an input -> its gradient."""
    gradients: dict[int, Tensor] = {}
    for first in range(0, call.samples, call.chunk):
        count = min(call.chunk, call.samples - first)
        # 1. These samples' inputs, as leaves of a graph of their own.
        parts = [call.part(tensor, first, count).detach() for tensor in inputs]
        for i in needed:
            parts[i].requires_grad_(True)
        # 2. Forward with that graph, then backward; hooks in the module see the gradients of its weights meanwhile.
        with call.recomputation.samples.narrowed(call.first + first, count), torch.enable_grad():
            pairs = [
                (output, call.part(gradient, first, count))
                for output, gradient in zip(call.run(parts), output_gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        # 3. The inputs' gradients: side by side for the samples, added up for what all samples share.
        for i in needed:
            new = parts[i].grad
            if new is None:
                continue
            step = rows_per_sample(inputs[i], call.samples) if count < call.samples else None
            if step is None:
                gradients[i] = new if i not in gradients else gradients[i] + new
            else:
                whole = gradients.setdefault(i, torch.zeros_like(inputs[i]))
                whole[first * step : (first + count) * step] = new
    return gradients
