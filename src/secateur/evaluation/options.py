"""What `evaluate` and `profile` measure: two frozen dataclasses of plain data, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.errors import DataError, TaskError, check_least
from secateur.evaluation.protocols import read_protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """What is measured of every model: perplexity, accuracy in tasks, samples of text.

    Raises `DataError` or `TaskError` for a value that measures nothing.

    >>> EvaluationOptions(limit=200)
    Traceback (most recent call last):
    secateur.errors.TaskError: limit=200 is about tasks, and none is named. Expected --tasks zero-shot
    """

    texts: tuple[str, ...] = ()
    """Texts to measure perplexity on, each NAME=FILE. Without texts, tasks and prompts: the half of Python's language
    reference that calibration does not read."""

    protocols: tuple[str, ...] = ("served@128",)
    """Windows in which a text is read: served@N (N tokens, no overlap, each after the start tokens), llm-pruner@N
    (without them) or sliding@N/STRIDE."""

    max_tokens: int | None = None
    """Score only the first so many tokens of each text."""

    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval by name; zero-shot is LLM-Pruner's seven."""

    tasks_data: str | None = None
    """Folder with the questions of the tasks as local files; without it they come from the hub."""

    limit: int | None = None
    """Only the first so many questions of each task."""

    batch_size: int | None = None
    """Windows of a text, and answers of a task, read at once; by default as many as fit in memory."""

    prompts: tuple[str, ...] = ()
    """Prompts to continue, greedily."""

    new_tokens: int = 48
    """Tokens to continue each prompt by."""

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            read_protocol(protocol)
        for name in ("tasks_data", "limit"):
            value = getattr(self, name)
            if value is not None and not self.tasks:
                raise TaskError(f"{name}={value} is about tasks, and none is named. Expected --tasks zero-shot")
        check_least(DataError, "max_tokens", self.max_tokens, 1, 40_000)
        check_least(TaskError, "limit", self.limit, 1, 200)
        check_least(DataError, "batch_size", self.batch_size, 1, 8)
        check_least(DataError, "new_tokens", self.new_tokens, 1, 48)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """What is timed: every length of prompt with every batch size. Raises `DataError` for a count below 1.

    >>> ProfileOptions(seq_lens=(64, 512)).grid
    ((64, 1), (512, 1))
    """

    seq_lens: tuple[int, ...] = (64,)
    """Tokens of a prompt; each with each batch size."""

    batch_sizes: tuple[int, ...] = (1,)
    """Prompts read at once."""

    new_tokens: int = 16
    """Tokens written after each prompt."""

    repeats: int = 5
    """Timed runs of each model, in turns; the median is reported."""

    sizes_only: bool = False
    """Count parameters, MACs and bytes and time nothing; weights are not read."""

    seed: int = 0
    """Seed of the random prompts."""

    def __post_init__(self) -> None:
        check_least(DataError, "seq_lens", min(self.seq_lens, default=0), 1, 64)
        check_least(DataError, "batch_sizes", min(self.batch_sizes, default=0), 1, 1)
        check_least(DataError, "new_tokens", self.new_tokens, 1, 16)
        check_least(DataError, "repeats", self.repeats, 1, 5)

    @property
    def grid(self) -> tuple[tuple[int, int], ...]:
        """All pairs of a length and a batch size, each once."""
        return tuple(dict.fromkeys((length, batch) for length in self.seq_lens for batch in self.batch_sizes))
