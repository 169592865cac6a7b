"""Dense model and options -> the record of how a checkpoint was made, so that it can be made again."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from secateur import __version__
from secateur.data.calibration import recorded_options
from secateur.decoding import build_known, decode
from secateur.errors import CheckpointError
from secateur.files import RECORD_FILE, read_json
from secateur.models.manifest import check_as_written


@dataclass(frozen=True, slots=True)
class Record:
    """What a checkpoint was made from."""

    model: str
    """The dense model, as it was named."""
    weights: str
    """Sha256 of the dense model's weights."""
    calibration: str | None
    """Sha256 of the calibration tokens; None where no text was used."""
    seed: int
    dtype: str
    versions: Mapping[str, str]
    """Of Secateur, torch, transformers and Python."""
    command: str | None
    """As it was typed; None from Python."""
    calibration_options: Mapping[str, Any] | None = None
    """The fields of `CalibrationOptions`; None where they are not known."""
    tensors: Mapping[str, str] | None = None
    """What became of every dense tensor (see `account_for_tensors`); None where it is not known."""
    recovery: Mapping[str, Any] | None = None
    """How the model was trained after the cut; None where it was not."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def make_record(
    model: nn.Module,
    *,
    name: str,
    scored: Mapping[str, Any] | None = None,
    seed: int = 0,
    command: str | None = None,
    tensors: Mapping[str, str] | None = None,
) -> Record:
    """The record of a cut of `model`, the dense one; what its plan says of how it was scored goes before `seed`.

    >>> make_record(nn.Linear(2, 1, bias=False), name="tiny").dtype
    'float32'
    """
    dtype = next((str(weight.dtype).removeprefix("torch.") for weight in model.parameters()), "none")
    text = scored or {}
    digest, options, seed = text.get("calibration"), text.get("calibration_options"), text.get("seed", seed)
    return Record(name, weights_digest(model), digest, seed, dtype, versions(), command, options, tensors)


def versions() -> dict[str, str]:
    """The versions that a result depends on.

    >>> list(versions())
    ['secateur', 'torch', 'transformers', 'python']
    """
    return {
        "secateur": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def read_record(folder: Path | None) -> Record | None:
    """Read the record of a folder that `save` wrote; None where there is none, or no folder.

    Keys that a later version has added are ignored. Raises `CheckpointError` when it is damaged, or not as it was
    written.

    >>> read_record(Path("no-such-folder")) is None
    True
    """
    if folder is None or not (folder / RECORD_FILE).exists():
        return None
    try:
        check_as_written(folder, lambda name: name == RECORD_FILE)
        data = read_json(folder / RECORD_FILE)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    try:
        record: Record = decode(Record, data, section=build_known)
        recorded_options(data)
        return record
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: {RECORD_FILE} is damaged ({error}). Copy it again, or remove it: models load without one"
        ) from error


def weights_digest(model: nn.Module) -> str:
    """Sha256 of all parameters and saved buffers: names, dtypes, shapes and bytes, in the order of names.

    >>> layer = nn.Linear(2, 2)
    >>> before = weights_digest(layer)
    >>> _ = layer.weight.data.mul_(2)
    >>> before == weights_digest(layer)
    False
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(memoryview(raw.numpy()))
    return total.hexdigest()
