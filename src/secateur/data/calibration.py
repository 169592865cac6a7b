"""Which text to calibrate on, and how much of it: the options of scores and repairs about their text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from secateur.data.forms import FORMS
from secateur.data.options import split_weight
from secateur.decoding import build_known, decode
from secateur.errors import DataError, check_least

if TYPE_CHECKING:
    from torch import Tensor

DEMO = "demo"
SELF = "self"
COLUMN = "text"
SAMPLES, TOKENS_PER_COLUMN = 128, 8.0
MOST_SAMPLES = 512  # of a small model
SMALL = 50_000_000  # parameters: a model with fewer takes more windows, which cost as much as SAMPLES of one with these


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which text to calibrate on, and how many windows of how many tokens of it.

    >>> CalibrationOptions(samples=0)
    Traceback (most recent call last):
    secateur.errors.DataError: samples=0 is too small. Expected at least 1, for example samples=64
    """

    text: Sequence[str] = (DEMO,)
    """Files, folders of text files, names of data sets, demo (Python's language reference) or self (text that the model
    generates), one or more. FILE@2 gives a source twice the windows of another. For models that read images or hear
    sound, a folder or Parquet file of these with their texts."""
    samples: int = SAMPLES
    """Number of calibration windows. Where it is not given, a cut of a model of less than 50 million parameters takes
    up to 512."""
    length: int = 256
    """Tokens per window."""
    tokens_per_column: float | None = None
    """At least so many tokens for each column of the widest matrix that repair fits, which in wide models takes more
    windows than `samples`. Default: 8 (preset fast: 2) where `samples` is not given, else 0."""
    seed: int = 0
    """Seed of the choice of windows, and of the text that the model generates."""
    column: str = COLUMN
    """The field of a document that holds its text; with chat, `messages` comes before `text`."""
    chat: bool = False
    """Put every document into the tokenizer's chat template."""
    held_out: int = 8
    """Number of windows besides `samples`, which no repair sees: one that raises the loss there is left out. Where
    layers are trained (repair=reconstruct) at least 32, if the text has as many."""
    score_samples: int | None = 64
    """Number of windows that scores look at, the first ones; repairs look at all. None: scores look at all, too."""
    varied: float | None = None
    """Share of the windows, the last ones, in other forms: lower case without punctuation, spaces around punctuation,
    tokens in random order. Repairs look at them, scores do not. Default: 0.375 where the cut has a repair, else 0."""
    copied: float | None = None
    """Share of the windows that scores look at which are half a window of shuffled tokens, repeated: they show what
    copying heads are worth. Default: 0.125 for the score fisher, else 0."""
    start_tokens: tuple[int, ...] | None = None
    """Token ids that begin every row, for custom code that looks for them. Default: what the tokenizer puts before a
    text, or special tokens that the config names, where the code fails without."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", (self.text,) if isinstance(self.text, str) else tuple(self.text))
        if self.start_tokens is not None:
            object.__setattr__(self, "start_tokens", tuple(self.start_tokens))
            if len(self.start_tokens) >= self.length or min(self.start_tokens, default=0) < 0:
                raise DataError(
                    f"start_tokens={list(self.start_tokens)} are no ids that a window of {self.length} tokens may "
                    "begin with. Expected a few, from 0 up: CalibrationOptions(start_tokens=(1, 2))."
                )
        if not self.text or not all(self.names):
            raise DataError(
                f"text={','.join(self.text)!r} names no text. Expected demo, a file or a data set: "
                "CalibrationOptions('demo')."
            )
        if not self.column:
            raise DataError("column='' names no field. Expected that of the text: CalibrationOptions(column='text').")
        if SELF in self.names:
            self._check_self()
        # A window of one token predicts nothing.
        limits = {"samples": (1, 64), "length": (2, 128), "seed": (0, 0), "held_out": (1, 8), "score_samples": (1, 64)}
        for name, (least, example) in limits.items():
            check_least(DataError, name, getattr(self, name), least, example)
        if self.tokens_per_column is None:
            object.__setattr__(self, "tokens_per_column", TOKENS_PER_COLUMN if self.samples == SAMPLES else 0.0)
        elif not 0 <= self.tokens_per_column < math.inf:
            raise DataError(
                f"tokens_per_column={self.tokens_per_column:g} is no number of tokens. Expected at least 0: "
                "CalibrationOptions(tokens_per_column=8)."
            )
        for name, usual in (("varied", 0.375), ("copied", 0.125)):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise DataError(
                    f"{name}={share:g} is no share of the windows that leaves some as they are. Expected at least 0 "
                    f"and less than 1: CalibrationOptions({name}={usual})."
                )

    def _check_self(self) -> None:
        alone = f"Leave them out: CalibrationOptions({SELF!r})."
        if self.chat or self.column != COLUMN:
            raise DataError(
                f"column={self.column!r} and chat={self.chat} are about documents, and {SELF!r} is what the model "
                f"generates. {alone}"
            )
        if len(self.text) > 1:
            raise DataError(f"text={','.join(self.text)!r}: {SELF!r} is generated, and stands alone. {alone}")
        if self.varied:
            raise DataError(f"varied={self.varied:g} is for texts that are read, and {SELF!r} is generated. {alone}")

    @property
    def sources(self) -> list[tuple[str, float]]:
        """The sources and their weights."""
        return [(name, 1.0 if weight is None else weight) for name, weight in map(split_weight, self.text)]

    @property
    def names(self) -> tuple[str, ...]:
        """The sources without their weights."""
        return tuple(name for name, _ in self.sources)

    @property
    def generated(self) -> bool:
        """Whether the model writes the windows."""
        return self.names == (SELF,)

    def to_json(self) -> dict[str, Any]:
        """As plain data, of which `build_known` makes the options again."""
        return {**asdict(self), "text": list(self.text)}

    def for_model(self, *, columns: int, parameters: int = 0) -> CalibrationOptions:
        """The same with as many windows as a matrix of so many columns takes, or a small model can afford.

        >>> [CalibrationOptions(samples=samples).for_model(columns=8960).samples for samples in (64, 128)]
        [64, 280]
        >>> [CalibrationOptions().for_model(columns=64, parameters=10**power).samples for power in (6, 8)]
        [512, 128]
        """
        tokens = (self.tokens_per_column or 0.0) * columns
        samples = max(self.samples, math.ceil(tokens / self.length))
        if columns and self.takes_more_time(parameters):
            samples = max(samples, min(MOST_SAMPLES, SAMPLES * SMALL // parameters))
        return replace(self, samples=samples)

    def takes_more_time(self, parameters: int) -> bool:
        """Whether a model of so many parameters is small, and the windows are those that nobody has chosen.

        >>> [CalibrationOptions(samples=samples).takes_more_time(10**6) for samples in (64, 128)]
        [False, True]
        """
        usual = (self.samples, self.tokens_per_column) == (SAMPLES, TOKENS_PER_COLUMN)
        return usual and 0 < parameters < SMALL and not self.generated

    def counts(self, windows: int) -> list[int]:
        """Of so many windows, how many are as the text has them, in each of `FORMS`, and in random order.

        >>> CalibrationOptions(varied=0.5).counts(256)
        [128, 43, 43, 42]
        """
        varied, kinds = int(windows * (self.varied or 0)), len(FORMS) + 1
        each = [(varied + kind) // kinds for kind in range(kinds)]
        return [windows - varied, *reversed(each)]

    def as_written(self, windows: Tensor) -> Tensor:
        """Those of the windows (int64, samples x length) that are as the text has them."""
        return windows[: self.counts(len(windows))[0]]

    def as_scored(self) -> CalibrationOptions:
        """The same options without what only repairs look at, under which statistics for scores can be saved.

        >>> [CalibrationOptions(samples=8, score_samples=n, varied=0.25).as_scored().varied for n in (6, 7)]
        [0.0, 0.25]
        """
        unaffected = self.score_samples is not None and self.score_samples <= self.counts(self.samples)[0]
        return replace(self, held_out=1, varied=0.0 if unaffected else self.varied)


def recorded_options(about: Mapping[str, Any]) -> CalibrationOptions | None:
    """The options of the text, of what a plan or a record says of it; None where it names none. Raises `ValueError`.

    >>> recorded_options({"calibration_options": CalibrationOptions(samples=3).to_json()}).samples
    3
    >>> recorded_options({"calibration_options": {"samples": "many"}})
    Traceback (most recent call last):
    ValueError: calibration_options: samples: 'many' is no int
    """
    name = "calibration_options"
    given = decode(Mapping[str, Any] | None, about.get(name), name)
    try:
        return build_known(CalibrationOptions, given, name) if given else None
    except DataError as error:
        raise ValueError(f"{name}: {error}") from error
