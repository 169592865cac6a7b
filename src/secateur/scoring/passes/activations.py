"""Model and calibration windows -> the inputs of each product with a weight, in one forward pass.

All samples go forward together, so when a layer is done, all inputs of its weights have been seen. Axes: B samples,
T tokens, N tokens of all samples, C features (columns of the weight), D hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.progress import Progress
from secateur.scoring.passes.forward import eager_experts, input_device, probe_windows, split_output_head
from secateur.scoring.passes.products import WeightProduct, WeightProducts


class Observer(Protocol):
    """What watches a forward pass."""

    def inputs(self, weight: str, dim: int, index: int | None, x_NC: Tensor) -> None:
        """A weight, or the matrix `index` of its stack, is multiplied with x along its dimension `dim`."""

    def layer(self, path: str, before_BTD: Tensor, after_BTD: Tensor) -> None:
        """A layer has turned one hidden state into another."""


@torch.no_grad()
def stream_inputs(
    model: PreTrainedModel,
    windows: Tensor,
    observer: Observer,
    *,
    wanted: Collection[str] | None = None,
    layers: Sequence[str] = (),
    progress: Progress | None = None,
) -> None:
    """Run the windows (int64, samples x length) through the model and show the observer the inputs of its weights.

    `wanted` names the weights (by default, all of two or more dimensions), `layers` the modules whose hidden states are
    shown.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, shapes = AutoModelForCausalLM.from_config(config), {}
    >>> class Shapes:
    ...     def inputs(self, weight, dim, index, x_NC):
    ...         shapes[weight] = dim, tuple(x_NC.shape)
    ...     def layer(self, path, before_BTD, after_BTD):
    ...         pass
    >>> stream_inputs(model, torch.arange(20).reshape(2, 10), Shapes())
    >>> shapes["model.decoder.layers.0.fc2.weight"]
    (1, (20, 24))
    """
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    weights = {name: parameter for name, parameter in matrices.items() if wanted is None or name in wanted}
    ids_BT = windows.to(input_device(model))

    def observe(product: WeightProduct) -> None:
        for index, x_NC in product.parts:
            observer.inputs(product.weight, product.dim, index, x_NC)

    with ExitStack() as stack:
        stack.enter_context(eager_experts(model))
        head = split_output_head(model, probe_windows(windows).to(ids_BT.device))
        for done, path in enumerate(layers, 1):
            hook = _layer_hook(path, observer, functools.partial(progress, done, len(layers)) if progress else None)
            stack.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(WeightProducts(weights, observe))
        if head is None:
            model(input_ids=ids_BT, use_cache=False)
            return
        hidden_BTD = head.hidden(ids_BT)
        for some in head.chunks(ids_BT):
            head.logits(hidden_BTD[some], ids_BT[some])


def _layer_hook(path: str, observer: Observer, done: Callable[[], None] | None) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs.get("hidden_states")
        after = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape:
            observer.layer(path, before, after)
        if done is not None:
            done()

    return hook


def input_dims(model: PreTrainedModel, ids: Tensor) -> dict[str, int]:
    """The dimension along which each weight meets its inputs, seen in a pass over these ids (samples x length).

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> input_dims(model, torch.arange(20).reshape(2, 10))["model.decoder.layers.0.fc2.weight"]
    1
    """
    dims: dict[str, int] = {}

    def observe(product: WeightProduct) -> None:
        dims[product.weight] = product.dim

    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    with torch.no_grad(), eager_experts(model), WeightProducts(weights, observe):
        model(input_ids=ids.to(input_device(model)), use_cache=False)
    return dims
