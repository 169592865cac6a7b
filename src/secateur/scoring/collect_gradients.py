"""Model and calibration windows -> sums of saliences of its gradients, from one forward and backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import ScoreError
from secateur.progress import Progress
from secateur.scoring.evidence import Evidence, Salience
from secateur.scoring.passes.gradients import stream_gradients
from secateur.scoring.passes.layer_cache import LayerCache
from secateur.scoring.passes.memory import activation_budget
from secateur.scoring.passes.recomputation import Recompute
from secateur.scoring.salience_sums import SalienceSums
from secateur.scoring.statistics import Statistics


def gradient_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    saliences: Mapping[str, Salience],
    *,
    second_order: bool = False,
    wanted: Sequence[str] | None = None,
    layers: Sequence[str] = (),
    layer_cache: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Sums of saliences of the gradients of the mean cross-entropy over the windows (int64, samples x length).

    With `second_order`, saliences see the mean over the samples of the square of each one's gradient: the Hessian's
    diagonal by the Fisher information (LLM-Pruner, arXiv 2305.11627, equation 5). The gradient of the batched mean is
    the mean of the samples' gradients, since all windows are equally long. `wanted` names the parameters (by default,
    all), `layers` the modules that may be recomputed to save memory. `layer_cache` is a folder to which every layer is
    saved when it is done; the same call resumes from there. Raises `ScoreError` for a loss or a gradient that is not
    finite, and where all gradients are zero.

    >>> import torch
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10)
    >>> statistics = gradient_statistics(model, windows, {"first": lambda evidence: evidence.first.abs()})
    >>> sums = statistics.sums["first"]["model.decoder.layers.0.fc1.weight"]
    >>> statistics.samples, statistics.tokens, [len(each) for each in sums]
    (2, 18, [24, 12])
    """
    samples, length = windows.shape
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sums = SalienceSums(saliences)
    cache = None if layer_cache is None else LayerCache(layer_cache, sums)
    any_gradient = cache is not None and bool(cache.finished)

    def visit(name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        nonlocal any_gradient
        any_gradient = any_gradient or bool(gradient.any())
        sums.add(name, rows, Evidence(weight, gradient=gradient, squared=squared), shapes[name])

    loss = stream_gradients(
        model,
        windows,
        visit,
        wanted=wanted,
        second_order=second_order,
        recompute=Recompute(layers, activation_budget(model), cache),
        progress=progress,
    )
    if not any_gradient:
        raise all_zero(loss)
    return Statistics(sums.finished(), loss=loss, samples=samples, tokens=samples * (length - 1))


def all_zero(loss: float) -> ScoreError:
    """The error of a pass whose gradients are all zero.

    >>> print(all_zero(4.6))
    all gradients are zero (loss 4.6), so all units score the same. Check the weights ...
    """
    return ScoreError(
        f"all gradients are zero (loss {loss:.4g}), so all units score the same. Check the weights and the "
        "calibration text, or use dtype float32 or bfloat16"
    )
