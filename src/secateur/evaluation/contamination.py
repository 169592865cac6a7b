"""What a model was calibrated and trained on -> a warning where it occurs in the text that it is evaluated on.

A model that has seen the text is flattered by it. Nothing of the text is kept with a model; but its record says where
it came from, so that it can be read again from the files that are still there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.calibration import DEMO, CalibrationOptions
from secateur.data.options import DataOptions, split_weight
from secateur.data.overlap import OVERLAP_WORDS, overlap
from secateur.data.reading import read_tuning_data
from secateur.data.rows import Rows
from secateur.data.windows import calibration_windows, digest
from secateur.errors import DataError
from secateur.evaluation.texts import decode

logger = logging.getLogger(__name__)


def warn_of_overlap(
    name: str, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], calibrated: Mapping[str, Any]
) -> None:
    """Log a warning for every text (name -> text) that holds calibration or tuning text of the model called `name`.

    `calibrated` says how it was calibrated: the record of its folder, or what its plan was scored with, as plain data.
    Its windows are drawn again from the file, or `demo`, that it names; so are the rows of every training that the
    record tells of. Where they cannot be, or turn out to be others (the file is gone or has changed, the text is a data
    set's or the model's own), nothing is known and nothing said.

    >>> warn_of_overlap("pruned", None, {"wikitext2": "A text."}, {"calibration": None})
    """
    _warn_of_calibration(name, tokenizer, texts, calibrated)
    recovery = calibrated.get("recovery")
    while recovery is not None:
        _warn_of_tuning(name, tokenizer, texts, recovery)
        recovery = recovery.get("before")


def _warn_of_calibration(
    name: str, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], calibrated: Mapping[str, Any]
) -> None:
    about = calibrated.get("calibration_options")
    if about is None or not _is_at_hand(about["text"]):
        return
    try:
        options = CalibrationOptions(**about)
        windows = calibration_windows(tokenizer, options)
    except (DataError, TypeError) as error:
        logger.debug("the calibration of %s cannot be drawn again: %s", name, error)
        return
    if calibrated["calibration"] == digest(options.scored(windows)):
        windows = options.scored(windows)  # nothing was repaired
    elif calibrated["calibration"] != digest(windows):
        logger.debug("the calibration of %s cannot be drawn again: %s gives other tokens", name, about["text"])
        return
    decoded = [decode(tokenizer, ids) for ids in options.in_order(windows).tolist()]
    for data, text in texts.items():
        if share := overlap(decoded, text):
            logger.warning(
                "%s: %.3g %% of its calibration windows, from %s, share %d words in a row with the evaluation text %s; "
                "this flatters the result, so calibrate on another text",
                name,
                100 * share,
                about["text"],
                OVERLAP_WORDS,
                data,
            )


def _warn_of_tuning(
    name: str, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], recovery: Mapping[str, Any]
) -> None:
    try:
        about = recovery["data"]
        options = DataOptions(**{**about, "sources": tuple(about["sources"])})
        sources = [split_weight(source)[0] for source in options.sources]
        if not all(map(_is_at_hand, sources)):
            return
        read = read_tuning_data(tokenizer, options)
    except (DataError, KeyError, TypeError) as error:
        logger.debug("the tuning data of %s cannot be read again: %s", name, error)
        return
    if recovery.get("rows") != read.train.digest():
        logger.debug("the tuning data of %s cannot be read again: %s give other rows", name, ", ".join(sources))
        return
    for data, text in texts.items():
        rows = chain(_texts(tokenizer, read.train), _texts(tokenizer, read.validation))
        if share := overlap(rows, text):
            logger.warning(
                "%s: %.3g %% of the rows it was trained on, from %s, share %d words in a row with the evaluation text "
                "%s; this flatters the result, so train on another text",
                name,
                100 * share,
                ", ".join(sources),
                OVERLAP_WORDS,
                data,
            )


def _is_at_hand(text: str) -> bool:
    """Whether a text can be read without a network."""
    return text == DEMO or Path(text).expanduser().is_file()


def _texts(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Iterable[str]:
    return (decode(tokenizer, rows.ids_T[rows.slice_of(row)].tolist()) for row in range(len(rows)))
