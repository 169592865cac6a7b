"""What a model predicts of windows, and the windows -> its loss, by which units are scored and repairs are judged.

- A language model predicts tokens: the next ones, those under masks, or the second half of each window; a model of
  speech, those of the text of a sound. The loss is the cross-entropy of the tokens that are there.
- A classifier has no labels here. They are drawn from its own prediction, so that squared gradients give the true
  Fisher information (Kunstner, Hennig, Balles 2019: arXiv 1905.12558), whatever classes the model was trained for.
- A model without a head is taken to predict each hidden state with Gaussian noise as large as the hidden state is on
  average. Drawn likewise, the Fisher information is the Gauss-Newton matrix of the relative squared error of hidden
  states, whichever of them an application pools.

Draws depend on the window alone, not on what else is in a batch.
Axes: B samples, T tokens, P predictions of one sample, N predictions of all, V vocabulary or classes, D hidden.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur.data.rows import IGNORED
from secateur.errors import ScoreError
from secateur.models.classes import is_encoder_decoder, objective
from secateur.models.inputs import arguments, masked_tokens, next_tokens, predicted
from secateur.scoring.passes.forward import embedding_device

LOSS_ROWS = 64  # rows of logits that are made probabilities at once


def labels_of(model: PreTrainedModel, windows_BT: Tensor) -> Tensor | None:
    """The token that each row of logits is for, B x P, `IGNORED` where there is none; None for models of no tokens.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> labels_of(AutoModelForCausalLM.from_config(config), torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    kind = objective(model)
    if kind in ("class", "embedding"):
        return None
    if kind in ("next token", "transcription"):
        labels_BP = functional.pad(next_tokens(windows_BT)[:, 1:], (0, 1), value=IGNORED)
    elif kind == "second half":
        labels_BP = next_tokens(windows_BT)[:, windows_BT.shape[1] // 2 :]
    else:
        labels_BP = masked_tokens(windows_BT)
    return labels_BP.masked_fill(labels_BP < 0, IGNORED)


def predictions(model: PreTrainedModel, windows_BT: Tensor) -> int:
    """How many predictions a model makes of windows, whose losses are averaged: of tokens, classes or hidden states.

    Raises `ScoreError` for a masked language model and windows without masks.
    """
    labels_BP = labels_of(model, windows_BT)
    if labels_BP is None:
        return len(windows_BT) if objective(model) == "class" else _states(model, windows_BT)
    count = int((labels_BP != IGNORED).sum())
    if not count:
        raise ScoreError(
            f"{type(model).__name__} predicts masked tokens, and none of the windows is masked: "
            "windows=secateur.data.encoder_windows.mask_tokens(windows, tokenizer)"
        )
    return count


def _states(model: PreTrainedModel, windows_BT: Tensor) -> int:
    length = windows_BT.shape[1]
    return len(windows_BT) * (length - length // 2 if is_encoder_decoder(model.config) else length)


def loss_of(model: PreTrainedModel, output: Tensor, windows_BT: Tensor, weight: float) -> Tensor:
    """The sum of the losses (nats) of all predictions, times a weight: a scalar.

    Its backward pass takes it for the end of the graph: it ignores a factor from outside.
    """
    labels_BP = labels_of(model, windows_BT)
    if labels_BP is not None:
        return cross_entropy(output.flatten(0, 1), labels_BP.flatten(), weight)
    if objective(model) == "class" and output.shape[-1] > 1:
        pairs = zip(torch.softmax(output.detach().float(), -1).cpu(), windows_BT, strict=True)
        drawn_B = torch.cat([torch.multinomial(p_V, 1, generator=_of(ids_T)) for p_V, ids_T in pairs])
        return cross_entropy(output, drawn_B, weight)
    noise = torch.stack([torch.randn(output.shape[1:], generator=_of(ids_T)) for ids_T in windows_BT]).to(output.device)
    scale = _scale(output.detach())
    drawn = output.detach().float() + scale * noise
    return 0.5 * ((output.float() - drawn) / scale).square().sum().double() * weight


def _of(ids_T: Tensor) -> torch.Generator:
    """Random numbers of one window."""
    return torch.Generator().manual_seed(zlib.crc32(ids_T.cpu().numpy().tobytes()))


def _scale(output: Tensor) -> Tensor:
    """The size of each hidden state; that of a single score is one."""
    one = output.new_ones((), dtype=torch.float32)
    return one if output.shape[-1] == 1 else output.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


@torch.no_grad()
def outputs_of(model: PreTrainedModel, windows_BT: Tensor) -> list[Tensor] | None:
    """What a model gives for each window, with which another can be compared; None where the windows have labels."""
    if labels_of(model, windows_BT) is not None:
        return None
    return [_run(model, ids_T[None]) for ids_T in windows_BT.to(embedding_device(model))]


def _run(model: PreTrainedModel, windows_BT: Tensor) -> Tensor:
    return predicted(model(**arguments(model, windows_BT)))


@torch.no_grad()
def summed_loss(model: PreTrainedModel, windows_BT: Tensor, dense: Sequence[Tensor] | None = None) -> Tensor:
    """The loss of all predictions of the windows, nats: a float64 scalar on the CPU.

    Where windows have no labels: how far the predictions are from those of the dense model, which `outputs_of` gives.
    """
    total = torch.zeros((), dtype=torch.float64)
    for number, ids_T in enumerate(windows_BT.to(embedding_device(model))):
        output, labels_BP = _run(model, ids_T[None]), labels_of(model, ids_T[None])
        if labels_BP is not None:
            rows_NV, labels_N = output[0], labels_BP[0].to(output.device)
            labelled_N = labels_N != IGNORED
            loss = functional.cross_entropy(rows_NV[labelled_N].float(), labels_N[labelled_N], reduction="sum")
        elif dense is None:
            raise ScoreError(f"{type(model).__name__}: windows have no labels; give outputs_of(dense model, windows)")
        else:
            loss = divergence(model, dense[number].to(output.device), output)
        total += loss.cpu()
    return total


def divergence(model: PreTrainedModel, dense: Tensor, output: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of predictions from the dense model's, nats, summed over the predictions.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> divergence(AutoModelForCausalLM.from_config(config), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(0.)
    """
    dense, output = dense.float(), output.float()
    if objective(model) != "embedding" and output.shape[-1] > 1:
        of_dense, of_output = dense.log_softmax(-1), output.log_softmax(-1)
        return functional.kl_div(of_output, of_dense, reduction="sum", log_target=True)
    return 0.5 * ((output - dense) / _scale(dense)).square().sum()


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, weight: float) -> Tensor:
    """The sum over all rows with a label of their cross-entropy (nats), times a weight: a float64 scalar.

    It holds no second tensor of the logits' size but their gradient. Its backward pass takes it for the end of the
    graph: it ignores a factor from outside.

    >>> loss = cross_entropy(torch.zeros(3, 8), torch.tensor([1, 2, IGNORED]), 0.5)
    >>> round(float(loss), 4)  # ln 8 for each of two tokens
    2.0794
    """
    loss: Tensor = _CrossEntropy.apply(logits_NV, labels_N.to(logits_NV.device), weight)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, weight: float) -> Tensor:
        gradient_NV = torch.empty_like(logits_NV)
        total = torch.zeros((), dtype=torch.float64)
        for first in range(0, len(logits_NV), LOSS_ROWS):
            rows = slice(first, min(first + LOSS_ROWS, len(logits_NV)))
            labelled_N1 = (labels_N[rows] != IGNORED)[:, None]
            label_N1 = labels_N[rows, None].clamp_min(0)
            # log p, then in place p - [v = label]: the gradient of the cross-entropy by the logits.
            p_NV = torch.log_softmax(logits_NV[rows].float(), -1)
            total -= p_NV.gather(1, label_N1).where(labelled_N1, 0).sum().double().cpu()
            p_NV.exp_().scatter_add_(1, label_N1, torch.full_like(label_N1, -1, dtype=p_NV.dtype))
            gradient_NV[rows] = p_NV.mul_(labelled_N1 * weight)
        ctx.save_for_backward(gradient_NV)
        return (total * weight).to(logits_NV.device)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV, None, None  # `outer` is 1
