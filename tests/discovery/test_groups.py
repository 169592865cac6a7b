"""Groups have the right axes and kinds, read back as written, and count what a cut leaves."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from every_type import tiny_config
from secateur.discovery.algebra import show, variables_in
from secateur.discovery.counting import count_parameters
from secateur.discovery.discover import discover, discover_groups
from secateur.discovery.groups import KINDS, Discovery
from secateur.discovery.layers import layer_of
from secateur.models.silence import quiet
from small_models import CONFIGS, Plain, in_turn, llama, small_discovery

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
    discovery = small_discovery(family)
    layer = [g for g in discovery.groups if g.layer == 0]
    assert ", ".join(f"{g.name.removeprefix('layers.0.')} {g.kind} {g.units}" for g in layer) == GROUPS[family]
    second = [(g.name.replace("layers.1.", "layers.0."), g.kind, g.units) for g in discovery.groups if g.layer == 1]
    assert second == [(g.name, g.kind, g.units) for g in layer]
    assert [(g.name, g.kind, g.units) for g in discovery.groups if g.layer is None] == [
        ("hidden", "hidden", 16),
        ("vocabulary", "vocabulary", 50),
        ("layers", "layer", 2),
    ]
    assert [g.name for g in discovery.groups if g.normed] == ["hidden"]
    assert not any(g.chosen for g in discovery.groups)
    assert {g.least for g in discovery.groups} == {1}


@every_family
def test_the_axes_of_a_family(family: str) -> None:
    discovery = small_discovery(family)
    (prefix,) = discovery.layer_lists
    shown = {w.name: ", ".join(show(dim) for dim in w.dims).replace("layers.0.", "") for w in discovery.weights}
    assert {name: dims for name, dims in shown.items() if layer_of(name, [prefix]) == 0} == {
        f"{prefix}.0.{name}": dims for name, dims in AXES[family].items()
    }
    assert {dims for name, dims in shown.items() if layer_of(name, [prefix]) is None} <= {
        "vocabulary, hidden",
        "(32), hidden",
        "(34), hidden",  # OPT's positions start at 2
        "hidden",
    }


@every_family
def test_groups_list_exactly_the_axes_that_name_them(family: str) -> None:
    discovery = small_discovery(family)
    dims = {(w.name, i): dim for w in discovery.weights for i, dim in enumerate(w.dims)}
    for group in discovery.groups:
        assert {(axis.weight, axis.dim): axis.expression for axis in group.axes} == {
            at: dim for at, dim in dims.items() if group.name in {v.name for v in variables_in(dim)}
        }


@every_family
def test_tables_and_heads_are_embeddings(family: str) -> None:
    discovery = small_discovery(family)
    assert {w.name for w in discovery.weights if w.embedding} == {
        w.name for w in discovery.weights if "emb" in w.name or "wte" in w.name or "wpe" in w.name or "head" in w.name
    }


# The weights of layer 1 of models that are not dense transformers, those of the layer's norms left out.
UNLIKE = {
    "mixtral": {
        "self_attn.q_proj.weight": "attention·query·(10), hidden",
        "self_attn.k_proj.weight": "attention·(10), hidden",
        "self_attn.v_proj.weight": "attention·head_dim, hidden",
        "self_attn.o_proj.weight": "hidden, attention·query·head_dim",
        "mlp.gate.weight": "expert, hidden",
        "mlp.experts.gate_up_proj": "expert, (2)·expert_mlp, hidden",
        "mlp.experts.down_proj": "expert, hidden, expert_mlp",
    },
    "gpt_oss": {  # gate and up take turns; sinks beside the keys
        "self_attn.sinks": "attention·query",
        "self_attn.q_proj.weight": "attention·query·(10), hidden",
        "self_attn.q_proj.bias": "attention·query·(10)",
        "self_attn.k_proj.weight": "attention·(10), hidden",
        "self_attn.k_proj.bias": "attention·(10)",
        "self_attn.v_proj.weight": "attention·head_dim, hidden",
        "self_attn.v_proj.bias": "attention·head_dim",
        "self_attn.o_proj.weight": "hidden, attention·query·head_dim",
        "self_attn.o_proj.bias": "hidden",
        "mlp.router.weight": "expert, hidden",
        "mlp.router.bias": "expert",
        "mlp.experts.gate_up_proj": "expert, hidden, expert_mlp·(2)",
        "mlp.experts.gate_up_proj_bias": "expert, expert_mlp·(2)",
        "mlp.experts.down_proj": "expert, expert_mlp, hidden",
        "mlp.experts.down_proj_bias": "expert, hidden",
    },
    "deepseek_v3": {  # 8 of each query and key turn with the positions
        "self_attn.q_a_proj.weight": "latent.0, hidden",
        "self_attn.q_a_layernorm.weight": "latent.0",
        "self_attn.q_b_proj.weight": "attention·(head_dim.0 + (8)), latent.0",
        "self_attn.kv_a_proj_with_mqa.weight": "latent.1 + (8), hidden",
        "self_attn.kv_a_layernorm.weight": "latent.1",
        "self_attn.kv_b_proj.weight": "attention·(head_dim.0 + head_dim.1), latent.1",
        "self_attn.o_proj.weight": "hidden, attention·head_dim.1",
        "mlp.gate.weight": "expert, hidden",
        "mlp.gate.e_score_correction_bias": "expert",
        "mlp.experts.gate_up_proj": "expert, (2)·expert_mlp, hidden",
        "mlp.experts.down_proj": "expert, hidden, expert_mlp",
        "mlp.shared_experts.gate_proj.weight": "shared_mlp, hidden",
        "mlp.shared_experts.up_proj.weight": "shared_mlp, hidden",
        "mlp.shared_experts.down_proj.weight": "hidden, shared_mlp",
    },
    "mamba": {  # channels, states of each, and the low rank of its steps
        "mixer.A_log": "state.0, state.1",
        "mixer.D": "state.0",
        "mixer.conv1d.weight": "state.0, (1), (4)",
        "mixer.conv1d.bias": "state.0",
        "mixer.in_proj.weight": "(2)·state.0, hidden",
        "mixer.x_proj.weight": "state.2 + (2)·state.1, state.0",
        "mixer.dt_proj.weight": "state.0, state.2",
        "mixer.dt_proj.bias": "state.0",
        "mixer.out_proj.weight": "hidden, state.0",
    },
    "mamba2": {  # groups, heads of each, channels of each head, and states
        "mixer.dt_bias": "state.0·state.1",
        "mixer.A_log": "state.0·state.1",
        "mixer.D": "state.0·state.1",
        "mixer.conv1d.weight": "state.0·state.1·state.2 + (2)·state.0·state.3, (1), (4)",
        "mixer.conv1d.bias": "state.0·state.1·state.2 + (2)·state.0·state.3",
        "mixer.in_proj.weight": "(2)·state.0·state.1·state.2 + (2)·state.0·state.3 + state.0·state.1, hidden",
        "mixer.norm.weight": "state.0·state.1·state.2",
        "mixer.out_proj.weight": "hidden, state.0·state.1·state.2",
    },
}

# Groups of layer 1: name, kind and units, then whether a norm runs across it, or a choice and of how many at least.
UNLIKE_GROUPS = {
    "mixtral": """
        attention attention 3, query query 2, head_dim head_dim 10, expert expert 5 chosen 2, expert_mlp expert_mlp 84
    """,
    "gpt_oss": """
        attention attention 3, query query 2, head_dim head_dim 10, expert expert 5 chosen 2, expert_mlp expert_mlp 84
    """,
    "deepseek_v3": """
        attention attention 6, head_dim.0 head_dim 14, head_dim.1 head_dim 18, latent.0 latent 26 normed,
        latent.1 latent 22 normed, expert expert 5 chosen 2, expert_mlp expert_mlp 28, shared_mlp shared_mlp 28
    """,
    "mamba": "state.0 state 96, state.1 state 11, state.2 state 7",
    "mamba2": "state.0 state 2, state.1 state 4 normed, state.2 state 12 normed, state.3 state 11",
}

every_unlike_type = pytest.mark.parametrize("model_type", UNLIKE)


@functools.cache
def tiny_discovery(model_type: str) -> Discovery:
    with quiet():
        return discover(tiny_config(model_type))


@every_unlike_type
def test_the_axes_of_experts_latents_and_states(model_type: str) -> None:
    discovery = tiny_discovery(model_type)
    (prefix,) = discovery.layer_lists
    shown = {
        w.name.removeprefix(f"{prefix}.1."): ", ".join(show(dim) for dim in w.dims).replace("layers.1.", "")
        for w in discovery.weights
        if w.layer == 1
    }
    norms = {name: dims for name, dims in shown.items() if name not in UNLIKE[model_type]}
    assert {name: dims for name, dims in shown.items() if name not in norms} == UNLIKE[model_type]
    assert set(norms.values()) == {"hidden"}


@every_unlike_type
def test_the_groups_of_experts_latents_and_states(model_type: str) -> None:
    shown = [
        f"{group.name.removeprefix('layers.1.')} {group.kind} {group.units}"
        + (" normed" if group.normed else "")
        + (f" chosen {group.least}" if group.chosen else "")
        for group in tiny_discovery(model_type).groups
        if group.layer == 1
    ]
    assert shown == [text.strip() for text in UNLIKE_GROUPS[model_type].split(",")]


def test_a_dense_layer_of_a_model_with_experts_has_a_plain_mlp() -> None:
    kinds = [group.kind for group in tiny_discovery("deepseek_v3").groups if group.layer == 0]
    assert "mlp" in kinds
    assert not {"expert", "expert_mlp", "shared_mlp"} & set(kinds)


def test_every_kind_has_an_example() -> None:
    examples = [small_discovery(family) for family in CONFIGS] + [tiny_discovery(name) for name in UNLIKE]
    apart = nn.Parameter(torch.ones(5))
    examples.append(discover_groups(Plain(lambda x, m: x * m.a.dot(m.b), a=apart, b=nn.Parameter(torch.ones(5)))))
    found = {group.kind: group for discovery in examples for group in discovery.groups}
    assert set(found) == set(KINDS)
    assert {(axis.weight, axis.dim) for axis in found["other"].axes} == {("a", 0), ("b", 0)}


# --- choices ----------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """Experts in one tensor, of which each token gets some; among the scores may be one for "no expert"."""

    def __init__(self, *, chosen: int, none: int = 0) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(5 + none, 6))
        self.experts = nn.Parameter(torch.ones(5, 6, 6))
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        weights, numbers = (x @ self.gate.t()).softmax(-1).topk(self.chosen, -1)
        picked = self.experts[numbers.clamp(max=len(self.experts) - 1)]  # (B, T, chosen, 6, 6)
        outputs = picked @ x[:, :, None, :, None]
        return x + (outputs.squeeze(-1) * weights.unsqueeze(-1)).sum(2)


@pytest.mark.parametrize(("chosen", "none", "least"), [(1, 0, 1), (2, 0, 2), (4, 0, 4), (3, 1, 2)])
def test_a_router_needs_as_many_experts_as_it_chooses(chosen: int, none: int, least: int) -> None:
    discovery = discover_groups(Plain(in_turn, blocks=nn.ModuleList([Router(chosen=chosen, none=none)])))
    groups = {group.kind: group for group in discovery.groups}
    assert groups["expert"].axes[0].weight == "blocks.0.gate"
    assert (groups["expert"].units, groups["expert"].chosen, groups["expert"].least) == (5, True, least)
    assert [show(axis.expression) for axis in groups["expert"].axes] == [
        "layers.0.expert" + (" + (1)" if none else ""),
        "layers.0.expert",
    ]
    assert not any(group.chosen for kind, group in groups.items() if kind != "expert")


def routed(x: Tensor, m: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which experts each of them gets, and with which weights."""
    tokens = x.flatten(0, 1)
    weights, numbers = (tokens @ m.gate.t()).softmax(-1).topk(2, -1)
    none = torch.zeros(len(tokens), len(m.gate))
    return tokens, none.scatter(-1, numbers, 1.0), none.scatter(-1, numbers, weights)


def by_tensor(x: Tensor, m: Any) -> Tensor:
    tokens, mask, routing = routed(x, m)
    result = torch.zeros_like(tokens)
    for (expert,) in mask.sum(0).gt(0).nonzero():
        (rows,) = torch.where(mask[:, expert])
        result.index_add_(0, rows, tokens[rows] @ m.experts[expert] * routing[rows, expert, None])
    return result.view(x.shape)


def by_item(x: Tensor, m: Any) -> Tensor:
    tokens, mask, routing = routed(x, m)
    hit = mask.sum(0).gt(0).nonzero()
    summed: Any = sum(tokens @ m.experts[e.item()] * routing[:, e] for e in hit)
    result: Tensor = summed.view(x.shape)
    return result


def by_list(x: Tensor, m: Any) -> Tensor:
    tokens, mask, routing = routed(x, m)
    hit = mask.sum(0).gt(0).nonzero().flatten().tolist()
    summed: Any = sum(tokens @ m.experts[e] * routing[:, [e]] for e in hit)
    result: Tensor = summed.view(x.shape)
    return result


def by_module(x: Tensor, m: Any) -> Tensor:
    tokens, mask, _ = routed(x, m)
    hit = mask.sum(0).gt(0).nonzero().flatten()
    summed: Any = sum(m.modules_of_experts[e](tokens) for e in hit)
    result: Tensor = summed.view(x.shape)
    return result


def by_one_hot(x: Tensor, m: Any) -> Tensor:
    tokens = x.flatten(0, 1)
    numbers = (tokens @ m.gate.t()).topk(2, -1).indices
    result = torch.zeros_like(tokens)
    for (expert,) in F.one_hot(numbers, len(m.gate)).sum((0, 1)).gt(0).nonzero():
        result = result + tokens @ m.experts[expert]
    return result.view(x.shape)


@pytest.mark.parametrize(
    ("loop", "free"),
    [(by_tensor, True), (by_item, False), (by_list, False), (by_module, False), (by_one_hot, True)],
)
def test_experts_in_a_loop_are_cut_with_their_router_or_not_at_all(
    loop: Callable[[Tensor, Any], Tensor], free: bool
) -> None:
    model = Plain(
        loop,
        gate=nn.Parameter(torch.ones(5, 6)),
        experts=nn.Parameter(torch.ones(5, 6, 6)),
        modules_of_experts=nn.ModuleList(nn.Linear(6, 6) for _ in range(5)),
    )
    discovery = discover_groups(model)
    five = [group for group in discovery.groups if group.units == 5]
    assert [(g.kind, g.chosen, g.least) for g in five] == [("expert", True, 2)] * free
    assert [[(axis.weight, axis.dim) for axis in g.axes] for g in five] == [[("gate", 0), ("experts", 0)]] * free


def test_frozen_axes_say_why() -> None:
    reasons = {(f.weight, f.dim, f.size): f.reason for f in small_discovery("llama").frozen if ".1." not in f.weight}
    rotary = "the code computes the buffer model.rotary_emb.inv_freq"
    assert reasons == {
        ("model.layers.0.self_attn.q_proj.weight", 0, 2): rotary,
        ("model.layers.0.self_attn.k_proj.weight", 0, 2): rotary,
    }


def test_a_group_that_does_not_exist_is_a_key_error() -> None:
    discovery = small_discovery("llama")
    assert discovery.group("layers.1.mlp").units == 24
    with pytest.raises(KeyError, match=r"layers\.2\.mlp"):
        discovery.group("layers.2.mlp")


# --- as JSON ----------------------------------------------------------------------------------------------------


def test_json_holds_the_whole_discovery() -> None:
    discovery = discover(llama(), name="tiny")
    data = json.loads(json.dumps(discovery.to_json()))
    assert list(data) == [field.name for field in dataclasses.fields(discovery)]
    for name in ("groups", "frozen", "weights", "operations"):
        for value, item in zip(getattr(discovery, name), data[name], strict=True):
            assert list(item) == [field.name for field in dataclasses.fields(value)]
            for field in dataclasses.fields(value):
                if field.name == "axes":
                    shown = [(axis.weight, axis.dim, show(axis.expression)) for axis in value.axes]
                    assert [(axis["weight"], axis["dim"], axis["expression"]) for axis in item["axes"]] == shown
                elif field.name == "dims":
                    assert item["dims"] == [show(dim) for dim in value.dims]
                else:
                    assert item[field.name] == getattr(value, field.name)


# --- what cannot be grouped -------------------------------------------------------------------------------------


def test_a_parameter_that_is_not_used_is_frozen() -> None:
    discovery = discover_groups(Plain(lambda x, m: x, spare=nn.Parameter(torch.ones(4, 3))))
    assert [(f.dim, f.size, f.reason) for f in discovery.frozen if f.weight == "spare"] == [
        (0, 4, "the logits do not depend on it"),
        (1, 3, "the logits do not depend on it"),
    ]
    assert not any(axis.weight == "spare" for group in discovery.groups for axis in group.axes)


def test_units_that_meet_each_other_in_one_axis_are_frozen() -> None:
    discovery = discover_groups(Plain(lambda x, m: (x[..., None] * x[..., None, :]).flatten(2), columns=36))
    reasons = {f.reason for f in discovery.frozen if f.weight == "head.weight" and f.dim == 1}
    assert reasons == {"its units meet each other within one axis of head.weight"}
    assert [group.name for group in discovery.groups] == ["vocabulary"]


def test_a_saved_buffer_is_cut_with_its_group_and_is_no_parameter() -> None:
    model = Plain(lambda x, m: x * m.scale)
    model.register_buffer("scale", torch.ones(6))
    discovery = discover_groups(model)
    hidden, vocabulary = discovery.groups
    assert ("scale", 0) in {(axis.weight, axis.dim) for axis in hidden.axes}
    assert "scale" not in {axis.weight for axis in vocabulary.axes}
    assert count_parameters(discovery, {hidden.name: 4}) == 2 * 26 * 4
