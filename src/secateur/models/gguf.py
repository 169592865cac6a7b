"""What the GGUF reader of transformers lacks: it parses a file once, and shows no progress bar."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from secateur.progress import without_collection


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


def config_of_gguf(path: Path) -> PreTrainedConfig:
    """The config that a file's metadata make, which is read once: all of the vocabulary is read with it."""
    return copy.deepcopy(_config(path, _state(path)))


@functools.lru_cache(maxsize=2)
def _config(path: Path, _: tuple[int, ...]) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    return config


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


def _read_once(parser: type) -> Callable[[str | os.PathLike[str]], Any]:
    def read(path: str | os.PathLike[str]) -> Any:
        return _parse(parser, os.fspath(path), _state(Path(path)))

    return read


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


@functools.lru_cache(maxsize=1)
def _parse(parser: type, path: str, _: tuple[int, ...]) -> Any:
    """What the parser makes of a file, from an ordinary array: slices of a memory map take three times as long.

    Arrays of strings, which vocabularies are, are split here: the parser makes five arrays of each string.
    """

    class OfArray(parser):  # type: ignore[misc]  # gguf has no types
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if isinstance(value, np.memmap) else value)

        def _get_field_parts(self, start: int, kind: int) -> tuple[int, list[Any], list[int], list[Any]]:
            inner = int(self._get(start, np.uint32)[0]) if kind == GGUFValueType.ARRAY else None
            if inner != GGUFValueType.STRING or self.byte_order != "I":  # of this machine's byte order
                found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(start, kind)
                return found
            count = self._get(start + 4, np.uint64)
            strings, size = _strings(memoryview(self.data), start + 12, int(count[0]))
            parts = [self._get(start, np.uint32), count, *strings]
            kinds = [GGUFValueType.ARRAY, *([GGUFValueType.STRING] if strings else [])]
            return 12 + size, parts, [*range(2, len(parts))], kinds

    from gguf import GGUFValueType

    with without_collection():
        return OfArray(path)


def _strings(data: memoryview, start: int, count: int) -> tuple[list[memoryview], int]:
    """So many strings of bytes, each behind its length of 8 bytes, and how many bytes all take.

    >>> strings, size = _strings(memoryview(b".." + bytes([2, *bytes(7)]) + b"ab" + bytes(8)), 2, 2)
    >>> [each.tobytes() for each in strings], size
    ([b'ab', b''], 18)
    """
    length, strings, at = struct.Struct("=Q"), [], start
    for _ in range(count):
        (size,) = length.unpack_from(data, at)
        at += 8 + size
        strings.append(data[at - size : at])
    return strings, at - start


def metadata(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of these keys of a GGUF file, None where it does not have one."""
    import gguf

    with gguf_reader():
        fields = gguf.GGUFReader(path).fields
    return {key: fields[key].contents() if key in fields else None for key in keys}
