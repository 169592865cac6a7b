"""What the GGUF reader of transformers lacks: it parses a file once, and shows no progress bar."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def gguf_reader() -> Iterator[None]:
    """Let transformers read GGUF files silently, and parse a file once for its config, tokenizer and weights.

    By itself it parses the file for each, which takes seconds, and maps the names of tensors anew for every module.
    """
    import gguf

    reader = None
    with suppress(ImportError):  # a later transformers may do without that module
        reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    with (
        _replaced(gguf, "GGUFReader", _read_once),
        _replaced(gguf, "get_tensor_name_map", functools.cache),
        _replaced(reader, "tqdm", lambda tqdm: functools.partial(tqdm, disable=True)),
    ):
        yield


def forget_gguf() -> None:
    """Release the file that was parsed last: after its weights it is seldom read, and it takes memory."""
    _parse.cache_clear()


@contextmanager
def _replaced(module: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of a module, where there is one, and put it back."""
    original = getattr(module, name, None)
    if original is None:
        yield
        return
    setattr(module, name, change(original))
    try:
        yield
    finally:
        setattr(module, name, original)


def _read_once(parser: Callable[[str], Any]) -> Callable[[str | os.PathLike[str]], Any]:
    def read(path: str | os.PathLike[str]) -> Any:
        state = Path(path).stat()
        return _parse(parser, os.fspath(path), (state.st_ino, state.st_mtime_ns, state.st_size))

    return read


@functools.lru_cache(maxsize=1)
def _parse(parser: Callable[[str], Any], path: str, _: tuple[int, ...]) -> Any:
    return parser(path)


def metadata(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of these keys of a GGUF file, None where it does not have one."""
    import gguf

    with gguf_reader():
        fields = gguf.GGUFReader(path).fields
    return {key: fields[key].contents() if key in fields else None for key in keys}
