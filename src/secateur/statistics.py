"""Calibration tokens -> what the scores need to know of the model on them.

Gradients are taken one batch at a time. A hook folds each parameter's gradient into float32 sums the moment it is
complete and drops it, so the model's own `.grad` is never held whole, whatever its dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur.errors import ScoreError

Progress = Callable[[int, int], None]
BATCH_TOKENS = 1024  # tokens of one backward pass when samples need not be told apart


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the calibration samples, by parameter name; tensors are float32 and shaped like the parameter."""

    loss: float  # mean cross-entropy in nats per token
    samples: int
    tokens: int  # scored tokens
    gradient: Mapping[str, Tensor] = field(default_factory=dict)  # G of the batched mean cross-entropy
    squared_gradient: Mapping[str, Tensor] = field(default_factory=dict)  # A = mean over samples of G_n * G_n


def gradient_statistics(
    model: PreTrainedModel, windows: Tensor, *, second_order: bool = False, progress: Progress | None = None
) -> Statistics:
    """Gradients of the mean cross-entropy over the windows (int64, samples x length; labels are the inputs).

    With `second_order`, each sample gets its own backward pass and the squares of its gradient are summed too
    (LLM-Pruner, arXiv 2305.11627, equation 5: the Hessian's diagonal by the Fisher information). The gradient of the
    batched mean is the mean of the samples' gradients, since all windows are equally long. Raises `ScoreError`
    naming the first parameter whose gradient is not finite.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> statistics = gradient_statistics(model, torch.arange(20).reshape(2, 10), second_order=True)
    >>> statistics.samples, statistics.tokens, statistics.gradient["model.decoder.layers.0.fc1.weight"].shape
    (2, 18, torch.Size([24, 12]))
    """
    samples, length = windows.shape
    per_batch = 1 if second_order else max(1, BATCH_TOKENS // length)
    gradient: dict[str, Tensor] = {}
    squared: dict[str, Tensor] = {}
    loss = 0.0
    with _folding_gradients(model, samples, gradient, squared if second_order else None), torch.enable_grad():
        for start in range(0, samples, per_batch):
            batch = windows[start : start + per_batch].to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            # Summed over the batch: the hook divides by the number of samples.
            nll = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
            )
            mean = nll / (length - 1)
            mean.backward()
            loss += float(mean.detach()) / samples
            if progress is not None:
                progress(min(start + per_batch, samples), samples)
    for name, value in gradient.items():
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise ScoreError(
                f"the gradient of {name} has {bad} values that are NaN or Inf (loss {loss:.4g}); "
                "check the weights, or use dtype float32 or bfloat16"
            )
    return Statistics(loss, samples, samples * (length - 1), gradient, squared)


@contextmanager
def _folding_gradients(
    model: PreTrainedModel, samples: int, gradient: dict[str, Tensor], squared: dict[str, Tensor] | None
) -> Iterator[None]:
    """While open, every complete gradient is added to the sums and dropped."""

    def fold(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            new = parameter.grad.detach().float()
            if name in gradient:
                gradient[name].add_(new, alpha=1 / samples)
            else:
                gradient[name] = new / samples
            if squared is not None:
                if name not in squared:
                    squared[name] = torch.zeros_like(new)
                squared[name].addcmul_(new, new, value=1 / samples)
            parameter.grad = None

        return hook

    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handles = []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(fold(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = None
