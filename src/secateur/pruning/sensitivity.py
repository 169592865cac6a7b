"""Model and scores -> what it costs to cut each group to a few sizes, measured: the damage curves of an allocation.

Each group is cut alone, the units with the lowest scores first, and the cut model is compared with the dense one on a
few windows. What lies before the cut layer is computed once.
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

    Windows are int64, samples x length, of which the first that hold `TOKENS` tokens are looked at. Raises `PlanError`
    for groups that run through all layers, and `ScoreError` where a cut gives NaN or Inf.

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
    few = windows[: max(1, TOKENS // windows.shape[1])].to(input_device(model))
    dense = _Dense(model, few, [f"{prefix}.{i}" for prefix in discovery.layer_lists for i in range(discovery.depth)])
    total, done = sum(len(_sizes(group)) for group in groups), 0
    found: dict[str, DamageCurve] = {}
    for group in groups:
        points = []
        for kept in _sizes(group):
            keep = top_units(scores.units[group.name], kept)
            one = PlannedGroup(group.name, group.kind, group.layer, group.units, kept, keep)
            cut = prune(model, Plan(discovery.model, CutOptions(ratio=0.0), (one,), {}, {}), discovery=discovery)
            damage = dense.divergence(cut, group.layer or 0)
            if not damage < torch.inf:
                raise ScoreError(f"{group.name} cut to {kept} units gives NaN or Inf: check the weights")
            points.append((kept, max(0.0, damage)))
            done += 1
            if progress is not None:
                progress(done, total)
        found[group.name] = (*points, (group.units, 0.0))
    return found


def _sizes(group: Group) -> list[int]:
    """Sizes to cut to, ascending; of few units, all."""
    if group.units <= len(SHARES) + 1:
        return [*range(group.least, group.units)]
    whole = {0} if group.least == 0 else set()
    return sorted(whole | {max(group.least, round(group.units * share)) for share in SHARES})


class _Dense:
    """The dense model's answers, and what its layers give on the way."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, layers: Sequence[str]) -> None:
        self.ids = ids
        self.tail = split_output_head(model, probe_windows(ids))
        self.outputs: dict[str, Any] = {}  # of the layers, in their order; none where they are not to be replaced
        modules = dict(model.named_modules())
        self.vocabulary = model.get_output_embeddings().weight.shape[0] if self.tail else model.config.vocab_size
        if self.tail is None:
            self.answers = [logits.float().log_softmax(-1) for logits in self._logits(model)]
            return
        with ExitStack() as stack:
            for path in layers:
                if path in modules:
                    stack.callback(modules[path].register_forward_hook(self._keep(path)).remove)
            self.hidden = self.tail.hidden(ids)
        if not self._can_be_replaced(model):
            logger.debug("%s: layers are computed anew for every cut", type(model).__name__)
            self.outputs.clear()

    def _keep(self, path: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            self.outputs[path] = _copied(output)

        return hook

    def _can_be_replaced(self, model: PreTrainedModel) -> bool:
        """Whether what the layers have given is all that is needed of them."""
        assert self.tail is not None
        try:
            with ExitStack() as stack:
                self._replace(model, [*self.outputs][:-1], stack)
                return torch.equal(self.tail.hidden(self.ids), self.hidden)
        except Exception as error:  # code that is not run as it expects may fail in any way
            logger.debug("%s: its layers cannot be replaced: %s", type(model).__name__, error)
            return False

    def _replace(self, model: PreTrainedModel, paths: Sequence[str], stack: ExitStack) -> None:
        for path in paths:
            given = self.outputs[path]
            stack.enter_context(
                replaced_forward(model.get_submodule(path), lambda *_, given=given, **__: _copied(given))
            )

    def divergence(self, cut: PreTrainedModel, layer: int) -> float:
        """KL(dense, cut), nats per token, of a model that is cut from this layer on."""
        total = 0.0
        if self.tail is None:
            for wanted, logits in zip(self.answers, self._logits(cut), strict=True):
                total += _divergence(wanted, logits)
            return total / self.ids.numel()
        base: Any = getattr(cut, cut.base_model_prefix)
        tail = OutputHead(cut, base)
        with ExitStack() as stack:
            self._replace(cut, [path for path in self.outputs if int(path.rpartition(".")[2]) < layer], stack)
            hidden = tail.hidden(self.ids)
        for few in self._chunks():
            wanted = self.tail.logits(self.hidden[few], self.ids[few]).float().log_softmax(-1)
            total += _divergence(wanted, tail.logits(hidden[few], self.ids[few]))
        return total / self.ids.numel()

    def _chunks(self) -> Iterator[slice]:
        step = max(1, LOGITS_BYTES // (self.vocabulary * self.ids.shape[1] * 4))
        for first in range(0, len(self.ids), step):
            yield slice(first, first + step)

    def _logits(self, model: PreTrainedModel) -> Iterator[Tensor]:
        for few in self._chunks():
            yield model(input_ids=self.ids[few], use_cache=False).logits


def _copied(output: Any) -> Any:
    """A copy, since what comes after may change it in place."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


def _divergence(wanted: Tensor, logits: Tensor) -> float:
    found = functional.kl_div(logits.float().log_softmax(-1), wanted, reduction="sum", log_target=True)
    return float(found)
