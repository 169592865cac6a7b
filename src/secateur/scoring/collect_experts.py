"""Model and calibration windows -> what every expert adds to its tokens (REAP, arXiv 2510.13999).

A module of stacked experts is called with tokens, the experts chosen for each and their gates. Each expert is run once
more by itself, on the tokens that were routed to it, whatever the module's own code does inside. Axes: N tokens,
K experts of a token, D hidden, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import processes
from secateur.errors import ScoreError
from secateur.progress import Progress
from secateur.scoring.passes.forward import pass_to_hidden, plain_products
from secateur.scoring.saliences import MORE_PRECISE
from secateur.scoring.statistics import Statistics


@torch.no_grad()
def expert_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    experts: Mapping[str, tuple[str, int]],
    *,
    layers: Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    """The score `reap` of one forward pass over the windows (int64, samples x length).

    `experts` names modules of stacked experts: path -> their group and number. An expert's score is the mean, over the
    tokens that are routed to it, of the norm of its output times its gate; without such a token it is zero. Raises
    `ScoreError` for a module that is not called with tokens, chosen experts and gates, and for outputs that are not
    finite.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> small = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_local_experts": 4}
    >>> config = AutoConfig.for_model("mixtral", num_attention_heads=2, num_key_value_heads=1, **small)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10)
    >>> statistics = expert_statistics(model, windows, {"model.layers.0.mlp.experts": ("layers.0.expert", 4)})
    >>> statistics.units["reap"]["layers.0.expert"]["model.layers.0.mlp.experts"].shape
    torch.Size([4])
    """
    modules = dict(model.named_modules())
    sums = {path: torch.zeros(2, number, dtype=torch.float64) for path, (_, number) in experts.items()}
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
    units: dict[str, dict[str, Tensor]] = {}
    for path, (group, _) in experts.items():
        norms_E, tokens_E = sums[path]
        if not torch.isfinite(norms_E).all():
            raise ScoreError(f"the outputs of the experts {path} have values that are NaN or Inf; {MORE_PRECISE}")
        units.setdefault(group, {})[path] = (norms_E / tokens_E.clamp_min(1)).float()
    return Statistics({}, units={"reap": units}, samples=len(windows), tokens=windows.numel())


class _ExpertNorms:
    """A hook on stacked experts that adds up, for each, the norms of its weighted outputs and its tokens."""

    def __init__(self, path: str, sums_2E: Tensor) -> None:
        self.path, self.sums_2E = path, sums_2E

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
        hidden_ND, chosen_NK, gates_NK = self._routed([*args, *kwargs.values()])
        for expert in range(self.sums_2E.shape[1]):
            rows_M, slots_M = torch.nonzero(chosen_NK == expert, as_tuple=True)
            if len(rows_M):
                alone_M1, gates_M1 = chosen_NK[rows_M, slots_M][:, None], gates_NK[rows_M, slots_M][:, None]
                output_MD = module.forward(hidden_ND[rows_M], alone_M1, gates_M1)
                self.sums_2E[0, expert] += output_MD.float().norm(dim=-1).double().sum().cpu()
                self.sums_2E[1, expert] += len(rows_M)

    def _routed(self, given: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the arguments of the module: its tokens, N x D, the experts of each, and their gates, N x K."""
        match [value for value in given if isinstance(value, Tensor)]:
            case [hidden_ND, chosen_NK, gates_NK] if (
                not chosen_NK.is_floating_point()
                and hidden_ND.dim() == chosen_NK.dim() == 2
                and chosen_NK.shape == gates_NK.shape
                and len(hidden_ND) == len(chosen_NK)
            ):
                return hidden_ND, chosen_NK, gates_NK
        shapes = ", ".join(str(tuple(value.shape)) for value in given if isinstance(value, Tensor))
        raise ScoreError(
            f"score reap: {self.path} is called with tensors of {shapes}; expected tokens, the experts chosen for each "
            "and their gates. Use a score of gradients, for example --score param_first"
        )
