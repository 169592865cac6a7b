"""A model -> the bytes of its weights, of its cache, and of all that one forward pass holds at its peak.

What a forward pass keeps for the next token is not computed by a formula: the model runs once, and what it returned is
looked at. On `meta` that takes no memory, so the cache of a config is known as well as that of a model.

Tensor names end in their axes: B batch, T token.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.tracing import run_without_memory
from secateur.evaluation.inference import (
    NOT_THE_CACHE,
    STATE_NAMES,
    decode_steps,
    evaluation_mode,
    input_device,
    random_ids,
    special_tokens,
)
from secateur.models.tensors import plain_tensors

logger = logging.getLogger(__name__)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers; a tied weight counts once, a packed one as packed.

    >>> weight_bytes(nn.Linear(4, 4, bias=False))  # 16 float32
    64
    """
    state = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    tensors = [plain for tensor in state for plain in plain_tensors(tensor)]
    # Two parameters may share memory without being one object; on `meta` there is no address, and the object counts.
    sizes = {(tensor.device, tensor.data_ptr() or id(tensor), tensor.shape): tensor.nbytes for tensor in tensors}
    return sum(sizes.values())


def cache_bytes_by_layer(model: PreTrainedModel, *, seq_len: int) -> tuple[int, ...] | None:
    """Return the bytes that a pass over one sequence of `seq_len` tokens keeps for the next, by layer.

    The model runs once, on `meta` too, and every tensor of what it returned is counted with the elements that it has:
    a window that slides keeps what is in it, and a layer without attention its state. What is not made of layers is
    one entry, and what returns nothing none. None where the pass fails: on `meta`, or because the code cannot keep any.
    """
    on_meta = not hasattr(model, "_hf_hook") and any(weight.device.type == "meta" for weight in model.parameters())
    with evaluation_mode(model), torch.no_grad():
        try:
            if on_meta:
                tokens = special_tokens(model)
                outputs = run_without_memory(model, sequence=seq_len, start_tokens=tokens, use_cache=True)
            else:
                outputs = model(input_ids=random_ids([model], 1, seq_len).to(input_device(model)), use_cache=True)
        except NOT_THE_CACHE:
            raise
        except Exception as error:  # whatever the model's own code raises
            logger.debug("%s", error)
            return None
    state = next((outputs[name] for name in STATE_NAMES if name in outputs), None)
    layers = getattr(state, "layers", state)
    entries = list(layers) if isinstance(layers, list | tuple) else [layers]
    sizes = tuple(sum(tensor.nbytes for tensor in _tensors_in(entry)) for entry in entries)
    return sizes if any(sizes) else ()


def _tensors_in(value: Any) -> list[Tensor]:
    """Every tensor that is reached through containers and attributes, each once; counters are no part of a cache."""
    seen: dict[int, Any] = {}

    def walk(value: Any) -> Iterator[Tensor]:
        if id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if value.dim() > 1:
                yield value
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | PreTrainedConfig | type):
            yield from walk(vars(value))

    return [*walk(value)]


def activation_bytes(model: PreTrainedModel, prompts_BT: Tensor) -> int:
    """Return the most bytes that one forward pass over the prompts holds besides the weights.

    On CUDA the allocator counts it. Elsewhere the bytes of all live tensors are counted after each operator, which
    gives the same number each time; what an operator allocates and frees within itself is not seen.
    """
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    steps = decode_steps(model, prompts_BT.to(input_device(model)))
    if devices:
        before = {device: torch.cuda.memory_allocated(device) for device in devices}
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        with torch.inference_mode():
            next(steps)
        for device in devices:
            torch.cuda.synchronize(device)
        return sum(int(torch.cuda.max_memory_allocated(device)) - before[device] for device in devices)
    memory = LiveBytes()
    with torch.no_grad(), memory:
        next(steps)
    return memory.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators allocate while it is entered: `live` now, and their `peak`.

    Final. Views and in-place results share their input's storage and count nothing; a storage stops counting when
    its last tensor is gone. Run it under `torch.no_grad()`, not `torch.inference_mode()`: there, composite operators
    (matmul, attention) arrive whole, and what they allocate within is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        borrowed = {id(storage) for storage in _storages((args, kwargs))}
        # torch keeps the Python object of a storage as long as the storage, so its id is a name for it
        fresh = {id(storage): storage for storage in _storages(outputs) if id(storage) not in borrowed}
        for storage in fresh.values():
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return outputs

    def _forget(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
