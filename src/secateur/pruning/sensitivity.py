"""Model and scores -> damage curves: what it costs to cut each group to a few sizes, measured.

Each group is cut alone, the units with the lowest scores first, and the cut model is compared with the dense one on a
few windows. What lies before the cut layer is computed once.

Names of tensors end in their axes: B samples, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from secateur.discovery.groups import Discovery, Group
from secateur.errors import PlanError, ScoreError
from secateur.planning.allocation import DamageCurve
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup
from secateur.planning.selection import top_units
from secateur.progress import Progress
from secateur.pruning.prune import prune
from secateur.scoring.passes.forward import (
    LOGITS_BYTES,
    OutputHead,
    input_device,
    probe_windows,
    replaced_forward,
    split_output_head,
)
from secateur.scoring.scores import Scores

SHARES = (0.25, 0.5, 0.75)  # of a group's units, to which it is cut
TOKENS = 2048  # on which a cut model is compared, as whole windows

logger = logging.getLogger(__name__)


@torch.no_grad()
def damage_curves(
    model: PreTrainedModel,
    discovery: Discovery,
    groups: Sequence[Group],
    scores: Scores,
    windows: Tensor,
    *,
    progress: Progress | None = None,
) -> dict[str, DamageCurve]:
    """By group: units kept, ascending to all of them, and the damage: KL(dense, cut) in nats per token.

    Windows are int64, samples x length, of which the first that hold `TOKENS` tokens are used. Raises `PlanError` for
    groups that run through all layers, and `ScoreError` where a cut gives NaN or Inf.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.scoring.scores import score
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model, discovery = AutoModelForCausalLM.from_config(config), discover(config)
    >>> scores = score(model, discovery=discovery, name="l2")
    >>> mlp, windows = discovery.group("layers.1.mlp"), torch.arange(60).view(3, 20)
    >>> curves = damage_curves(model, discovery, [mlp], scores, windows)
    >>> [kept for kept, _ in curves["layers.1.mlp"]], curves["layers.1.mlp"][-1]
    ([6, 12, 18, 24], (24, 0.0))
    """
    for group in groups:
        if group.layer is None or group.kind == "layer":
            raise PlanError(f"{group.name} runs through all layers: its damage cannot be weighed against others")
    few_BT = windows[: max(1, TOKENS // windows.shape[1])].to(input_device(model))
    dense = _DenseOutputs(model, few_BT, [*discovery.layer_paths])
    cuts = [(group, kept) for group in groups for kept in _sizes_to_measure(group)]
    points: dict[str, list[tuple[int, float]]] = {group.name: [] for group in groups}
    for done, (group, kept) in enumerate(cuts, 1):
        keep = top_units(scores.units[group.name], kept)
        planned = PlannedGroup(group.name, group.kind, group.layer, group.units, kept, keep)
        cut = prune(
            model,
            Plan(discovery.model, CutOptions(ratio=0.0, scope="local", shape="uniform"), (planned,), {}, {}),
            discovery=discovery,
        )
        damage = dense.divergence(cut, group.layer or 0)
        if not damage < torch.inf:
            raise ScoreError(f"{group.name} cut to {kept} units gives NaN or Inf: check the weights")
        points[group.name].append((kept, max(0.0, damage)))
        if progress is not None:
            progress(done, len(cuts))
    return {group.name: (*points[group.name], (group.units, 0.0)) for group in groups}


def _sizes_to_measure(group: Group) -> list[int]:
    """Sizes that a group is cut to, ascending; of few units, all."""
    if group.units <= len(SHARES) + 1:
        return [*range(group.least, group.units)]
    nothing = {0} if group.least == 0 else set()
    return sorted(nothing | {max(group.least, round(group.units * share)) for share in SHARES})


class _DenseOutputs:
    """The dense model's log-probabilities, and the outputs of its layers on the way, to be used instead of them."""

    def __init__(self, model: PreTrainedModel, ids_BT: Tensor, layers: Sequence[str]) -> None:
        self.ids_BT = ids_BT
        self.tail = split_output_head(model, probe_windows(ids_BT))
        self.outputs: dict[str, Any] = {}  # of the layers, in their order; empty where they cannot be used
        self.vocabulary = model.get_output_embeddings().weight.shape[0] if self.tail else model.config.vocab_size
        if self.tail is None:
            self.logs_BTVs = [logits_BTV.float().log_softmax(-1) for logits_BTV in self._logits(model)]
            return
        modules = dict(model.named_modules())
        with ExitStack() as stack:
            for path in layers:
                if path in modules:
                    stack.callback(modules[path].register_forward_hook(self._keep_output(path)).remove)
            self.hidden_BTD = self.tail.hidden(ids_BT)
        if not self._outputs_suffice(model):
            logger.debug("%s: layers are computed anew for every cut", type(model).__name__)
            self.outputs.clear()

    def divergence(self, cut: PreTrainedModel, layer: int) -> float:
        """KL(dense, cut), nats per token, of a model that differs from this layer on."""
        total = 0.0
        if self.tail is None:
            for dense_BTV, cut_BTV in zip(self.logs_BTVs, self._logits(cut), strict=True):
                total += _divergence(dense_BTV, cut_BTV)
            return total / self.ids_BT.numel()
        base: Any = getattr(cut, cut.base_model_prefix)
        tail = OutputHead(cut, base)
        with ExitStack() as stack:
            self._use_outputs(cut, [path for path in self.outputs if int(path.rpartition(".")[2]) < layer], stack)
            hidden_BTD = tail.hidden(self.ids_BT)
        for part in self._parts():
            dense_BTV = self.tail.logits(self.hidden_BTD[part], self.ids_BT[part]).float().log_softmax(-1)
            total += _divergence(dense_BTV, tail.logits(hidden_BTD[part], self.ids_BT[part]))
        return total / self.ids_BT.numel()

    def _keep_output(self, path: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            self.outputs[path] = _copied(output)

        return hook

    def _outputs_suffice(self, model: PreTrainedModel) -> bool:
        """Whether the outputs of the layers are all that the rest of the model needs of them."""
        assert self.tail is not None
        try:
            with ExitStack() as stack:
                self._use_outputs(model, [*self.outputs][:-1], stack)
                return torch.equal(self.tail.hidden(self.ids_BT), self.hidden_BTD)
        except Exception as error:  # code that is not run as it expects may fail in any way
            logger.debug("%s: its layers cannot be replaced: %s", type(model).__name__, error)
            return False

    def _use_outputs(self, model: PreTrainedModel, paths: Sequence[str], stack: ExitStack) -> None:
        """Let these layers give the outputs that were kept, without computing anything."""
        for path in paths:
            kept = self.outputs[path]
            stack.enter_context(replaced_forward(model.get_submodule(path), lambda *_, kept=kept, **__: _copied(kept)))

    def _parts(self) -> Iterator[slice]:
        """The samples, as many at a time as logits fit into memory."""
        at_once = max(1, LOGITS_BYTES // (self.vocabulary * self.ids_BT.shape[1] * 4))
        for first in range(0, len(self.ids_BT), at_once):
            yield slice(first, first + at_once)

    def _logits(self, model: PreTrainedModel) -> Iterator[Tensor]:
        for part in self._parts():
            yield model(input_ids=self.ids_BT[part], use_cache=False).logits


def _copied(output: Any) -> Any:
    """A copy, since what comes after may change it in place."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


def _divergence(dense_BTV: Tensor, logits_BTV: Tensor) -> float:
    """KL in nats over all tokens, of log-probabilities and logits."""
    cut_BTV = logits_BTV.float().log_softmax(-1)
    return float(functional.kl_div(cut_BTV, dense_BTV, reduction="sum", log_target=True))
