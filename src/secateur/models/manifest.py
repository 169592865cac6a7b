"""What a folder that we wrote holds: the size and hash of every file, the dtype and shape of every tensor.

The manifest is the last file that `save` writes. A file is compared with it before it is read; the bytes of weights are
hashed by `verify` alone. In a folder without a manifest nothing is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from secateur.decoding import decode
from secateur.errors import CheckpointError, one_line
from secateur.files import read_json, unwritable, write_json

MANIFEST_FILE = "secateur_manifest.json"
CARD_FILE = "README.md"
FORMAT = 1
WEIGHTS = ".safetensors"
REMEDY = f"Copy it again; if it was changed on purpose, remove {MANIFEST_FILE}, and nothing is compared"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as it was written; of weights, each tensor's dtype and shape: "BF16 [48, 84]"."""

    bytes: int
    sha256: str
    tensors: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        about: dict[str, Any] = {"bytes": self.bytes, "sha256": self.sha256}
        return about if self.tensors is None else {**about, "tensors": dict(self.tensors)}


def entry(path: Path) -> Entry:
    """The entry of a file in the manifest."""
    return Entry(path.stat().st_size, file_digest(path), tensors_in(path) if path.suffix == WEIGHTS else None)


def file_digest(path: Path) -> str:
    """Sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_in(path: Path) -> dict[str, str]:
    """Dtype and shape of each tensor of a safetensors file, from its header alone.

    Raises `CheckpointError` when it is truncated or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: f"{each.get_dtype()} {list(each.get_shape())}" for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} is truncated or not a safetensors file ({error}). Copy it again; the placeholder of a Git "
            "checkout becomes the file with: git lfs pull"
        ) from error


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder, after all its other files; the model card is left to be edited."""
    names = [name for name in files_in(folder) if name != CARD_FILE]
    try:
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            entries = list(pool.map(entry, (folder / name for name in names)))
    except OSError as error:
        raise unwritable(folder, error) from error
    files = {name: each.to_json() for name, each in zip(names, entries, strict=True)}
    write_json(folder / MANIFEST_FILE, {"format": FORMAT, "files": files})


def read_manifest(folder: Path) -> dict[str, Entry] | None:
    """What lies in a folder, by file; None where there is no manifest. Raises `CheckpointError` when it is damaged."""
    path = folder / MANIFEST_FILE
    if not path.exists() and not path.is_symlink():
        return None
    data = read_json(path)
    try:
        if data["format"] != FORMAT:
            raise ValueError(f"it has format {data['format']!r:.40}, this version reads {FORMAT}")
        return {_plain(name): decode(Entry, about, name) for name, about in data["files"].items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else one_line(error)
        raise CheckpointError(f"{MANIFEST_FILE} is damaged ({reason[:200]}). {REMEDY}") from error


def _plain(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name or name == ".":
        raise ValueError(f"{name!r:.80} is no path within the folder")
    return name


def changes(folder: Path, name: str, written: Entry, *, hashed: bool) -> str | None:
    """How a file differs from what was written, in words that follow its name; None where it does not.

    With `hashed`, the bytes of weights are read, too.
    """
    path = folder / name
    if not path.is_file():
        return "is no regular file" if path.exists() else "is missing"
    size = path.stat().st_size
    if written.tensors is not None and (change := _tensor_changes(path, written.tensors)) is not None:
        return change
    if size != written.bytes:
        return f"has {size} bytes, {written.bytes} were written"
    if (hashed or written.tensors is None) and (digest := file_digest(path)) != written.sha256:
        return f"has other bytes than were written (sha256 {digest[:12]}..., expected {written.sha256[:12]}...)"
    return None


def _tensor_changes(path: Path, written: Mapping[str, str]) -> str | None:
    try:
        tensors = tensors_in(path)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path.name} ").split(". ")[0]
    for name in sorted(tensors.keys() | written.keys()):
        if name not in tensors:
            return f"lacks the tensor {name}"
        if name not in written:
            return f"holds {name}, which was not written"
        if tensors[name] != written[name]:
            return f"holds {name} as {tensors[name]}, {written[name]} was written"
    return None


def check_as_written(folder: Path, is_read: Callable[[str], bool]) -> None:
    """Raise `CheckpointError` where a file that is to be read is not as it was written, or was not written at all.

    Only files whose name `is_read` accepts are compared, and nothing in a folder without a manifest.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    for name in sorted({name for name in (*manifest, *files_in(folder)) if is_read(name)}):
        written = manifest.get(name)
        change = "was not written with the rest" if written is None else changes(folder, name, written, hashed=False)
        if change is not None:
            raise CheckpointError(f"{name} {change}. {REMEDY}")


def files_in(folder: Path) -> Iterator[str]:
    """Every file of a folder but the manifest and hidden ones, by its path within."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_dir() and not any(part.startswith(".") for part in parts) and parts != (MANIFEST_FILE,):
            yield "/".join(parts)
