"""What a model was calibrated and trained on -> a warning where the text that it is evaluated on contains it.

A model that has seen the text is flattered by it. The text is not stored with a model, but its record says where it
came from, so that it can be read again from the files that are still there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.calibration import DEMO, recorded_options
from secateur.data.options import DataOptions
from secateur.data.overlap import OVERLAP_WORDS, overlap
from secateur.data.pairs import holds_pairs
from secateur.data.training_data import read_training_data
from secateur.data.windows import calibration_windows, digest, scored
from secateur.decoding import build_known
from secateur.errors import DataError
from secateur.evaluation.texts import decode, decode_rows

logger = logging.getLogger(__name__)
Seen = tuple[str, str, list[str]]  # what was read and from where; the verb of the remedy; windows or rows as text


def warn_of_overlap(
    name: str, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], record: Mapping[str, Any]
) -> None:
    """Log a warning for every text (name -> text) that holds calibration or training text of the model called `name`.

    `record` says how it was calibrated: the record of its folder, or what its plan was scored with, as plain data. Its
    windows, and the rows of every training, are drawn again from the local file, or `demo`, that it names. Nothing is
    logged where they cannot be, or differ.
    """
    readers: list[tuple[Callable[..., Seen | None], Mapping[str, Any]]] = [(_calibration, record)]
    recovery = record.get("recovery")
    while recovery is not None:
        readers.append((_training, recovery))
        recovery = recovery.get("before")
    for read, part in readers:
        try:
            seen = read(tokenizer, part)
        except (
            DataError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # a changed file, another's record
            logger.debug("%s: what it was made with cannot be read again: %s", name, error)
            continue
        if seen is None:
            continue
        what, remedy, pieces = seen
        for data, text in texts.items():
            if share := overlap(pieces, text):
                shared = f"{100 * share:.3g} % of {what}, share {OVERLAP_WORDS} words in a row"
                advice = f"this flatters the result, so {remedy} on another text"
                logger.warning("%s: %s with the evaluation text %s; %s", name, shared, data, advice)


def _calibration(tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]) -> Seen | None:
    options = recorded_options(record)
    if options is None or not all(map(_is_local, options.names)):
        return None
    windows = calibration_windows(tokenizer, options)
    if record["calibration"] == digest(scored(windows, options)):
        windows = scored(windows, options)  # nothing was repaired
    elif record["calibration"] != digest(windows):
        raise DataError(f"{', '.join(options.names)} gives other tokens")
    pieces = [decode(tokenizer, ids) for ids in options.as_written(windows).tolist()]
    return f"its calibration windows, from {', '.join(options.names)}", "calibrate", pieces


def _training(tokenizer: PreTrainedTokenizerBase, recovery: Mapping[str, Any]) -> Seen | None:
    options = build_known(DataOptions, recovery["data"])
    sources = options.source_names
    if not all(map(_is_local, sources)):
        return None
    data = read_training_data(tokenizer, options)
    if recovery.get("rows") != data.train.digest():
        raise DataError(f"{', '.join(sources)} give other rows")
    pieces = [*decode_rows(tokenizer, data.train), *decode_rows(tokenizer, data.validation)]
    return f"the rows it was trained on, from {', '.join(sources)}", "train", pieces


def _is_local(text: str) -> bool:
    """Whether a text can be read without a network."""
    path = Path(text).expanduser()
    return text == DEMO or path.is_file() or (path.is_dir() and not holds_pairs(text))
