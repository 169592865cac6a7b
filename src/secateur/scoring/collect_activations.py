"""Model and calibration windows -> sums of saliences of its inputs, costs by Gram matrix, cosines of hidden states.

All from one forward pass. When a layer is done, what was held of its weights' inputs is reduced and dropped.

Axes: B samples, T tokens, N tokens of all samples, M matrices of a stack (1 for a plain weight), C features (columns),
D hidden, U units.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur import processes
from secateur.progress import Progress
from secateur.scoring.evidence import Evidence, Moments, Salience
from secateur.scoring.gram import add_gram
from secateur.scoring.obs import removal_costs, unit_costs
from secateur.scoring.passes.activations import stream_inputs
from secateur.scoring.salience_sums import SalienceSums, weight_rows
from secateur.scoring.statistics import Statistics

# A weight and its dimension that is read -> group -> the unit of each index (-1 for none).
UnitsOf = Callable[[str, int], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class GramScore:
    """A score of units from Gram matrices of what reads them."""

    units_of: UnitsOf
    greedy: bool = False
    """`obs_greedy`: one unit after the other, with those before it gone. Otherwise `obs`: each unit alone."""

    @property
    def name(self) -> str:
        """The name of the score."""
        return "obs_greedy" if self.greedy else "obs"

    def costs(self, weight: Tensor, features: FeatureMoments, dim: int, unit_of: Tensor) -> Tensor:
        """The cost of each unit over all matrices of a weight, per token: float64."""
        assert features.gram_MCC is not None
        total_U = torch.zeros(int(unit_of.max()) + 1, dtype=torch.float64, device=weight.device)
        for i, gram_CC in enumerate(features.gram_MCC):
            matrix = weight[i] if weight.dim() > 2 else weight
            along = dim - (weight.dim() - matrix.dim())
            w_RC = matrix if along == 1 else matrix.t()
            tokens = float(features.tokens_M1[i])
            if not tokens:
                continue  # an expert that no token was routed to
            if self.greedy:
                order, costs = removal_costs(w_RC, gram_CC / tokens, unit_of)
                total_U[order] += costs.cummax(0).values.to(total_U.device)  # later in the order, no cheaper
            else:
                total_U += unit_costs(w_RC, gram_CC / tokens, unit_of)
        return total_U


def activation_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    saliences: Mapping[str, Salience],
    *,
    wanted: Collection[str] | None = None,
    gram_score: GramScore | None = None,
    layers: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of one forward pass over the windows (int64, samples x length), without gradients.

    Sums of saliences of the inputs of the weights wanted (by default, all). With `gram_score`, the cost of leaving out
    each unit's inputs when all other columns make up for it (see `obs`), per token, in squares of the output. With
    `layers` (path -> number), the score `block_influence` of each: 1 - the mean cosine of a token's hidden states
    before and after it (ShortGPT, arXiv 2403.03853).

    Raises `ScoreError` for inputs that are not finite.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10)
    >>> wanda = lambda evidence: evidence.weight.abs() * evidence.inputs.norm
    >>> statistics = activation_statistics(model, windows, {"wanda": wanda})
    >>> statistics.reads["model.decoder.layers.0.fc1.weight"], statistics.samples
    (1, 2)
    """
    weights = {
        name: p.detach() for name, p in model.named_parameters() if p.dim() > 1 and (wanted is None or name in wanted)
    }
    collector = _InputCollector(weights, SalienceSums(saliences), gram_score, layers or {}, _tied(model))
    mine = processes.share_of(windows)
    stream_inputs(model, mine, collector, wanted=weights, layers=[*(layers or {})], progress=progress)
    collector.finish_rest()
    return Statistics(
        sums=collector.sums.finished(),
        units=collector.units,
        reads=collector.read_dims,
        samples=len(windows),
        tokens=windows.numel(),
    )


def _tied(model: PreTrainedModel) -> set[str]:
    """Parameters that several modules have: what reads them is known only after the last layer."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {name for name, parameter in model.named_parameters() if owners[id(parameter)] > 1}


class _InputCollector:
    """Watches a forward pass and reduces it to sums and costs of units, layer by layer."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        sums: SalienceSums,
        gram_score: GramScore | None,
        layers: Mapping[str, int],
        tied: Collection[str],
    ) -> None:
        self.weights, self.sums, self.gram_score, self.layers, self.tied = weights, sums, gram_score, layers, tied
        self.features: dict[str, FeatureMoments] = {}  # of weights that are not finished
        self.read_dims: dict[str, int] = {}
        self.units: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        self.cosines = torch.zeros(2, max(layers.values(), default=-1) + 1, dtype=torch.float64)  # sums, tokens

    def inputs(self, weight: str, dim: int, index: int | None, x_NC: Tensor) -> None:
        """Take in the inputs of a weight."""
        if weight not in self.features:
            matrices = 1 if index is None else self.weights[weight].shape[0]
            self.features[weight] = self._moments(matrices, x_NC.shape[-1], x_NC.device)
            self.read_dims[weight] = dim
        self.features[weight].add(index or 0, x_NC)

    def layer(self, path: str, before_BTD: Tensor, after_BTD: Tensor) -> None:
        """Take in the hidden states around a layer, and finish its weights."""
        if path in self.layers:
            after_BTD = after_BTD.float().to(before_BTD.device)
            cosine_BT = functional.cosine_similarity(before_BTD.float(), after_BTD, dim=-1)
            self.cosines[0, self.layers[path]] += cosine_BT.double().sum().cpu()
            self.cosines[1, self.layers[path]] += cosine_BT.numel()
        self._finish(name for name in self.weights if name.startswith(f"{path}.") and name not in self.tied)

    def finish_rest(self) -> None:
        """Finish what is left when the pass is over."""
        self._finish(self.weights)
        if self.layers:
            processes.add_up(self.cosines)
            total, tokens = self.cosines
            if tokens.all():
                self.units["block_influence"]["layers"]["hidden"] = (1 - total / tokens).float()

    def _moments(self, matrices: int, features: int, device: torch.device) -> FeatureMoments:
        return FeatureMoments(matrices, features, device, gram=self.gram_score is not None)

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
        weight, dim = self.weights[name], self.read_dims[name]
        moments = features.moments(weight, dim)
        for rows in weight_rows(weight):
            self.sums.add(name, rows, Evidence(weight[rows].float(), moments=moments.rows(rows)), weight.shape)
        if self.gram_score is not None:
            for group, unit_of in self.gram_score.units_of(name, dim).items():
                costs_U = self.gram_score.costs(weight, features, dim, unit_of)
                self.units[self.gram_score.name][group][name] = costs_U.float().cpu()


class FeatureMoments:
    """Running moments of the features that a weight reads, float64; one row for each matrix of a stack."""

    def __init__(self, matrices: int, features: int, device: torch.device, *, gram: bool) -> None:
        self.tokens_M1 = torch.zeros(matrices, 1, dtype=torch.float64, device=device)
        self.mean_MC = torch.zeros(matrices, features, dtype=torch.float64, device=device)
        self.deviations_MC = torch.zeros_like(self.mean_MC)  # sums of squared differences from the mean
        self.gram_MCC = self.mean_MC.new_zeros(matrices, features, features) if gram else None

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
        if self.gram_MCC is not None:
            add_gram(self.gram_MCC[index], x_NC, dtype=torch.float64)

    def add_up_processes(self) -> None:
        """Make them those of the tokens of all processes."""
        if processes.count() == 1:
            return
        tokens_M1, total_MC = self.tokens_M1.clone(), self.tokens_M1 * self.mean_MC
        processes.add_up(tokens_M1, total_MC)
        mean_MC = total_MC / tokens_M1.clamp_min(1)
        self.deviations_MC += self.tokens_M1 * (self.mean_MC - mean_MC).square()
        processes.add_up(self.deviations_MC, *([] if self.gram_MCC is None else [self.gram_MCC]))
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
