"""What to train on, and how to read it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur.errors import DataError

TEMPLATES = ("auto", "alpaca", "chat")
LOSS_ON = ("answers", "all")


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What to train on. A source is a file, `demo` or the name of a data set; `FILE@2` gives it the weight 2.

    >>> DataOptions(("alpaca.json",), loss_on="questions")
    Traceback (most recent call last):
    secateur.errors.DataError: loss_on='questions' is unknown. Expected answers or all: DataOptions(loss_on='answers').
    """

    sources: tuple[str, ...]
    template: str = "auto"  # auto: Alpaca's prompt for instructions, the chat template for messages; or one for both
    loss_on: str = "answers"  # or all: the prompts, too
    length: int = 256  # tokens, to which rows are cut
    samples: int | None = None  # of every source the first so many; None: all
    column: str | None = None  # the field of documents that holds text or messages; None: found by its name
    packing: bool = False  # several short rows in one, which do not see each other
    validation: float = 0.02  # the share of the rows that are left out of the training, and judge it
    group_by_length: bool = False  # rows of like length into the same step; within a step they always are
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources or not all(name for name, _ in map(weighted, self.sources)):
            raise DataError(f"sources={self.sources} names no data. Expected files or data sets: ('alpaca.json',).")
        for name, value, known in (("template", self.template, TEMPLATES), ("loss_on", self.loss_on, LOSS_ON)):
            if value not in known:
                expected = f"{', '.join(known[:-1])} or {known[-1]}"
                raise DataError(f"{name}={value!r} is unknown. Expected {expected}: DataOptions({name}={known[0]!r}).")
        for name, number, least, good in (("length", self.length, 2, 256), ("samples", self.samples, 1, 1000)):
            if number is not None and number < least:
                raise DataError(f"{name}={number} is too small. Expected at least {least}: DataOptions({name}={good}).")
        if not 0 <= self.validation < 1:
            raise DataError(
                f"validation={self.validation} is no share of the rows. Expected 0 (none) up to 1: "
                "DataOptions(validation=0.02)."
            )


def weighted(source: str) -> tuple[str, float | None]:
    """The name of a source and its weight, if it has one.

    >>> weighted("alpaca.json@0.5"), weighted("alpaca.json")
    (('alpaca.json', 0.5), ('alpaca.json', None))
    """
    name, at, weight = source.rpartition("@")
    if not at or not re.fullmatch(r"\d+\.?\d*|\.\d+", weight):
        return source, None
    if float(weight) == 0:
        raise DataError(f"{source!r}: the weight 0 leaves nothing of it. Leave it out, or give it a weight: {name}@1")
    return name, float(weight)
