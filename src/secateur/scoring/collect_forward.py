"""Model and calibration windows -> statistics of forward passes: what weights read, and what layers do.

`activation_statistics` takes sums of saliences of inputs, costs by Gram matrix and cosines of hidden states from one
pass. When a layer is done, what was held of its weights' inputs is reduced and dropped. `layer_loss_statistics` runs
the model once without each layer.
Axes: B samples, T tokens, N tokens of all samples, V vocabulary, M matrices of a stack (1 for a plain weight),
R rows of a matrix, C features (columns), D hidden, U units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur import processes
from secateur.errors import ScoreError
from secateur.models.inputs import hidden_read
from secateur.progress import Progress
from secateur.scoring.obs import add_gram, fill_above, removal_costs, unit_costs
from secateur.scoring.passes.loss import outputs_of, predictions, summed_loss
from secateur.scoring.passes.products import stream_inputs
from secateur.scoring.passes.weight_gradients import row_blocks
from secateur.scoring.saliences import MORE_PRECISE, WEIGHT_ELEMENTS, Evidence, Moments, Salience, SalienceSums
from secateur.scoring.statistics import Statistics

# A weight and its dimension that is read -> group -> the unit of each index (-1 for none).
UnitsOf = Callable[[str, int], Mapping[str, Tensor]]


def activation_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    saliences: Mapping[str, Salience],
    *,
    wanted: Collection[str] | None = None,
    units_of: UnitsOf | None = None,
    greedy: bool = False,
    layers: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of one forward pass over the windows (int64, samples x length), without gradients.

    Sums of saliences of the inputs of the weights wanted (by default, all). With `units_of`, the score `obs`: the cost
    of leaving out each unit's inputs when all other columns make up for it, per token, in squares of the output; with
    `greedy`, `obs_greedy`: the same with the units before it gone. With `layers` (path -> number), the score
    `block_influence` of each: 1 - the mean cosine of a token's hidden states before and after it (ShortGPT, arXiv
    2403.03853). Raises `ScoreError` for inputs that are not finite.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10)
    >>> wanda = lambda evidence: evidence.weight.abs() * evidence.inputs.norm
    >>> statistics = activation_statistics(model, windows, {"wanda": wanda})
    >>> statistics.reads["model.decoder.layers.0.fc1.weight"]
    1
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    named = {name: p for name, p in model.named_parameters() if p.dim() > 1 and (wanted is None or name in wanted)}
    collector = _InputCollector(
        named,
        {name for name, parameter in named.items() if owners[id(parameter)] > 1},
        SalienceSums(saliences),
        units_of,
        greedy,
        layers or {},
        torch.zeros(2, max((layers or {}).values(), default=-1) + 1, dtype=torch.float64),
    )
    stream_inputs(
        model,
        processes.share_of(windows),
        collector.add_inputs,
        wanted=named,
        layers=[*collector.layers],
        visit_layer=collector.finish_layer,
        progress=progress,
    )
    collector.finish_rest()
    sums, units, reads = collector.sums.finished(), collector.units, collector.read_dims
    return Statistics(sums, units, reads=reads, tokens=windows.numel())


@dataclass(slots=True)
class _InputCollector:
    """Watches a forward pass and reduces it to sums and costs of units, layer by layer."""

    weights: Mapping[str, Tensor]
    tied: Collection[str]  # weights of several modules: what reads them is known only after the last layer
    sums: SalienceSums
    units_of: UnitsOf | None
    greedy: bool
    layers: Mapping[str, int]
    cosines: Tensor  # sums and tokens x layers
    features: dict[str, FeatureMoments] = field(default_factory=dict)  # of weights that are not finished
    read_dims: dict[str, int] = field(default_factory=dict)
    units: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)

    def add_inputs(self, weight: str, dim: int, index: int | None, x_NC: Tensor) -> None:
        if weight not in self.features:
            matrices = 1 if index is None else self.weights[weight].shape[0]
            self.features[weight] = self._moments(matrices, x_NC.shape[-1], x_NC.device)
            self.read_dims[weight] = dim
        self.features[weight].add(index or 0, x_NC)

    def finish_layer(self, path: str, before_BTD: Tensor, after_BTD: Tensor) -> None:
        after_BTD = after_BTD.float().to(before_BTD.device)
        cosine_BT = functional.cosine_similarity(before_BTD.float(), after_BTD, dim=-1)
        self.cosines[0, self.layers[path]] += cosine_BT.double().sum().cpu()
        self.cosines[1, self.layers[path]] += cosine_BT.numel()
        self._finish(name for name in self.weights if name.startswith(f"{path}.") and name not in self.tied)

    def finish_rest(self) -> None:
        self._finish(self.weights)
        if self.layers:
            processes.add_up(self.cosines)
            total, tokens = self.cosines
            if tokens.all():
                self.units["block_influence"] = {"layers": {"hidden": (1 - total / tokens).float()}}

    def _moments(self, matrices: int, features: int, device: torch.device) -> FeatureMoments:
        return FeatureMoments(matrices, features, device, gram=self.units_of is not None)

    def _finish(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            features = self.features.pop(name, None)
            if processes.count() > 1:  # a process may have routed no token to an expert that others have used
                matrices = processes.largest(0 if features is None else len(features.mean_MC))
                dim = processes.largest(self.read_dims.get(name, -1))
                if features is None and matrices:
                    weight = self.weights[name]
                    features = self._moments(matrices, weight.shape[dim], weight.device)
                    self.read_dims[name] = dim
            if features is not None:
                features.add_up_processes()
                self._reduce(name, features)

    def _reduce(self, name: str, features: FeatureMoments) -> None:
        weight, dim = self.weights[name].detach(), self.read_dims[name]
        moments = features.moments(weight, dim)
        for rows in row_blocks(weight, WEIGHT_ELEMENTS):
            self.sums.add(name, rows, Evidence(weight[rows].float(), moments=moments.rows(rows)), weight.shape)
        for group, unit_of in ({} if self.units_of is None else self.units_of(name, dim)).items():
            costs_U = features.unit_costs(weight, dim, unit_of, greedy=self.greedy)
            of_score = self.units.setdefault("obs_greedy" if self.greedy else "obs", {})
            of_score.setdefault(group, {})[name] = costs_U.float().cpu()


class FeatureMoments:
    """Running moments of the features that a weight reads, float64; one row for each matrix of a stack."""

    def __init__(self, matrices: int, features: int, device: torch.device, *, gram: bool) -> None:
        self.tokens_M1 = torch.zeros(matrices, 1, dtype=torch.float64, device=device)
        self.mean_MC = torch.zeros(matrices, features, dtype=torch.float64, device=device)
        self.deviations_MC = torch.zeros_like(self.mean_MC)  # sums of squared differences from the mean
        self.gram_MCC = self.mean_MC.new_zeros(matrices if gram else 0, features, features)

    def add(self, index: int, x_NC: Tensor) -> None:
        """Take in inputs of one matrix (Chan, Golub, LeVeque 1979: updating formulae for sample variances)."""
        if not len(x_NC):
            return
        variance_C, mean_C = torch.var_mean(x_NC.float(), 0, correction=0)
        n, before = len(x_NC), float(self.tokens_M1[index])
        change_C = mean_C.double() - self.mean_MC[index]
        self.tokens_M1[index] += n
        self.mean_MC[index] += change_C * (n / (before + n))
        self.deviations_MC[index] += variance_C.double() * n + change_C.square() * (before * n / (before + n))
        if len(self.gram_MCC):
            add_gram(self.gram_MCC[index], x_NC)

    def add_up_processes(self) -> None:
        """Make them those of the tokens of all processes."""
        if processes.count() == 1:
            return
        tokens_M1, total_MC = self.tokens_M1.clone(), self.tokens_M1 * self.mean_MC
        processes.add_up(tokens_M1, total_MC)
        mean_MC = total_MC / tokens_M1.clamp_min(1)
        self.deviations_MC += self.tokens_M1 * (self.mean_MC - mean_MC).square()
        processes.add_up(self.deviations_MC, *([self.gram_MCC] if len(self.gram_MCC) else []))
        self.tokens_M1, self.mean_MC = tokens_M1, mean_MC

    def moments(self, weight: Tensor, dim: int) -> Moments:
        """Shaped for a weight that reads the features along `dim`."""
        shape = [1] * weight.dim()
        shape[dim] = weight.shape[dim]
        if len(self.mean_MC) > 1 or weight.dim() > 2:
            shape[0] = len(self.mean_MC)
        squares_MC = self.deviations_MC + self.tokens_M1 * self.mean_MC.square()
        variance_MC = self.deviations_MC / (self.tokens_M1 - 1).clamp_min(1)
        return Moments(
            norm=squares_MC.sqrt().float().reshape(shape),
            mean=self.mean_MC.float().reshape(shape),
            variance=variance_MC.float().reshape(shape),
            tokens=self.tokens_M1.float().reshape([len(self.tokens_M1), *[1] * (weight.dim() - 1)]),
        )

    def unit_costs(self, weight: Tensor, dim: int, unit_of: Tensor, *, greedy: bool) -> Tensor:
        """The cost of each unit over all matrices of a weight, per token: float64."""
        total_U = torch.zeros(int(unit_of.max()) + 1, dtype=torch.float64, device=weight.device)
        for i, gram_CC in enumerate(self.gram_MCC):
            tokens = float(self.tokens_M1[i])
            if not tokens:
                continue  # an expert that no token was routed to
            fill_above(gram_CC)
            matrix = weight[i] if weight.dim() > 2 else weight
            w_RC = matrix if dim - (weight.dim() - matrix.dim()) == 1 else matrix.t()
            if greedy:
                order, costs = removal_costs(w_RC, gram_CC / tokens, unit_of)
                total_U[order] += costs.cummax(0).values.to(total_U.device)  # later in the order, no cheaper
            else:
                total_U += unit_costs(w_RC, gram_CC / tokens, unit_of)
        return total_U


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
        before = hidden_read(args, kwargs)
        return (before, *output[1:]) if isinstance(output, tuple) else before

    of_dense = outputs_of(model, processes.share_of(windows))
    dense = _loss(model, windows, of_dense)
    costs = torch.zeros(max(layers.values(), default=-1) + 1)
    for done, (path, number) in enumerate(layers.items(), 1):
        with model.get_submodule(path).register_forward_hook(input_as_output, with_kwargs=True):
            costs[number] += float(_loss(model, windows, of_dense) - dense)
        if progress is not None:
            progress(done, len(layers))
    if not torch.isfinite(costs).all():
        raise ScoreError(f"the loss without a layer is NaN or Inf; {MORE_PRECISE}")
    units, tokens = {"layer_loss": {"layers": {"hidden": costs}}}, predictions(model, windows)
    return Statistics({}, units=units, loss=float(dense), tokens=tokens)


def _loss(model: PreTrainedModel, windows: Tensor, of_dense: Sequence[Tensor] | None) -> Tensor:
    """The mean loss over all windows, nats per prediction: float64."""
    total = summed_loss(model, processes.share_of(windows), of_dense)
    processes.add_up(total)
    return total / predictions(model, windows)
