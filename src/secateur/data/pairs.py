"""Images or sound with their texts: where they lie, and what turns them into calibration windows.

They lie in a folder with a `metadata.jsonl`, a row for each: `file_name` and a text, the layout of the hub's folders of
images and sound. Or they are the column `image` or `audio` of a Parquet file, as the hub's data sets have it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from secateur.data.calibration import COLUMN, CalibrationOptions
from secateur.data.documents import read_documents
from secateur.data.images import IMAGE, image_windows
from secateur.data.sound import SOUND, SUFFIXES, sound_windows
from secateur.data.text import text_of
from secateur.errors import DataError
from secateur.models.media import Pair
from secateur.models.tokenizer import load_processor

METADATA, FILE_NAME = "metadata.jsonl", "file_name"
TEXT_COLUMNS = ("caption", "transcription")  # beside `text`
MOST_ROWS = 5_000  # that are drawn from


def holds_pairs(name: str) -> bool:
    """Whether a source of calibration has images or sound with its texts.

    >>> holds_pairs("demo"), holds_pairs("book.txt")
    (False, False)
    """
    path = Path(name)
    if (path / METADATA).is_file():
        return True
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    return any(IMAGE in row or SOUND in row for _, row in itertools.islice(read_documents(path), 1))


def reader_of(
    model: str, options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What makes windows of a calibration: the model's tokenizer, or where there are images or sound its processor.

    Raises `DataError` for images or sound and a model without a processor.
    """
    if not any(map(holds_pairs, options.names)):
        return tokenizer
    processor = load_processor(model, trust_remote_code=trust_remote_code)
    if processor is None:
        raise DataError(
            f"{','.join(options.text)!r} has images or sound, and {model!r} no processor that reads them. Expected a "
            "model with its preprocessor_config.json, or calibration text: CalibrationOptions('demo')."
        )
    return processor


def shown_windows(processor: ProcessorMixin, options: CalibrationOptions, *, skipped: int, count: int) -> Tensor:
    """So many windows (int64, count x length) of images or sound with their texts, after those that are skipped.

    Raises `DataError` for a mix of sources, forms of texts, rows that lack what they should have, and as
    `image_windows` and `sound_windows` do.
    """
    pairs = _drawn_pairs(options)
    of_sound = bool(pairs) and pairs[0].is_sound
    windows = sound_windows if of_sound else image_windows
    return windows(processor, pairs, options, skipped=skipped, count=count)


def _drawn_pairs(options: CalibrationOptions) -> list[Pair]:
    """The rows of the source, in the order in which the seed draws them."""
    if len(options.text) > 1:
        raise DataError(
            f"text={','.join(options.text)}: images and sound stand alone, each window has some. Expected one source: "
            f"CalibrationOptions({options.names[0]!r})."
        )
    if options.varied:
        raise DataError(f"varied={options.varied:g} is for texts without images or sound. Leave it out, or use 0.")
    folder = Path(options.names[0])
    source = folder / METADATA if folder.is_dir() else folder
    pairs = []
    for where, row in itertools.islice(read_documents(source), MOST_ROWS):
        given: Any = _file_of(folder, where, row) if folder.is_dir() else row.get(SOUND, row.get(IMAGE))
        if given is None:
            raise DataError(f"{where}: neither {IMAGE!r} nor {SOUND!r} among {sorted(row)}, or nothing there.")
        is_sound = given.suffix.lower() in SUFFIXES if isinstance(given, Path) else row.get(SOUND) is not None
        pairs.append(Pair(where, text_of(row, where, _column(row, options)), given, is_sound))
    random.Random(options.seed).shuffle(pairs)
    return pairs


def _file_of(folder: Path, where: str, row: Mapping[str, Any]) -> Path:
    name = row.get(FILE_NAME)
    if not isinstance(name, str):
        raise DataError(f'{where}: no {FILE_NAME!r} among {sorted(row)}. Expected {{"{FILE_NAME}": "a.png", ...}}.')
    return folder / name


def _column(row: Mapping[str, Any], options: CalibrationOptions) -> str:
    named = () if options.column != COLUMN or COLUMN in row else TEXT_COLUMNS
    return next((name for name in named if name in row), options.column)
