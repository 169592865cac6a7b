"""A running model -> its layers one at a time: run again for some of the samples, or left out for what they gave.

Both ask that a layer takes and gives all that later ones need. Some hand on more, such as their keys, in an object that
all layers share. Axes: B samples, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from secateur.models.inputs import arguments, hidden_read, predicted
from secateur.scoring.passes.forward import embedding_device, probe_windows, replaced_forward, rows_per_sample
from secateur.scoring.passes.probe import activation_budget, activation_bytes_by_layer, independent_modules

LEAST_TOKENS = 2048  # that a layer runs on at once
WITHOUT_GRAPH = 0.5  # of the activations that a graph keeps, what a layer holds at once where there is none


class LayerOutputs:
    """What each layer of a model gives for some windows (int64, samples x length), and the model's predictions."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[str], windows: Tensor) -> None:
        self.model, self.windows = model, windows.to(embedding_device(model))
        self.layers = [model.get_submodule(path) for path in layers]
        self.outputs: dict[int, Any] = {}  # of a layer that is called twice, nothing
        with self._recorded():
            self.whole = self.predicted()

    def predicted(self) -> Tensor:
        """What the model predicts for the windows."""
        return predicted(self.model(**arguments(self.model, self.windows)))

    def run_alone(self) -> bool:
        """Whether the last layer gives the same when those before it do not run; not where they hand on more."""
        if len(self.layers) < 2:
            return True
        if len(self.outputs) < len(self.layers):
            return False
        with self.without_layers_before(len(self.layers) - 1):
            try:
                return torch.allclose(self.predicted(), self.whole, atol=1e-3)
            except Exception:  # any model code may miss what it looks for, such as the keys of another layer
                return False

    @contextmanager
    def without_layers_before(self, number: int) -> Iterator[None]:
        """While open, layers before this one give what they gave in the whole model."""
        with ExitStack() as stack:
            for at, layer in enumerate(self.layers[:number]):
                stack.enter_context(replaced_forward(layer, _giving(self.outputs[at])))
            yield

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        twice: set[int] = set()

        def hook_of(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if number in self.outputs:
                    twice.add(number)
                self.outputs[number] = output

            return hook

        hooks = [layer.register_forward_hook(hook_of(number)) for number, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for number in twice:
                del self.outputs[number]


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


@torch.no_grad()
def hand_on_more(model: PreTrainedModel, layers: Sequence[str], windows: Tensor) -> bool:
    """Whether layers hand on more than they return, as seen on two short samples.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(config).eval()
    >>> hand_on_more(model, ["model.decoder.layers.0", "model.decoder.layers.1"], torch.arange(40).reshape(4, 10))
    False
    """
    return not LayerOutputs(model, layers, probe_windows(windows)).run_alone()


@torch.no_grad()
def layers_in_parts(model: PreTrainedModel, windows: Tensor, layers: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
    """Layers whose activations over all windows (int64, samples x length) do not fit, and the samples that run at once.

    None where a part of the samples does not tell what the model does with all of them.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> layers_in_parts(AutoModelForCausalLM.from_config(config), torch.ones(8, 9).long(), ["model.decoder.layers.0"])
    {}
    """
    samples, length = windows.shape
    of_each = WITHOUT_GRAPH * max(activation_bytes_by_layer(model, windows, layers).values(), default=0) / samples
    at_once = max(int(activation_budget(model) // max(1, of_each)), LEAST_TOKENS // length, 1)
    if at_once >= samples or hand_on_more(model, layers, windows):
        return {}
    parts = torch.arange(samples).tensor_split(math.ceil(samples / at_once))
    independent, _ = independent_modules(model, probe_windows(windows).to(embedding_device(model)), layers)
    return {path: parts for path in layers if path in independent}


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A call of a layer with all samples, that can be repeated with some of them."""

    forward: Callable[..., Any]
    leaves: list[Any]
    """Its arguments, flattened."""
    spec: Any
    rows_of: Mapping[int, int]
    """Leaf -> how many entries of dimension 0 belong to each sample; other leaves are the same for all."""
    at: int | None
    """The leaf of the hidden states; None where they have another name."""

    @classmethod
    def of(cls, forward: Callable[..., Any], args: Any, kwargs: Any, samples: int) -> LayerCall:
        """A call of this function with these arguments, for so many samples."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        hidden = hidden_read(args, kwargs)
        at = next((i for i, leaf in enumerate(leaves) if leaf is hidden), None)
        rows_of = {i: rows_per_sample(leaf, samples) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        return cls(forward, leaves, spec, {i: rows for i, rows in rows_of.items() if rows is not None}, at)

    @property
    def hidden_BTD(self) -> Tensor:
        """The hidden states that the layer reads."""
        assert self.at is not None, "the layer's arguments have no hidden states"
        hidden_BTD: Tensor = self.leaves[self.at]
        return hidden_BTD

    def run(self, samples: Tensor, hidden_BTD: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
        """The layer's output for these samples, of other hidden states where they are given."""
        leaves = list(self.leaves)
        for i, rows in self.rows_of.items():
            numbers = (samples[:, None] * rows + torch.arange(rows)).flatten()
            leaves[i] = leaves[i][numbers.to(leaves[i].device)]
        if hidden_BTD is not None and self.at is not None:
            leaves[self.at] = hidden_BTD
        if dtype is not None:
            leaves = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.forward(*args, **kwargs)


def joined(outputs: Sequence[Any], parts: Sequence[Tensor]) -> Any:
    """One output of those of the parts of the samples; what all samples share is the first's.

    >>> shared = torch.tensor([5.0])
    >>> hidden, alike = joined([(torch.zeros(2, 4), shared), (torch.ones(1, 4), shared)], torch.arange(3).split(2))
    >>> hidden.shape, alike
    (torch.Size([3, 4]), tensor([5.]))
    """
    flat = [pytree.tree_leaves(output) for output in outputs]
    leaves, spec = pytree.tree_flatten(outputs[0])
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and rows_per_sample(leaf, len(parts[0])) is not None:
            leaves[at] = torch.cat([each[at] for each in flat])
    return pytree.tree_unflatten(leaves, spec)
