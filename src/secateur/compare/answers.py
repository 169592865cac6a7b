"""A prompt and sampling settings -> the answers of both models, a token of each in turns.

Only one model computes at any moment, so the seconds of a token are those of its own model. An answer is a generator:
when the page stops asking for tokens (a stop button, a closed browser), nothing more is computed.

Tensor names end in their axes: B batch (one text), T token, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from secateur.compare.models import Side
from secateur.errors import DataError, one_line
from secateur.evaluation.inference import decode_steps, end_tokens, input_device, vocabulary_size
from secateur.evaluation.texts import decode

LONGEST_PROMPT = 1_000_000  # characters; to tokenize more takes long, and no model reads it


@dataclass(frozen=True, slots=True)
class Sampling:
    """How both models write."""

    temperature: float = 0.0  # 0 takes the most likely token
    top_p: float = 1.0  # only the most likely tokens that have this much probability together; 1: all
    top_k: int = 0  # only so many of the most likely tokens; 0: all
    new_tokens: int = 64  # the most tokens of an answer
    seed: int = 0
    chat: bool = False  # whether the prompt is a message in the chat template, where a tokenizer has one


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model has written so far, and how fast."""

    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    first_seconds: float = 0.0  # to read the prompt and write the first token
    other_seconds: float = 0.0  # to write the tokens after the first
    ended: str | None = None  # why it ended; None while it writes

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the tokens after the first; None before there are any."""
        return (self.tokens - 1) / self.other_seconds if self.other_seconds else None

    @property
    def characters_per_second(self) -> float | None:
        """The same speed in characters, for models whose tokens differ."""
        speed = self.tokens_per_second
        return speed * len(self.text) / self.tokens if speed is not None else None


def prompt_ids(side: Side, prompt: str, sampling: Sampling) -> Tensor:
    """Tokenize a prompt for one model; returns ids_BT (1 x T) on its device.

    Raises `DataError` for a prompt that is empty, that a chat template refuses, that does not fit into the model's
    positions together with the answer, or that has tokens which the model does not know.
    """
    if not prompt.strip():
        raise DataError("the prompt is empty: type some text")
    if len(prompt) > LONGEST_PROMPT:
        raise DataError(f"the prompt has {len(prompt):,} characters: shorten it to {LONGEST_PROMPT:,}")
    if sampling.chat and side.tokenizer.chat_template is not None:
        message = [{"role": "user", "content": prompt}]
        try:
            found: Any = side.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program, and refuses in any way it likes
            why = f"its chat template refuses the prompt ({one_line(error)})"
            raise DataError(f"{side.title}: {why}: switch the chat template off") from error
    else:
        found = side.tokenizer(prompt, verbose=False)  # a prompt that is too long has an error of ours
    ids = list(found["input_ids"])
    if not ids:
        raise DataError(f"{side.title}: the prompt has no tokens: type some text")
    if side.positions is not None and len(ids) + sampling.new_tokens > side.positions:
        raise DataError(
            f"{side.title} reads {side.positions:,} tokens at most, and the prompt has {len(ids):,} and the answer up "
            f"to {sampling.new_tokens:,}: shorten the prompt or the answer"
        )
    if max(ids) >= (known := vocabulary_size(side.model)):
        other = f"gives token {max(ids)}, and the model has {known}: it is of another model"
        raise DataError(f"{side.title}: the tokenizer {other}")
    return torch.tensor([ids], device=input_device(side.model))


def answers(sides: Sequence[Side], prompt: str, sampling: Sampling) -> Iterator[tuple[Answer, ...]]:
    """Let the models answer in turns; yields all answers after each round of tokens, the last time complete.

    A model whose code raises ends with the error, and the others go on. Raises `DataError` as `prompt_ids` does, for
    any of the models, before one begins.
    """
    prompts = [prompt_ids(side, prompt, sampling) for side in sides]
    writers = [_write(side, ids_BT, sampling) for side, ids_BT in zip(sides, prompts, strict=True)]
    current = [Answer(prompt_tokens=ids_BT.shape[1]) for ids_BT in prompts]
    while any(answer.ended is None for answer in current):
        for i, writer in enumerate(writers):
            if current[i].ended is None:
                try:
                    current[i] = next(writer)
                except Exception as error:  # the model's code may raise anything
                    current[i] = replace(current[i], ended=f"failed: {one_line(error)}")
        yield tuple(current)


def _write(side: Side, ids_BT: Tensor, sampling: Sampling) -> Iterator[Answer]:
    """One model's answer, a token at a time."""
    steps = decode_steps(side.model, ids_BT, _choice(sampling, ids_BT.device))
    ends = end_tokens(side.model, side.tokenizer)
    answer = Answer(prompt_tokens=ids_BT.shape[1])
    written: list[int] = []
    while answer.ended is None:
        start = time.perf_counter()
        with torch.inference_mode():  # entered anew for each token: a page may run each in another thread
            token = int(next(steps))
        seconds = time.perf_counter() - start
        if token not in ends:
            written.append(token)
        done = token in ends or answer.tokens + 1 == sampling.new_tokens
        text = decode(side.tokenizer, written)
        answer = replace(
            answer,
            text=text if done else text.rstrip("\N{REPLACEMENT CHARACTER}"),  # of a character not yet complete
            tokens=answer.tokens + 1,
            first_seconds=answer.first_seconds or seconds,
            other_seconds=answer.other_seconds + seconds if answer.tokens else 0.0,
            ended=("end of text" if token in ends else "length") if done else None,
        )
        yield answer


def _choice(sampling: Sampling, device: torch.device) -> Callable[[Tensor], Tensor]:
    """How a token is chosen from logits_BV: as `generate` of transformers does it, with random numbers of its own."""
    warpers: list[Any] = []
    if sampling.temperature > 0:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        warpers += [TopKLogitsWarper(int(sampling.top_k))] if sampling.top_k > 0 else []
        warpers += [TopPLogitsWarper(float(sampling.top_p))] if sampling.top_p < 1 else []
    generator = torch.Generator(device).manual_seed(int(sampling.seed or 0))  # None where the page's field is empty

    def choose(logits_BV: Tensor) -> Tensor:
        logits_BV = logits_BV.float()
        if logits_BV.isnan().any():
            raise DataError("the model's logits hold NaN; float16 often overflows: try --dtype bfloat16 or float32")
        if not warpers:
            return logits_BV.argmax(dim=-1, keepdim=True)
        for warper in warpers:
            logits_BV = warper(None, logits_BV)
        return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)

    return choose
