"""Model and calibration windows -> how much the loss grows without each layer: one forward pass for each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur import processes
from secateur.errors import ScoreError
from secateur.progress import Progress
from secateur.scoring.evidence import MORE_PRECISE
from secateur.scoring.passes.forward import input_device
from secateur.scoring.statistics import Statistics


@torch.no_grad()
def layer_loss_statistics(
    model: PreTrainedModel, windows: Tensor, layers: Mapping[str, int], *, progress: Progress | None = None
) -> Statistics:
    """The loss on the windows without a layer (path -> number) minus that with it: nats per token.

    A layer is left out by making its output its input. Raises `ScoreError` for a loss that is not finite.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model, layers = AutoModelForCausalLM.from_config(config), {f"model.decoder.layers.{i}": i for i in range(2)}
    >>> statistics = layer_loss_statistics(model, torch.arange(20).reshape(2, 10), layers)
    >>> statistics.units["layer_loss"]["layers"]["hidden"].shape
    torch.Size([2])
    """

    def input_as_output(_: object, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        before = args[0] if args else kwargs.get("hidden_states")
        return (before, *output[1:]) if isinstance(output, tuple) else before

    dense = _loss(model, windows)
    costs = torch.zeros(max(layers.values(), default=-1) + 1)
    for done, (path, number) in enumerate(layers.items(), 1):
        handle = model.get_submodule(path).register_forward_hook(input_as_output, with_kwargs=True)
        try:
            costs[number] += float(_loss(model, windows) - dense)
        finally:
            handle.remove()
        if progress is not None:
            progress(done, len(layers))
    if not torch.isfinite(costs).all():
        raise ScoreError(f"the loss without a layer is NaN or Inf; {MORE_PRECISE}")
    return Statistics(
        {},
        units={"layer_loss": {"layers": {"hidden": costs}}},
        loss=float(dense),
        samples=len(windows),
        tokens=windows.numel() - len(windows),
    )


def _loss(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """The mean cross-entropy over all windows, nats per token: float64."""
    total = torch.zeros((), dtype=torch.float64)
    for ids_T in processes.share_of(windows).to(input_device(model)):
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
        labels_T = ids_T[1:].to(logits_TV.device)
        total += functional.cross_entropy(logits_TV.float(), labels_T, reduction="sum").cpu()
    processes.add_up(total)
    return total / (len(windows) * (windows.shape[1] - 1))
