"""Model + text -> perplexity by a named protocol, bits per byte, how sure both are; a greedy continuation to read.

A text is the rows of a data set joined by a blank line, tokenized in one call; `protocols.py` says how it is cut into
windows. Bits per byte are the negative log-likelihood of the scored tokens in bits, over the UTF-8 bytes of exactly
the text that these tokens stand for, so that models with other tokenizers compare.

Tensor names end in their axes: B batch, N window, T token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.calibration import read_rows
from secateur.errors import DataError, ModelError, SecateurError
from secateur.evaluation.protocols import LLM_PRUNER, Protocol, Window, read_protocol, windows
from secateur.evaluation.significance import interval, ratio_and_error

LOGITS_BYTES = 256 * 2**20  # of one batch; a single window may need more
SOFTMAX_BYTES = 64 * 2**20  # of one float32 or float64 piece of the logits
BATCH_TOKENS = 8192  # where the vocabulary is small, activations are the limit

# What models call the keys and values, or the recurrent state, that they return and take back: transformers from
# 5.24 on, transformers before that, and the names that remote code and recurrent models use.
STATE_NAMES = ("cache", "past_key_values", "cache_params", "state")


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well one model predicts one text.

    >>> Perplexity(data="wikitext2", seq_len=128, tokens=3937, ppl=55.0, nll=4.007).tokens
    3937
    """

    data: str  # the name the caller gave the text
    seq_len: int  # tokens in a window
    tokens: int  # scored tokens
    ppl: float  # exp(nll); inf where that overflows
    nll: float  # mean negative log-likelihood of a scored token, nats
    protocol: str = ""  # such as llm-pruner@128
    stride: int = 0  # tokens from one window's start to the next's
    windows: int = 0
    bytes: int | None = None  # of UTF-8, that the scored tokens stand for; None where the text was not given
    bits_per_byte: float | None = None
    nll_stderr: float | None = None  # over the windows; None for a single one
    ppl_low: float | None = None  # the 95 % interval that follows from it
    ppl_high: float | None = None


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A perplexity, and what it is made of: the nats and the scored tokens of every window.

    >>> ScoredText(Perplexity("a", 3, 2, 1.0, 0.0), (0.0,), (2,)).tokens
    (2,)
    """

    perplexity: Perplexity
    nats: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """A text as tokens, and how many of its UTF-8 bytes are behind one when its first so many tokens are read.

    >>> EncodedText(torch.tensor([5, 7]), torch.tensor([3, 4])).ids_T
    tensor([5, 7])
    """

    ids_T: Tensor  # int64
    byte_ends_T: Tensor  # int64, never falling


def join_rows(rows: Sequence[str]) -> str:
    r"""Join the rows of a data set with a blank line, as LLM-Pruner and most perplexity tables do.

    >>> join_rows(["one", "two"])
    'one\n\ntwo'
    """
    return "\n\n".join(rows)


def read_evaluation_text(path: Path | str) -> str:
    r"""Read the rows of a file and join them with a blank line.

    Raises DataError where `read_rows` does: the file is missing, empty or of an unknown format.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "two.txt"
    ...     _ = file.write_text("one\ntwo\n", encoding="utf-8")
    ...     len(read_evaluation_text(file)) > 0
    True
    """
    return join_rows(read_rows(Path(path)))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int | None = None) -> Tensor:
    """Tokenize a whole text in one call, with the tokenizer's usual special tokens; returns ids_T, int64, on the CPU.

    Only the first `max_tokens` are returned (None: all). Raises DataError if `max_tokens` is below 1.

    >>> def bytes_tokenizer(text, **_):
    ...     return {"input_ids": list(text.encode())}
    >>> encode(bytes_tokenizer, "prune", max_tokens=3)
    tensor([112, 114, 117])
    """
    _check_max_tokens(max_tokens)
    # verbose=False: a text is longer than the model reads at once, and we cut it into windows ourselves
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int | None = None) -> EncodedText:
    """Tokenize as `encode` does, and find where in the text's UTF-8 bytes every token ends.

    What no token covers (white space, with some tokenizers) belongs to the next token, and a character that is split
    over several tokens to the first of them. A tokenizer written in Python does not tell: its tokens then stand for as
    many bytes each as the text has per token.

    >>> from types import SimpleNamespace
    >>> def words(text, **_):
    ...     return {"input_ids": [1, 2], "offset_mapping": [(0, 3), (4, 8)]}
    >>> words.is_fast = True
    >>> encode_text(words, "one d\u00e9ux").byte_ends_T
    tensor([3, 9])
    """
    _check_max_tokens(max_tokens)
    whole = len(text.encode(errors="surrogatepass"))
    if not getattr(tokenizer, "is_fast", False):
        ids_T = encode(tokenizer, text)
        ends_T = torch.arange(1, len(ids_T) + 1, dtype=torch.int64) * whole // max(len(ids_T), 1)
    else:
        encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids_T = torch.tensor(encoding["input_ids"], dtype=torch.int64)
        ends_T = _byte_ends(text, [end for _, end in encoding["offset_mapping"]])
    return EncodedText(ids_T[:max_tokens], ends_T[:max_tokens])


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    *,
    seq_lens: Sequence[int] | None = None,
    protocols: Sequence[str | Protocol] = (),
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Perplexity]:
    """Score every text (name -> text) by every protocol, the first `max_tokens` tokens of each.

    `seq_lens` are short for LLM-Pruner's protocol: 128 is `llm-pruner@128`, which is also what is done where neither is
    given. Each text is tokenized once. `progress` counts windows over all texts and protocols. Raises as `perplexity`
    does, before any text is scored where a text is too short.

    >>> evaluate(None, None, {})
    []
    """
    wanted = wanted_protocols(seq_lens, protocols)
    found = score_texts(model, tokenizer, texts, protocols=wanted, max_tokens=max_tokens, progress=progress)
    return [each.perplexity for each in found]


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    *,
    protocols: Sequence[Protocol],
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ScoredText]:
    """As `evaluate` does, with what every window came to, for a comparison window by window.

    >>> score_texts(None, None, {}, protocols=[])
    []
    """
    encoded = {name: encode_text(tokenizer, text, max_tokens=max_tokens) for name, text in texts.items()}
    work = [(name, protocol) for name in encoded for protocol in protocols]
    counts = [len(windows(protocol, len(encoded[name].ids_T), data=name)) for name, protocol in work]
    results = []
    for i, (name, protocol) in enumerate(work):
        before = sum(counts[:i])

        def counted(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, sum(counts))

        results.append(score_text(model, encoded[name], data=name, protocol=protocol, progress=counted))
    return results


def wanted_protocols(
    seq_lens: Sequence[int] | None = None, protocols: Sequence[str | Protocol] = ()
) -> tuple[Protocol, ...]:
    """The protocols that lengths of windows and names of protocols stand for, each once.

    >>> [str(protocol) for protocol in wanted_protocols([128], ["gptq@2048", "llm-pruner@128"])]
    ['llm-pruner@128', 'gptq@2048']
    """
    if not protocols and seq_lens is None:
        seq_lens = (128,)
    named = [each if isinstance(each, Protocol) else read_protocol(each) for each in protocols]
    return tuple(dict.fromkeys([*(Protocol(LLM_PRUNER, length, length) for length in seq_lens or ()), *named]))


def perplexity(
    model: PreTrainedModel,
    text: Tensor | EncodedText,
    *,
    data: str,
    seq_len: int | None = None,
    protocol: Protocol | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score a text in the windows of a protocol; `seq_len` is short for LLM-Pruner's with windows of that length.

    `text` is what `encode_text` returns, or token ids alone (T, integers, on any device), of which no bits per byte
    are known. The log-softmax is taken in float32, or in float64 if the logits are, and summed in float64. The
    standard error is that of a mean over windows (`ratio_and_error`). `data` names the text in the result and in
    errors. `batch_size` counts windows per forward pass; None takes as many as keep the logits under 256 MB.
    `progress` is called after each batch with the windows done and all windows.

    Raises DataError if there is no window, a token the model does not know, or a window longer than its table of
    positions; ModelError if the weights are not loaded; SecateurError if the model answers NaN.

    >>> from transformers import PretrainedConfig
    >>> from transformers.modeling_outputs import CausalLMOutput
    >>> class Uniform(PreTrainedModel):  # every token is equally likely
    ...     def forward(self, input_ids, **_):
    ...         return CausalLMOutput(logits=torch.zeros(*input_ids.shape, 8))
    >>> model = Uniform(PretrainedConfig(vocab_size=8))
    >>> result = perplexity(model, torch.arange(8).repeat(4), data="counting", seq_len=5)
    >>> result.tokens, round(result.ppl, 4)  # 6 windows of 5; the last 2 tokens are dropped
    (24, 8.0)
    """
    protocol = protocol or Protocol(LLM_PRUNER, seq_len or 0, seq_len or 0)
    found = score_text(model, text, data=data, protocol=protocol, batch_size=batch_size, progress=progress)
    return found.perplexity


def score_text(
    model: PreTrainedModel,
    text: Tensor | EncodedText,
    *,
    data: str,
    protocol: Protocol,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ScoredText:
    """As `perplexity` does, with what every window came to.

    >>> score_text(None, torch.arange(3), data="three", protocol=read_protocol("gptq@4"))
    Traceback (most recent call last):
    secateur.errors.DataError: three: 3 tokens are fewer than one window of 4. ...
    """
    ids_T = text.ids_T if isinstance(text, EncodedText) else text
    if ids_T.dim() != 1:
        raise DataError(
            f"{data}: token_ids has shape {tuple(ids_T.shape)}; expected one dimension. "
            "encode(tokenizer, text) returns it."
        )
    cut = windows(protocol, len(ids_T), data=data)
    vocabulary = vocabulary_size(model)
    read_T = ids_T[: cut[-1].end]
    if (largest := int(read_T.max())) >= vocabulary or int(read_T.min()) < 0:
        raise DataError(
            f"{data}: token {largest if largest >= vocabulary else int(read_T.min())} is outside the model's "
            f"vocabulary of {vocabulary}. Encode the text with the tokenizer that belongs to this model."
        )
    if batch_size is None:
        batch_size = fitting_batch(protocol.window, vocabulary)
    elif batch_size < 1:
        raise DataError(f"batch_size={batch_size} scores nothing; expected at least 1, or None to choose it.")

    flag = "--seq-len" if protocol.name == LLM_PRUNER else f"the window of --protocol {protocol}"
    device = input_device(model)
    sums: list[float] = []  # nats, of every window
    with evaluation_mode(model), torch.inference_mode(), known_positions(model, protocol.window, flag=flag):
        for batch in _batches(cut, batch_size):
            ids_BT = torch.stack([ids_T[window.start : window.end] for window in batch]).long().to(device)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            for logits_TV, window_T, window in zip(logits_BTV, ids_BT, batch, strict=True):
                sums.append(_summed_nll(logits_TV, window_T, window.scored - window.start))
            if progress is not None:
                progress(len(sums), len(cut))
    tokens = sum(window.tokens for window in cut)
    if any(map(math.isnan, sums)):
        raise SecateurError(
            f"{data}: the model's negative log-likelihood is NaN over {tokens} tokens (seq_len={protocol.window}); "
            "expected finite logits. float16 often overflows: try --dtype bfloat16 or --dtype float32."
        )
    scored_bytes = _bytes(text.byte_ends_T, cut) if isinstance(text, EncodedText) else None
    return ScoredText(
        _summary(data, protocol, sums, cut, scored_bytes), tuple(sums), tuple(window.tokens for window in cut)
    )


def _summary(
    data: str, protocol: Protocol, sums: Sequence[float], cut: Sequence[Window], scored_bytes: int | None
) -> Perplexity:
    counts = [window.tokens for window in cut]
    nll, stderr = ratio_and_error(sums, counts)
    ends = interval(nll, stderr)
    return Perplexity(
        data=data,
        seq_len=protocol.window,
        tokens=sum(counts),
        ppl=_exp(nll),
        nll=nll,
        protocol=str(protocol),
        stride=protocol.stride,
        windows=len(cut),
        bytes=scored_bytes,
        bits_per_byte=math.fsum(sums) / math.log(2) / scored_bytes if scored_bytes else None,
        nll_stderr=stderr,
        ppl_low=_exp(ends[0]) if ends else None,
        ppl_high=_exp(ends[1]) if ends else None,
    )


def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, new_tokens: int = 48
) -> str:
    """Continue `prompt` with the most likely tokens and return the continuation alone.

    Deterministic, with the prompt as it stands: no chat template, no sampling, none of the model's generation
    settings. Ends after `new_tokens` tokens, or before the model's or the tokenizer's end-of-text token.
    Raises DataError if the prompt has no tokens or `new_tokens` is below 1.

    >>> from transformers import PretrainedConfig
    >>> from transformers.modeling_outputs import CausalLMOutput
    >>> class Counting(PreTrainedModel):  # predicts the next letter
    ...     def forward(self, input_ids, **_):
    ...         return CausalLMOutput(logits=functional.one_hot(input_ids + 1, 128).float())
    >>> class Letters:
    ...     eos_token_id = None
    ...     __call__ = staticmethod(lambda text, **_: {"input_ids": list(text.encode())})
    ...     decode = staticmethod(lambda ids, **_: bytes(ids).decode())
    >>> sample_text(Counting(PretrainedConfig(vocab_size=128)), Letters(), "abc", new_tokens=4)
    'defg'
    """
    if new_tokens < 1:
        raise DataError(f"new_tokens={new_tokens}: expected at least 1. new_tokens=48 writes a few lines.")
    prompt_ids = encode(tokenizer, prompt)
    if not len(prompt_ids):
        raise DataError(f"prompt={prompt!r} has no tokens. prompt='Once upon a time' has some.")
    ends = _end_tokens(model) | {tokenizer.eos_token_id}
    written: list[int] = []
    with evaluation_mode(model), torch.inference_mode():
        steps = greedy_steps(model, prompt_ids[None].to(input_device(model)))
        while len(written) < new_tokens and (token := int(next(steps))) not in ends:
            written.append(token)
    # Some tokenizers drop the space before the first word they decode: decode with the prompt, then cut it off.
    before = decode(tokenizer, prompt_ids.tolist())
    whole = decode(tokenizer, prompt_ids.tolist() + written)
    return whole[len(before) :] if whole.startswith(before) else decode(tokenizer, written)


def greedy_steps(model: PreTrainedModel, prompt_BT: Tensor) -> Iterator[Tensor]:
    """Yield the most likely next token, ids_B1 (int64), once per forward pass and without end.

    The first pass reads the whole prompt, each later one the token just yielded, with the keys and values (or the
    recurrent state) that the model returned. A model that returns none reads everything again. The caller sets
    evaluation and inference mode.

    >>> from transformers.modeling_outputs import CausalLMOutput
    >>> def counting(input_ids, **_):
    ...     return CausalLMOutput(logits=functional.one_hot(input_ids + 1, 128))
    >>> steps = greedy_steps(counting, torch.tensor([[1, 5]]))
    >>> int(next(steps)), int(next(steps))
    (6, 7)
    """
    read_BT, seen_BT, state = prompt_BT, prompt_BT, dict[str, Any]()
    while True:
        outputs = model(input_ids=read_BT, use_cache=True, **state)
        next_B1 = outputs.logits[:, -1:].argmax(dim=-1)
        # the first name only: newer outputs answer to the older names as well
        state = next(({name: outputs[name]} for name in STATE_NAMES if name in outputs), {})
        del outputs  # the logits of the prompt need not outlive the pass
        yield next_B1
        seen_BT = torch.cat([seen_BT, next_B1], dim=1)
        read_BT = next_B1 if state else seen_BT


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and put every module back as it was.

    >>> model = nn.Dropout()
    >>> with evaluation_mode(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def known_positions(model: PreTrainedModel, length: int, *, flag: str) -> Iterator[None]:
    """Turn the IndexError of a model that reads `length` tokens but has fewer positions into a DataError naming `flag`.

    Models with a table of positions fail; those that compute them (rotary, ALiBi) read on, and worse.

    >>> from types import SimpleNamespace as Model
    >>> try:
    ...     with known_positions(Model(config=Model(max_position_embeddings=8)), 9, flag="--seq-len"):
    ...         torch.zeros(8)[8]
    ... except DataError as error:
    ...     print(error)
    the model has 8 positions, but reads 9 tokens at once. --seq-len takes at most 8.
    """
    try:
        yield
    except IndexError as error:
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is None or length <= positions:
            raise
        raise DataError(
            f"the model has {positions} positions, but reads {length} tokens at once. {flag} takes at most {positions}."
        ) from error


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model has an embedding for, as its config states it.

    >>> from transformers import PretrainedConfig
    >>> vocabulary_size(PreTrainedModel(PretrainedConfig(vocab_size=8)))
    8
    """
    return int(model.config.get_text_config().vocab_size)


def input_device(model: nn.Module) -> torch.device:
    """Return the device to put token ids on: that of the weights, or the CPU where accelerate moves them.

    Raises ModelError if the weights are on `meta` and nothing will load them.

    >>> input_device(nn.Linear(1, 1))
    device(type='cpu')
    """
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    if not hasattr(model, "_hf_hook"):  # accelerate's; it loads each layer as it runs and moves what goes in
        raise ModelError(
            f"{type(model).__name__}: its weights are on device='meta', which holds shapes and no values; expected "
            "loaded weights. load(model, device='cpu') reads them."
        )
    return torch.device("cpu")


def fitting_batch(length: int, vocabulary: int, *, limit: int = LOGITS_BYTES) -> int:
    """How many rows of `length` tokens keep their float32 logits under `limit` bytes, and their tokens under 8192.

    >>> fitting_batch(128, 49152)
    10
    """
    return max(1, min(limit // (4 * vocabulary * length), BATCH_TOKENS // length))


def _check_max_tokens(max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens={max_tokens} leaves nothing to score. --max-tokens 40000 scores the first 40,000.")


def _byte_ends(text: str, ends: Sequence[int]) -> Tensor:
    """Places in characters -> the largest so far, in UTF-8 bytes."""
    found, place, size = [], 0, 0
    for end in ends:
        if end > place:
            size += len(text[place:end].encode(errors="surrogatepass"))
            place = end
        found.append(size)
    return torch.tensor(found, dtype=torch.int64)


def _bytes(byte_ends_T: Tensor, cut: Sequence[Window]) -> int:
    """The bytes of the scored tokens; the first token of a text is never scored."""
    return sum(int(byte_ends_T[window.end - 1] - byte_ends_T[window.scored - 1]) for window in cut)


def _batches(cut: Sequence[Window], batch_size: int) -> Iterator[Sequence[Window]]:
    """Windows one after the other, as many at once as are asked for; a shorter one, at the end of a text, alone."""
    first = 0
    while first < len(cut):
        length = cut[first].end - cut[first].start
        last = first + 1
        while last < min(first + batch_size, len(cut)) and cut[last].end - cut[last].start == length:
            last += 1
        yield cut[first:last]
        first = last


def _summed_nll(logits_TV: Tensor, ids_T: Tensor, first: int) -> float:
    """Sum the negative log-likelihood of the tokens from `first` (1 or more) on, nats, in pieces of at most 64 MB."""
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    piece = max(1, SOFTMAX_BYTES // (dtype.itemsize * logits_TV.shape[-1]))
    total = 0.0
    for some_TV, targets_T in zip(logits_TV[first - 1 : -1].split(piece), ids_T[first:].split(piece), strict=True):
        nll_T = functional.cross_entropy(some_TV.to(dtype), targets_T.to(some_TV.device), reduction="none")
        total += nll_T.cpu().double().sum().item()  # on the CPU: some accelerators have no float64
    return total


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:  # above 709 nats; a model that is badly broken, not an error of ours
        return math.inf


def _end_tokens(model: PreTrainedModel) -> set[int | None]:
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(end) if isinstance(end, list | tuple) else {end}


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Tokens as the text that they stand for, without special tokens.

    >>> from types import SimpleNamespace
    >>> decode(SimpleNamespace(decode=lambda ids, **_: bytes(ids).decode()), [112, 114])
    'pr'
    """
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
