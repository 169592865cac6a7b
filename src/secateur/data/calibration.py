"""Which text to calibrate on, and how much of it: the options of scores and repairs about their text."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from secateur.errors import DataError, check_least

DEMO = "demo"
SELF = "self"
COLUMN = "text"


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which text to calibrate on, and how many windows of how many tokens of it.

    >>> CalibrationOptions(samples=0)
    Traceback (most recent call last):
    secateur.errors.DataError: samples=0 is too small. Expected at least 1, for example samples=64
    """

    text: str = DEMO
    """A file, the name of a data set, demo (Python's language reference) or self (text that the model generates)."""
    samples: int = 256
    """Number of calibration windows."""
    length: int = 256
    """Tokens per window."""
    seed: int = 0
    """Seed of the choice of windows, and of the text that the model generates."""
    column: str = COLUMN
    """The field of a document that holds its text; with chat, `messages` comes before `text`."""
    chat: bool = False
    """Put every document into the tokenizer's chat template."""
    held_out: int = 8
    """Number of windows besides `samples` on which ways to choose the units are compared."""
    score_samples: int | None = 64
    """Number of windows that scores look at, the first ones; repairs look at all. None: scores look at all, too."""
    shuffled: float | None = None
    """Share of the windows, the last ones, whose tokens are shuffled: repairs look at them, scores do not.
    Default: 0.25 where the cut has a repair, else 0."""

    def __post_init__(self) -> None:
        if not self.text:
            raise DataError("text='' names no text. Expected demo, a file or a data set: CalibrationOptions('demo').")
        if not self.column:
            raise DataError("column='' names no field. Expected that of the text: CalibrationOptions(column='text').")
        if self.text == SELF and (self.chat or self.column != COLUMN):
            raise DataError(
                f"column={self.column!r} and chat={self.chat} are about documents, and {SELF!r} is what the model "
                f"generates. Leave them out: CalibrationOptions({SELF!r})."
            )
        # A window of one token predicts nothing.
        limits = {"samples": (1, 64), "length": (2, 128), "seed": (0, 0), "held_out": (1, 8), "score_samples": (1, 64)}
        for name, (least, example) in limits.items():
            check_least(DataError, name, getattr(self, name), least, example)
        if self.shuffled is not None and not 0 <= self.shuffled < 1:
            raise DataError(
                f"shuffled={self.shuffled:g} is no share of the windows that leaves some as they are. Expected at "
                "least 0 and less than 1: CalibrationOptions(shuffled=0.25)."
            )

    def in_order(self, windows: Tensor) -> Tensor:
        """Those of the windows (int64, samples x length) whose tokens are in the order of the text."""
        return windows[: self._in_order(len(windows))]

    def scored(self, windows: Tensor) -> Tensor:
        """Those of the windows that scores look at."""
        return self.in_order(windows)[: self.score_samples]

    def as_scored(self) -> CalibrationOptions:
        """The same options without what only repairs look at, under which statistics for scores can be saved.

        >>> [CalibrationOptions(samples=8, score_samples=n, shuffled=0.25).as_scored().shuffled for n in (6, 7)]
        [0.0, 0.25]
        """
        unaffected = self.score_samples is not None and self.score_samples <= self._in_order(self.samples)
        return replace(self, held_out=1, shuffled=0.0 if unaffected else self.shuffled)

    def _in_order(self, windows: int) -> int:
        return windows - int(windows * (self.shuffled or 0))
