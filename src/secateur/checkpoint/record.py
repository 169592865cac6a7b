"""How a checkpoint was made, so that it can be made again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from secateur import __version__

PLAN_FILE = "secateur_plan.json"
RECORD_FILE = "secateur_record.json"


@dataclass(frozen=True, slots=True)
class Record:
    """What went in: the dense model and its weights' hash, the calibration and its tokens' hash, seed, versions."""

    model: str
    weights: str  # sha256 of the dense model's weights
    calibration: str | None  # sha256 of the calibration tokens; None where no text was used
    seed: int
    dtype: str
    versions: Mapping[str, str]
    command: str | None  # as typed; None from Python
    calibration_options: Mapping[str, Any] | None = None  # text, samples, length, seed, column, chat; None if not known
    recovery: Mapping[str, Any] | None = None  # how it was trained after the cut; None where it was not

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def make_record(
    model: nn.Module,
    *,
    name: str,
    calibration: str | None = None,
    calibration_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    command: str | None = None,
) -> Record:
    """The record of a cut of `model`, the dense one.

    >>> make_record(nn.Linear(2, 1, bias=False), name="tiny").dtype
    'float32'
    """
    dtype = next((str(weight.dtype).removeprefix("torch.") for weight in model.parameters()), "none")
    versions = {
        "secateur": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return Record(name, weights_digest(model), calibration, seed, dtype, versions, command, calibration_options)


def read_record(folder: Path) -> Record | None:
    """Read the record of a folder that `save` wrote; None where there is none, or none that can be read.

    >>> read_record(Path("no-such-folder")) is None
    True
    """
    try:
        return Record(**json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


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
