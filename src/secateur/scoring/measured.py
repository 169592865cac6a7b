"""Model, scores and windows -> the scores, scaled by what a cut of each group really loses.

A score such as Fisher information estimates from derivatives what the loss loses when a unit goes, and from few samples
at that. Within a group it ranks units well; between groups it can be off by a factor of ten: where a few units hold up
activations that the rest of the model relies on, or where all units look cheap by chance. So the cheapest units of each
group are left out, one group at a time, and the divergence of the predictions is measured.
Axes: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.discovery.groups import Discovery, Group
from secateur.models.inputs import arguments, predicted
from secateur.progress import Progress
from secateur.scoring.passes.forward import input_device, plain_products, probe_windows, replaced_forward
from secateur.scoring.passes.loss import divergence
from secateur.scoring.passes.products import WeightProduct, WeightProducts, input_dims
from secateur.scoring.scores import Scores
from secateur.scoring.unit_scores import units_reached

SHARE = 0.3  # of the units of a group, the cheapest, are left out
LEAST, MOST = 0.05, 100.0  # by which the scores of a group are scaled


@torch.no_grad()
def measured_scores(
    model: PreTrainedModel,
    discovery: Discovery,
    scores: Scores,
    windows: Tensor,
    *,
    progress: Progress | None = None,
) -> Scores:
    """Scores in nats per token, those of each group scaled to what its cheapest units together lose when left out.

    The loss is the Kullback-Leibler divergence of a prediction, such as the next token, in nats, on the windows (int64,
    samples x length), which should not be those that were scored. A group of units that no product reads (experts) is
    scaled by the median of the others; tokens of the vocabulary are not. One pass of the later layers for each group.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.scoring.scores import score
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(80).reshape(4, 20)
    >>> scores = score(model, name="fisher", windows=windows[:3], groups=["layers.0.mlp", "layers.1.mlp"])
    >>> scaled = measured_scores(model, discover(config), scores, windows[3:])
    >>> [bool(torch.equal(scaled.units[name].argsort(), scores.units[name].argsort())) for name in scores.units]
    [True, True]
    """
    with plain_products(model):
        measure = _Divergence(model, discovery, windows)
        factors: dict[str, float] = {}
        groups = [group for group in discovery.groups if group.name in scores.units and group.kind != "vocabulary"]
        for done, group in enumerate(groups, 1):
            units = scores.units[group.name]
            cheapest = units.argsort(stable=True)[: max(1, round(SHARE * len(units)))]
            estimated = float(units[cheapest].sum())
            if estimated > 0 and (lost := measure(group, cheapest)) is not None:
                factors[group.name] = min(MOST, max(LEAST, lost / estimated))
            if progress is not None:
                progress(done, len(groups))
    usual = median(factors.values()) if factors else 1.0
    scaled = {group.name: scores.units[group.name] * factors.get(group.name, usual) for group in groups}
    return replace(scores, units={**scores.units, **scaled})


class _Divergence:
    """How far predictions move when units are left out, against those of the whole model."""

    def __init__(self, model: PreTrainedModel, discovery: Discovery, windows: Tensor) -> None:
        self.model, self.windows = model, windows.to(input_device(model))
        self.reads = input_dims(model, probe_windows(windows))
        self.weights = {
            w.name: w for w in discovery.weights if w.name in self.reads and w.parameter and not w.embedding
        }
        self.parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        self.layers = {number: modules[path] for path, number in discovery.layer_paths.items() if path in modules}
        self.outputs: list[dict[int, Any]] = []  # of each window: layer -> what it gave
        self.whole: list[Tensor] = []  # predictions of the whole model
        for ids_T in self.windows:
            self.outputs.append({})
            with self._recorded(self.outputs[-1]):
                self.whole.append(self._predicted(ids_T))
        last = max(self.layers, default=-1)
        self.skips = last > 0 and all(given.keys() == self.layers.keys() for given in self.outputs)
        if self.skips:  # code that hands more from layer to layer than it returns has to run whole
            with self._without_layers_before(last, 0):
                again = self._predicted(self.windows[0])
            self.skips = torch.allclose(again, self.whole[0], atol=1e-3)

    def __call__(self, group: Group, units: Tensor) -> float | None:
        """Nats per token; None where no product reads the group's units."""
        zeroed: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            dim = self.reads[name]
            for unit_of in units_reached(weight.dims[dim], [group.name]).values():
                gone = torch.nonzero(torch.isin(unit_of, units)).flatten()
                parameter = self.parameters[name].detach()
                zeroed[name] = parameter.index_fill(dim, gone.to(parameter.device), 0.0)
        if not zeroed:
            return None

        def without(product: WeightProduct) -> Tensor:
            return product.compute(product.inputs, zeroed[product.weight], product.bias)

        total = 0.0
        for number, (ids_T, whole) in enumerate(zip(self.windows, self.whole, strict=True)):
            with ExitStack() as stack:
                if self.skips and group.layer is not None:
                    stack.enter_context(self._without_layers_before(group.layer, number))
                stack.enter_context(WeightProducts({name: self.parameters[name] for name in zeroed}, without))
                cut = self._predicted(ids_T)
            total += float(divergence(self.model, whole, cut)) / (cut.numel() / cut.shape[-1])
        return max(0.0, total / len(self.windows))

    def _predicted(self, ids_T: Tensor) -> Tensor:
        return predicted(self.model(**arguments(self.model, ids_T[None])))

    @contextmanager
    def _recorded(self, outputs: dict[int, Any]) -> Iterator[None]:
        """While open, note what each layer gives; of one that is called twice, nothing."""
        twice: set[int] = set()

        def hook_of(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if number in outputs:
                    twice.add(number)
                outputs[number] = output

            return hook

        hooks = [layer.register_forward_hook(hook_of(number)) for number, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for number in twice:
                del outputs[number]

    @contextmanager
    def _without_layers_before(self, layer: int, window: int) -> Iterator[None]:
        """While open, layers before this one give what they gave in the whole model."""
        given: Mapping[int, Any] = self.outputs[window]
        with ExitStack() as stack:
            for number, module in self.layers.items():
                if number < layer:
                    stack.enter_context(replaced_forward(module, _giving(given[number])))
            yield


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output
