"""Dense model, pruned model and windows -> the pruned model, each layer trained to give what the dense layer gives.

Layer after layer, in one forward pass: a layer of the pruned model reads what the trained layers before it give, and
learns to answer as the dense model's layer does at the same place. Unlike the closed forms of `repair`, this moves
every weight of a layer. A layer's training is kept only where it lowers the error on windows left out of it, and of the
layers as many quarters, from the first on, as the whole model is best with.

Names of tensors end in their axes: B samples, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.discovery.groups import Discovery
from secateur.errors import PlanError, one_line
from secateur.models.inputs import hidden_in
from secateur.models.streaming import check_in_place
from secateur.progress import Progress
from secateur.scoring.passes.forward import pass_to_hidden, plain_products, replaced_forward
from secateur.scoring.passes.layers import LEAST_TOKENS, LayerCall, joined

HELD_OUT = 8  # one window of so many is left out of the training, and judges it
PARTS = 4  # of the layers, after each of which the whole model is judged
PATIENCE = 2  # parts in a row that make it no better, after which no more layers are trained
LEAST_RMS = 1e-3  # of a parameter, for the length of its steps: a bias may be all zeros


@dataclass(frozen=True, slots=True)
class LayerTraining:
    """How each layer is trained: by AdamW, without weight decay.

    A parameter's learning rate is relative to its size, as in Adafactor (arXiv 1804.04235), and to the layer's error: a
    layer that is almost exact already would get worse by longer steps. It falls with the square root of the width: the
    steps of a row's entries agree, so what they change grows with their number, and what the row gives with the square
    root of it (arXiv 2203.03466).
    """

    steps: int = 150
    batch_tokens: int = 1024
    """Tokens of a step, as whole windows."""
    learning_rate: float = 1.0
    """The highest, as a multiple of the parameter's root mean square times the square root of the layer's error, over
    the square root of the parameter's columns: it rises over the first tenth of the steps and falls along a cosine."""
    seed: int = 0
    """Of the order of the windows."""

    def factor(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        warmup_steps = max(1, self.steps // 10)
        return min((step + 1) / warmup_steps, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.steps)))


@torch.no_grad()
def reconstruct_in_place(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    discovery: Discovery,
    windows: Tensor,
    *,
    training: LayerTraining | None = None,
    judge: Callable[[], float] | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """Train the layers of the pruned model in place; the dense model, with which it may share weights, stays as it is.

    Windows are int64, samples x length; all go through the models together, which takes memory for the hidden states
    of one layer. `judge` gives the loss of the pruned model, which it may run: before the training and after each
    quarter of the layers. The model is left as it was at the least loss, and after two quarters in a row that do not
    lower it no more layers are trained. Returns the error of every layer that has been trained, on the windows left
    out, before and after training: the squared distance of a token's hidden states to the dense layer's, as a share of
    the squares of those, on average. Raises `PlanError` where the two models have other layers or another hidden width,
    or layers cannot be trained alone; the model is then as it was.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.options import CutOptions
    >>> from secateur.planning.plan import Plan, PlannedGroup
    >>> from secateur.pruning.prune import prune
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model, discovery = AutoModelForCausalLM.from_config(config), discover(config)
    >>> half = PlannedGroup("layers.1.mlp", "mlp", 1, units=24, kept=12, keep=tuple(range(12)))
    >>> pruned = prune(model, Plan("opt", CutOptions(ratio=0.2), (half,), {}, {}), discovery=discovery)
    >>> windows = torch.arange(160).reshape(8, 20)
    >>> errors = reconstruct_in_place(model, pruned, discovery, windows, training=LayerTraining(steps=5))
    >>> [(path, after <= before) for path, (before, after) in errors.items()]
    [('model.decoder.layers.1', True)]
    """
    check_in_place(pruned, "repair=reconstruct", "--repair least-squares")
    layers = _layers_to_match(dense, pruned, discovery)
    before = _weights(pruned)  # which no training writes to
    pass_ = _Reconstruction(dense, pruned, layers, windows, training or LayerTraining(), judge, progress)
    with ExitStack() as stack:
        for model in (dense, pruned):
            stack.enter_context(plain_products(model))
        run = pass_to_hidden(pruned, windows)
        for path in layers:
            layer = pruned.get_submodule(path)
            stack.enter_context(replaced_forward(layer, pass_.forward_of(path, layer.forward)))
        try:
            run()
        except _NoBetterError:
            pass_.put_best()
        except (PlanError, IndexError, RuntimeError) as error:
            _put(pruned, before)
            if isinstance(error, PlanError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise
            raise PlanError(
                f"repair=reconstruct trains each layer on some of the windows at a time, which layers of "
                f"{type(pruned).__name__} do not allow ({one_line(error)}). Use another repair: --repair least-squares"
            ) from error
        else:
            pass_.put_best()
    return pass_.errors


def _layers_to_match(dense: PreTrainedModel, pruned: PreTrainedModel, discovery: Discovery) -> dict[str, bool]:
    """Path of each layer -> whether it has been cut. Raises `PlanError` for another hidden width, or other layers."""
    modules, others = dict(dense.named_modules()), dict(pruned.named_modules())
    layers = [path for path in discovery.layer_paths if path in modules]
    if not layers or any(path not in others for path in layers):
        raise PlanError("reconstruction needs all layers of the dense model: use another repair where layers go")
    shapes = {name: parameter.shape for name, parameter in pruned.named_parameters()}
    changed = {name for name, parameter in dense.named_parameters() if parameter.shape != shapes.get(name)}
    if any(not name.startswith(tuple(f"{path}." for path in layers)) for name in changed):
        raise PlanError("reconstruction needs the dense model's hidden width: use another repair where it goes")
    return {path: any(name.startswith(f"{path}.") for name in changed) for path in layers}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]


class _NoBetterError(Exception):
    """Layers that are trained no longer make the model better: the pass ends."""


class _Reconstruction:
    """A forward pass of the pruned model in which each layer is trained before it is computed."""

    def __init__(
        self,
        dense: PreTrainedModel,
        pruned: PreTrainedModel,
        layers: Mapping[str, bool],
        windows: Tensor,
        training: LayerTraining,
        judge: Callable[[], float] | None,
        progress: Progress | None,
    ) -> None:
        self.dense, self.pruned, self.layers = dense, pruned, layers
        self.training, self.judge, self.progress = training, judge, progress
        self.judging = False  # while the whole model runs within the pass
        self.least = math.inf if judge is None else judge()
        self.best = _weights(pruned)
        self.no_better = 0  # parts in a row
        self.samples, self.length = windows.shape
        held_B = torch.arange(self.samples) % HELD_OUT == HELD_OUT - 1
        if self.samples > 1 and not held_B.any():
            held_B[-1] = True
        self.held_out = torch.nonzero(held_B if held_B.any() else ~held_B).flatten()  # numbers of windows
        self.trained_on = torch.nonzero(~held_B).flatten()
        self.target_BTD: Tensor | None = None  # the output of the dense layer before
        self.errors: dict[str, tuple[float, float]] = {}

    def forward_of(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a layer of the pruned model: it is trained first."""

        def trained(*args: Any, **kwargs: Any) -> Any:
            if self.judging:
                return forward(*args, **kwargs)
            call = LayerCall.of(forward, args, kwargs, self.samples)
            if (rows := len(call.hidden_BTD)) != self.samples:
                raise PlanError(
                    f"repair=reconstruct: {path} reads hidden states with {rows} rows, expected one for each of "
                    f"{self.samples} windows. Use another repair: --repair least-squares"
                )
            dense = LayerCall.of(self.dense.get_submodule(path).forward, args, kwargs, self.samples)
            dense_input_BTD = call.hidden_BTD if self.target_BTD is None else self.target_BTD
            parts = self._batches(LEAST_TOKENS)
            self.target_BTD = torch.cat([hidden_in(dense.run(part, dense_input_BTD[part])) for part in parts])
            if self.layers[path] and path not in self.errors:
                self.errors[path] = self._train(self.pruned.get_submodule(path), call, self.target_BTD)
                done, layers = len(self.errors), sum(self.layers.values())
                if self.progress is not None:
                    self.progress(done, layers)
                self._judge(done, layers)
            return joined([call.run(part, call.hidden_BTD[part]) for part in parts], parts)

        return trained

    def _judge(self, done: int, layers: int) -> None:
        """Judge the whole model, where a part of the layers is done."""
        if self.judge is None or done * PARTS // layers == (done - 1) * PARTS // layers:
            return
        self.judging = True
        try:
            loss = self.judge()
        finally:
            self.judging = False
        self.no_better += 1
        if loss < self.least:
            self.least, self.best, self.no_better = loss, _weights(self.pruned), 0
        if self.no_better == PATIENCE:
            raise _NoBetterError

    def put_best(self) -> None:
        """Give the pruned model the weights that it was best with."""
        if self.judge is not None:
            _put(self.pruned, self.best)

    def _batches(self, tokens: int, of: Tensor | None = None) -> list[Tensor]:
        """Numbers of windows, of all or of these, in batches of so many tokens."""
        return list((torch.arange(self.samples) if of is None else of).split(max(1, tokens // self.length)))

    def _train(self, layer: nn.Module, call: LayerCall, target_BTD: Tensor) -> tuple[float, float]:
        """Train a layer in float32 (or float64) and take its weights back where that does not help; both errors."""
        own = {name: parameter for name, parameter in layer.named_parameters() if parameter.is_floating_point()}
        before = {name: parameter.data for name, parameter in own.items()}  # may be the dense model's
        required = {name: parameter.requires_grad for name, parameter in own.items()}
        first = self._error(call, target_BTD)
        exact = torch.float64 if target_BTD.dtype == torch.float64 else torch.float32
        try:
            for parameter in own.values():
                parameter.data = parameter.data.to(exact, copy=True)
                parameter.requires_grad_(True)
            self._descend([*own.values()], call, target_BTD.to(exact), math.sqrt(min(1.0, first)))
            for name, parameter in own.items():
                parameter.data = parameter.data.to(before[name].dtype)
            last = self._error(call, target_BTD)
        finally:
            for name, parameter in own.items():
                parameter.grad = None
                parameter.requires_grad_(required[name])
        if last < first:
            return first, last
        for name, parameter in own.items():
            parameter.data = before[name]
        return first, first

    @torch.enable_grad()
    def _descend(self, parameters: list[nn.Parameter], call: LayerCall, target_BTD: Tensor, wrong: float) -> None:
        """Train on the squared error, where `wrong` is the size of the error beside the target's."""
        training = self.training
        highest = [training.learning_rate * wrong * _step_size(parameter) for parameter in parameters]
        groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, highest, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.factor)
        generator = torch.Generator().manual_seed(training.seed)
        squares_BT = _squares(target_BTD)
        parts: list[Tensor] = []
        for _ in range(training.steps):
            if not parts:
                order = torch.randperm(len(self.trained_on), generator=generator)
                parts = self._batches(training.batch_tokens, self.trained_on[order])
            part = parts.pop()
            output_BTD = hidden_in(call.run(part, call.hidden_BTD[part], target_BTD.dtype))
            loss = ((output_BTD - target_BTD[part]).square().mean(-1) / squares_BT[part]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def _error(self, call: LayerCall, target_BTD: Tensor) -> float:
        """On the windows that are left out: of each token relative to the target's squares, on average."""
        squares_BT, total = _squares(target_BTD), 0.0
        for part in self._batches(LEAST_TOKENS, self.held_out):
            wrong_BTD = hidden_in(call.run(part, call.hidden_BTD[part])).double() - target_BTD[part].double()
            total += float((wrong_BTD.square().mean(-1) / squares_BT[part]).sum())
        return total / squares_BT[self.held_out].numel()


def _step_size(parameter: Tensor) -> float:
    """The root mean square over the square root of the columns.

    >>> _step_size(torch.full((3, 16), 2.0))
    0.5
    """
    rms = float(parameter.detach().square().mean().sqrt())
    return max(LEAST_RMS, rms) / math.sqrt(parameter.shape[-1] if parameter.dim() else 1)


def _squares(target_BTD: Tensor) -> Tensor:
    """The mean square of each token's hidden states; of one whose are zero, a little."""
    squares_BT = target_BTD.to(torch.promote_types(target_BTD.dtype, torch.float32)).square().mean(-1)
    return squares_BT.clamp(min=1e-6 * float(squares_BT.mean()) + torch.finfo(torch.float32).tiny)
