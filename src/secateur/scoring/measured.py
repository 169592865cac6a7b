"""Model, scores and windows -> what a cut of each group really loses, beside what the scores say.

A score such as Fisher information estimates from derivatives what the loss loses when a unit goes, and from few samples
at that. Within a group it ranks units well; between groups it can be off by a factor of ten: where a few units hold up
activations that the rest of the model relies on, or where all units look cheap by chance. So the cheapest units of each
group are left out, one group at a time, and the divergence of the predictions is measured. Of groups with few units,
such as heads, it is not: what one head is worth depends on the text (some only copy), and few tokens do not show it.
Axes: B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.discovery.groups import Discovery, Group
from secateur.progress import Progress
from secateur.scoring.passes.forward import plain_products, probe_windows
from secateur.scoring.passes.layers import LayerOutputs
from secateur.scoring.passes.loss import divergence
from secateur.scoring.passes.products import WeightProduct, WeightProducts, input_dims
from secateur.scoring.scores import Scores
from secateur.scoring.statistics import Statistics
from secateur.scoring.unit_scores import units_reached

SHARE = 0.3  # of the units of a group, the cheapest, are left out
UNITS = 32  # at least, of a group that is measured
LEAST, MOST = 0.05, 100.0  # by which the scores of a group are scaled


@torch.no_grad()
def measured_factors(
    model: PreTrainedModel,
    discovery: Discovery,
    scores: Scores,
    windows: Tensor,
    *,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Of each group of many units, what its cheapest lose when they are left out, beside what their scores say.

    A factor of 2: the scores of this group understate its loss twice as much as the median group's do. Beside heads,
    which have no factor, channels are thus as dear as the scores say. Scores are in nats per token. The loss is the
    Kullback-Leibler divergence of a prediction, such as the next token, in nats, on the windows (int64, samples x
    length), which should not be those that were scored. Groups of fewer than 32 units have no factor, nor have those
    that no product reads. One pass of the later layers for each group.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.scoring.scores import score
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=32, num_hidden_layers=2)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(80).reshape(4, 20)
    >>> scores = score(model, name="fisher", windows=windows[:3])
    >>> sorted(measured_factors(model, discover(config), scores, windows[3:]))
    ['layers.0.mlp', 'layers.1.mlp']
    """
    groups = [
        group
        for group in discovery.groups
        if group.kind != "vocabulary" and len(scores.units.get(group.name, ())) >= UNITS
    ]
    factors: dict[str, float] = {}
    if not groups:
        return factors
    with plain_products(model):
        measure = _Divergence(model, discovery, windows)
        for done, group in enumerate(groups, 1):
            units = scores.units[group.name]
            cheapest = units.argsort(stable=True)[: max(1, round(SHARE * len(units)))]
            estimated = float(units[cheapest].sum())
            if estimated > 0 and (lost := measure(group, cheapest)) is not None:
                factors[group.name] = min(MOST, max(LEAST, lost / estimated))
            if progress is not None:
                progress(done, len(groups))
    usual = median(factors.values()) if factors else 1.0
    return {name: factor / usual for name, factor in factors.items()}


def kept_factors(statistics: Statistics, scores: Scores) -> dict[str, float] | None:
    """The factors that `with_factors` has added for these scores; None where there are none.

    >>> scores = Scores("fisher", "sum", {"a": torch.ones(2)})
    >>> kept_factors(Statistics({}), scores), kept_factors(with_factors(Statistics({}), scores, {"a": 3.0}), scores)
    (None, {'a': 3.0})
    """
    kept = statistics.units.get(f"measured {scores.score} {scores.reduce}", {})
    factors = {name: float(kept[name]["factor"]) for name in scores.units if name in kept}
    return factors if factors.keys() == scores.units.keys() else None


def with_factors(statistics: Statistics, scores: Scores, factors: Mapping[str, float]) -> Statistics:
    """The statistics with the factors of these scores, 1 where there is none."""
    by_group = {name: {"factor": torch.tensor(factors.get(name, 1.0))} for name in scores.units}
    return statistics.joined(Statistics({}, units={f"measured {scores.score} {scores.reduce}": by_group}))


def scaled(scores: Scores, factors: Mapping[str, float]) -> Scores:
    """The scores, those of some groups times a factor.

    >>> scaled(Scores("fisher", "sum", {"a": torch.ones(2), "b": torch.ones(1)}), {"a": 3.0}).units
    {'a': tensor([3., 3.]), 'b': tensor([1.])}
    """
    return replace(scores, units={name: units * factors.get(name, 1.0) for name, units in scores.units.items()})


class _Divergence:
    """How far predictions move when units are left out, against those of the whole model."""

    def __init__(self, model: PreTrainedModel, discovery: Discovery, windows: Tensor) -> None:
        self.model = model
        self.reads = input_dims(model, probe_windows(windows))
        self.weights = {
            w.name: w for w in discovery.weights if w.name in self.reads and w.parameter and not w.embedding
        }
        self.parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        paths = {number: path for path, number in discovery.layer_paths.items() if path in modules}
        self.outputs = LayerOutputs(model, [paths[number] for number in sorted(paths)], windows)
        self.skips = self.outputs.run_alone()

    def __call__(self, group: Group, units: Tensor) -> float | None:
        """Nats per token; None where no product reads the group's units."""
        gone_from: dict[str, Tensor] = {}  # weight -> what it reads of these units
        for name, weight in self.weights.items():
            dim = self.reads[name]
            for unit_of in units_reached(weight.dims[dim], [group.name]).values():
                gone_from[name] = torch.nonzero(torch.isin(unit_of, units)).flatten()
        if not gone_from:
            return None

        def without(product: WeightProduct) -> Tensor:
            gone = gone_from[product.weight].to(product.inputs.device)
            return product.of(product.inputs.index_fill(-1, gone, 0.0))

        with ExitStack() as stack:
            if self.skips and group.layer is not None:
                stack.enter_context(self.outputs.without_layers_before(group.layer))
            stack.enter_context(WeightProducts({name: self.parameters[name] for name in gone_from}, without))
            cut = self.outputs.predicted()
        lost = float(divergence(self.model, self.outputs.whole, cut)) / (cut.numel() / cut.shape[-1])
        return max(0.0, lost)
