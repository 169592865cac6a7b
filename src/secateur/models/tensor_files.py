"""Tensors of our own in safetensors files: statistics, caches, what a training reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import CheckpointError, one_line
from secateur.files import renamed

METADATA_KEY = "secateur"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Any = None) -> None:
    """Write a safetensors file, whole or not at all, with `about` (JSON) in its metadata. Raises `DiskError`.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(Path(folder) / "a", {"w": torch.ones(2)}, {"seed": 0})
    ...     read_tensors(Path(folder) / "a")
    ({'w': tensor([1., 1.])}, {'seed': 0})
    """
    metadata = None if about is None else {METADATA_KEY: json.dumps(about)}
    with renamed(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what `write_tensors` wrote: the tensors, which are mapped, not copied, and `about`.

    Raises `CheckpointError` when the file is missing, truncated or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            return {name: file.get_tensor(name) for name in sorted(file.keys())}, about
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read; {one_line(error)}") from error


def sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file, which its library writes in another order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)
