"""Sound with its texts -> calibration windows: the transcriptions that a model of speech predicts. Axes: T tokens."""

from __future__ import annotations

import importlib.util
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import ProcessorMixin

from secateur.data.calibration import CalibrationOptions
from secateur.errors import DataError, one_line
from secateur.models.media import Pair, Shown, with_shown

SOUND = "audio"
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
SECONDS = 30  # of sound in a window, where the processor does not say


def sound_windows(
    processor: ProcessorMixin, pairs: Sequence[Pair], options: CalibrationOptions, *, skipped: int, count: int
) -> Tensor:
    """So many windows (int64, count x length) of the text of a sound, after those that are skipped.

    Each is of some sounds one after the other, as many as its tokens take, each of which is in one window alone. Raises
    `DataError` for fewer sounds than are needed, for one that is missing, damaged or of another sampling rate than the
    model's, and for windows with more tokens than the sound has.
    """
    left, windows = list(reversed(pairs)), []
    for _ in range(skipped + count):
        windows.append(_window(processor, left, options))
    return torch.stack(windows[skipped:])


def _window(processor: ProcessorMixin, left: list[Pair], options: CalibrationOptions) -> Tensor:
    """The next sounds, which are taken off the end of the list."""
    extractor: Any = getattr(processor, "feature_extractor", processor)
    tokenizer: Any = processor.tokenizer
    rate = int(extractor.sampling_rate)
    most = int(getattr(extractor, "n_samples", SECONDS * rate))
    sound, texts, ids = torch.zeros(0), list[str](), list[int]()
    while len(ids) < options.length:
        if not left:
            raise DataError(
                f"{options.names[0]!r} has too little sound: samples={options.samples} and held_out={options.held_out} "
                f"windows of {options.length} tokens need more. Expected more, or fewer windows: "
                f"CalibrationOptions(samples={max(1, options.samples // 2)})."
            )
        new = _sound_of(left[-1], rate)
        if len(sound) + len(new) > most:
            raise DataError(
                f"{left[-1].where}: the model takes {most / rate:g} seconds of sound at once, and those before it have "
                f"{len(ids)} tokens of text, where windows have {options.length}. Expected shorter ones: "
                f"CalibrationOptions(length={max(2, len(ids) // 2)})."
            )
        sound = torch.cat([sound, new])
        texts.append(left.pop().text)
        ids = tokenizer(" ".join(texts), verbose=False)["input_ids"]
    padded = functional.pad(sound, (0, most - len(sound)))
    call: Any = processor
    made = call(audio=padded.numpy(), sampling_rate=rate, return_tensors="pt")
    ids_T = torch.tensor(ids[: options.length], dtype=torch.int64)
    first_T = torch.arange(options.length) == 0
    features = {name: each for name, each in made.items() if isinstance(each, Tensor)}
    return with_shown(ids_T, first_T, Shown(features, {}, 1))


def _sound_of(pair: Pair, rate: int) -> Tensor:
    """The samples of a sound, its channels averaged: float32."""
    try:
        if importlib.util.find_spec("soundfile") is not None:
            import soundfile

            given, found = soundfile.read(pair.file(), dtype="float32", always_2d=True)
            samples = torch.from_numpy(given).mean(1)
        else:
            samples, found = _from_wave(pair)
    except (
        OSError,
        RuntimeError,
        ValueError,
        wave.Error,
        EOFError,
    ) as error:  # missing, or of no format that is read here
        more = "" if importlib.util.find_spec("soundfile") else "; pip install 'secateur[sound]' reads more than WAV"
        raise DataError(f"{pair.where}: the sound cannot be read ({one_line(error)}{more}).") from error
    if found != rate:
        raise DataError(
            f"{pair.where}: its sampling rate is {found:,} Hz, and the model expects {rate:,} Hz. Resample it."
        )
    return samples


def _from_wave(pair: Pair) -> tuple[Tensor, int]:
    """A WAV file of 16 bits, by what every Python has."""
    file = pair.file()
    with wave.open(str(file) if isinstance(file, Path) else file, "rb") as sound:
        if sound.getsampwidth() != 2:
            raise wave.Error(f"{8 * sound.getsampwidth()} bits, where 16 are read")
        content = bytearray(sound.readframes(sound.getnframes()))
        samples = torch.frombuffer(content, dtype=torch.int16) if content else torch.zeros(0, dtype=torch.int16)
        return samples.view(-1, sound.getnchannels()).float().mean(1) / 2**15, sound.getframerate()
