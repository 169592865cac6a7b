"""A prompt and settings -> what both models write, token by token, with how fast each of them was.

`generate` writes; we say when. Each model runs in a thread of its own that waits after every token, and the threads are
let go one after the other: a token of A, a token of B. So only one model computes at any time, and the time of a token
is that model's own, however many of them, and of their users, share the machine. Nothing is written that nobody asks
for: whoever stops iterating (a stop button, a browser that is closed) stops the models.

Tensor names end in their axes: B batch (one text), T token, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from secateur.compare.sides import Side
from secateur.compare.turns import TURNS
from secateur.errors import DataError, SecateurError, one_line
from secateur.evaluation.inference import STATE_NAMES, input_device, vocabulary_size

LENGTH, END, STOPPED, FAILED = "length", "end of text", "stopped", "failed"  # why an answer ended
LONGEST_ANSWER = 4096  # tokens
LONGEST_PROMPT = 1_000_000  # characters; to tokenize more takes long, and no model reads it


@dataclass(frozen=True, slots=True)
class Writing:
    """How to write: the same for both models. Temperature 0 takes the most likely token every time."""

    temperature: float = 0.0
    top_p: float = 1.0  # the most likely tokens that have this much probability together
    top_k: int = 0  # so many of the most likely tokens; 0: all
    length: int = 64  # tokens of the answer at most
    seed: int = 0
    chat: bool = False  # the prompt as a message, in the model's chat template where it has one

    def __post_init__(self) -> None:
        """Check every value: a page passes on whatever a browser sends."""
        number, whole = (int, float), (int,)
        checks: tuple[tuple[str, Any, tuple[type, ...], Callable[[Any], bool], str], ...] = (
            ("temperature", self.temperature, number, lambda x: x == 0 or 0.01 <= x <= 100, "0, or 0.01 to 100"),
            ("top-p", self.top_p, number, lambda x: 0 < x <= 1, "a share above 0; 1 takes all tokens"),
            ("top-k", self.top_k, whole, lambda x: x >= 0, "a whole number; 0 takes all tokens"),
            ("length", self.length, whole, lambda x: 1 <= x <= LONGEST_ANSWER, f"1 to {LONGEST_ANSWER} tokens"),
            ("seed", self.seed, whole, lambda x: 0 <= x < 2**63, "a whole number, 0 or more"),
        )
        for name, value, kinds, fits, expected in checks:
            if isinstance(value, bool) or not isinstance(value, kinds) or not fits(value):
                raise DataError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model has written so far, and how fast."""

    text: str
    prompt_tokens: int
    tokens: int = 0
    first_seconds: float | None = None  # to read the prompt and write the first token
    tokens_per_second: float | None = None  # of the tokens after the first
    characters_per_second: float | None = None  # the same, for models whose tokens differ in length
    state_bytes: int = 0  # what the model keeps of the text: keys and values, or recurrent states
    ended: str | None = None  # None while it writes
    error: str | None = None


def prompt_ids(side: Side, prompt: str, writing: Writing) -> Tensor:
    """The tokens that a model reads, ids_BT (1 x T) on its device; in its chat template, where asked and there is one.

    Raises `DataError` for a prompt that is empty, that a chat template refuses, that does not fit into the model's
    positions together with the answer, or that has tokens which the model does not know.

    >>> from types import SimpleNamespace as Namespace
    >>> side = Namespace(tokenizer=lambda text, **_: {"input_ids": list(text.encode())}, title="A: tiny", positions=8)
    >>> prompt_ids(side, "pruning", Writing(length=4))
    Traceback (most recent call last):
    secateur.errors.DataError: A: tiny reads 8 tokens at most, and the prompt has 7 and the answer up to 4: ...
    """
    if not prompt.strip():
        raise DataError("the prompt is empty: type some text")
    if len(prompt) > LONGEST_PROMPT:
        raise DataError(
            f"the prompt has {len(prompt):,} characters: shorten it, {LONGEST_PROMPT:,} are the most that is read"
        )
    if writing.chat and side.tokenizer.chat_template is not None:
        message = [{"role": "user", "content": prompt}]
        try:
            found: Any = side.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates are programs, and refuse in any way they like
            raise DataError(
                f"{side.title}: its chat template refuses the prompt ({one_line(error)}): switch the chat template off"
            ) from error
        ids = list(found["input_ids"])
    else:
        ids = list(side.tokenizer(prompt, verbose=False)["input_ids"])  # verbose=False: we say what is too long
    if not ids:
        raise DataError(f"{side.title}: the prompt has no tokens: type some text")
    if side.positions is not None and len(ids) + writing.length > side.positions:
        left = side.positions - len(ids)
        remedy = f"shorten the prompt, or the answer to {left} tokens" if left > 0 else "shorten the prompt"
        raise DataError(
            f"{side.title} reads {side.positions:,} tokens at most, and the prompt has {len(ids):,} and the answer up "
            f"to {writing.length:,}: {remedy}"
        )
    known = vocabulary_size(side.model)
    if max(ids) >= known:
        raise DataError(
            f"{side.title}: the tokenizer gives token {max(ids)}, and the model has {known}: it is of another model"
        )
    return torch.tensor([ids], device=input_device(side.model))


def answers(
    sides: Sequence[Side],
    prompt: str,
    writing: Writing,
    *,
    stopped: Callable[[], bool] = lambda: False,
    every: float = 0.0,
) -> Iterator[tuple[Answer, ...]]:
    """Let the models answer in turns, a token of each at a time; yields what there is at least `every` seconds apart.

    The last that is yielded is complete. It ends when all models have ended, or when `stopped` says so; a model whose
    code raises ends with an error, and the others go on. Raises `DataError` as `prompt_ids` does, for any of the
    models, before one begins.
    """
    prompts = [prompt_ids(side, prompt, writing) for side in sides]
    writers = [_Writer(side, ids_BT, writing) for side, ids_BT in zip(sides, prompts, strict=True)]
    shown = time.monotonic()
    try:
        yield tuple(writer.answer() for writer in writers)
        while any(writer.ended is None for writer in writers):
            for writer in writers:
                if stopped():
                    writer.close()
                elif writer.ended is None:
                    writer.step()
            if time.monotonic() - shown >= every:
                shown = time.monotonic()
                yield tuple(writer.answer() for writer in writers)
        yield tuple(writer.answer() for writer in writers)
    finally:
        for writer in writers:
            writer.close()


class _Closed(Exception):
    """Raised within `generate` to end it."""


class _Writer:
    """One model that writes one answer, a token whenever it is asked to. Final."""

    def __init__(self, side: Side, ids_BT: Tensor, writing: Writing) -> None:
        self.ended: str | None = None
        self._side, self._ids_BT, self._writing = side, ids_BT, writing
        self._error: str | None = None
        self._seconds: list[float] = []  # of each token
        self._started = 0.0
        self._state: Any = None  # keys and values, or what a recurrent model has instead
        self._streamer = _Streamer(side.tokenizer, self._written, self._pause)
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"answer {side.letter}", daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Let it write a token; where the last is written, let it end."""
        with TURNS:
            self._go.release()
            self._done.acquire()

    def close(self) -> None:
        """End it, wherever it is."""
        with TURNS:
            if self._thread.is_alive():
                self._closed = True
                self._go.release()
                self._thread.join()

    def answer(self) -> Answer:
        """What there is by now."""
        text, tokens = self._streamer.text, len(self._seconds)
        after_first = sum(self._seconds[1:])
        speed = (tokens - 1) / after_first if after_first else None
        return Answer(
            text=text,
            prompt_tokens=self._ids_BT.shape[1],
            tokens=tokens,
            first_seconds=self._seconds[0] if tokens else None,
            tokens_per_second=speed,
            characters_per_second=speed * len(text) / tokens if speed else None,
            state_bytes=_bytes_in(self._state),
            ended=self.ended,
            error=self._error,
        )

    def _run(self) -> None:
        ended, model = STOPPED, self._side.model
        generate: Any = model.generate
        hook = None
        try:
            self._wait()
            hook = model.register_forward_hook(self._keep_state)
            generate(
                input_ids=self._ids_BT,
                attention_mask=torch.ones_like(self._ids_BT),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=self._writing.length, use_cache=True
                ),
                logits_processor=_choosing(self._writing, self._ids_BT.device),
                streamer=self._streamer,
            )
            ended = LENGTH if len(self._seconds) == self._writing.length else END
        except _Closed:
            self._streamer.finish()
        except Exception as error:  # the model's code may raise anything
            self._error = str(error) if isinstance(error, SecateurError) else one_line(error)
            ended = FAILED
        finally:
            if hook is not None:
                hook.remove()
            self.ended = ended
            self._done.release()

    def _wait(self) -> None:
        """Until the next token is asked for."""
        self._go.acquire()
        if self._closed:
            raise _Closed
        self._started = time.perf_counter()

    def _written(self) -> None:
        self._seconds.append(time.perf_counter() - self._started)

    def _pause(self) -> None:
        self._done.release()
        self._wait()

    def _keep_state(self, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        if threading.current_thread() is self._thread:  # not where the same model answers somebody else
            self._state = next((outputs[name] for name in STATE_NAMES if name in outputs), None)


class _Streamer(TextStreamer):
    """Gathers the text, and says so before and after it has made text of a token. Final."""

    def __init__(self, tokenizer: Any, written: Callable[[], None], pause: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.text = ""
        self._written, self._pause = written, pause

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt:
            super().put(value)  # type: ignore[no-untyped-call]
            return
        self._written()  # before the text is made: that is no work of the model
        super().put(value)  # type: ignore[no-untyped-call]
        self._pause()

    def finish(self) -> None:
        """Give out the text that waits for its next token."""
        self.end()  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


class _Drawing(LogitsProcessor):
    """Draws the token, and leaves it the only one to choose. Final.

    With random numbers of its own: those of torch are shared by all that runs in the process.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn_B1 = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_B1, 0.0)


def _not_nan(_: Tensor, scores_BV: Tensor) -> Tensor:
    if scores_BV.isnan().any():
        raise DataError("the model's logits hold NaN; float16 often overflows: try --dtype bfloat16 or float32")
    return scores_BV


def _choosing(writing: Writing, device: torch.device) -> LogitsProcessorList:
    """What becomes of the logits before the most likely token is taken, in the order in which transformers does it."""
    found: list[Any] = [_not_nan]
    if writing.temperature > 0:
        found.append(TemperatureLogitsWarper(float(writing.temperature)))
        if writing.top_k > 0:
            found.append(TopKLogitsWarper(writing.top_k))
        if writing.top_p < 1:
            found.append(TopPLogitsWarper(float(writing.top_p)))
        found.append(_Drawing(writing.seed, device))
    return LogitsProcessorList(found)


def _bytes_in(state: Any) -> int:
    """The bytes of all tensors in a cache, whatever it is built of."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting = [state]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif hasattr(item, "__dict__") and not isinstance(item, type | nn.Module | PreTrainedConfig):
            waiting += vars(item).values()
    return sum(storages.values())
