"""A per-layer model -> what `per_layer_config` of transformers says of it: heads and widths, layer by layer.

Heads are those that attention is called with, whatever a family calls its matrices. Programs that allocate caches
before they run a model read them from its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from secateur.models.attention_calls import Attention
from secateur.models.modeling_per_layer import PER_LAYER

KV_HEADS = "num_key_value_heads"
HEADS = "num_attention_heads"
KV_NAMES = ("num_kv_heads", "n_head_kv", "multi_query_group_num")  # what config classes call the same
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def set_layer_settings_in_place(
    config: PreTrainedConfig,
    dense: PreTrainedModel,
    *,
    before: Mapping[int, Attention],
    after: Mapping[int, Attention],
) -> None:
    """Write into the config of a per-layer model what differs between its layers, in the words of transformers.

    `before` and `after` are the attention of the dense and of the pruned model, by layer. A config that has such
    settings already is left as it is, since its own code reads them; so is one of several parts, or of layers that it
    counts in another way.
    """
    own: Any = config
    depth = getattr(own, "num_hidden_layers", None)
    if getattr(own, "is_heterogeneous", False) or own.get_text_config() is not own or not isinstance(depth, int):
        return
    sizes = {each.head_dim for each in (*before.values(), *after.values())}
    if len(sizes) == 1 and getattr(own, "head_dim", None) is None:
        own.head_dim = sizes.pop()
    widths = _widths(own, dense, {each.module for each in before.values()})
    layers = {}
    for number in sorted(before.keys() | after.keys() | widths.keys()):
        heads = _heads(own, after.get(number, before.get(number)))
        layers[number] = heads | widths.get(number, {}) | _skip(own, number, before)
    unknown = {name for settings in layers.values() for name in settings if name != "skip" and not hasattr(own, name)}
    unknown = {name for name in unknown if sum(name in settings for settings in layers.values()) != depth}
    layers = {n: {name: v for name, v in each.items() if name not in unknown} for n, each in layers.items()}
    layers = {number: settings for number, settings in layers.items() if settings}
    if layers and max(layers) < depth:
        own.allow_global_per_layer_attribute_access = True  # the dense sizes, which the stock code reads
        own.serialize_explicit_per_layer_config = True  # every layer has each: config classes differ in their names
        own.per_layer_config = layers


def _heads(config: Any, found: Attention | None) -> dict[str, Any]:
    """What attention was called with, under each name that the config class has for it."""
    if found is None:
        return {}
    names = [KV_HEADS, *(name for name in KV_NAMES if getattr(config, name, None) is not None)]
    settings = {HEADS: found.heads, **dict.fromkeys(names, found.kv_heads)}
    head_dim = getattr(config, "head_dim", None)
    return settings | ({} if head_dim is None else {"head_dim": found.head_dim})


def _skip(config: Any, number: int, before: Mapping[int, Attention]) -> dict[str, Any]:
    """The sub-layers of a layer that are gone, as transformers calls them."""
    attention = before[number].module if number in before else None
    paths = [path for path in getattr(config, PER_LAYER).get("skipped", {}) if _number(path) == number]
    skip = sorted({"attention" if path == attention else "mlp" for path in paths})
    return {"skip": skip} if skip else {}


def _widths(config: Any, dense: PreTrainedModel, attentions: set[str]) -> dict[int, dict[str, int]]:
    """Settings of a layer that its shapes outside attention say: sizes that were a setting's value and are another."""
    before = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    own = set(config.to_dict())  # not what is another name of a setting
    settings = {name: getattr(config, name, None) for name in (*WIDTHS, *COUNTS) if name in own}
    found: dict[int, dict[str, set[int]]] = {}
    for tensor, shape in getattr(config, PER_LAYER)["shapes"].items():
        number = _number(tensor)
        if number is None or any(tensor.startswith(f"{path}.") for path in attentions):
            continue
        for size, now in zip(before[tensor].shape, shape, strict=True):
            for name, value in settings.items() if now != size else ():
                if value == size:
                    found.setdefault(number, {}).setdefault(name, set()).add(now)
    return {
        number: {name: sizes.pop() for name, sizes in by_name.items() if len(sizes) == 1}
        for number, by_name in found.items()
    }


def _number(path: str) -> int | None:
    """The first number in a path: that of the layer."""
    return next((int(piece) for piece in path.split(".") if piece.isdigit()), None)
