"""Model and calibration windows -> statistics of its gradients, from one forward and backward pass.

Sums of saliences come from one pass over all windows. Derivatives by masks (for the Fisher score) are held for each
span of each sample apart: a few windows hold hundreds of spans, and so tell units apart that their sums would not.
Samples do not depend on each other, so they may come from several passes, each over as many samples as fit into memory
without recomputation. Axes: B samples, P spans of a sample, N spans of all samples, S the size of a dimension.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import ScoreError
from secateur.models.streaming import streamed_layers
from secateur.progress import Progress
from secateur.scoring.passes.forward import probe_windows
from secateur.scoring.passes.gradients import stream_gradients, stream_masks
from secateur.scoring.passes.layers import hand_on_more
from secateur.scoring.passes.loss import predictions
from secateur.scoring.passes.probe import activation_budget, fitting_batches
from secateur.scoring.passes.products import input_dims
from secateur.scoring.passes.recomputation import LayerCache, Recompute
from secateur.scoring.saliences import MORE_PRECISE, Evidence, Salience, SalienceSums
from secateur.scoring.statistics import Statistics

logger = logging.getLogger(__name__)

SPAN = 16  # tokens whose derivatives are one
MOST_SPANS = 256  # of all windows; of more text, spans are longer


def gradient_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    saliences: Mapping[str, Salience],
    *,
    second_order: bool = False,
    wanted: Collection[str] | None = None,
    layers: Sequence[str] = (),
    layer_cache: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Sums of saliences of the gradients of the mean loss over the windows (int64, samples x length).

    With `second_order`, saliences see the mean over the samples of the square of each one's gradient: the Hessian's
    diagonal by the Fisher information (LLM-Pruner, arXiv 2305.11627, equation 5). `wanted` names the parameters (by
    default, all), `layers` the modules that may be recomputed to save memory. `layer_cache` is a folder to which every
    layer is saved when it is done; the same call resumes from there. Raises `ScoreError` for a loss or a gradient that
    is not finite, and where all gradients are zero.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10)
    >>> statistics = gradient_statistics(model, windows, {"first": lambda evidence: evidence.first.abs()})
    >>> sums = statistics.sums["first"]["model.decoder.layers.0.fc1.weight"]
    >>> statistics.tokens, [len(each) for each in sums]
    (18, [24, 12])
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sums = SalienceSums(saliences)
    layers = _recomputed(model, windows, layers)
    cache = None if layer_cache is None or not layers else LayerCache(layer_cache, sums.sums)
    any_gradient = cache is not None and bool(cache.finished)

    def visit(name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        nonlocal any_gradient
        any_gradient = any_gradient or bool(gradient.any())
        sums.add(name, rows, Evidence(weight, gradient=gradient, squared=squared), shapes[name])

    recompute = Recompute(layers, activation_budget(model), cache)
    loss = stream_gradients(
        model, windows, visit, wanted=wanted, second_order=second_order, recompute=recompute, progress=progress
    )
    if not any_gradient:
        raise _all_zero(loss)
    return Statistics(sums.finished(), loss=loss, tokens=predictions(model, windows))


def _recomputed(model: PreTrainedModel, windows: Tensor, layers: Sequence[str]) -> Sequence[str]:
    """The layers that may be computed again: none where the gradient of what they hand on besides would be lost."""
    if not layers or not hand_on_more(model, layers, windows):
        return layers
    if streamed_layers(model) is None:
        return ()
    logger.warning("layers hand on more than they return, such as keys: on the GPU, scores leave its gradient out")
    return layers


def _all_zero(loss: float) -> ScoreError:
    return ScoreError(
        f"all gradients are zero (loss {loss:.4g}), so all units score the same. Check the weights and the "
        "calibration text, or use dtype float32 or bfloat16"
    )


def mask_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    wanted: Mapping[str, Collection[int]] | None = None,
    layers: Sequence[str] = (),
    layer_cache: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Derivatives by masks over what every weight reads, span by span: weight -> dimension -> spans x size.

    A span is some tokens of a window (int64, samples x length): 16, or more where that would be over 256 spans.
    `wanted` names weights and dimensions of theirs: those that read along one of them are looked at (by default, all).
    All else is as in `gradient_statistics`.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> statistics = mask_statistics(AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10))
    >>> statistics.masks["model.decoder.layers.0.fc2.weight"][1].shape
    torch.Size([2, 24])
    """
    spans = spans_of(windows)
    reads = input_dims(model, probe_windows(windows))
    stacks = {name for name, parameter in model.named_parameters() if parameter.dim() > 2}  # of experts
    names = None
    if wanted is not None:
        names = sorted(n for n, dims in wanted.items() if n not in reads or reads[n] in dims or n in stacks)
    memory = activation_budget(model)
    again = _recomputed(model, windows, layers)
    if not again:
        layer_cache = None
    together = layer_cache is not None or streamed_layers(model) is not None  # all layers are computed again
    batches = [windows] if together else fitting_batches(model, windows, layers, memory)
    loss = 0.0
    results: list[dict[str, dict[str, Tensor]]] = []  # of each batch: weight -> dimension -> N x S

    def visit(name: str, dim: int, derivatives_BPS: Tensor) -> None:
        """Hold the derivatives along the dimension that reads, and of experts along that of their number, too."""
        if not torch.isfinite(derivatives_BPS).all():
            raise ScoreError(f"the gradient of what {name} reads has values that are NaN or Inf; {MORE_PRECISE}")
        if dim == reads.get(name, dim) or (dim == 0 and name in stacks):
            results[-1].setdefault(name, {})[str(dim)] = derivatives_BPS.flatten(0, 1).cpu()

    for number, batch in enumerate(batches):

        def report(done: int, total: int, number: int = number) -> None:
            if progress is not None:  # one of several passes, as a part of all
                progress(number * total + done, len(batches) * total)

        results.append({})
        recompute = Recompute(again, memory, None if layer_cache is None else LayerCache(layer_cache, results[-1]))
        batch_loss = stream_masks(model, batch, visit, spans=spans, wanted=names, recompute=recompute, progress=report)
        loss += len(batch) / len(windows) * batch_loss
    joined = _joined(results, [len(batch) for batch in batches], spans)
    if not any(bool(each_NS.any()) for by_dim in joined.values() for each_NS in by_dim.values()):
        raise _all_zero(loss)
    tokens = predictions(model, windows)
    return Statistics({}, masks=joined, reads=reads, loss=loss, tokens=tokens)


def spans_of(windows: Tensor) -> int:
    """Into how many spans each of the windows (int64, samples x length) is divided.

    >>> [spans_of(torch.zeros(samples, 256)) for samples in (1, 64, 128)], spans_of(torch.zeros(2, 10))
    ([16, 4, 2], 1)
    """
    samples, length = windows.shape
    return max(1, min(-(-length // SPAN), MOST_SPANS // samples))


def _joined(
    batches: Sequence[Mapping[str, Mapping[str, Tensor]]], sizes: Sequence[int], spans: int
) -> dict[str, dict[int, Tensor]]:
    """The derivatives of all batches' samples, by the mean loss over all; each batch's are by its own mean loss.

    A weight that some batch does not use (an expert) has derivatives of zero there.
    """
    like = {(name, dim): each for batch in batches for name, by_dim in batch.items() for dim, each in by_dim.items()}
    joined: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (name, dim), each_NS in like.items():
        parts = [
            batch.get(name, {}).get(dim, each_NS.new_zeros(size * spans, each_NS.shape[1])) * (size / sum(sizes))
            for batch, size in zip(batches, sizes, strict=True)
        ]
        joined[name][int(dim)] = torch.cat(parts) if len(parts) > 1 else each_NS
    return joined
