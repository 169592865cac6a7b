"""Dense model, cut model and windows -> the cut model, each layer trained to give what the dense layer gives.

Layer after layer, in one forward pass: a layer of the cut model reads what the trained layers before it give, and
learns to answer as the dense model's layer does at the same place. Unlike the closed forms of `repair`, this moves
every weight of a layer. It keeps a layer's training only where that lowers the error on windows left out of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.progress import Progress
from secateur.scoring.passes.forward import (
    eager_experts,
    input_device,
    probe_windows,
    replaced_forward,
    rows_per_sample,
    split_output_head,
)

STEPS = 150  # of training, for every layer
BATCH_TOKENS = 1024  # of a step, as whole windows
RATE = 2e-4  # the highest, of AdamW; it rises over the first tenth and falls along a cosine
HELD_OUT = 8  # one window of so many is left out of the training, and judges it


@dataclass(frozen=True, slots=True)
class Training:
    """How each layer is trained."""

    steps: int = STEPS
    batch_tokens: int = BATCH_TOKENS
    rate: float = RATE
    seed: int = 0


@torch.no_grad()
def reconstruct_in_place(
    dense: PreTrainedModel,
    cut: PreTrainedModel,
    discovery: Discovery,
    windows: Tensor,
    *,
    training: Training | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """Train the layers of the cut model in place; the dense model, of which it may share weights, is left as it is.

    Windows are int64, samples x length; all go through the models together, in the part of memory that hidden states
    of one layer take. Returns the error of every layer that has been cut, on the windows left out, before and after:
    the squared distance to the dense layer's output, as a share of that output's squares. Raises `PlanError` where the
    two models have other layers, or another hidden width.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.plan import CutOptions, plan
    >>> from secateur.pruning.prune import prune
    >>> from secateur.scoring.scores import score
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model, discovery = AutoModelForCausalLM.from_config(config), discover(config)
    >>> options = CutOptions(ratio=0.5, of="units", axes=("mlp",), score="l2")
    >>> decided = plan(discovery, options, config=config, scores=score(model, discovery=discovery, name="l2"))
    >>> cut = prune(model, decided, discovery=discovery)
    >>> windows = torch.arange(160).reshape(8, 20)
    >>> found = reconstruct_in_place(model, cut, discovery, windows, training=Training(steps=5))
    >>> all(after <= before for before, after in found.values()), len(found)
    (True, 2)
    """
    training = training or Training()
    pass_ = _Pass(dense, cut, discovery, windows, training, progress)
    ids = windows.to(input_device(cut))
    with ExitStack() as stack:
        for model in (dense, cut):
            stack.enter_context(eager_experts(model))
        tail = split_output_head(cut, probe_windows(windows).to(ids.device))
        for path in pass_.layers:
            layer = cut.get_submodule(path)
            stack.enter_context(replaced_forward(layer, pass_.forward_of(path, layer.forward)))
        if tail is None:
            cut(input_ids=ids, use_cache=False)
        else:
            tail.hidden(ids)
    return pass_.errors


class _Pass:
    def __init__(
        self,
        dense: PreTrainedModel,
        cut: PreTrainedModel,
        discovery: Discovery,
        windows: Tensor,
        training: Training,
        progress: Progress | None,
    ) -> None:
        self.dense, self.cut, self.training, self.progress = dense, cut, training, progress
        self.samples, self.length = windows.shape
        modules, others = dict(dense.named_modules()), dict(cut.named_modules())
        paths = [f"{prefix}.{i}" for prefix in discovery.layer_lists for i in range(discovery.depth)]
        self.layers = [path for path in paths if path in modules]
        if not self.layers or any(path not in others for path in self.layers):
            raise PlanError("reconstruction needs all layers of the dense model: use another repair where layers go")
        shapes = {name: parameter.shape for name, parameter in cut.named_parameters()}
        changed = {name for name, parameter in dense.named_parameters() if parameter.shape != shapes.get(name)}
        within = tuple(f"{path}." for path in self.layers)
        if any(not name.startswith(within) for name in changed):
            raise PlanError("reconstruction needs the dense model's hidden width: use another repair where it goes")
        self.cut_layers = [path for path in self.layers if any(name.startswith(f"{path}.") for name in changed)]
        held = torch.arange(self.samples) % HELD_OUT == HELD_OUT - 1 if self.samples > 1 else torch.zeros(1).bool()
        if self.samples > 1 and not held.any():
            held[-1] = True
        self.held_out = torch.nonzero(held if held.any() else ~held).flatten()
        self.trained_on = torch.nonzero(~held).flatten()
        self.wanted: Tensor | None = None  # what the dense layer before has given
        self.errors: dict[str, tuple[float, float]] = {}
        self.done = 0

    def forward_of(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What a layer of the cut model does: it is trained first, and so gives what is left to be wrong."""

        def trained(*args: Any, **kwargs: Any) -> Any:
            call = _Call.of(forward, args, kwargs, self.samples)
            reference = _Call.of(self.dense.get_submodule(path).forward, args, kwargs, self.samples)
            before = call.hidden if self.wanted is None else self.wanted
            self.wanted = torch.cat([_hidden_in(reference.run(part, before[part])) for part in self._batches()])
            if path in self.cut_layers and path not in self.errors:
                self.errors[path] = self._train(self.cut.get_submodule(path), call, self.wanted)
                self.done += 1
                if self.progress is not None:
                    self.progress(self.done, len(self.cut_layers))
            outputs = [call.run(part, call.hidden[part]) for part in self._batches()]
            return _joined(outputs)

        return trained

    def _batches(self, of: Tensor | None = None) -> list[Tensor]:
        """Numbers of windows, so many at a time as one step trains on."""
        size = max(1, self.training.batch_tokens // self.length)
        return list((torch.arange(self.samples) if of is None else of).split(size))

    def _train(self, layer: nn.Module, call: _Call, wanted: Tensor) -> tuple[float, float]:
        own = {name: parameter for name, parameter in layer.named_parameters() if parameter.is_floating_point()}
        before = {name: parameter.data for name, parameter in own.items()}  # may be the dense model's
        asked = {name: parameter.requires_grad for name, parameter in own.items()}
        first = self._error(call, wanted)
        exact = torch.float64 if wanted.dtype == torch.float64 else torch.float32
        try:
            for parameter in own.values():
                parameter.data = parameter.data.to(exact, copy=True)
                parameter.requires_grad_(True)
            self._descend([*own.values()], call, wanted, exact)
            for name, parameter in own.items():
                parameter.data = parameter.data.to(before[name].dtype)
            last = self._error(call, wanted)
        finally:
            for name, parameter in own.items():
                parameter.grad = None
                parameter.requires_grad_(asked[name])
        if last < first:
            return first, last
        for name, parameter in own.items():
            parameter.data = before[name]
        return first, first

    @torch.enable_grad()
    def _descend(self, parameters: list[nn.Parameter], call: _Call, wanted: Tensor, exact: torch.dtype) -> None:
        training = self.training
        optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0, betas=(0.9, 0.95))
        rise = max(1, training.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / training.steps))),
        )
        generator = torch.Generator().manual_seed(training.seed)
        scale = wanted[self.trained_on].to(exact).square().mean()
        parts: list[Tensor] = []
        for _ in range(training.steps):
            if not parts:
                order = torch.randperm(len(self.trained_on), generator=generator)
                parts = self._batches(self.trained_on[order])
            part = parts.pop()
            given = _hidden_in(call.run(part, call.hidden[part], exact))
            loss = (given - wanted[part].to(exact)).square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def _error(self, call: _Call, wanted: Tensor) -> float:
        """On the windows that are left out."""
        wrong, whole = 0.0, 0.0
        for part in self._batches(self.held_out):
            target = wanted[part].double()
            wrong += float((_hidden_in(call.run(part, call.hidden[part])).double() - target).square().sum())
            whole += float(target.square().sum())
        return wrong / max(whole, 1e-30)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a layer with all samples, that can be repeated with some."""

    forward: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    steps: Mapping[int, int]  # of tensors that hold something for each sample: how many entries
    at: int  # which of the leaves the hidden states are

    @classmethod
    def of(cls, forward: Callable[..., Any], args: Any, kwargs: Any, samples: int) -> _Call:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        hidden = args[0] if args else kwargs["hidden_states"]
        at = next(i for i, leaf in enumerate(leaves) if leaf is hidden)
        found = {i: rows_per_sample(leaf, samples) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        return cls(forward, leaves, spec, {i: step for i, step in found.items() if step is not None}, at)

    @property
    def hidden(self) -> Tensor:
        """What the layer reads: samples x tokens x features."""
        hidden: Tensor = self.leaves[self.at]
        return hidden

    def run(self, samples: Tensor, hidden: Tensor, dtype: torch.dtype | None = None) -> Any:
        """The layer's output for these samples, of which the hidden states are given."""
        leaves = list(self.leaves)
        for i, step in self.steps.items():
            whole = leaves[i]
            rows = (samples[:, None] * step + torch.arange(step)).flatten()
            leaves[i] = whole[rows.to(whole.device)]
        leaves[self.at] = hidden
        if dtype is not None:
            leaves = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.forward(*args, **kwargs)


def _hidden_in(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def _joined(outputs: list[Any]) -> Any:
    """One output of the outputs of parts: hidden states, or a tuple that begins with them."""
    hidden = torch.cat([_hidden_in(output) for output in outputs])
    return (hidden, *outputs[0][1:]) if isinstance(outputs[0], tuple) else hidden
