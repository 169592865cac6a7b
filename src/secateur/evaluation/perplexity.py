"""Model + text -> perplexity by a named protocol, bits per byte, and their uncertainty.

A text is the rows of a data set joined by a blank line, tokenized in one call; `protocols.py` says how it is cut into
windows. Bits per byte are the negative log-likelihood of the scored tokens in bits, over the UTF-8 bytes of exactly
the text that these tokens stand for, so that models with other tokenizers compare.

Tensor names end in their axes: B batch, T token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import DataError, SecateurError, check_least
from secateur.evaluation.inference import evaluation_mode, fitting_batch, input_device, position_errors, vocabulary_size
from secateur.evaluation.protocols import Protocol, Window, read_protocol, windows
from secateur.evaluation.significance import Difference, interval, paired_ratio, ratio_and_error
from secateur.evaluation.texts import EncodedText, encode_text
from secateur.models.precision import half_products, matmul_precision

SOFTMAX_BYTES = 64 * 2**20  # of one float32 or float64 piece of the logits


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well one model predicts one text."""

    data: str  # the name the caller gave the text
    seq_len: int  # tokens in a window
    tokens: int  # scored tokens
    ppl: float  # exp(nll); inf where that overflows
    nll: float  # mean negative log-likelihood of a scored token, nats
    protocol: str = ""  # such as served@128
    stride: int = 0  # tokens from one window's start to the next's
    windows: int = 0
    bytes: int | None = None  # of UTF-8, that the scored tokens stand for; None where the text was not given
    bits_per_byte: float | None = None
    tokens_per_byte: float | None = None
    nll_stderr: float | None = None  # over the windows; None for a single one
    ppl_low: float | None = None  # the 95 % interval that follows from it
    ppl_high: float | None = None
    window_nats: tuple[float, ...] = ()  # summed over the scored tokens of each window
    window_tokens: tuple[int, ...] = ()  # scored, in each window

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur evaluate --json` writes it: all but the windows."""
        data = asdict(self)
        del data["window_nats"], data["window_tokens"]
        return data


def loss_difference(result: Perplexity, first: Perplexity | None) -> Difference | None:
    """How many nats per token a model is worse than the first, window by window.

    None where the two did not read the same windows, as with another tokenizer.
    """
    if not result.window_tokens or first is None:
        return None
    if (result.window_tokens, result.bytes) != (first.window_tokens, first.bytes):
        return None
    return paired_ratio(result.window_nats, first.window_nats, result.window_tokens)


def bits_difference(result: Perplexity, first: Perplexity | None) -> float | None:
    """How many bits per byte a model is worse than the first, whose tokens are others.

    None where the tokens are the same, so that the loss per token says more, or the bytes are not known.
    """
    if first is None or result.bits_per_byte is None or first.bits_per_byte is None:
        return None
    if (result.window_tokens, result.bytes) == (first.window_tokens, first.bytes):
        return None
    return result.bits_per_byte - first.bits_per_byte


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    *,
    protocols: Sequence[str | Protocol] = ("served@128",),
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Perplexity]:
    """Perplexity of every text (name -> text) by every protocol, on the first `max_tokens` tokens of each.

    Each text is tokenized once. `batch_size` windows are read at once, as in `perplexity`; `progress` counts those of
    all texts and protocols. Raises as `perplexity` does, before the model reads any text where one is too short.
    """
    unique = list(dict.fromkeys(read_protocol(each) if isinstance(each, str) else each for each in protocols))
    encoded = {name: encode_text(tokenizer, text, max_tokens=max_tokens) for name, text in texts.items()}
    work = [(name, protocol) for name in encoded for protocol in unique]
    counts = [len(windows(protocol, len(encoded[name].ids_T), data=name)) for name, protocol in work]
    results = []
    for i, (name, protocol) in enumerate(work):

        def count_all(done: int, _: int, before: int = sum(counts[:i])) -> None:
            if progress is not None:
                progress(before + done, sum(counts))

        text = encoded[name]
        result = perplexity(model, text, data=name, protocol=protocol, batch_size=batch_size, progress=count_all)
        results.append(result)
    return results


def perplexity(
    model: PreTrainedModel,
    text: Tensor | EncodedText,
    *,
    data: str,
    protocol: Protocol,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of one text in the windows of a protocol.

    `text` is what `encode_text` returns, or token ids alone (T, integers, on any device), of which no bits per byte
    are known. The log-softmax is taken in float32, or in float64 if the logits are, and summed in float64. `data` names
    the text in the result and in errors. `batch_size` counts windows per forward pass; None takes as many as keep the
    logits under 256 MB. `progress` is called after each batch with the windows done and all windows.

    Raises DataError if there is no window, a token the model does not know, or a window longer than its table of
    positions; ModelError if the weights are not loaded; SecateurError if the loss is NaN.

    >>> from transformers import PretrainedConfig
    >>> from transformers.modeling_outputs import CausalLMOutput
    >>> class Uniform(PreTrainedModel):  # every token is equally likely
    ...     def forward(self, input_ids, **_):
    ...         return CausalLMOutput(logits=torch.zeros(*input_ids.shape, 8))
    >>> model = Uniform(PretrainedConfig(vocab_size=8))
    >>> result = perplexity(model, torch.arange(8).repeat(4), data="counting", protocol=Protocol(5))
    >>> result.tokens, round(result.ppl, 4)  # 6 windows of 5; the last 2 tokens are dropped
    (24, 8.0)
    """
    check_least(DataError, "batch_size", batch_size, 1, 8)
    ids_T, start_T = (text.ids_T, text.start_T) if isinstance(text, EncodedText) else (text, None)
    if ids_T.dim() != 1:
        raise DataError(
            f"{data}: token_ids has shape {tuple(ids_T.shape)}; expected one dimension. "
            "encode(tokenizer, text) returns it."
        )
    if protocol.start_tokens and start_T is None:
        raise DataError(f"{data}: {protocol} needs what encode_text(tokenizer, text) returns, not token ids alone")
    start_T = start_T if protocol.start_tokens and start_T is not None else ids_T[:0]
    if torch.equal(ids_T[: len(start_T)], start_T):
        ids_T = ids_T[len(start_T) :]  # each window gets them anew
    cut = windows(protocol, len(ids_T), data=data)
    vocabulary = vocabulary_size(model)
    batch_size = batch_size or fitting_batch(protocol.window, vocabulary)
    _check_ids(ids_T[: cut[-1].end], vocabulary, data=data)
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        matmul_precision(exact=True),
        half_products(model),
        position_errors(model, protocol.window + len(start_T), flag=f"--protocol {protocol}, start tokens included,"),
    ):
        nats = _window_nats(model, ids_T, start_T, cut, batch_size, progress)
    if any(map(math.isnan, nats)):
        raise SecateurError(
            f"{data}: the model's negative log-likelihood is NaN ({protocol}, {len(cut)} windows); expected finite "
            "logits. float16 often overflows: try --dtype bfloat16 or --dtype float32."
        )
    scored_bytes = _scored_bytes(text.byte_ends_T[-len(ids_T) :], cut) if isinstance(text, EncodedText) else None
    return _summary(data, protocol, nats, [window.tokens for window in cut], scored_bytes)


def _window_nats(
    model: PreTrainedModel,
    ids_T: Tensor,
    start_T: Tensor,
    cut: Sequence[Window],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[float]:
    """The negative log-likelihood of each window after the start tokens, summed over its scored tokens, nats."""
    nats: list[float] = []
    for batch in _batches(cut, batch_size):
        parts = [torch.cat([start_T, ids_T[window.start : window.end]]) for window in batch]
        ids_BT = torch.stack(parts).long().to(input_device(model))
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        for logits_TV, window_T, window in zip(logits_BTV, ids_BT, batch, strict=True):
            nats.append(_summed_nll(logits_TV, window_T, len(start_T) + window.scored - window.start))
        if progress is not None:
            progress(len(nats), len(cut))
    return nats


def _scored_bytes(ends_T: Tensor, cut: Sequence[Window]) -> int:
    """The bytes that the scored tokens stand for; the first token of a text is never scored."""
    return sum(int(ends_T[window.end - 1] - ends_T[window.scored - 1]) for window in cut)


def _check_ids(ids_T: Tensor, vocabulary: int, *, data: str) -> None:
    least, most = int(ids_T.min()), int(ids_T.max())
    if least < 0 or most >= vocabulary:
        raise DataError(
            f"{data}: token {most if most >= vocabulary else least} is outside the model's vocabulary of {vocabulary}. "
            "Encode the text with the tokenizer that belongs to this model."
        )


def _batches(cut: Sequence[Window], batch_size: int) -> Iterator[Sequence[Window]]:
    """Windows in order, up to `batch_size` at once; a shorter one, at the end of a text, alone."""
    for _, group in groupby(cut, key=lambda window: window.end - window.start):
        alike = list(group)
        yield from (alike[first : first + batch_size] for first in range(0, len(alike), batch_size))


def _summed_nll(logits_TV: Tensor, ids_T: Tensor, first: int) -> float:
    """Sum the negative log-likelihood of the tokens from `first` (1 or more) on, nats, in pieces of at most 64 MB."""
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    piece = max(1, SOFTMAX_BYTES // (dtype.itemsize * logits_TV.shape[-1]))
    total = 0.0
    for piece_TV, targets_T in zip(logits_TV[first - 1 : -1].split(piece), ids_T[first:].split(piece), strict=True):
        nll_T = functional.cross_entropy(piece_TV.to(dtype), targets_T.to(piece_TV.device), reduction="none")
        total += nll_T.cpu().double().sum().item()  # on the CPU: some accelerators have no float64
    return total


def _summary(
    data: str, protocol: Protocol, nats: Sequence[float], tokens: Sequence[int], scored_bytes: int | None
) -> Perplexity:
    nll, stderr = ratio_and_error(nats, tokens)
    ends = interval(nll, stderr)
    return Perplexity(
        data=data,
        seq_len=protocol.window,
        tokens=sum(tokens),
        ppl=_exp(nll),
        nll=nll,
        protocol=str(protocol),
        stride=protocol.stride or protocol.window,
        windows=len(tokens),
        bytes=scored_bytes,
        bits_per_byte=math.fsum(nats) / math.log(2) / scored_bytes if scored_bytes else None,
        tokens_per_byte=sum(tokens) / scored_bytes if scored_bytes else None,
        nll_stderr=stderr,
        ppl_low=_exp(ends[0]) if ends else None,
        ppl_high=_exp(ends[1]) if ends else None,
        window_nats=tuple(nats),
        window_tokens=tuple(tokens),
    )


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:  # above 709 nats: the model is badly broken, which is no error of the evaluation
        return math.inf
