"""A config and the sizes of a model's parts -> what a GGUF file says about the model beside its tensors.

Nothing is left out in silence: a setting is said in the file, or seen in the weights, or has the value with which
llama.cpp's code computes; any other value is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import Keys
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.errors import ExportError
from secateur.export.architectures import Architecture, ModelType, is_neutral
from secateur.export.tensors import LayerSizes, Parts
from secateur.models.modeling_per_layer import PER_LAYER

SLIDING, FULL = "sliding_attention", "full_attention"
GROWING = ("dynamic", "longrope")  # rotations that change with the length of the text
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # what llama.cpp takes where the file says nothing


@dataclass(frozen=True, slots=True)
class Positions:
    """How a model knows positions: the context, windows, and the angles by which heads are rotated."""

    metadata: Mapping[str, Any]  # the keys that say all this
    factors: Tensor | None  # what the rotation's frequencies are divided by
    notes: tuple[str, ...]


def positions(model: nn.Module, config: PreTrainedConfig, wanted: Architecture, parts: Parts) -> Positions:
    """What a file says about positions. Raises `ExportError` where the architecture has no word for it."""
    context, notes = int(config.max_position_embeddings), []
    window = int(getattr(config, "sliding_window", None) or 0)
    sliding = _sliding(config, len(parts.sizes)) if window else ()
    said: dict[str, Any] = {}
    if any(sliding) and wanted.windows:
        said[Keys.Attention.SLIDING_WINDOW] = window
        said[Keys.Attention.SLIDING_WINDOW_PATTERN] = list(sliding)
    elif any(sliding) and window < context:
        notes.append(
            f"llama.cpp has no windows for {wanted.name}: the file's context is the window, {window} tokens instead of "
            f"{context}, within which nothing differs"
        )
        context = window
    said[Keys.LLM.CONTEXT_LENGTH] = context
    rotated = rotated_numbers(model)
    factors = None
    if rotated:
        said[Keys.Rope.DIMENSION_COUNT] = rotated
        for kind, rope in _ropes(config).items():
            more, factors_here = _rope(config, kind, rope, wanted, rotated)
            said |= more
            factors = factors_here if factors_here is not None else factors
    return Positions(said, factors, tuple(notes))


def rotated_numbers(model: nn.Module) -> int:
    """How many numbers of a head are rotated, by the frequencies that the model holds; 0 where none are."""
    found = {2 * b.numel() for name, b in model.named_buffers() if name.endswith("inv_freq") and "original" not in name}
    if len(found) > 1:
        raise ExportError(
            f"the heads of a GGUF file are all rotated alike, and the model's differ: {sorted(found)} numbers"
        )
    return found.pop() if found else 0


def _sliding(config: PreTrainedConfig, count: int) -> tuple[bool, ...]:
    """Which layers attend to a window alone."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (getattr(config, "sliding_window", None) is not None,) * count
    if odd := sorted(set(kinds) - {SLIDING, FULL}):
        raise ExportError(f"a GGUF file has no word for layers of the kind {odd[0]}, which layer_types lists")
    return tuple(kind == SLIDING for kind in kinds)


def _ropes(config: PreTrainedConfig) -> dict[str | None, Mapping[str, Any]]:
    """The rotation of every kind of layer that has one of its own; of all under None."""
    given = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        return {kind: rope for kind, rope in given.items() if kind in config.layer_types}
    return {None: given}


def _rope(
    config: PreTrainedConfig, kind: str | None, rope: Mapping[str, Any], wanted: Architecture, rotated: int
) -> tuple[dict[str, Any], Tensor | None]:
    how = rope.get("rope_type", "default")
    base = float(rope["rope_theta"])
    said: dict[str, Any] = {Keys.Rope.FREQ_BASE_SWA if kind == SLIDING else Keys.Rope.FREQ_BASE: base}
    where = f"rope_parameters with rope_type {how!r}" + (f" for {kind}" if kind else "")
    if how == "default":
        return said, None
    if how == "linear" and kind != SLIDING:
        return {**said, Keys.Rope.SCALING_TYPE: "linear", Keys.Rope.SCALING_FACTOR: float(rope["factor"])}, None
    if how == "yarn" and kind is None:
        odd = [n for n, v in YARN_DEFAULTS.items() if (rope.get(n) if rope.get(n) is not None else v) != v]
        odd += [n for n in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(n) is not None]
        if not odd and rope.get("factor") is not None:
            said[Keys.Rope.SCALING_TYPE] = "yarn"
            said[Keys.Rope.SCALING_FACTOR] = float(rope["factor"])
            said[Keys.Rope.SCALING_ORIG_CTX_LEN] = int(rope["original_max_position_embeddings"])
            return said, None
        where += f" that sets {', '.join(odd) or 'no factor'}"
    elif how in ROPE_INIT_FUNCTIONS and how not in GROWING and kind is None and wanted.rope_factors:
        frequencies, scale = ROPE_INIT_FUNCTIONS[how](config, torch.device("cpu"))
        plain = base ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
        if scale == 1.0 and frequencies.shape == plain.shape and bool((frequencies > 0).all()):
            return said, (plain / frequencies.double()).float()  # a factor for every frequency
    raise ExportError(
        f"{where} cannot be said in a GGUF file for the architecture {wanted.name!r}; "
        "take a model with the default rotation"
    )


def metadata(
    config: PreTrainedConfig,
    model_type: ModelType,
    parts: Parts,
    where: Positions,
) -> dict[str, Any]:
    """Key -> value, without the architecture's name in front: "block_count", "attention.head_count".

    Raises `ExportError` for a setting that the file cannot say.
    """
    heads, kv_heads, mlp = (
        _one_or_all([getattr(size, name) for size in parts.sizes]) for name in ("heads", "kv_heads", "mlp")
    )
    found: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: len(parts.sizes),
        Keys.LLM.EMBEDDING_LENGTH: parts.hidden,
        Keys.LLM.FEED_FORWARD_LENGTH: mlp,
        Keys.Attention.HEAD_COUNT: heads,
        Keys.Attention.HEAD_COUNT_KV: kv_heads,
        Keys.Attention.KEY_LENGTH: parts.head_dim,
        Keys.Attention.VALUE_LENGTH: parts.head_dim,
    }
    if parts.sizes[0].experts:
        found[Keys.LLM.EXPERT_COUNT] = parts.sizes[0].experts
        found[Keys.LLM.EXPERT_FEED_FORWARD_LENGTH] = parts.sizes[0].mlp
    found |= where.metadata
    found |= {f"{{arch}}.{key}": value for key, value in model_type.constants.items()}
    for key, setting in {**model_type.metadata, **model_type.optional}.items():
        value = getattr(config, setting)
        if value is not None:
            found[f"{{arch}}.{key}"] = value
        elif setting in model_type.metadata.values():
            raise _refused(setting, None, "llama.cpp computes with a number there")
    check_settings(config, model_type, parts.sizes[0], parts)
    return {key.removeprefix("{arch}."): value for key, value in found.items()}


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def check_settings(config: PreTrainedConfig, model_type: ModelType, size: LayerSizes, parts: Parts) -> None:
    """Raise `ExportError` for a setting that is neither said, nor seen in weights, nor what llama.cpp computes with."""
    stock = CONFIG_MAPPING[config.model_type.removeprefix(f"{PER_LAYER}_")]
    usual: Mapping[str, Any] = stock().to_dict()
    settings: Mapping[str, Any] = config.to_dict()
    said = {*model_type.metadata.values(), *model_type.optional.values()}
    if scalar := model_type.query_scalar:
        said.add(scalar["setting"])
        by_width = len(parts.sizes) == scalar["by_hidden_width_at_layers"]  # llama.cpp takes this size for the largest
        needed = parts.hidden // size.heads if by_width else parts.head_dim
        if settings[scalar["setting"]] != needed:
            raise _refused(
                scalar["setting"], settings[scalar["setting"]], f"llama.cpp divides scores by the root of {needed}"
            )
    aliases = stock.attribute_map
    for name, value in _set(settings):
        if (
            name in said
            or name not in usual
            or any(is_neutral(n, model_type) for n in (name, *_names_of(name, aliases)))
        ):
            continue
        allowed = model_type.fixed.get(name, (usual[name],))
        if value not in allowed:
            raise _refused(name, value, f"llama.cpp computes with {' or '.join(repr(each) for each in allowed)}")
    for name in model_type.fixed.keys() - settings.keys():
        raise _refused(name, None, f"llama.cpp computes with {model_type.fixed[name]}")


def _set(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from sorted(settings.items())


def _names_of(name: str, aliases: Mapping[str, str]) -> list[str]:
    """The usual names of a setting that a model type calls otherwise."""
    return [usual for usual, own in aliases.items() if own == name]


def _refused(setting: str, value: Any, why: str) -> ExportError:
    return ExportError(
        f"{setting} = {value!r:.80} cannot be said in a GGUF file: {why}; other values are another model"
    )
