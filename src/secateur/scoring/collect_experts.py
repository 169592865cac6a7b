"""Model and calibration windows -> what every expert adds to its tokens (REAP, arXiv 2510.13999).

A module of stacked experts is called with tokens, the experts chosen for each and their gates. Each expert is run once
more by itself, on the tokens that were routed to it, whatever the module's own code does inside. Axes: N tokens,
K experts of a token, D hidden, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import processes
from secateur.discovery.groups import Discovery, Group
from secateur.errors import ScoreError
from secateur.progress import Progress
from secateur.scoring.passes.forward import pass_to_hidden, plain_products
from secateur.scoring.saliences import MORE_PRECISE
from secateur.scoring.statistics import Statistics
from secateur.scoring.unit_scores import units_reached


@torch.no_grad()
def expert_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    layers: Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    """The score `reap` of one forward pass over the windows (int64, samples x length).

    `experts` is what `expert_modules` finds. An expert's score is the mean, over the tokens that are routed to it, of
    the norm of its output times its gate; without such a token it is zero. A unit of several experts has their sum.
    Raises `ScoreError` for a module that is not called with tokens, chosen experts and gates, and for outputs that are
    not finite.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> small = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_local_experts": 4}
    >>> config = AutoConfig.for_model("mixtral", num_attention_heads=2, num_key_value_heads=1, **small)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10)
    >>> experts = {"model.layers.0.mlp.experts": {"layers.0.expert": torch.arange(4)}}
    >>> statistics = expert_statistics(model, windows, experts)
    >>> statistics.units["reap"]["layers.0.expert"]["model.layers.0.mlp.experts"].shape
    torch.Size([4])
    """
    modules = dict(model.named_modules())
    numbers = {path: len(next(iter(units.values()))) for path, units in experts.items()}
    sums = {path: torch.zeros(2, number, dtype=torch.float64) for path, number in numbers.items()}
    passed = itertools.count(1)

    def count(*_: Any) -> None:
        if progress is not None:
            progress(next(passed), len(layers))

    with ExitStack() as stack:
        stack.enter_context(plain_products(model))
        run = pass_to_hidden(model, processes.share_of(windows))
        for path in experts:
            hook = _ExpertNorms(path, sums[path])
            stack.callback(modules[path].register_forward_hook(hook, with_kwargs=True).remove)
        for path in layers:
            stack.callback(modules[path].register_forward_hook(count).remove)
        run()
    processes.add_up(*sums.values())
    scores: dict[str, dict[str, Tensor]] = {}
    for path, units in experts.items():
        norms_E, tokens_E = sums[path]
        if not torch.isfinite(norms_E).all():
            raise ScoreError(f"the outputs of the experts {path} have values that are NaN or Inf; {MORE_PRECISE}")
        for group, unit_of_E in units.items():
            total_U = torch.zeros(int(unit_of_E.max()) + 1, dtype=torch.float64)
            scores.setdefault(group, {})[path] = total_U.index_add_(
                0, unit_of_E, norms_E / tokens_E.clamp_min(1)
            ).float()
    return Statistics({}, units={"reap": scores}, tokens=windows.numel())


@dataclass(frozen=True, slots=True)
class Routed:
    """What experts are called with."""

    hidden_ND: Tensor
    chosen_NK: Tensor
    """Numbers of experts, int64."""
    gates_NK: Tensor


def routed(given: Sequence[Any]) -> Routed | None:
    """The arguments of a module of experts as what they are: tokens, the experts of each and their gates, or None."""
    match [value for value in given if isinstance(value, Tensor)]:
        case [hidden_ND, chosen_NK, gates_NK] if (
            not chosen_NK.is_floating_point()
            and hidden_ND.dim() == chosen_NK.dim() == 2
            and chosen_NK.shape == gates_NK.shape
            and len(hidden_ND) == len(chosen_NK)
        ):
            return Routed(hidden_ND, chosen_NK, gates_NK)
    return None


def expert_output(module: nn.Module, call: Routed, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of one expert as numbers of rows, M, its gates for them, M, and what it adds to each, M x D."""
    rows_M, slots_M = torch.nonzero(call.chosen_NK == expert, as_tuple=True)
    chosen_M, gates_M = call.chosen_NK[rows_M, slots_M], call.gates_NK[rows_M, slots_M]
    if not len(rows_M):
        return rows_M, gates_M, call.hidden_ND[rows_M]
    return rows_M, gates_M, module.forward(call.hidden_ND[rows_M], chosen_M[:, None], gates_M[:, None])


class _ExpertNorms:
    """A hook on stacked experts that adds up, for each, the norms of its weighted outputs and its tokens."""

    def __init__(self, path: str, sums_2E: Tensor) -> None:
        self.path, self.sums_2E = path, sums_2E

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
        given = [*args, *kwargs.values()]
        call = routed(given)
        if call is None:
            shapes = ", ".join(str(tuple(value.shape)) for value in given if isinstance(value, Tensor))
            raise ScoreError(
                f"score reap: {self.path} is called with tensors of {shapes}; expected tokens, the experts chosen for "
                "each and their gates. Use a score of gradients, for example --score param_first"
            )
        for expert in range(self.sums_2E.shape[1]):
            rows_M, _, output_MD = expert_output(module, call, expert)
            self.sums_2E[0, expert] += output_MD.float().norm(dim=-1).double().sum().cpu()
            self.sums_2E[1, expert] += len(rows_M)


def expert_modules(
    model: PreTrainedModel, discovery: Discovery, groups: Iterable[Group]
) -> dict[str, dict[str, Tensor]]:
    """Modules that hold weights of several experts in one: path -> group -> the unit of each expert, int64.

    A unit is an expert, or several where the router chooses among groups of experts first.

    >>> from secateur.discovery.discover import discover
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> small = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_local_experts": 4}
    >>> config = AutoConfig.for_model("mixtral", num_attention_heads=2, num_key_value_heads=1, **small)
    >>> discovery = discover(config)
    >>> expert_modules(AutoModelForCausalLM.from_config(config), discovery, discovery.groups)
    {'model.layers.0.mlp.experts': {'layers.0.expert': tensor([0, 1, 2, 3])}}
    """
    stacked = {name for name, parameter in model.named_parameters() if parameter.dim() > 2}
    names = {group.name for group in groups if group.kind == "expert"}
    found = {
        weight.name.rpartition(".")[0]: units_reached(weight.dims[0], names)
        for weight in discovery.weights
        if weight.name in stacked
    }
    return {path: units for path, units in found.items() if units}
