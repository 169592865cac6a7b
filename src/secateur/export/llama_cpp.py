"""llama.cpp itself, through the C functions of the wheel llama-cpp-py-sync: GGUF file -> tokens and logits.

The wheel brings the compiled library, so nothing is built on this machine.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import ExportError, one_line

PACKAGE = "llama_cpp_py_sync"
FLOAT32 = 0  # of enum ggml_type
Array = np.ndarray[Any, Any]


def is_installed() -> bool:
    """Whether llama.cpp can run files here."""
    return importlib.util.find_spec(PACKAGE) is not None


@functools.cache
def _library() -> tuple[Any, Any, Any]:
    """Cffi's interface, the library, and the callback that drops its messages, which must live as long."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # documented as the way to the C functions

    try:
        ffi, lib = get_ffi(), get_lib()
    except (OSError, RuntimeError) as error:
        raise ExportError(f"llama.cpp is installed, but its library does not load ({one_line(error)})") from error
    silence = ffi.callback("ggml_log_callback", lambda level, text, data: None)
    lib.llama_log_set(silence, ffi.NULL)
    lib.llama_backend_init()
    return ffi, lib, silence


def version() -> str:
    """The build of llama.cpp, for example "b11739"."""
    from llama_cpp_py_sync import __llama_cpp_tag__

    return str(__llama_cpp_tag__)


class Engine:
    """A GGUF file in llama.cpp, on the CPU, with a key-value cache in float32. Final."""

    def __init__(self, file: Path, *, context: int) -> None:
        self._ffi, self._lib, _ = _library()
        loading = self._lib.llama_model_default_params()
        loading.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), loading)
        if self._model == self._ffi.NULL:
            raise ExportError("llama.cpp does not load the file")
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k = settings.type_v = FLOAT32
        settings.flash_attn_type = 0  # off: its sums are of 16 bits
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if self._context == self._ffi.NULL:
            self._lib.llama_model_free(self._model)
            raise ExportError("llama.cpp loads the file, but cannot run it")
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(self._lib.llama_vocab_n_tokens(self._vocabulary))
        self._length = 0  # tokens in the cache

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, special tokens around it included."""
        data = text.encode()
        ids = self._ffi.new("llama_token[]", len(data) + 16)  # no text has more tokens than bytes
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), True, True)
        return list(ids[0:count])

    def read(self, ids: Sequence[int]) -> Array:
        """Read more tokens; returns the logits after each, float32, tokens x vocabulary."""
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at], batch.logits[at] = token, self._length + at, 1
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            if (status := self._lib.llama_decode(self._context, batch)) != 0:
                raise ExportError(f"llama.cpp cannot run the file: llama_decode returned {status}")
        finally:
            self._lib.llama_batch_free(batch)
        self._length += len(ids)
        size = len(ids) * self.vocabulary_size
        logits = np.frombuffer(self._ffi.buffer(self._lib.llama_get_logits(self._context), 4 * size), np.float32)
        return logits.reshape(len(ids), self.vocabulary_size).copy()

    def greedy(self, ids: Sequence[int], count: int) -> tuple[list[int], Array]:
        """The greedy continuation by `count` tokens, and the logits at each position of all but the last."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._length = 0
        logits = [self.read(ids)]
        new = [int(np.argmax(logits[-1][-1]))]
        while len(new) < count:
            logits.append(self.read(new[-1:]))
            new.append(int(np.argmax(logits[-1][-1])))
        return new, np.concatenate(logits).astype(np.float64)

    def close(self) -> None:
        """Give the memory back."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
