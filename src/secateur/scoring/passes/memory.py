"""Layers and calibration windows -> the bytes that each layer's activations take until the backward pass.

They are measured on two short samples and scaled to all windows. From them follows which layers are recomputed
(gradient checkpointing), or how many windows go through the model together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import processes
from secateur.scoring.passes.forward import PROBE_SAMPLES, PROBE_TOKENS, input_device, probe_windows

LEAST_BYTES = 3 * 2**29  # weights and activations together may always take this much


def activation_budget(model: nn.Module) -> int:
    """Bytes of activations that may be held instead of computed again: a fifth of the weights, more of a small model.

    >>> activation_budget(nn.Linear(2**12, 2**12, bias=False)) / 2**20
    1472.0
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return max(int(weights * 0.2), LEAST_BYTES - weights)


class ActivationMemory:
    """Bytes that layers hold for the backward pass over all windows, measured on the probe windows."""

    def __init__(self, layers: Sequence[str], windows: Tensor) -> None:
        self.layers, self.windows = tuple(layers), windows
        self.bytes: Counter[str] = Counter()  # layer -> bytes
        self._seen: dict[int, Tensor] = {}  # storages that are counted; holding them keeps their addresses theirs
        self._layer: str | None = None  # that is running

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """While open, a forward pass over the probe windows (with gradients) is measured."""
        self._seen.update({weight.untyped_storage().data_ptr(): weight for weight in model.parameters()})

        def running(layer: str | None, *_: Any) -> None:
            self._layer = layer

        with ExitStack() as stack:
            for path in self.layers:
                module = model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(partial(running, path)).remove)
                stack.callback(module.register_forward_hook(partial(running, None)).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor))
            yield

    def _count(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves, once."""
        address = tensor.untyped_storage().data_ptr()
        if self._layer is not None and address not in self._seen and not isinstance(tensor, nn.Parameter):
            self._seen[address] = tensor
            samples, length = self.windows.shape
            # Attention maps are tokens x tokens, so they grow with the square of the length.
            token_dims = max(1, sum(size == PROBE_TOKENS for size in tensor.shape))
            scale = samples / PROBE_SAMPLES * (length / min(length, PROBE_TOKENS)) ** token_dims
            self.bytes[self._layer] += int(tensor.untyped_storage().nbytes() * scale)
        return tensor

    def recomputed(self, memory: int) -> tuple[str, ...]:
        """The layers that do not fit into the memory (bytes). The last ones stay: backward, they are freed first."""
        count = len(self.layers)
        for path in reversed(self.layers) if memory else ():
            memory -= self.bytes[path]
            if memory < 0:
                break
            count -= 1
        return self.layers[:count]


def fitting_batches(model: PreTrainedModel, windows: Tensor, layers: Sequence[str], memory: int) -> list[Tensor]:
    """The windows in batches whose activations fit into the memory (bytes); at least one window for each process.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(40).reshape(4, 10)
    >>> [len(batch) for batch in fitting_batches(model, windows, ["model.decoder.layers.0"], memory=1)]
    [1, 1, 1, 1]
    """
    activations = ActivationMemory(layers, windows)
    with torch.enable_grad(), activations.recording(model):
        model(input_ids=probe_windows(windows).to(input_device(model)), use_cache=False)
    of_each = max(1, sum(activations.bytes.values()) // len(windows))
    at_once = -processes.largest(-max(1, int(memory // of_each))) * processes.count()
    return list(windows.tensor_split(max(1, len(windows) // at_once)))
