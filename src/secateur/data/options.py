"""What to train on, and how rows are made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from secateur.decoding import check_choices
from secateur.errors import DataError, check_least

Template = Literal["auto", "alpaca", "chat"]
LossOn = Literal["answers", "all"]


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What to train on, and how rows are made of it. Raises `DataError` for values that make no rows.

    >>> DataOptions(("alpaca.json",), loss_on="questions")
    Traceback (most recent call last):
    secateur.errors.DataError: loss_on='questions' is unknown. Expected answers or all
    """

    sources: tuple[str, ...]
    """Files (.json, .jsonl, .parquet or plain text), folders of text files, names of data sets, `demo`, or `self`: what
    the dense model writes. FILE@2 gives a source weight 2."""

    template: Template = "auto"
    """Prompt template. auto: the tokenizer's chat template; Alpaca's for instructions where it has none."""

    loss_on: LossOn = "all"
    """Tokens that count in the loss: all, or the answers without their prompts."""

    max_length: int = 256
    """Tokens per row; longer rows are truncated, plain text is split."""

    samples: int | None = None
    """Rows of each source, from its start. Default: all; 256 that the dense model writes."""

    varied: float = 0.25
    """Share of the plain text in other forms: lower case without punctuation, spaces around punctuation."""

    column: str | None = None
    """Field with the text or the messages, where its name is not a usual one."""

    packing: bool = False
    """Pack several short rows into one; they do not attend to each other."""

    group_by_length: bool = False
    """Sort rows by length over several steps: less padding, a less even shuffle."""

    validation: float = 0.02
    """Fraction of the rows held out for the validation loss."""

    seed: int = 0
    """Seed of the split into training and validation rows."""

    def __post_init__(self) -> None:
        if not self.sources or not all(name for name, _ in map(split_weight, self.sources)):
            raise DataError(f"sources={self.sources} names no data. Expected files or data sets: ('alpaca.json',).")
        check_choices(self, DataError)
        check_least(DataError, "max_length", self.max_length, 2, 256)
        check_least(DataError, "samples", self.samples, 1, 1000)
        for name, what, usual in (("validation", "rows", 0.02), ("varied", "plain text", 0.25)):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise DataError(
                    f"{name}={share} is no fraction of the {what}. Expected 0 (none) up to 1: "
                    f"DataOptions({name}={usual})."
                )

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources without their weights."""
        return tuple(split_weight(source)[0] for source in self.sources)


def split_weight(source: str) -> tuple[str, float | None]:
    """Split a source into its name and its weight; None where it has no weight.

    >>> split_weight("alpaca.json@0.5"), split_weight("alpaca.json")
    (('alpaca.json', 0.5), ('alpaca.json', None))
    """
    name, at, weight = source.rpartition("@")
    if not at or not re.fullmatch(r"\d+\.?\d*|\.\d+", weight):
        return source, None
    if float(weight) == 0:
        raise DataError(f"{source!r}: the weight 0 leaves nothing of it. Leave it out, or give it a weight: {name}@1")
    return name, float(weight)
