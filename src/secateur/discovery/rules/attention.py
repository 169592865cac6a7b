"""Attention in one operator."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.discovery.graph import Node
from secateur.discovery.rules.registry import aten, rule
from secateur.discovery.rules.state import Dims, Inference


@rule(
    *aten("_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
    *aten("_scaled_dot_product_efficient_attention _scaled_dot_product_attention_math"),
    *aten("_scaled_dot_product_fused_attention_overrideable"),
)
def attention(state: Inference, node: Node) -> Sequence[Dims]:
    """Fused attention of query (B, H, T, D), key (B, KV, S, D) and value (B, KV, S, E) -> (B, H, T, E)."""
    query, key, value = (state.argument(node, name) for name in ("query", "key", "value"))
    kv, queries = state.unifier.factor(query[1], query[1].size // key[1].size)  # several heads may read the same keys
    for a, b in [(query[0], key[0]), (kv, key[1]), (query[3], key[3]), *zip(key[:3], value[:3], strict=True)]:
        state.unifier.unify(a, b)
    mask = node.arguments.get("attn_mask", node.arguments.get("attn_bias"))
    if mask is not None:
        state.broadcast([(*query[:3], key[2]), state.dims_of(mask)])
    state.unifier.freeze(key[2], "a softmax runs across it")
    state.repeated += [queries, queries]  # for the keys, and for the values
    state.beside_softmax += query[:2]
    state.record_operation("matmul", (*query, key[2]))
    state.record_operation("matmul", (*query[:3], *value[2:]))
    state.record_operation("softmax", (*query[:3], key[2]))
    by_products = [
        state.new_dims(state.graph.shapes[number], frozen=f"it is a by-product of {node.op}")
        for number in node.outputs[1:]
    ]
    return [(*query[:3], value[3]), *by_products]
