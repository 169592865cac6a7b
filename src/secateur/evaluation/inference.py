"""A model in evaluation mode -> its device, vocabulary and batch size; text, token by token.

Tensor names end in their axes: B batch, T token, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.windows import behind
from secateur.errors import DataError, ModelError, check_least, one_line
from secateur.evaluation.texts import decode, encode
from secateur.models.config import max_positions, special_token_ids
from secateur.models.trust import runs_remote_code

logger = logging.getLogger(__name__)

LOGITS_BYTES = 256 * 2**20  # of one batch; a single row may need more
BATCH_TOKENS = 8192  # where the vocabulary is small, activations are the limit

# What models call the keys and values, or the recurrent state, that they return and take back: transformers from
# 5.24 on, transformers before that, and the names that remote code and recurrent models use.
STATE_NAMES = ("cache", "past_key_values", "cache_params", "state")
NOT_THE_CACHE = (IndexError, torch.OutOfMemoryError)  # a text longer than the table of positions; out of memory


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and put every module back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def position_errors(model: PreTrainedModel, length: int, *, flag: str) -> Iterator[None]:
    """Turn the error of a model that reads `length` tokens but has fewer positions into a DataError naming `flag`.

    Models with a table of positions fail, on a CPU with an IndexError, on a GPU with an assertion there; those that
    compute them (rotary, ALiBi) read on, and worse.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        positions = max_positions(model.config)
        asserted = isinstance(error, IndexError) or "device-side assert" in str(error)
        if not asserted or positions is None or length <= positions:
            raise
        raise DataError(
            f"the model has {positions} positions, but reads {length} tokens at once. {flag} takes at most {positions}."
        ) from error


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model has an embedding for, as its config states it."""
    return int(model.config.get_text_config().vocab_size)


def input_device(model: nn.Module) -> torch.device:
    """Return the device to put token ids on: that of the weights, or the CPU where accelerate moves them.

    Raises ModelError if the weights are on `meta` and nothing will load them.
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


def random_ids(models: Iterable[PreTrainedModel], batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Draw ids_BT (batch x length), int64, on the CPU, from the token ids that all models have.

    Where a model is custom code, rows begin with the special tokens that its config names: it may look for them.
    """
    models = list(models)
    smallest = min(vocabulary_size(model) for model in models)
    ids_BT = torch.randint(smallest, (batch, length), generator=torch.Generator().manual_seed(seed))
    special = next((special_tokens(model) for model in models if special_tokens(model)), [])
    return behind(torch.tensor(special, dtype=torch.int64), ids_BT)


def special_tokens(model: PreTrainedModel) -> list[int]:
    """The special tokens that the config of custom code names; none for a model of transformers, which needs none."""
    return special_token_ids(model.config) if runs_remote_code(model) else []


def fitting_batch(length: int, vocabulary: int, *, limit: int = LOGITS_BYTES) -> int:
    """How many rows of `length` tokens keep their float32 logits under `limit` bytes, and their tokens under 8192.

    >>> fitting_batch(128, 49152)
    10
    """
    return max(1, min(limit // (4 * vocabulary * length), BATCH_TOKENS // length))


def decode_steps(
    model: PreTrainedModel, prompt_BT: Tensor, choose: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Tensor]:
    """Yield the next token, ids_B1 (int64), once per forward pass and without end.

    `choose` takes logits_BV and returns ids_B1 (None: the most likely). The first pass reads the whole prompt, each
    later one the token just yielded, with the keys and values (or the recurrent state) that the model returned. A model
    that returns none reads everything again, and so does one whose code fails with them, with one warning. The caller
    sets evaluation and inference mode.

    >>> from transformers.modeling_outputs import CausalLMOutput
    >>> def counting(input_ids, **_):
    ...     return CausalLMOutput(logits=nn.functional.one_hot(input_ids + 1, 128))
    >>> steps = decode_steps(counting, torch.tensor([[1, 5]]))
    >>> int(next(steps)), int(next(steps))
    (6, 7)
    """
    input_BT, seen_BT, state, cached = prompt_BT, prompt_BT, dict[str, Any](), True
    while True:
        try:
            outputs = model(input_ids=input_BT, use_cache=cached, **state)
        except Exception as error:  # whatever the model's own code makes of its cache
            has_worked = seen_BT.shape[1] > prompt_BT.shape[1] + 1  # a pass has read what another kept
            if not cached or has_worked or isinstance(error, NOT_THE_CACHE):
                raise
            outputs, cached = model(input_ids=seen_BT, use_cache=False), False
            _warn(f"{type(model).__name__} fails with its cache ({one_line(error)}): every step reads the whole text")
        logits_BV = outputs.logits[:, -1]
        next_B1 = logits_BV.argmax(dim=-1, keepdim=True) if choose is None else choose(logits_BV)
        # the first name only: newer outputs answer to the older names as well
        kept = ({name: outputs[name]} for name in STATE_NAMES if cached and name in outputs)
        state = next(kept, {})
        del outputs, logits_BV  # the logits of the prompt need not outlive the pass
        yield next_B1
        seen_BT = torch.cat([seen_BT, next_B1], dim=1)
        input_BT = next_B1 if state else seen_BT


@functools.cache  # once for each model, however often it is timed
def _warn(message: str) -> None:
    logger.warning(message)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    """The tokens that end a text: the model's and the tokenizer's."""
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {tokenizer.eos_token_id, *(end if isinstance(end, list | tuple) else [end])}


def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, new_tokens: int = 48
) -> str:
    """Continue `prompt` with the most likely tokens and return the continuation alone.

    Deterministic, with the prompt as it stands: no chat template, no sampling, none of the model's generation
    settings. Ends after `new_tokens` tokens, or before the model's or the tokenizer's end-of-text token.
    Raises DataError if the prompt has no tokens or `new_tokens` is below 1.
    """
    check_least(DataError, "new_tokens", new_tokens, 1, 48)
    prompt_T = encode(tokenizer, prompt)
    if not len(prompt_T):
        raise DataError(f"prompt={prompt!r} has no tokens. prompt='Once upon a time' has some.")
    ends = end_tokens(model, tokenizer)
    written: list[int] = []
    with evaluation_mode(model), torch.inference_mode():
        steps = decode_steps(model, prompt_T[None].to(input_device(model)))
        while len(written) < new_tokens and (token := int(next(steps))) not in ends:
            written.append(token)
    # Some tokenizers drop the space before the first word they decode: decode with the prompt, then cut it off.
    before = decode(tokenizer, prompt_T.tolist())
    whole = decode(tokenizer, prompt_T.tolist() + written)
    return whole[len(before) :] if whole.startswith(before) else decode(tokenizer, written)
