"""Finished layers of a forward and backward pass -> files, from which a killed pass resumes.

One safetensors file for each layer and direction: `forward-0` holds the layer's output, `backward-0` the gradients of
its inputs and all sums of weights that were finished since the file before.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.files import METADATA_KEY, write_tensors

RESULT, TENSOR = "found", "given"  # first part of a tensor's name in a file: found/WEIGHT/KIND, given/NUMBER


class CachedResults(Protocol):
    """What a pass has found of every weight that it has finished."""

    def by_weight(self) -> dict[str, dict[str, Tensor]]:
        """Weight -> kind -> tensor."""

    def restore(self, weight: str, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `by_weight` gave for a weight."""


class LayerCache:
    """The files of finished layers in a folder. Opening it restores the results of those that are there."""

    def __init__(self, folder: Path, results: CachedResults) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.results = folder, results
        for path in sorted(folder.glob("*.safetensors")):
            restored: dict[str, dict[str, Tensor]] = defaultdict(dict)
            try:
                with safe_open(path, framework="pt") as file:
                    for key in list(file.keys()):
                        if key.startswith(f"{RESULT}/"):
                            _, weight, kind = key.split("/", 2)
                            restored[weight][kind] = file.get_tensor(key).clone()
            except (OSError, SafetensorError):  # damaged: that layer is computed again
                path.unlink()
                continue
            for weight, tensors in restored.items():
                results.restore(weight, tensors)
        self.finished: set[str] = set(results.by_weight())
        """Weights whose results are in files: the pass need not form their gradients."""

    def read(self, key: str) -> tuple[list[Tensor], str] | None:
        """The tensors saved under a key and the text that was saved with them; None where there is no file."""
        path = self._path(key)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            text: str = json.loads((file.metadata() or {})[METADATA_KEY])
            count = sum(name.startswith(f"{TENSOR}/") for name in list(file.keys()))
            return [file.get_tensor(f"{TENSOR}/{i}") for i in range(count)], text

    def write(self, key: str, tensors: Sequence[Tensor], text: str) -> None:
        """Save tensors, a text and all results that are in no file yet; whole or not at all.

        Raises `DiskError` when the file cannot be written.
        """
        results = self.results.by_weight()
        content = {
            f"{RESULT}/{weight}/{kind}": tensor
            for weight, kinds in results.items()
            if weight not in self.finished
            for kind, tensor in kinds.items()
        }
        content |= {f"{TENSOR}/{i}": tensor.detach() for i, tensor in enumerate(tensors)}
        write_tensors(self._path(key), content, text)
        self.finished |= set(results)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key.replace('/', '-')}.safetensors"
