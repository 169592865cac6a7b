"""What a pass over the calibration windows has found, as a value and as a file.

Of saliences only sums are held: for every dimension of a weight, the sum over all the others. Scores of units, over any
axes and with any reduction, follow from them. Scores that look at more than single elements (Gram matrices, masks,
whole layers) are held by unit or by span of tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import CheckpointError, ScoreError
from secateur.models.tensor_files import read_tensors, write_tensors

METADATA = ("reads", "loss", "tokens", "calibration")  # fields that are no tensors, as in the file


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums of saliences over the elements of every weight, and what they were computed on. All float32, on the CPU."""

    sums: Mapping[str, Mapping[str, tuple[Tensor, ...]]]
    """Score -> weight -> for each dimension of the weight, the sums over all others."""
    units: Mapping[str, Mapping[str, Mapping[str, Tensor]]] = field(default_factory=dict)
    """Score -> group -> axis -> one number for each unit."""
    masks: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    """Weight -> dimension -> spans x size: derivatives of the mean loss by a mask over what the weight reads there."""
    reads: Mapping[str, int] = field(default_factory=dict)
    """Weight -> the dimension that meets its inputs."""
    loss: float | None = None
    """Mean cross-entropy, nats per token."""
    tokens: int = 0
    """Tokens that were looked at or predicted."""
    calibration: str | None = None
    """Hash of the token ids."""

    def joined(self, other: Statistics) -> Statistics:
        """These and those of another pass over the same tokens; the other's where both have them.

        >>> import torch
        >>> one = Statistics({"l1": {"v": (torch.ones(1),)}})
        >>> two = Statistics({"l1": {"w": (torch.ones(2),)}}, loss=2.0)
        >>> sorted(one.joined(two).sums["l1"]), one.joined(two).loss
        (['v', 'w'], 2.0)
        """
        return Statistics(
            sums=_merged(self.sums, other.sums, levels=2),
            units=_merged(self.units, other.units, levels=3),
            masks={**self.masks, **other.masks},
            reads={**self.reads, **other.reads},
            loss=self.loss if other.loss is None else other.loss,
            tokens=other.tokens or self.tokens,
            calibration=other.calibration or self.calibration,
        )


def _merged(one: Mapping[str, Any], two: Mapping[str, Any], *, levels: int) -> dict[str, Any]:
    """Nested mappings as one; where both have a value at the last level, the second's."""
    if levels == 1:
        return {**one, **two}
    return {key: _merged(one.get(key, {}), two.get(key, {}), levels=levels - 1) for key in {**one, **two}}


def save_statistics(path: Path, statistics: Statistics, *, about: str = "") -> None:
    """Write statistics as one safetensors file, whole or not at all; `load_statistics` reads it back.

    `about` says which model and calibration they are of. Tensors are named `sums/SCORE/DIMENSION/WEIGHT`,
    `units/SCORE/GROUP/AXIS` and `masks/DIMENSION/WEIGHT`.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "statistics.safetensors"
    ...     save_statistics(file, Statistics({"l1": {"w": (torch.ones(2), torch.zeros(3))}}, loss=1.5))
    ...     loaded = load_statistics(file)
    >>> loaded.loss, [sums.tolist() for sums in loaded.sums["l1"]["w"]]
    (1.5, [[1.0, 1.0], [0.0, 0.0, 0.0]])
    """
    tensors: dict[str, Tensor] = {}
    for score, by_weight in statistics.sums.items():
        for weight, dims in by_weight.items():
            tensors |= {f"sums/{score}/{dim}/{weight}": sums for dim, sums in enumerate(dims)}
    for score, by_group in statistics.units.items():
        for group, by_axis in by_group.items():
            tensors |= {f"units/{score}/{group}/{axis}": values for axis, values in by_axis.items()}
    for weight, by_dim in statistics.masks.items():
        tensors |= {f"masks/{dim}/{weight}": derivatives for dim, derivatives in by_dim.items()}
    write_tensors(path, tensors, {"about": about, **{key: getattr(statistics, key) for key in METADATA}})


def load_statistics(path: Path, *, about: str = "") -> Statistics:
    """Read what `save_statistics` wrote.

    Raises `ScoreError` when the file is missing, holds no statistics, or those of something other than `about`.
    """
    try:
        tensors, metadata = read_tensors(path)
        if metadata["about"] != about:
            raise ScoreError(f"{path} holds statistics of another model or calibration")
        sums: dict[str, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        units: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        masks: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            match key.split("/", 3):
                case ["sums", score, dim, weight]:
                    sums[score][weight][int(dim)] = tensor
                case ["units", score, group, axis]:
                    units[score][group][axis] = tensor
                case ["masks", dim, weight]:
                    masks[weight][int(dim)] = tensor
                case _:
                    raise ValueError(f"unexpected tensor {key}")
        return Statistics(
            sums={
                score: {weight: tuple(dims[i] for i in range(len(dims))) for weight, dims in by_weight.items()}
                for score, by_weight in sums.items()
            },
            units=units,
            masks=masks,
            **{key: metadata[key] for key in METADATA},
        )
    except (CheckpointError, KeyError, ValueError, TypeError) as error:
        raise ScoreError(f"{path} holds no statistics ({error}); expected what save_statistics writes") from error
