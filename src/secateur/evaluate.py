"""Model + text -> perplexity, and a greedy continuation to read.

The windows are LLM-Pruner's (arXiv 2305.11627, `LLMPruner/evaluator/ppl.py`): rows joined by a blank line, one
tokenizer call over all of it, windows that do not overlap, the tail dropped, the first token of a window unscored.

Tensor names end in their axes: B batch, N window, T token, V vocabulary.
"""

from __future__ import annotations

import logging
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

from secateur.calibration import (
    DEMO,
    OVERLAP_WORDS,
    CalibrationOptions,
    calibration_windows,
    digest,
    overlap,
    read_rows,
)
from secateur.errors import DataError, ModelError, SecateurError

logger = logging.getLogger(__name__)

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
    tokens: int  # scored tokens: windows x (seq_len - 1)
    ppl: float  # exp(nll); inf where that overflows
    nll: float  # mean negative log-likelihood of a scored token, nats


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
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens={max_tokens} leaves nothing to score. --max-tokens 40000 scores the first 40,000.")
    # verbose=False: a text is longer than the model reads at once, and we cut it into windows ourselves
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    *,
    seq_lens: Sequence[int] = (128,),
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Perplexity]:
    """Score every text (name -> text) in windows of every length, the first `max_tokens` tokens of each.

    Each text is tokenized once. `progress` counts windows over all texts and lengths. Raises as `perplexity` does,
    before any text is scored where a text is too short.

    >>> evaluate(None, None, {})
    []
    """
    encoded = {name: encode(tokenizer, text, max_tokens=max_tokens) for name, text in texts.items()}
    work = [(name, seq_len) for name in encoded for seq_len in seq_lens]
    counts = [len(_windows(encoded[name], data=name, seq_len=seq_len)) for name, seq_len in work]
    results = []
    for i, (name, seq_len) in enumerate(work):
        before = sum(counts[:i])

        def counted(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, sum(counts))

        results.append(perplexity(model, encoded[name], data=name, seq_len=seq_len, progress=counted))
    return results


def warn_of_overlap(
    name: str, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], calibrated: Mapping[str, Any]
) -> None:
    """Log a warning for every text (name -> text) that holds calibration text of the model called `name`.

    `calibrated` says how it was calibrated: the record of its folder, or what its plan was scored with, as plain data.
    Its windows are drawn again from the file, or `demo`, that it names. Where they cannot be, or turn out to be others
    (the file is gone or has changed, the text is a data set's or the model's own), nothing is known and nothing said.

    >>> warn_of_overlap("pruned", None, {"wikitext2": "A text."}, {"calibration": None})
    """
    about = calibrated.get("calibration_options")
    if about is None or not (about["text"] == DEMO or Path(about["text"]).expanduser().is_file()):
        return
    try:
        options = CalibrationOptions(**about)
        windows = calibration_windows(tokenizer, options)
    except (DataError, TypeError) as error:
        logger.debug("the calibration of %s cannot be drawn again: %s", name, error)
        return
    if calibrated["calibration"] == digest(windows[: options.for_scores]):
        windows = windows[: options.for_scores]  # nothing was repaired
    elif calibrated["calibration"] != digest(windows):
        logger.debug("the calibration of %s cannot be drawn again: %s gives other tokens", name, about["text"])
        return
    decoded = [_decode(tokenizer, ids) for ids in windows.tolist()]
    for data, text in texts.items():
        if share := overlap(decoded, text):
            logger.warning(
                "%s: %.3g %% of its calibration windows, from %s, share %d words in a row with the evaluation text %s; "
                "this flatters the result, so calibrate on another text",
                name,
                100 * share,
                about["text"],
                OVERLAP_WORDS,
                data,
            )


def perplexity(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    data: str,
    seq_len: int,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score `token_ids` (T, integers, on any device) in windows of `seq_len` tokens that do not overlap.

    The tail that fills no window is dropped and the first token of a window is unscored, so the result counts
    floor(T / seq_len) * (seq_len - 1) tokens. The log-softmax is taken in float32, or in float64 if the logits are,
    and summed in float64. `data` names the text in the result and in errors. `batch_size` counts windows per forward
    pass; None takes as many as keep the logits under 256 MB. `progress` is called after each batch with the windows
    done and all windows.

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
    windows_NT = _windows(token_ids, data=data, seq_len=seq_len)
    vocabulary = vocabulary_size(model)
    if (largest := int(windows_NT.max())) >= vocabulary or int(windows_NT.min()) < 0:
        raise DataError(
            f"{data}: token {largest if largest >= vocabulary else int(windows_NT.min())} is outside the model's "
            f"vocabulary of {vocabulary}. Encode the text with the tokenizer that belongs to this model."
        )
    if batch_size is None:
        batch_size = _fitting_batch(seq_len, vocabulary)
    elif batch_size < 1:
        raise DataError(f"batch_size={batch_size} scores nothing; expected at least 1, or None to choose it.")

    device = input_device(model)
    total, done = 0.0, 0
    with evaluation_mode(model), torch.inference_mode(), known_positions(model, seq_len, flag="--seq-len"):
        for ids_BT in windows_NT.split(batch_size):
            ids_BT = ids_BT.to(device)
            total += _summed_nll(model(input_ids=ids_BT, use_cache=False).logits, ids_BT)
            done += len(ids_BT)
            if progress is not None:
                progress(done, len(windows_NT))
    tokens = len(windows_NT) * (seq_len - 1)
    if math.isnan(total):
        raise SecateurError(
            f"{data}: the model's negative log-likelihood is NaN over {tokens} tokens (seq_len={seq_len}); expected "
            "finite logits. float16 often overflows: try --dtype bfloat16 or --dtype float32."
        )
    nll = total / tokens
    return Perplexity(data=data, seq_len=seq_len, tokens=tokens, ppl=_exp(nll), nll=nll)


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
    before = _decode(tokenizer, prompt_ids.tolist())
    whole = _decode(tokenizer, prompt_ids.tolist() + written)
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, written)


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


def _windows(token_ids: Tensor, *, data: str, seq_len: int) -> Tensor:
    """Cut ids_T into windows_NT of `seq_len` tokens; the tail is dropped."""
    if seq_len < 2:
        raise DataError(
            f"{data}: seq_len={seq_len} scores nothing, because the first token of a window is unscored; expected at "
            "least 2. --seq-len 128 is the paper's."
        )
    if token_ids.dim() != 1:
        raise DataError(
            f"{data}: token_ids has shape {tuple(token_ids.shape)}; expected one dimension. "
            "encode(tokenizer, text) returns it."
        )
    if len(token_ids) < seq_len:
        raise DataError(
            f"{data}: {len(token_ids)} tokens are fewer than one window of {seq_len}. "
            f"Give a longer text, or --seq-len {max(len(token_ids), 2)} or less."
        )
    return token_ids[: len(token_ids) // seq_len * seq_len].reshape(-1, seq_len).long()


def _fitting_batch(seq_len: int, vocabulary: int) -> int:
    """Return how many windows keep the logits, at 4 bytes each, and the tokens of one batch within their limits."""
    return max(1, min(LOGITS_BYTES // (4 * vocabulary * seq_len), BATCH_TOKENS // seq_len))


def _summed_nll(logits_BTV: Tensor, ids_BT: Tensor) -> float:
    """Sum the negative log-likelihood of tokens 1, 2, ... of each window, nats, in pieces of at most 64 MB."""
    dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
    piece = max(1, SOFTMAX_BYTES // (dtype.itemsize * logits_BTV.shape[-1]))
    total = 0.0
    for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):
        for some_TV, targets_T in zip(logits_TV[:-1].split(piece), ids_T[1:].split(piece), strict=True):
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


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
