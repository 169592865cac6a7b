"""Model and calibration windows -> gradients, shown one weight at a time; no `.grad` is ever held.

One forward and one backward pass over all samples together. `probe.py` looks at how the model uses its parameters,
`capture.py` takes the factors of each gradient as the backward pass reaches it, `weight_gradients.py` and
`mask_gradients.py` form from them what is asked for, show it and drop it, `recomputation.py` runs modules again.
Axes: B samples, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import processes
from secateur.errors import ScoreError
from secateur.models.inputs import arguments, predicted
from secateur.models.streaming import streamed_layers
from secateur.progress import Progress
from secateur.scoring.passes.capture import Capture, GradientVisitor, PassContext, PassProgress
from secateur.scoring.passes.forward import embedding_device, replaced_forward
from secateur.scoring.passes.loss import loss_of, predictions
from secateur.scoring.passes.mask_gradients import MaskGradients, MaskVisit
from secateur.scoring.passes.probe import Layout, probe
from secateur.scoring.passes.recomputation import Recomputation, Recompute, SampleRange
from secateur.scoring.passes.weight_gradients import WeightGradients, WeightVisit

RECOMPUTED_TOKENS = 2048  # of a layer that is computed again at once
FLOAT16_LOSS_SCALE = 2.0**12  # without it, float16 gradients would be zero


def stream_gradients(
    model: PreTrainedModel,
    windows: Tensor,
    visit: WeightVisit,
    *,
    wanted: Collection[str] | None = None,
    second_order: bool = False,
    recompute: Recompute | None = None,
    progress: Progress | None = None,
) -> float:
    """Visit the gradient of the mean loss over the windows for each parameter wanted (by default, all).

    Windows are int64, samples x length; `loss.py` says what is predicted of them. With `second_order`, visits see the
    mean over the samples of each one's squared gradient as well. `recompute` names layers that may be computed again in
    the backward pass (by default, none). Of several processes (see `processes`), each takes its share of the windows,
    and all visit the gradients over all of them. Returns the loss in nats per prediction. Parameters that the loss does
    not depend on are not visited. Raises `ScoreError` when the loss is NaN or Inf, or a weight is not in memory.
    """
    gradient_pass = _GradientPass(model, windows, wanted, second_order, recompute or Recompute())
    return gradient_pass.run(lambda context: WeightGradients(context, visit, second_order=second_order), progress)


def stream_masks(
    model: PreTrainedModel,
    windows: Tensor,
    visit: MaskVisit,
    *,
    spans: int = 1,
    wanted: Collection[str] | None = None,
    recompute: Recompute | None = None,
    progress: Progress | None = None,
) -> float:
    """Visit the derivatives by masks over what each weight wanted reads, at each of the spans of every sample.

    See `mask_gradients`. Weights of linear layers are visited along the dimension that reads; those whose gradients
    autograd has to form (stacked experts) along every dimension. All else is as in `stream_gradients`.
    """
    matrices = [n for n, p in model.named_parameters() if p.dim() > 1 and (wanted is None or n in wanted)]
    gradient_pass = _GradientPass(model, windows, matrices, True, recompute or Recompute())
    return gradient_pass.run(lambda context: MaskGradients(context, visit, spans), progress)


class _GradientPass:
    """One forward and one backward pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        wanted: Collection[str] | None,
        second_order: bool,
        recompute: Recompute,
    ) -> None:
        _check_in_memory(model)
        self.model, self.second_order, self.recompute = model, second_order, recompute
        self.windows, self.all_samples = processes.share_of(windows), len(windows)
        self.predictions = predictions(model, windows)  # of all processes
        self.samples, self.length = self.windows.shape  # of this process
        self.running = SampleRange(0, self.samples)
        self.parameters = {
            n: p for n, p in model.named_parameters() if p.is_floating_point() and (wanted is None or n in wanted)
        }
        float16 = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self.loss_scale = FLOAT16_LOSS_SCALE if float16 else 1.0

    def run(self, visitor_of: Callable[[PassContext], GradientVisitor], progress: Progress | None) -> float:
        """Run the pass and show its gradients to a visitor; returns the loss in nats per token."""
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(_restored(self.model))

            # 1. Probe the model with two short samples: which gradients are products, which layers fit into memory. In
            #    its pass, what autograd saves is measured: the graph has to begin where the real one will.
            traced = {id(each) for each in (*self.parameters.values(), self.model.get_input_embeddings().weight)}
            for parameter in self.model.parameters():
                parameter.requires_grad_(id(parameter) in traced)
            memory = 0 if self.recompute.layer_cache else self.recompute.memory  # only recomputed layers are cached
            layers, squares = self.recompute.layers, self.second_order
            layout = probe(
                self.model, self.windows, self.parameters, second_order=squares, layers=layers, memory=memory
            )
            context = PassContext(
                parameters=self.parameters,
                layout=layout,
                running=self.running,
                samples=self.samples,
                all_samples=self.all_samples,
                loss_scale=self.loss_scale,
                layer_cache=self.recompute.layer_cache,
                progress=PassProgress(self.parameters, progress),
            )
            visitor = visitor_of(context)

            # 2. Let autograd form only those weight gradients that are no products. All others are captured by hooks on
            #    the modules' outputs, so for autograd their weights are constants.
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for name in layout.by_autograd:
                self.parameters[name].requires_grad_(True)
            Capture(context, visitor).register_hooks(self.model, stack)
            self._report_layers(context.progress, stack)

            # 3. Replace the forward of modules that are computed again in the backward pass.
            self._replace_recomputed(context, visitor, stack)

            # 4. Forward, loss and backward: hooks hand each gradient to the visitor when the backward pass reaches it.
            loss = torch.tensor(self._forward_and_backward(layout), dtype=torch.float64)
            if layout.head is not None:
                layout.head.base_output.clear()  # it holds the graph, which holds the hooks, which hold the head

            # 5. Visit what can be known to be complete only now.
            processes.add_up(loss)
            visitor.finish_rest()
        return float(loss)

    def _replace_recomputed(self, context: PassContext, visitor: GradientVisitor, stack: ExitStack) -> None:
        layout = context.layout
        complete = layout.by_autograd - layout.conditional - layout.tied  # parameters, once their module is done

        def finish_module(path: str) -> None:
            for name in sorted(self._names_within(path) & complete):  # in the same order in all processes
                visitor.finish(name)

        recomputation = Recomputation(
            self.running,
            Counter(layout.calls),
            self.recompute.layer_cache,
            # Of tied weights, another part of the gradient would be missing.
            may_skip=lambda path: not self._names_within(path) & layout.tied,
            on_done=finish_module,
            on_skipped=lambda path: context.progress.finish(*self._names_within(path)),
        )
        for path, module in self.model.named_modules():
            chunk = self._chunk(path, layout)
            if chunk is not None:
                forward = recomputation.wrap(module, path, chunk, cached=path in layout.recomputed)
                stack.enter_context(replaced_forward(module, forward))

    def _chunk(self, path: str, layout: Layout) -> int | None:
        """How many samples of a module are computed again at once; None where it is not recomputed."""
        if path in layout.one_by_one:
            return 1
        if path in layout.recomputed:
            return max(1, RECOMPUTED_TOKENS // self.length) if path in layout.independent else self.samples
        return None

    def _names_within(self, path: str) -> set[str]:
        """The parameters wanted in a module."""
        inside = {id(parameter) for parameter in self.model.get_submodule(path).parameters()}
        return {name for name, parameter in self.parameters.items() if id(parameter) in inside}

    def _report_layers(self, progress: PassProgress, stack: ExitStack) -> None:
        """Report each layer of the forward pass."""

        def report(size: int, *_: Any) -> None:
            if self.running.depth == 0:
                progress.advance(size)

        for path in self.recompute.layers:
            size = sum(self.parameters[name].numel() for name in self._names_within(path))
            stack.callback(self.model.get_submodule(path).register_forward_hook(partial(report, size)).remove)

    def _forward_and_backward(self, layout: Layout) -> float:
        """Run all samples through the model and back; returns their part of the mean loss."""
        ids_BT, head = self.windows.to(embedding_device(self.model)), layout.head
        if layout.whole_model:  # sample by sample
            return sum(self._whole_model(first, ids_BT[first : first + 1]) for first in range(self.samples))
        if head is None:
            return self._whole_model(0, ids_BT)
        # The base model runs on all samples, the head on a few at a time, so that no tensor of all logits is needed:
        # forward and back to the hidden states, whose gradient then goes back through the base model.
        hidden_BTD = head.hidden(ids_BT)
        gradient_BTD, loss = torch.empty_like(hidden_BTD), 0.0
        for some in head.chunks(ids_BT):
            leaf_BTD = hidden_BTD[some].detach().requires_grad_(True)
            with self.running.narrowed(some.start, some.stop - some.start):
                part = self._loss(head.logits(leaf_BTD, ids_BT[some]), ids_BT[some])
                part.backward()
            assert leaf_BTD.grad is not None
            gradient_BTD[some] = leaf_BTD.grad
            loss += float(part.detach()) / self.loss_scale
        if hidden_BTD.requires_grad:
            hidden_BTD.backward(gradient_BTD)
        return loss

    def _whole_model(self, first: int, ids_BT: Tensor) -> float:
        """Forward and back with these samples, without a split."""
        with nullcontext() if len(ids_BT) == self.samples else self.running.narrowed(first, len(ids_BT)):
            loss = self._loss(predicted(self.model(**arguments(self.model, ids_BT))), ids_BT)
            loss.backward()
        return float(loss.detach()) / self.loss_scale

    def _loss(self, logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        """These samples' part of the mean loss over all samples of all processes, times the loss scale."""
        loss = loss_of(self.model, logits_BTV, ids_BT, self.loss_scale / self.predictions)
        if not torch.isfinite(loss) and processes.count() == 1:  # of several, all find it in the gradients
            raise ScoreError(
                f"the loss on the calibration text is {float(loss.detach())}: the model's outputs are not finite. "
                "Check the weights, or use dtype float32 or bfloat16"
            )
        return loss


def _check_in_memory(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters() if streamed_layers(model) is None else ():
        if parameter.device.type == "meta":
            raise ScoreError(
                f"the weight {name} is not in memory (it is on meta, as accelerate leaves those it offloads). Load the "
                "model on the CPU, where weights are read from the disk as they are used: --device cpu"
            )


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards, parameters require gradients as before, and none has one."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
