"""Dense model, model with fewer experts and windows -> the last matrices of the experts that stay, fitted anew.

Tokens whose expert is gone go to others, and the gates of all change. The output of a layer's experts is linear in the
last matrix of each, so these are fitted, one expert after the other, to what all experts of the dense layer give for
the same tokens. Some windows are left out of the fit: they choose how far it may move the matrices, or that it does
not. Names of tensors end in their axes: N tokens, M tokens of one expert, D hidden, C what the last matrix reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.progress import Progress
from secateur.scoring.collect_experts import Routed, expert_output, routed
from secateur.scoring.obs import add_gram, fill_above, gram_dtype
from secateur.scoring.passes.forward import pass_to_hidden, plain_products
from secateur.scoring.passes.products import WeightProduct, WeightProducts

HELD_OUT = 8  # one window of so many is left out of the fit, and judges it
SWEEPS = 2  # over all experts of a layer
DAMPINGS = (0.01, 0.1, 1.0)  # shares of the mean square of what a matrix reads: the larger, the less it moves


@torch.no_grad()
def fit_experts_in_place(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    experts: Sequence[str],
    windows: Tensor,
    *,
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """Fit the last matrices of the experts of the pruned model, in place, layer by layer in one forward pass.

    `experts` are paths of modules of stacked experts, of which the pruned model has fewer. Windows are int64, samples x
    length. Returns for each stack of last matrices that was changed, by its name, the squared error of the experts'
    output on the windows left out, before and after, as a share of the squares of what the dense experts give.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.options import CutOptions
    >>> from secateur.planning.plan import Plan, PlannedGroup
    >>> from secateur.pruning.prune import prune
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> small = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_local_experts": 4}
    >>> config = AutoConfig.for_model("mixtral", num_attention_heads=2, num_key_value_heads=1, **small)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(800).reshape(40, 20)
    >>> three = PlannedGroup("layers.0.expert", "expert", 0, units=4, kept=3, keep=(0, 1, 2))
    >>> plan = Plan("mixtral", CutOptions(ratio=0.2), (three,), {}, {})
    >>> pruned = prune(model, plan, discovery=discover(config))
    >>> errors = fit_experts_in_place(model, pruned, ["model.layers.0.mlp.experts"], windows)
    >>> [(name, after < before) for name, (before, after) in errors.items()]
    [('model.layers.0.mlp.experts.down_proj', True)]
    """
    errors: dict[str, tuple[float, float]] = {}
    fitted = itertools.count(1)
    with ExitStack() as stack:
        for model in (dense, pruned):
            stack.enter_context(plain_products(model))
        run = pass_to_hidden(pruned, windows)
        for path in experts:
            fit = _ExpertFit(dense, pruned, path, windows.shape[1])

            def after(
                module: nn.Module, args: Any, kwargs: Any, output: Tensor, fit: _ExpertFit = fit
            ) -> Tensor | None:
                better = fit.better_output(module, args, kwargs, output)
                if fit.errors is not None:
                    errors[fit.weight] = fit.errors
                if progress is not None:
                    progress(min(next(fitted), len(experts)), len(experts))
                return better

            block = pruned.get_submodule(path.rpartition(".")[0])
            stack.callback(block.register_forward_pre_hook(fit.see_dense, with_kwargs=True).remove)
            stack.callback(pruned.get_submodule(path).register_forward_hook(after, with_kwargs=True).remove)
        run()
    return errors


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of one expert, what its last matrix reads of them, times the gates, and that matrix, C x D."""

    rows_M: Tensor
    reads_MC: Tensor
    matrix_CD: Tensor


class _ExpertFit:
    """The fit of one layer's experts, when they are first called."""

    def __init__(self, dense: PreTrainedModel, pruned: PreTrainedModel, path: str, length: int) -> None:
        self.block, self.experts = (dense.get_submodule(each) for each in (path.rpartition(".")[0], path))
        self.stacks = {
            f"{path}.{name}": parameter
            for name, parameter in pruned.get_submodule(path).named_parameters()
            if parameter.dim() > 2
        }
        self.length = length
        self.weight = ""  # the name of the stack of last matrices
        self.errors: tuple[float, float] | None = None
        self.target_ND: Tensor | None = None
        self.done = False

    def see_dense(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the block that holds router and experts: what the dense one's experts give for the same inputs."""
        if self.done:
            return
        outputs: list[Tensor] = []
        with self.experts.register_forward_hook(lambda module, args, output: outputs.append(output)):
            self.block(*args, **kwargs)
        self.target_ND = outputs[0]

    def better_output(self, module: nn.Module, args: Any, kwargs: Any, output_ND: Tensor) -> Tensor | None:
        """Fit the experts that were called so, unless they were before; their output then, if it is nearer."""
        target_ND, self.target_ND = self.target_ND, None
        call = routed([*args, *kwargs.values()])
        if self.done or target_ND is None or call is None or target_ND.shape != output_ND.shape:
            return None
        self.done = True
        held_N = (torch.arange(len(output_ND), device=output_ND.device) // self.length) % HELD_OUT == HELD_OUT - 1
        tokens = self._tokens(module, call)
        if not held_N.any() or held_N.all() or not tokens:
            return None
        # 1. Fits with every damping, from the matrices as they are.
        exact = torch.float64 if output_ND.dtype == torch.float64 else torch.float32
        error_ND = (target_ND - output_ND).to(exact)
        fits = [_fitted(tokens, error_ND, ~held_N, damping) for damping in DAMPINGS]
        # 2. The best of them, if it is better on tokens that no fit has seen.
        best = min(fits, key=lambda fit: float(fit[1][held_N].square().sum()))[0]
        stack = self.stacks[self.weight]
        before = stack.detach().clone()
        for expert, matrix_CD in best.items():
            tokens[expert].matrix_CD.copy_(matrix_CD)
        better_ND: Tensor = module.forward(*args, **kwargs)
        whole = max(float(target_ND[held_N].double().square().sum()), 1e-30)
        errors = [float((y[held_N] - target_ND[held_N]).double().square().sum()) for y in (output_ND, better_ND)]
        if not errors[1] < errors[0]:
            stack.copy_(before)
            return None
        self.errors = (errors[0] / whole, errors[1] / whole)
        return better_ND

    def _tokens(self, module: nn.Module, call: Routed) -> dict[int, _Tokens]:
        """What the last matrix of every expert reads; nothing where one cannot be seen."""
        found: dict[int, _Tokens] = {}
        for expert in range(min(len(stack) for stack in self.stacks.values())):
            seen: list[WeightProduct] = []
            with WeightProducts(self.stacks, seen.append):
                rows_M, gates_M, _ = expert_output(module, call, expert)
            if not len(rows_M):
                continue
            last = next((each for each in reversed(seen) if _reads(each, expert) is not None), None)
            if last is None or len(reads_MC := _reads(last, expert)) != len(rows_M):
                return {}
            self.weight = last.weight
            matrix = self.stacks[last.weight][expert]
            matrix_CD = matrix if last.dim == 1 else matrix.t()
            found[expert] = _Tokens(rows_M, reads_MC * gates_M[:, None], matrix_CD)
        return found


def _reads(product: WeightProduct, expert: int) -> Any:
    return next((inputs_MC for index, inputs_MC in product.parts if index == expert), None)


def _fitted(
    tokens: Mapping[int, _Tokens], error_ND: Tensor, seen_N: Tensor, damping: float
) -> tuple[dict[int, Tensor], Tensor]:
    """The matrices with the least squared error on the tokens that are seen, and the error that is left on all."""
    error_ND = error_ND.clone()
    fitted = {expert: each.matrix_CD.double() for expert, each in tokens.items()}
    for _ in range(SWEEPS):
        for expert, each in tokens.items():
            seen_M = seen_N[each.rows_M]
            reads_MC, error_MD = each.reads_MC[seen_M], error_ND[each.rows_M[seen_M]]
            gram_CC = reads_MC.new_zeros(reads_MC.shape[1], reads_MC.shape[1], dtype=gram_dtype(reads_MC))
            add_gram(gram_CC, reads_MC)
            fill_above(gram_CC)
            gram_CC = gram_CC.double()
            gram_CC.diagonal().add_(damping * gram_CC.diagonal().mean().clamp_min(1e-12))
            wanted_CD = (reads_MC.to(error_MD.dtype).t() @ error_MD).double()
            change_CD = torch.cholesky_solve(wanted_CD, torch.linalg.cholesky(gram_CC))
            fitted[expert] = fitted[expert] + change_CD
            error_ND[each.rows_M] -= each.reads_MC.to(error_ND.dtype) @ change_CD.to(error_ND.dtype)
    return fitted, error_ND
