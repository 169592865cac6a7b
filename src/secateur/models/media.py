"""Images and sound of calibration: what a processor makes of them, found again by the windows that show them.

A window has room for token ids alone. So image tokens, or the first token of the text of a sound, carry a number in
their upper half, as masked tokens carry the token under the mask (`inputs`), and windows can be cut, joined, saved and
compared as any others. Numbers are hashes of what the processor made: equal images have equal numbers in every process,
and other images make other windows. Axes: B samples, T tokens.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

HALF = 32  # bits of an id, and of what stands above it
_SHOWN: dict[int, Shown] = {}  # by their numbers, in this process
_DIGESTS: dict[int, bytes] = {}  # of what has a number, so that no other gets it


@dataclass(frozen=True, slots=True)
class Pair:
    """An image or a sound with its text."""

    where: str
    text: str
    given: Path | Mapping[str, object]
    """A path, or the `bytes` or `path` of a Parquet file."""
    is_sound: bool = False

    def file(self) -> Path | BinaryIO:
        """What can be opened to read it."""
        if isinstance(self.given, Path):
            return self.given
        content = self.given.get("bytes")
        return io.BytesIO(content) if isinstance(content, bytes) else Path(str(self.given.get("path")))


@dataclass(frozen=True, slots=True)
class Shown:
    """What a model reads of one window besides its ids; the first dimension of each tensor is of images or patches."""

    whole: Mapping[str, Tensor]
    by_token: Mapping[str, Tensor]
    """1 x T: those that have an entry for each token, such as an attention mask."""
    places: int
    """Tokens at which the image stands, or the first token of the text of a sound."""


def with_shown(ids_T: Tensor, places_T: Tensor, shown: Shown) -> Tensor:
    """A window (int64) that shows an image at some of its tokens (bool), or a sound.

    >>> shown = Shown({"pixel_values": torch.ones(1, 3, 2, 2)}, {}, places=1)
    >>> window_T = with_shown(torch.tensor([7, 8]), torch.tensor([True, False]), shown)
    >>> {name: tuple(each.shape) for name, each in shown_in(window_T.repeat(2, 1)).items()}
    {'pixel_values': (2, 3, 2, 2)}
    >>> shown_in(window_T[None, 1:])
    {}
    """
    hashed = hashlib.sha256()
    for name, tensor in sorted({**shown.whole, **shown.by_token}.items()):
        hashed.update(f"{name} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    digest = hashed.digest()
    number = int.from_bytes(digest[:4]) >> 2 or 1
    while _DIGESTS.setdefault(number, digest) != digest:
        number += 1
    _SHOWN[number] = shown
    return ids_T + ((places_T * number) << HALF)


def shows(windows_BT: Tensor) -> bool:
    """Whether any of the windows shows an image or a sound."""
    return any(number in _SHOWN for number in (windows_BT >> HALF).amax(1).tolist())


def shown_in(windows_BT: Tensor) -> dict[str, Tensor]:
    """What a model reads besides the ids; nothing, unless every window shows the whole of an image or a sound."""
    numbers_BT = windows_BT >> HALF
    numbers = numbers_BT.amax(1).tolist()
    shown = [_SHOWN.get(number) for number in numbers]
    if not all(
        each is not None and int((row_T == number).sum()) == each.places
        for each, row_T, number in zip(shown, numbers_BT, numbers, strict=True)
    ):
        return {}
    found = [each for each in shown if each is not None]
    whole = {name: torch.cat([each.whole[name] for each in found]) for name in found[0].whole}
    length = windows_BT.shape[1]
    by_token = {name: torch.cat([each.by_token[name][:, :length] for each in found]) for name in found[0].by_token}
    return {name: tensor.to(windows_BT.device) for name, tensor in {**whole, **by_token}.items()}
