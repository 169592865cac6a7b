"""Config and sizes of a model -> the metadata of its GGUF file.

Nothing is left out in silence: a setting is written to the file, or visible in the weights, or has the value with which
llama.cpp's code computes; any other value is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import Keys
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.errors import ExportError
from secateur.export.mapping import MappedModel
from secateur.models.classes import stock_type
from secateur.models.llama_cpp_architectures import Architecture, ModelType, is_neutral

SLIDING, FULL = "sliding_attention", "full_attention"
GROWING = ("dynamic", "longrope")  # rotary embeddings that change with the length of the text
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # llama.cpp's where the file says nothing


@dataclass(frozen=True, slots=True)
class Positions:
    """How a model knows positions: context length, windows, rotary embeddings."""

    metadata: Mapping[str, Any]
    rope_factors: Tensor | None  # one float32 divisor for each rotary frequency
    notes: tuple[str, ...]


def positions(model: PreTrainedModel, wanted: Architecture, mapped: MappedModel) -> Positions:
    """Metadata about positions. Raises `ExportError` for what the architecture has no key for."""
    config: Any = model.config
    context, notes = int(config.max_position_embeddings), []
    window = int(getattr(config, "sliding_window", None) or 0)
    sliding = _sliding_layers(config, len(mapped.sizes)) if window else []
    keys: dict[str, Any] = {}
    if any(sliding) and wanted.windows:
        keys[Keys.Attention.SLIDING_WINDOW] = window
        keys[Keys.Attention.SLIDING_WINDOW_PATTERN] = sliding
    elif any(sliding) and window < context:
        notes.append(
            f"llama.cpp has no windows for {wanted.name}: the file's context is the window, {window} tokens instead of "
            f"{context}, within which nothing differs"
        )
        context = window
    keys[Keys.LLM.CONTEXT_LENGTH] = context
    factors = None
    if rotary := rotary_dim(model):
        keys[Keys.Rope.DIMENSION_COUNT] = rotary
        for kind, rope in _ropes(config).items():
            more, factors_here = _rope(config, kind, rope, wanted, rotary)
            keys |= more
            factors = factors_here if factors_here is not None else factors
    return Positions(keys, factors, tuple(notes))


def rotary_dim(model: nn.Module) -> int:
    """How many numbers of a head are rotated, by the frequencies that the model holds; 0 where none are."""
    sizes = {2 * b.numel() for name, b in model.named_buffers() if name.endswith("inv_freq") and "original" not in name}
    if len(sizes) > 1:
        raise ExportError(
            f"the heads of a GGUF file are all rotated alike, and the model's differ: {sorted(sizes)} numbers"
        )
    return sizes.pop() if sizes else 0


def _sliding_layers(config: PreTrainedConfig, count: int) -> list[bool]:
    """Which layers attend to a window alone, of a config that sets one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [True] * count
    if unknown := sorted(set(kinds) - {SLIDING, FULL}):
        raise ExportError(f"a GGUF file has no key for layers of the kind {unknown[0]}, which layer_types lists")
    return [kind == SLIDING for kind in kinds]


def _ropes(config: PreTrainedConfig) -> dict[str | None, Mapping[str, Any]]:
    """The rotary settings of each kind of layer with its own; those of all layers under None."""
    settings = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, Mapping) for value in settings.values()):
        return {kind: rope for kind, rope in settings.items() if kind in config.layer_types}
    return {None: settings}


def _rope(
    config: PreTrainedConfig, kind: str | None, rope: Mapping[str, Any], wanted: Architecture, rotary: int
) -> tuple[dict[str, Any], Tensor | None]:
    how = rope.get("rope_type", "default")
    base = float(rope["rope_theta"])
    keys: dict[str, Any] = {Keys.Rope.FREQ_BASE_SWA if kind == SLIDING else Keys.Rope.FREQ_BASE: base}
    where = f"rope_parameters with rope_type {how!r}" + (f" for {kind}" if kind else "")
    if how == "default":
        return keys, None
    if how == "linear" and kind != SLIDING:
        return {**keys, Keys.Rope.SCALING_TYPE: "linear", Keys.Rope.SCALING_FACTOR: float(rope["factor"])}, None
    if how == "yarn" and kind is None:
        unknown = [n for n, v in YARN_DEFAULTS.items() if (rope.get(n) if rope.get(n) is not None else v) != v]
        unknown += [n for n in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(n) is not None]
        if not unknown and rope.get("factor") is not None:
            keys[Keys.Rope.SCALING_TYPE] = "yarn"
            keys[Keys.Rope.SCALING_FACTOR] = float(rope["factor"])
            keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = int(rope["original_max_position_embeddings"])
            return keys, None
        where += f" that sets {', '.join(unknown) or 'no factor'}"
    elif how in ROPE_INIT_FUNCTIONS and how not in GROWING and kind is None and wanted.rope_factors:
        frequencies, scale = ROPE_INIT_FUNCTIONS[how](config, torch.device("cpu"))
        plain = base ** -(torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
        if scale == 1.0 and frequencies.shape == plain.shape and bool((frequencies > 0).all()):
            return keys, (plain / frequencies.double()).float()
    raise ExportError(
        f"{where} cannot be written to a GGUF file for the architecture {wanted.name!r}; "
        "take a model with default rotary embeddings"
    )


def metadata(config: PreTrainedConfig, model_type: ModelType, mapped: MappedModel, where: Positions) -> dict[str, Any]:
    """Key -> value, without the architecture's name in front: "block_count", "attention.head_count".

    Raises `ExportError` for a setting that the file has no key for.
    """
    by_layer = {name: [getattr(size, name) for size in mapped.sizes] for name in ("heads", "kv_heads", "mlp")}
    heads, kv_heads, mlp = (sizes[0] if len(set(sizes)) == 1 else sizes for sizes in by_layer.values())
    keys: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: len(mapped.sizes),
        Keys.LLM.EMBEDDING_LENGTH: mapped.hidden,
        Keys.LLM.FEED_FORWARD_LENGTH: mlp,
        Keys.Attention.HEAD_COUNT: heads,
        Keys.Attention.HEAD_COUNT_KV: kv_heads,
        Keys.Attention.KEY_LENGTH: mapped.head_dim,
        Keys.Attention.VALUE_LENGTH: mapped.head_dim,
    }
    if mapped.sizes[0].experts:
        keys[Keys.LLM.EXPERT_COUNT] = mapped.sizes[0].experts
        keys[Keys.LLM.EXPERT_FEED_FORWARD_LENGTH] = mapped.sizes[0].mlp
    keys |= where.metadata
    keys |= {f"{{arch}}.{key}": value for key, value in model_type.constants.items()}
    for key, setting in {**model_type.metadata, **model_type.optional}.items():
        value = getattr(config, setting)
        if value is not None:
            keys[f"{{arch}}.{key}"] = value
        elif setting in model_type.metadata.values():
            raise _refused(setting, None, "llama.cpp computes with a number there")
    _check_settings(config, model_type, mapped)
    return {key.removeprefix("{arch}."): value for key, value in keys.items()}


def _check_settings(config: PreTrainedConfig, model_type: ModelType, mapped: MappedModel) -> None:
    """Refuse a setting that is neither written, nor visible in weights, nor what llama.cpp computes with."""
    stock = CONFIG_MAPPING[stock_type(config)]
    defaults: Mapping[str, Any] = stock().to_dict()
    settings: Mapping[str, Any] = config.to_dict()
    written = {*model_type.metadata.values(), *model_type.optional.values()}
    if scalar := model_type.query_scalar:
        name = scalar["setting"]
        written.add(name)
        by_width = len(mapped.sizes) == scalar["by_hidden_width_at_layers"]  # llama.cpp knows the largest size by depth
        needed = mapped.hidden // mapped.sizes[0].heads if by_width else mapped.head_dim
        if settings[name] != needed:
            raise _refused(name, settings[name], f"llama.cpp divides scores by the root of {needed}")
    for name, value in sorted(settings.items()):
        names = [name, *(usual for usual, own in stock.attribute_map.items() if own == name)]
        if name in written or name not in defaults or any(is_neutral(each, model_type) for each in names):
            continue
        allowed = model_type.fixed.get(name, (defaults[name],))
        if value not in allowed:
            raise _refused(name, value, f"llama.cpp computes with {' or '.join(repr(each) for each in allowed)}")
    for name in model_type.fixed.keys() - settings.keys():
        raise _refused(name, None, f"llama.cpp computes with {model_type.fixed[name]}")


def _refused(setting: str, value: Any, why: str) -> ExportError:
    return ExportError(
        f"{setting} = {value!r:.80} cannot be written to a GGUF file: {why}; other values are another model"
    )
