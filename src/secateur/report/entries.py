"""The results that a report shows, with the names that their commands give them in JSON, as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.data.calibration import recorded_options
from secateur.evaluation.task_results import HEADLINES
from secateur.planning.plan import PlannedGroup

BY_LENGTH = ("macs", "peak_bytes", "kv_cache_bytes", "prefill_seconds")  # costs of a pass


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a text; None is an infinite perplexity, or a bound that is not known."""

    data: str
    protocol: str
    seq_len: int
    tokens: int
    ppl: float | None
    ppl_low: float | None = None  # lower end of the 95 % interval
    ppl_high: float | None = None
    bits_per_byte: float | None = None

    @property
    def test(self) -> str:
        """Text and protocol: only perplexities of the same test compare."""
        return f"{self.data} ({self.protocol})"


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference to the first model of an evaluation; None for that model."""

    difference: float | None = None
    p: float | None = None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A model's share of right answers in a task, or the mean over its tasks."""

    value: float
    metric: str = ""
    stderr: float | None = None
    documents: int | None = None
    against: Difference | None = None  # of a task; a mean has the two fields below instead
    difference: float | None = None
    p: float | None = None
    tasks: tuple[str, ...] = ()  # of a mean: of which

    @property
    def is_share(self) -> bool:
        """Whether it is a share of right answers, and no other metric of a task."""
        return self.metric in ("", *HEADLINES)

    @property
    def paired(self) -> Difference:
        """The difference to the first model."""
        return self.against or Difference(self.difference, self.p)


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, and a model's continuation."""

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A row of `evaluate`."""

    model: str
    perplexity: tuple[Perplexity, ...] = ()
    tasks: Mapping[str, Accuracy] = field(default_factory=dict)
    tasks_mean: Accuracy | None = None
    samples: tuple[Sample, ...] = ()
    weight_bytes: int | None = None
    file_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GridCell:
    """A model's speed at one batch size and length."""

    batch: int
    seq_len: int
    prefill_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """Size and speed of a model; None where nothing is known."""

    seq_len: int | None = None  # tokens of a pass, whose MACs, cache, memory and time these are
    parameters: int | None = None
    non_embedding_parameters: int | None = None
    macs: int | None = None
    weight_bytes: int | None = None
    file_bytes: int | None = None
    peak_bytes: int | None = None
    kv_cache_bytes: int | None = None
    prefill_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    macs_by_operator: Mapping[str, int] = field(default_factory=dict)
    grid: tuple[GridCell, ...] = ()

    def compares(self, other: Cost, field: str) -> bool:
        """Whether a field is of passes of one length in both, if it depends on it."""
        return field not in BY_LENGTH or self.seq_len == other.seq_len


@dataclass(frozen=True, slots=True)
class Cut:
    """A row of `plan` or `prune`."""

    model: str
    options: Mapping[str, Any]
    groups: tuple[PlannedGroup, ...]
    parameters: Mapping[str, int]
    macs: Mapping[str, int]
    scored: Mapping[str, Any] = field(default_factory=dict)
    out: str | None = None  # the folder that was written; None of a plan

    def __post_init__(self) -> None:
        recorded_options(self.scored)
        for group in self.groups:
            if not 0 <= group.kept <= group.units or not group.units:
                raise ValueError(f"{group.name} keeps {group.kept} of {group.units} units")


@dataclass(frozen=True, slots=True)
class TrainingEvaluation:
    """What was measured at one step of a training; None is infinite or unknown."""

    step: int
    validation: float | None = None
    perplexity: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Training:
    """The result of `recover`; the loss is in nats per token."""

    out: str
    method: str
    steps: int
    best_step: int
    tokens: int
    loss: tuple[tuple[int, float | None], ...]
    evaluation: tuple[TrainingEvaluation, ...]


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One cut of a sweep; ratio 0 is the dense model."""

    ratio: float
    parameters: int
    score: str | None = None
    label: str | None = None  # score or preset, whichever differ in the sweep
    perplexity: tuple[Perplexity, ...] = ()

    @property
    def line(self) -> str | None:
        """The line of its chart."""
        return self.label or self.score


@dataclass(frozen=True, slots=True)
class Sweep:
    """The result of `sweep`."""

    model: str
    rows: tuple[SweepPoint, ...]
