"""Model, plan and windows -> a repair that helps on windows which no repair has seen, or none.

So with the training of layers after it: what is nearer to the dense layers may yet predict worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor
from transformers import PreTrainedModel

from secateur.discovery.groups import Discovery
from secateur.planning.plan import Plan
from secateur.progress import Progress
from secateur.pruning.prune import prune
from secateur.pruning.reconstruct import LayerTraining, reconstruct_in_place
from secateur.pruning.repair import Repaired, repair
from secateur.scoring.passes.loss import outputs_of, predictions, summed_loss


def checked_repair(
    model: PreTrainedModel,
    plan: Plan,
    discovery: Discovery,
    windows: Tensor,
    held_out: Tensor,
    *,
    room: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Repaired, dict[str, float]]:
    """Repair as the plan's options say, unless the cut alone, by the score, loses less on the held-out windows.

    Windows and `held_out` are int64, samples x length. The losses come as well, in nats per token of the held-out
    windows: of the model before (`before`), cut without repair (`cut`), and `repaired`. The cut models are held one at
    a time, in memory or in a file in the folder `room`. Raises as `repair` does.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.options import CutOptions
    >>> from secateur.planning.plan import PlannedGroup
    >>> import torch
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> half = PlannedGroup("layers.0.mlp", "mlp", 0, units=24, kept=12, keep=tuple(range(12)))
    >>> by_hand = Plan("opt", CutOptions(ratio=0.2), (half,), {}, {})
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(80).reshape(4, 20)
    >>> repaired, losses = checked_repair(model, by_hand, discover(config), windows[:3], windows[3:])
    >>> list(losses)
    ['before', 'cut', 'repaired']
    """
    by_score = replace(plan, groups=tuple(replace(group, spare=None) for group in plan.groups))
    tried = {
        "cut": repair(model, by_score, discovery, windows[:1], method="none"),  # runs no window
        "repaired": repair(model, plan, discovery, windows, method=plan.options.repair, room=room, progress=progress),
    }
    of_dense = outputs_of(model, held_out)
    losses = {"before": _mean_loss(model, held_out, of_dense)}
    for name, found in tried.items():
        with TemporaryDirectory(dir=room) as folder:
            where = None if room is None else Path(folder)
            smaller = prune(model, found.plan, discovery=discovery, weights=found.weights, room=where)
            losses[name] = _mean_loss(smaller, held_out, of_dense)
    return tried["cut" if repair_rejected(losses) else "repaired"], losses


def checked_reconstruction(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    discovery: Discovery,
    windows: Tensor,
    held_out: Tensor | None,
    *,
    training: LayerTraining | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the layers of the pruned model in place, as `reconstruct_in_place` does, as far as it then loses less.

    Windows and `held_out` are int64, samples x length. The losses come back, in nats per token of the held-out windows:
    of the dense model (`before`), and `reconstructed`, the least with trained layers; where that is not less than
    before the training, the pruned model is as it was. Without such windows nothing is compared. Raises as
    `reconstruct_in_place` does.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.options import CutOptions
    >>> from secateur.planning.plan import PlannedGroup
    >>> import torch
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> half = PlannedGroup("layers.0.mlp", "mlp", 0, units=24, kept=12, keep=tuple(range(12)))
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(80).reshape(4, 20)
    >>> pruned = prune(model, Plan("opt", CutOptions(ratio=0.2), (half,), {}, {}))
    >>> list(checked_reconstruction(model, pruned, discover(config), windows[:3], windows[3:]))
    ['before', 'reconstructed']
    """
    if held_out is None:
        reconstruct_in_place(dense, pruned, discovery, windows, training=training, progress=progress)
        return {}
    of_dense, losses = outputs_of(dense, held_out), []

    def judge() -> float:
        losses.append(_mean_loss(pruned, held_out, of_dense))
        return losses[-1]

    reconstruct_in_place(dense, pruned, discovery, windows, training=training, judge=judge, progress=progress)
    return {"before": _mean_loss(dense, held_out, of_dense), "reconstructed": min(losses[1:], default=losses[0])}


def _mean_loss(model: PreTrainedModel, held_out: Tensor, of_dense: Sequence[Tensor] | None) -> float:
    """Nats per prediction; a model that has broken down is worse than any other."""
    total = summed_loss(model, held_out, of_dense).nan_to_num(math.inf, math.inf)
    return float(total) / predictions(model, held_out)


def repair_rejected(losses: Mapping[str, float] | None) -> bool:
    """Whether the repair lost no less than the cut alone, by the losses of `checked_repair`.

    >>> [repair_rejected({"before": 1.0, "cut": 2.0, "repaired": repaired}) for repaired in (2.5, 1.5)]
    [True, False]
    """
    return losses is not None and losses["cut"] <= losses["repaired"]
