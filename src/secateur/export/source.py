"""A MODEL argument -> the model in memory, with what an exported folder copies from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.models.config import check_not_quantized, load_config
from secateur.models.loading import load
from secateur.models.options import LoadOptions
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer, text_files


@dataclass(frozen=True)
class Source:
    """A model and what lies beside it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None  # with its plan and record; None for a GGUF file and a model of the hub
    files: Mapping[str, Path]  # of its tokenizer and processors, by name


def load_source(model: str, loading: LoadOptions) -> Source:
    """Load a MODEL argument and its tokenizer. Raises `ModelError`, also for a model that is quantized already."""
    where = resolve(model)
    check_not_quantized(load_config(model, trust_remote_code=loading.trust_remote_code), name=model)
    loaded = load(model, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=loading.trust_remote_code)
    return Source(loaded, tokenizer, where.folder, text_files(model, tokenizer))
