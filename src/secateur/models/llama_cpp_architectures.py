"""What llama.cpp's architectures can hold, and which of them a model type of transformers may become.

All that is particular to one architecture or one model type is data, in `llama_cpp_architectures.json` beside this
file: that is where a new model type goes, once tiny models of it give torch's logits in llama.cpp
(`tests/export/test_check.py`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from secateur.errors import ExportError
from secateur.models.classes import stock_type
from secateur.models.config import check_not_quantized, per_layer_model_class

TABLE = Path(__file__).with_name("llama_cpp_architectures.json")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of llama.cpp's architectures: what its code reads from a file."""

    name: str
    rotary: str  # numbers of a head rotated together: "halves" (i and i + n/2), "pairs" (2i and 2i + 1) or "none"
    biases: tuple[str, ...] | str  # the tensors that may have a bias, or "all", where each must have one
    per_layer: bool = False  # every layer may have sizes of its own
    skips_attention: bool = False  # a layer may have no attention, with no tensors for it
    part_rotary: bool = False  # a part of a head may be rotated and the rest not
    rope_factors: bool = False  # every frequency may have a factor
    windows: bool = False  # some layers may attend to a window alone
    width: str = "any"  # of all heads together: "any", or "hidden" where it must be the hidden width
    output: str = "optional"  # the output matrix: "optional", "required" or "tied" (never in the file)
    joins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensors that lie in the file as one


@dataclass(frozen=True, slots=True)
class ModelType:
    """One of transformers' model types: how its weights and settings are written to a file."""

    name: str
    architectures: tuple[str, ...]  # that may hold it, best first
    rotary: str = "halves"  # as in `Architecture`
    norm_offset: float = 0.0  # what its norms add to their weights
    metadata: Mapping[str, str] = field(default_factory=dict)  # key of the file -> setting
    optional: Mapping[str, str] = field(default_factory=dict)  # the same, for settings that may be unset
    constants: Mapping[str, float] = field(default_factory=dict)  # key of the file -> what the code has
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # setting -> the values that llama.cpp computes
    query_scalar: Mapping[str, Any] | None = None  # the setting whose root divides attention scores
    in_weights: tuple[str, ...] = ()  # settings that the shapes of weights show
    neutral: tuple[str, ...] = ()  # settings that change no output
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # end of a fused weight's name -> its parts
    split_by_head: bool = False  # a fused weight holds queries, keys and values of one head, then of the next


def _tuples(value: Any) -> Any:
    """JSON with tuples for lists, which frozen values hold."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _table() -> dict[str, Any]:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        "architectures": {n: Architecture(n, **_tuples(entry)) for n, entry in table["architectures"].items()},
        "types": {n: ModelType(n, **_tuples(entry)) for n, entry in table["types"].items()},
        "neutral": frozenset(table["neutral"]),
        "in_weights": frozenset(table["in_weights"]),
    }


def architecture(name: str) -> Architecture:
    """An architecture of the table, by its name in GGUF files."""
    entry: Architecture = _table()["architectures"][name]
    return entry


def known_types() -> tuple[str, ...]:
    """The model types of transformers that can be written."""
    return tuple(_table()["types"])


def type_of(config: PreTrainedConfig) -> ModelType:
    """The entry of a config's model type.

    Raises `ExportError` when there is none, or the code is the model's own, and `ModelError` for packed weights.

    >>> from transformers import AutoConfig
    >>> type_of(AutoConfig.for_model("granite")).architectures
    ('granite',)
    """
    name = stock_type(config)
    entry: ModelType | None = _table()["types"].get(name)
    if entry is None:
        raise ExportError(
            f"model type {name!r} cannot be written as GGUF: llama.cpp is not tested to give torch's logits for it. "
            f"Expected one of {', '.join(known_types())}; for another, llama.cpp's own convert_hf_to_gguf.py reads a "
            "folder of uniform shapes (secateur prune --shape uniform)"
        )
    if type(config) is not CONFIG_MAPPING[name] and per_layer_model_class(config) is None:
        raise ExportError(
            f"the model's code is its own, {type(config).__name__}, and no architecture of llama.cpp is known to "
            f"compute the same; transformers' {name} can be written"
        )
    check_not_quantized(config)
    return entry


def is_neutral(name: str, model_type: ModelType) -> bool:
    """Whether a setting needs no key in the file: weights show it, or no output depends on it."""
    table = _table()
    return name in table["neutral"] | table["in_weights"] | {*model_type.in_weights, *model_type.neutral}
