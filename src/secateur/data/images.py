"""Images with their texts -> calibration windows, as the model's own processor prepares them. Axes: T tokens."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from secateur.data.calibration import CalibrationOptions
from secateur.errors import DataError, check_installed, one_line
from secateur.models.media import Pair, Shown, with_shown

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

IMAGE, SUFFIX = "image", "suffix"
NOT_SHOWN = ("input_ids", "labels")  # of what a processor makes


def image_windows(
    processor: ProcessorMixin, pairs: Sequence[Pair], options: CalibrationOptions, *, skipped: int, count: int
) -> Tensor:
    """So many windows (int64, count x length), after those that are skipped, each of which shows one image.

    A window is what the processor makes of an image and its text, in a chat template that has a place for it; the texts
    of the images that follow fill it. Images are cropped to the shape of the first, so that all take equally many
    tokens. Raises `DataError` for fewer images than are needed, for one that is missing or damaged, and for windows
    into which an image does not fit.
    """
    check_installed(DataError, "PIL", extra="images", what="reading images")
    if skipped + count > len(pairs):
        raise DataError(
            f"{options.names[0]!r} has {len(pairs)} images, and samples={options.samples} and "
            f"held_out={options.held_out} are one each. Expected more images, or fewer windows: "
            f"CalibrationOptions(samples={max(1, len(pairs) - options.held_out)})."
        )
    size, some = _image_of(pairs[0]).size, pairs[skipped : skipped + count]
    texts = [pair.text for pair in some]  # those of others are for other windows
    return torch.stack(
        [_window(processor, pair, texts[at:] + texts[:at], size, options) for at, pair in enumerate(some)]
    )


def _image_of(pair: Pair) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(pair.file()) as image:
            return image.convert("RGB")
    except OSError as error:  # missing, or no image
        raise DataError(f"{pair.where}: the image cannot be read ({one_line(error)}).") from error


def _window(
    processor: ProcessorMixin, pair: Pair, texts: list[str], size: tuple[int, int], options: CalibrationOptions
) -> Tensor:
    """One image, with its text and those after it."""
    from PIL import ImageOps

    where, image, text = pair.where, ImageOps.fit(_image_of(pair), size), ""
    following = itertools.cycle(texts)
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
