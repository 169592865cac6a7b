"""Model, plan and windows -> the repair that does the least damage on windows which no repair has seen.

Which units of a group should go depends on the model. Optimal brain surgeon asks what the output of one matrix loses,
and knows what the others can make up for; the score asks what the loss loses, and does not. On some models one is far
better, on others the other, so both are tried.
"""

from __future__ import annotations

import math

from torch import Tensor
from transformers import PreTrainedModel

from secateur.discovery.groups import Discovery
from secateur.planning.plan import Plan
from secateur.progress import Progress
from secateur.pruning.prune import prune
from secateur.pruning.repair import Repaired, repair
from secateur.scoring.passes.forward import summed_loss

CHOICES = {"obs": True, "score": False}  # way to choose -> whether repair chooses


def best_repair(
    model: PreTrainedModel,
    plan: Plan,
    discovery: Discovery,
    windows: Tensor,
    held_out: Tensor,
    *,
    method: str = "least-squares",
    progress: Progress | None = None,
) -> tuple[Repaired, dict[str, float]]:
    """Repair with either choice of units; the result is no worse on the held-out windows than the cut without repair.

    Windows and `held_out` are int64, samples x length. The losses come as well, in nats per token of the held-out
    windows: of the model before (`before`), cut without repair (`cut`), repaired with each choice (`obs`, `score`). The
    cut models are held in memory, one at a time. Raises as `repair` does.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.options import CutOptions
    >>> from secateur.planning.plan import PlannedGroup
    >>> import torch
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> half = PlannedGroup("layers.0.mlp", "mlp", 0, units=24, kept=12, keep=tuple(range(12)))
    >>> by_hand = Plan("opt", CutOptions(ratio=0.2), (half,), {}, {})
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(80).reshape(4, 20)
    >>> repaired, losses = best_repair(model, by_hand, discover(config), windows[:3], windows[3:])
    >>> list(losses)
    ['before', 'cut', 'obs', 'score']
    """

    def part(number: int) -> Progress | None:
        return None if progress is None else lambda done, total: progress(number * total + done, len(CHOICES) * total)

    tried = {"cut": repair(model, plan, discovery, windows[:1], method="none")}  # which looks at no window
    for number, (name, choose) in enumerate(CHOICES.items()):
        tried[name] = repair(model, plan, discovery, windows, method=method, choose=choose, progress=part(number))
    losses = {"before": _mean_loss(model, held_out)}
    for name, found in tried.items():
        smaller = prune(model, found.plan, discovery=discovery, weights=found.weights)
        losses[name] = _mean_loss(smaller, held_out)
    return tried[min(tried, key=losses.__getitem__)], losses


def _mean_loss(model: PreTrainedModel, held_out: Tensor) -> float:
    """Nats per token; a model that has broken down is worse than any other."""
    loss = float(summed_loss(model, held_out)) / (len(held_out) * (held_out.shape[1] - 1))
    return loss if math.isfinite(loss) else math.inf
