"""A model that is too large for a GPU: its layers stay on the CPU or the disk, and are brought there one at a time.

All else (embeddings, output head, the last norm, buffers) is on the GPU. A layer is brought when it runs and stays
until another runs, so a backward pass that runs each layer again finds its weights there, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import ModelError, PlanError

ATTRIBUTE = "_streamed_layers"  # of the model
_moves = 0  # of layers, by this process


def moves() -> int:
    """Count of moves so far: when it changes, weights of a streamed model have new addresses."""
    return _moves


class StreamedLayers:
    """The layers of a model, one of which is on the device."""

    def __init__(self, layers: list[nn.Module], device: torch.device, away: Callable[[Tensor], Tensor]) -> None:
        self.device, self._away = device, away
        self.homes = [[(weight, weight.data) for weight in layer.parameters()] for layer in layers]
        self._here: int | None = None
        for homes in self.homes:
            for weight, home in homes:
                weight.data = away(home)

    def bring(self, number: int) -> None:
        """Move the weights of a layer to the device, and those of the previous one back home."""
        global _moves
        if number == self._here:
            return
        self.leave()
        self._here, _moves = number, _moves + 1
        for weight, home in self.homes[number]:
            weight.data = home.to(self.device, non_blocking=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedLayers:
        """A copied model has to be streamed anew; its weights are not copied meanwhile."""
        return self

    def leave(self) -> None:
        """Move the weights that are on the device back home."""
        for weight, home in self.homes[self._here] if self._here is not None else ():
            weight.data = self._away(home)
        self._here = None


class _Forward:
    """The `forward` of a layer that is brought first. It can be copied with its layer."""

    def __init__(self, own: Callable[..., Any], layers: StreamedLayers, number: int) -> None:
        self.own, self.layers, self.number = own, layers, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.layers.bring(self.number)
        return self.own(*args, **kwargs)


def stream_in_place(
    model: PreTrainedModel,
    device: str | torch.device,
    *,
    away: Callable[[Tensor], Tensor] = lambda home: home,
) -> None:
    """Bring the layers of a model on the CPU to a device when they run; all else moves there now.

    Weights that are not on the device are `away(weight)`, which tests make unusable. Raises `ModelError` for a model
    that does not say what its layers are.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(config).eval()
    >>> ids = torch.arange(5)[None]
    >>> before = model(ids).logits
    >>> stream_in_place(model, "cpu", away=lambda weight: weight.new_zeros(()).expand(weight.shape))
    >>> bool(torch.equal(model(ids).logits, before))
    True
    >>> [bool(layer.fc1.weight.any()) for layer in model.model.decoder.layers]
    [False, True]
    """
    layers = _layers_of(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} does not say what its layers are (`_no_split_modules`), so they cannot be brought "
            "to the GPU one by one. Use the CPU: --device cpu"
        )
    within = {id(weight) for layer in layers for weight in layer.parameters()}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in within:
            tensor.data = tensor.data.to(device)
    streamed = StreamedLayers(layers, torch.device(device), away)
    for number, layer in enumerate(layers):
        own = layer.__dict__.get("forward", layer.forward)
        layer.__dict__["forward"] = _Forward(own.own if isinstance(own, _Forward) else own, streamed, number)
    model.__dict__[ATTRIBUTE] = streamed


def streamed_layers(model: nn.Module) -> StreamedLayers | None:
    """How the layers of a model are brought to a device; None where all weights stay in their places."""
    found: StreamedLayers | None = model.__dict__.get(ATTRIBUTE)
    return found


def check_in_place(model: nn.Module, doing: str, remedy: str) -> None:
    """Raise `PlanError` for a streamed model, whose weights cannot be changed while it runs."""
    if streamed_layers(model) is not None:
        raise PlanError(
            f"{doing} changes weights in their places, and these layers are brought to the GPU one by one. Expected "
            f"all weights on one device: --device cpu; or {remedy}"
        )


def _layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The outermost modules that transformers keeps together on a device."""
    kinds = {*(getattr(model, "_no_split_modules", None) or ())}
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if type(module).__name__ in kinds and id(module) not in inside:
            found.append(module)
            inside.update(map(id, module.modules()))
    return found
