"""Images with their texts -> calibration windows, as the model's own processor prepares them.

Images lie in a folder with a `metadata.jsonl`, a row for each: `file_name` and `text`, the layout of the hub's image
folders. Or they are the column `image` of a Parquet file, as the hub's data sets have it. Axes: T tokens.
"""

from __future__ import annotations

import inspect
import io
import itertools
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from secateur.data.calibration import COLUMN, CalibrationOptions
from secateur.data.documents import read_documents
from secateur.data.text import text_of
from secateur.errors import DataError, check_installed, one_line
from secateur.models.media import Shown, with_shown
from secateur.models.tokenizer import load_processor

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

METADATA, FILE_NAME, IMAGE = "metadata.jsonl", "file_name", "image"
CAPTION, SUFFIX = "caption", "suffix"
MOST_ROWS = 5_000  # that are drawn from
NOT_SHOWN = ("input_ids", "labels")  # of what a processor makes
Row = tuple[str, Mapping[str, Any]]  # where it stands, and its fields


def holds_images(name: str) -> bool:
    """Whether a source of calibration has images.

    >>> holds_images("demo"), holds_images("book.txt")
    (False, False)
    """
    path = Path(name)
    if (path / METADATA).is_file():
        return True
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    return any(IMAGE in row for _, row in itertools.islice(read_documents(path), 1))


def reader_of(
    model: str, options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What makes windows of a calibration: the model's tokenizer, or where there are images its processor.

    Raises `DataError` for images and a model without a processor.
    """
    if not any(map(holds_images, options.names)):
        return tokenizer
    processor = load_processor(model, trust_remote_code=trust_remote_code)
    if processor is None:
        raise DataError(
            f"{','.join(options.text)!r} has images, and {model!r} no processor that reads them. Expected a "
            "vision-language model with its preprocessor_config.json, or calibration text: CalibrationOptions('demo')."
        )
    return processor


def image_windows(processor: ProcessorMixin, options: CalibrationOptions, *, skipped: int, count: int) -> Tensor:
    """So many windows (int64, count x length), after those that are skipped, each of which shows one image.

    A window is what the processor makes of an image and its text, in a chat template that has a place for it; the texts
    of the rows that follow fill it. Rows are drawn without repetition; their images are cropped to the shape of the
    first, so that all take equally many tokens. Raises `DataError` for fewer rows than are needed, for images and texts
    that are missing or damaged, and for windows into which an image does not fit.
    """
    check_installed(DataError, "PIL", extra="images", what="reading images")
    rows = _drawn_rows(options)
    if skipped + count > len(rows):
        raise DataError(
            f"{options.names[0]!r} has {len(rows)} images, and samples={options.samples} and "
            f"held_out={options.held_out} are one each. Expected more images, or fewer windows: "
            f"CalibrationOptions(samples={max(1, len(rows) - options.held_out)})."
        )
    texts = [text_of(row, where, _column(row, options)) for where, row in rows]
    size = _image_of(*rows[0]).size
    return torch.stack([_window(processor, rows, texts, at, size, options) for at in range(skipped, skipped + count)])


def _drawn_rows(options: CalibrationOptions) -> list[Row]:
    if len(options.text) > 1:
        raise DataError(
            f"text={','.join(options.text)}: images stand alone, each window shows one. Expected one source: "
            f"CalibrationOptions({options.names[0]!r})."
        )
    if options.varied:
        raise DataError(f"varied={options.varied:g} is for texts without images. Leave it out, or use 0.")
    name = options.names[0]
    folder = Path(name)
    source = folder / METADATA if folder.is_dir() else name
    rows = list(itertools.islice(read_documents(source), MOST_ROWS))
    if folder.is_dir():
        rows = [(where, {**row, IMAGE: _file_of(folder, where, row)}) for where, row in rows]
    random.Random(options.seed).shuffle(rows)
    return rows


def _file_of(folder: Path, where: str, row: Mapping[str, Any]) -> str:
    name = row.get(FILE_NAME)
    if not isinstance(name, str):
        raise DataError(f'{where}: no {FILE_NAME!r} among {sorted(row)}. Expected {{"{FILE_NAME}": "a.png", ...}}.')
    return str(folder / name)


def _column(row: Mapping[str, Any], options: CalibrationOptions) -> str:
    return CAPTION if options.column == COLUMN and COLUMN not in row and CAPTION in row else options.column


def _image_of(where: str, row: Mapping[str, Any]) -> Image.Image:
    """The image of a row: a path, bytes as Parquet files have them, or one that is read already."""
    from PIL import Image

    given = row.get(IMAGE)
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, Mapping):
        given = given.get("path") if given.get("bytes") is None else io.BytesIO(given["bytes"])
    if given is None:
        raise DataError(f"{where}: no {IMAGE!r} among {sorted(row)}. Expected a path, or an image of a data set.")
    try:
        with Image.open(given) as image:
            return image.convert("RGB")
    except OSError as error:  # missing, or no image
        raise DataError(f"{where}: the image cannot be read ({one_line(error)}).") from error


def _window(
    processor: ProcessorMixin,
    rows: list[Row],
    texts: list[str],
    at: int,
    size: tuple[int, int],
    options: CalibrationOptions,
) -> Tensor:
    """The image of one row, with its text and those after it."""
    from PIL import ImageOps

    where, row = rows[at]
    image, text = ImageOps.fit(_image_of(where, row), size), ""
    following = itertools.cycle(texts[at:] + texts[:at])
    tokenizer: Any = processor.tokenizer
    while len(tokenizer(text, verbose=False)["input_ids"]) < options.length:
        text += f"{next(following)}\n\n"
    prompt = _prompt(processor, text)
    try:
        made: Any = processor(images=[image], return_tensors="pt", **prompt)
    except Exception as error:  # processors fail in any way
        raise DataError(f"{where}: the model's processor does not take it ({one_line(error)}).") from error
    ids_T = made["input_ids"][0]
    places_T = _places(processor, ids_T)
    needed = int(places_T.nonzero().max()) + 1
    if needed >= options.length:
        raise DataError(
            f"{where}: the image ends with token {needed}, and windows have {options.length}. Expected longer ones: "
            f"CalibrationOptions(length={needed + 64})."
        )
    tensors = {name: each for name, each in made.items() if isinstance(each, Tensor) and name not in NOT_SHOWN}
    if bool((tensors.get("attention_mask", ids_T) == 1).all()):
        tensors.pop("attention_mask", None)
    by_token = {name for name, each in tensors.items() if each.dim() > 1 and each.shape[:2] == (1, len(ids_T))}
    shown = Shown(
        {name: each for name, each in tensors.items() if name not in by_token},
        {name: tensors[name][:, : options.length] for name in by_token},
        int(places_T.sum()),
    )
    return with_shown(ids_T[: options.length], places_T[: options.length], shown)


def _prompt(processor: ProcessorMixin, text: str) -> dict[str, Any]:
    """How the processor is asked for an image and the text behind it; in a chat template, if it has a place for one."""
    token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None) or ""
    if getattr(processor, "chat_template", None):
        messages = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        call: Any = processor
        try:
            prompt = str(call.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template of texts may fail in any way
            logger.debug("the chat template takes no images: %s", one_line(error))
        else:
            if str(token) in prompt:
                return {"text": [prompt], "add_special_tokens": False}
    if SUFFIX in inspect.signature(type(processor).__call__).parameters:  # what stands in no prefix is written
        return {"text": [token], SUFFIX: [text]}
    return {"text": [f"{token}{text}"]}


def _places(processor: ProcessorMixin, ids_T: Tensor) -> Tensor:
    """The tokens at which the image stands; the first, for a model that reads it beside the text."""
    tokenizer: Any = processor.tokenizer
    token = getattr(processor, "image_token", None)
    named = [getattr(each, "image_token_id", None) for each in (processor, tokenizer)]
    named.append(tokenizer.convert_tokens_to_ids(str(token)) if token else None)
    each_T = [ids_T == number for number in named if number is not None]  # one may be the token before an image
    places_T = max(each_T, key=lambda at_T: int(at_T.sum()), default=torch.zeros_like(ids_T, dtype=torch.bool))
    if not places_T.any():
        places_T[0] = True
    return places_T
