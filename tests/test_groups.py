"""Groups have the right axes and kinds, read back as written, and count what a cut leaves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
)

from secateur.axes import Discovery, count_macs, count_parameters, discover, discover_groups
from secateur.axes.algebra import show, variables_in
from secateur.axes.groups import from_json, layer_of, residual_lists
from secateur.graph import trace
from secateur.models import quiet

SHARED: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
LAYERS: dict[str, Any] = {**SHARED, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}


def llama(**changes: Any) -> LlamaConfig:
    sizes = {**LAYERS, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4}
    return LlamaConfig(**sizes | changes)


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": llama(),
    "gpt2": GPT2Config(**SHARED, n_embd=16, n_layer=2, n_head=4, n_positions=32, n_inner=24),
    "phi3": Phi3Config(**LAYERS, intermediate_size=24, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**LAYERS, intermediate_size=24),
    "opt": OPTConfig(**LAYERS, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
}

every_family = pytest.mark.parametrize("family", CONFIGS)


# --- golden values ----------------------------------------------------------------------------------------------

GROUPS = {  # of layer 0 and of no layer: name, kind, units
    "llama": "attention attention 2, query query 2, head_dim head_dim 4, mlp mlp 24",
    "gpt2": "attention attention 4, head_dim.0 head_dim 4, head_dim.1 head_dim 4, mlp mlp 24",
    "phi3": "attention attention 2, query query 2, head_dim head_dim 4, mlp mlp 24",
    "gpt_neox": "attention attention 4, head_dim.0 head_dim 2, head_dim.1 head_dim 4, mlp mlp 24",
    "opt": "attention attention 4, head_dim.0 head_dim 4, head_dim.1 head_dim 4, mlp mlp 24",
}

# The layer's weights, without "layers.0." in the names of groups.
AXES = {
    "llama": {
        "self_attn.q_proj.weight": "attention·query·(4), hidden",
        "self_attn.k_proj.weight": "attention·(4), hidden",
        "self_attn.v_proj.weight": "attention·head_dim, hidden",
        "self_attn.o_proj.weight": "hidden, attention·query·head_dim",
        "mlp.gate_proj.weight": "mlp, hidden",
        "mlp.up_proj.weight": "mlp, hidden",
        "mlp.down_proj.weight": "hidden, mlp",
        "input_layernorm.weight": "hidden",
        "post_attention_layernorm.weight": "hidden",
    },
    "gpt2": {
        "ln_1.weight": "hidden",
        "ln_1.bias": "hidden",
        "attn.c_attn.weight": "hidden, (2)·attention·head_dim.0 + attention·head_dim.1",
        "attn.c_attn.bias": "(2)·attention·head_dim.0 + attention·head_dim.1",
        "attn.c_proj.weight": "attention·head_dim.1, hidden",
        "attn.c_proj.bias": "hidden",
        "ln_2.weight": "hidden",
        "ln_2.bias": "hidden",
        "mlp.c_fc.weight": "hidden, mlp",
        "mlp.c_fc.bias": "mlp",
        "mlp.c_proj.weight": "mlp, hidden",
        "mlp.c_proj.bias": "hidden",
    },
    "phi3": {
        "self_attn.o_proj.weight": "hidden, attention·query·head_dim",
        "self_attn.qkv_proj.weight": "attention·query·(4) + attention·(4) + attention·head_dim, hidden",
        "mlp.gate_up_proj.weight": "(2)·mlp, hidden",
        "mlp.down_proj.weight": "hidden, mlp",
        "input_layernorm.weight": "hidden",
        "post_attention_layernorm.weight": "hidden",
    },
    "gpt_neox": {  # a quarter of each query and key turns with the positions, the rest does not
        "input_layernorm.weight": "hidden",
        "input_layernorm.bias": "hidden",
        "post_attention_layernorm.weight": "hidden",
        "post_attention_layernorm.bias": "hidden",
        "attention.query_key_value.weight": "attention·((2) + head_dim.0 + (2) + head_dim.0 + head_dim.1), hidden",
        "attention.query_key_value.bias": "attention·((2) + head_dim.0 + (2) + head_dim.0 + head_dim.1)",
        "attention.dense.weight": "hidden, attention·head_dim.1",
        "attention.dense.bias": "hidden",
        "mlp.dense_h_to_4h.weight": "mlp, hidden",
        "mlp.dense_h_to_4h.bias": "mlp",
        "mlp.dense_4h_to_h.weight": "hidden, mlp",
        "mlp.dense_4h_to_h.bias": "hidden",
    },
    "opt": {
        "self_attn.k_proj.weight": "attention·head_dim.0, hidden",
        "self_attn.k_proj.bias": "attention·head_dim.0",
        "self_attn.v_proj.weight": "attention·head_dim.1, hidden",
        "self_attn.v_proj.bias": "attention·head_dim.1",
        "self_attn.q_proj.weight": "attention·head_dim.0, hidden",
        "self_attn.q_proj.bias": "attention·head_dim.0",
        "self_attn.out_proj.weight": "hidden, attention·head_dim.1",
        "self_attn.out_proj.bias": "hidden",
        "self_attn_layer_norm.weight": "hidden",
        "self_attn_layer_norm.bias": "hidden",
        "fc1.weight": "mlp, hidden",
        "fc1.bias": "mlp",
        "fc2.weight": "hidden, mlp",
        "fc2.bias": "hidden",
        "final_layer_norm.weight": "hidden",
        "final_layer_norm.bias": "hidden",
    },
}


@every_family
def test_the_groups_of_a_family(family: str) -> None:
    discovery = discover(CONFIGS[family])
    layer = [g for g in discovery.groups if g.layer == 0]
    assert ", ".join(f"{g.name.removeprefix('layers.0.')} {g.kind} {g.units}" for g in layer) == GROUPS[family]
    second = [(g.name.replace("layers.1.", "layers.0."), g.kind, g.units) for g in discovery.groups if g.layer == 1]
    assert second == [(g.name, g.kind, g.units) for g in layer]
    assert [(g.name, g.units, g.normed) for g in discovery.groups if g.layer is None] == [
        ("hidden", 16, True),
        ("layers", 2, False),
    ]
    assert [g.name for g in discovery.groups if g.normed] == ["hidden"]


@every_family
def test_the_axes_of_a_family(family: str) -> None:
    discovery = discover(CONFIGS[family])
    (prefix,) = discovery.layer_lists
    shown = {w.name: ", ".join(show(dim) for dim in w.dims).replace("layers.0.", "") for w in discovery.weights}
    assert {name: dims for name, dims in shown.items() if layer_of(name, [prefix]) == 0} == {
        f"{prefix}.0.{name}": dims for name, dims in AXES[family].items()
    }
    assert {dims for name, dims in shown.items() if layer_of(name, [prefix]) is None} <= {
        "(50), hidden",
        "(32), hidden",
        "(34), hidden",  # OPT's positions start at 2
        "hidden",
    }


@every_family
def test_groups_list_exactly_the_axes_that_name_them(family: str) -> None:
    discovery = discover(CONFIGS[family])
    dims = {(w.name, i): dim for w in discovery.weights for i, dim in enumerate(w.dims)}
    for group in discovery.groups:
        assert {(axis.weight, axis.dim): axis.expression for axis in group.axes} == {
            at: dim for at, dim in dims.items() if group.name in {v.name for v in variables_in(dim)}
        }


@every_family
def test_tables_and_heads_are_embeddings(family: str) -> None:
    discovery = discover(CONFIGS[family])
    assert {w.name for w in discovery.weights if w.embedding} == {
        w.name for w in discovery.weights if "emb" in w.name or "wte" in w.name or "wpe" in w.name or "head" in w.name
    }


def test_frozen_axes_say_why() -> None:
    reasons = {(f.weight, f.dim, f.size): f.reason for f in discover(llama()).frozen if ".1." not in f.weight}
    rotary = "the code computes the buffer model.rotary_emb.inv_freq"
    assert reasons == {
        ("model.embed_tokens.weight", 0, 50): "its rows are looked up by number (an embedding)",
        ("model.layers.0.self_attn.q_proj.weight", 0, 2): rotary,
        ("model.layers.0.self_attn.k_proj.weight", 0, 2): rotary,
        ("lm_head.weight", 0, 50): "the model returns it",
    }


def test_a_group_that_does_not_exist_is_a_key_error() -> None:
    discovery = discover(llama())
    assert discovery.group("layers.1.mlp").units == 24
    with pytest.raises(KeyError, match=r"layers\.2\.mlp"):
        discovery.group("layers.2.mlp")


# --- as JSON ----------------------------------------------------------------------------------------------------


@every_family
def test_a_discovery_reads_back_as_written(family: str) -> None:
    discovery = discover(CONFIGS[family], name="tiny")
    read = from_json(json.loads(json.dumps(discovery.to_json())))
    # The batch and the sequence of the trace are not written: what is counted has its own.
    assert dataclasses.replace(read, operations=()) == dataclasses.replace(discovery, operations=())
    assert read.to_json() == discovery.to_json()
    kept = {"layers.0.mlp": 7, "layers.1.attention": 1, "hidden": 12}
    for sizes in ({}, kept):
        assert count_parameters(read, sizes) == count_parameters(discovery, sizes)
        assert count_macs(read, sizes) == count_macs(discovery, sizes)


# --- counts -----------------------------------------------------------------------------------------------------


def parameters(config: PreTrainedConfig) -> int:
    """Of a real model of that config."""
    with quiet():
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@every_family
def test_every_parameter_counts_once(family: str) -> None:
    discovery = discover(CONFIGS[family])
    tables = sum(torch.Size(w.shape).numel() for w in discovery.weights if w.embedding)
    assert count_parameters(discovery) == parameters(CONFIGS[family])
    assert count_parameters(discovery, embeddings=False) == parameters(CONFIGS[family]) - tables


@pytest.mark.parametrize(
    ("kept", "smaller"),
    [
        ({"mlp": 16}, llama(intermediate_size=16)),
        ({"attention": 1}, llama(num_attention_heads=2, num_key_value_heads=1)),
        ({"query": 1}, llama(num_attention_heads=2)),
        ({"hidden": 8}, llama(hidden_size=8)),
        (
            {"mlp": 8, "attention": 1, "query": 1, "hidden": 12},
            llama(intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, hidden_size=12),
        ),
    ],
)
def test_a_cut_counts_as_the_smaller_model_does(kept: dict[str, int], smaller: LlamaConfig) -> None:
    discovery = discover(llama())
    sizes = {g.name: kept[g.kind] for g in discovery.groups if g.kind in kept}
    assert count_parameters(discovery, sizes) == parameters(smaller)
    assert count_macs(discovery, sizes) == count_macs(discover(smaller))


def test_a_dropped_layer_counts_as_the_shallower_model_does() -> None:
    discovery, shallower = discover(llama(num_hidden_layers=3)), llama(num_hidden_layers=2)
    assert count_parameters(discovery, dropped_layers=frozenset({1})) == parameters(shallower)
    assert count_macs(discovery, dropped_layers=frozenset({1})) == count_macs(discover(shallower))


def test_multiply_accumulates_of_a_layer_by_hand() -> None:
    discovery = discover(llama(num_hidden_layers=1))
    tokens, hidden, inner, heads, kv, dim, vocabulary = 3, 16, 24, 4, 2, 4, 50
    projections = tokens * hidden * (2 * heads * dim + 2 * kv * dim + 3 * inner + vocabulary)
    assert count_macs(discovery, tokens=tokens) == {
        "matmul": projections + 2 * heads * tokens * tokens * dim,
        "norm": 3 * 2 * tokens * hidden,
        "softmax": heads * tokens * tokens,
        "activation": tokens * inner,
        "rotary": 2 * tokens * (heads + kv) * dim,
    }


@pytest.fixture(scope="module")
def llama_7b() -> Discovery:
    return discover(LlamaConfig())


@pytest.mark.parametrize(
    ("kept", "giga_macs", "billions"),
    [
        ({}, "424.02", "6.74"),
        ({"attention": 24, "mlp": 8256}, "339.60", "5.42"),
        ({"hidden": 3276}, "339.36", "5.39"),
        ({"hidden": 2048}, "212.58", "3.37"),
    ],
)
def test_llama_7b_counts_as_llm_pruner_reports(
    llama_7b: Discovery, kept: dict[str, int], giga_macs: str, billions: str
) -> None:
    """The whole model, layers 4 to 29 cut by a quarter, and the whole width cut by a fifth and by half."""
    sizes = {g.name: kept[g.kind] for g in llama_7b.groups if g.kind in kept and (g.layer is None or 4 <= g.layer < 30)}
    assert f"{sum(count_macs(llama_7b, sizes).values()) / 1e9:.2f}" == giga_macs
    assert f"{count_parameters(llama_7b, sizes) / 1e9:.2f}" == billions


# --- what cannot be grouped -------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Embedded tokens through one function, which sees the module, then a head."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor], columns: int = 6, **children: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(26, 6)
        self.head = nn.Linear(columns, 26, bias=False)
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor, ...]:
        return (self.head(self.function(self.embed(input_ids), self)),)


def test_a_parameter_that_is_not_used_is_frozen() -> None:
    discovery = discover_groups(Plain(lambda x, m: x, spare=nn.Parameter(torch.ones(4, 3))))
    assert [(f.dim, f.size, f.reason) for f in discovery.frozen if f.weight == "spare"] == [
        (0, 4, "the forward pass does not use it"),
        (1, 3, "the forward pass does not use it"),
    ]
    assert not any(axis.weight == "spare" for group in discovery.groups for axis in group.axes)


def test_units_that_meet_each_other_in_one_axis_are_frozen() -> None:
    discovery = discover_groups(Plain(lambda x, m: (x[..., None] * x[..., None, :]).flatten(2), columns=36))
    reasons = {f.reason for f in discovery.frozen if f.weight == "head.weight" and f.dim == 1}
    assert reasons == {"its units meet each other within one axis of head.weight"}
    assert discovery.groups == ()


def test_a_saved_buffer_is_cut_with_its_group_and_is_no_parameter() -> None:
    model = Plain(lambda x, m: x * m.scale)
    model.register_buffer("scale", torch.ones(6))
    discovery = discover_groups(model)
    (hidden,) = discovery.groups
    assert ("scale", 0) in {(axis.weight, axis.dim) for axis in hidden.axes}
    assert count_parameters(discovery, {hidden.name: 4}) == 2 * 26 * 4


# --- lists of layers --------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, *, residual: bool = True, blocks: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.residual = residual
        self.inner = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        for block in self.inner:
            y = block(y)
        return x + y if self.residual else y


def in_turn(x: Tensor, module: Any) -> Tensor:
    for block in module.blocks:
        x = block(x)
    return x


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ([Block(), Block()], ("blocks",)),
        ([Block(), Block(residual=False)], ()),
        ([Block(residual=False), Block()], ()),
        ([nn.Linear(6, 6), nn.ReLU()], ()),
        ([nn.Identity(), nn.Identity()], ()),
        ([Block(blocks=2), Block(blocks=2)], ("blocks",)),  # the outer list alone
    ],
    ids=["residual", "the last is not", "the first is not", "plain", "nothing added", "nested"],
)
def test_only_lists_of_residual_blocks_are_lists_of_layers(blocks: list[nn.Module], found: tuple[str, ...]) -> None:
    model = Plain(in_turn, blocks=nn.ModuleList(blocks))
    assert residual_lists(trace(model)) == found
    discovery = discover_groups(model)
    assert [g.units for g in discovery.groups if g.kind == "layer"] == [2] * len(found)
    assert {w.layer for w in discovery.weights} == ({None, 0, 1} if found else {None})
