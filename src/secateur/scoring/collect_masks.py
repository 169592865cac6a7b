"""Model and calibration windows -> derivatives of the loss by masks over what each weight reads, for the Fisher score.

Each sample's derivatives are apart, and samples have nothing to do with each other. So, unlike sums of gradients, they
can be found in several passes, each over as many samples as fit into memory without recomputation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import ScoreError
from secateur.progress import Progress
from secateur.scoring.collect_gradients import all_zero
from secateur.scoring.evidence import MORE_PRECISE
from secateur.scoring.passes.activations import input_dims
from secateur.scoring.passes.forward import probe_windows
from secateur.scoring.passes.gradients import stream_masks
from secateur.scoring.passes.layer_cache import LayerCache
from secateur.scoring.passes.memory import activation_budget, fitting_batches
from secateur.scoring.passes.recomputation import Recompute
from secateur.scoring.statistics import Statistics


def mask_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    wanted: Mapping[str, Collection[int]] | None = None,
    layers: Sequence[str] = (),
    layer_cache: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Derivatives by masks over what every weight reads, sample by sample: weight -> dimension -> samples x size.

    Windows are int64, samples x length. `wanted` names weights and dimensions of theirs: those that read along one of
    them are looked at (by default, all). `layers`, `layer_cache` and the errors are as in `gradient_statistics`.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> statistics = mask_statistics(AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10))
    >>> statistics.masks["model.decoder.layers.0.fc2.weight"][1].shape
    torch.Size([2, 24])
    """
    samples, length = windows.shape
    reads = input_dims(model, probe_windows(windows))
    stacks = {name for name, parameter in model.named_parameters() if parameter.dim() > 2}  # of experts
    names = None
    if wanted is not None:
        names = sorted(n for n, dims in wanted.items() if n not in reads or reads[n] in dims or n in stacks)
    memory = activation_budget(model)
    batches = [windows] if layer_cache is not None else fitting_batches(model, windows, layers, memory)
    loss, found = 0.0, []
    for number, batch in enumerate(batches):
        masks = _Masks(reads, stacks)
        cache = None if layer_cache is None else LayerCache(layer_cache, masks)
        batch_loss = stream_masks(
            model,
            batch,
            masks.add,
            wanted=names,
            recompute=Recompute(layers, memory, cache),
            progress=None if progress is None else _progress_of_batch(progress, number, len(batches)),
        )
        loss += len(batch) / samples * batch_loss
        found.append(masks)
    masks_of_all = found[0].derivatives if len(found) == 1 else _joined(found, [len(batch) for batch in batches])
    if not any(bool(each_BS.any()) for by_dim in masks_of_all.values() for each_BS in by_dim.values()):
        raise all_zero(loss)
    return Statistics({}, masks=masks_of_all, reads=reads, loss=loss, samples=samples, tokens=samples * (length - 1))


class _Masks:
    """Derivatives as they come. The layer cache saves and restores them by weight."""

    def __init__(self, reads: Mapping[str, int], stacks: Collection[str]) -> None:
        self.reads, self.stacks = reads, stacks
        self.derivatives: dict[str, dict[int, Tensor]] = defaultdict(dict)  # weight -> dimension -> B x S

    def add(self, name: str, dim: int, derivatives_BS: Tensor) -> None:
        """Hold the derivatives along the dimension that reads, and of experts along that of their number, too."""
        if not torch.isfinite(derivatives_BS).all():
            raise ScoreError(f"the gradient of what {name} reads has values that are NaN or Inf; {MORE_PRECISE}")
        if dim == self.reads.get(name, dim) or (dim == 0 and name in self.stacks):
            self.derivatives[name][dim] = derivatives_BS.cpu()

    def by_weight(self) -> dict[str, dict[str, Tensor]]:
        """Weight -> dimension -> derivatives, for the layer cache."""
        return {name: {str(dim): each for dim, each in by_dim.items()} for name, by_dim in self.derivatives.items()}

    def restore(self, weight: str, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `by_weight` gave for a weight."""
        self.derivatives[weight] = {int(dim): each for dim, each in tensors.items()}


def _joined(batches: Sequence[_Masks], sizes: Sequence[int]) -> dict[str, dict[int, Tensor]]:
    """The derivatives of all batches' samples, by the mean loss over all; each batch's are by its own mean loss.

    A weight that some batch does not use (an expert) has derivatives of zero there.
    """
    shapes = {
        (name, dim): each for b in batches for name, by_dim in b.derivatives.items() for dim, each in by_dim.items()
    }
    joined: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (name, dim), like in shapes.items():
        joined[name][dim] = torch.cat(
            [
                batch.derivatives.get(name, {}).get(dim, like.new_zeros(size, like.shape[1])) * (size / sum(sizes))
                for batch, size in zip(batches, sizes, strict=True)
            ]
        )
    return joined


def _progress_of_batch(progress: Progress, number: int, batches: int) -> Progress:
    """Progress of one of several passes, as progress of all."""
    return lambda done, total: progress(number * total + done, batches * total)
