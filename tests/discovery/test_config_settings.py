"""Config settings are found, not listed: for every family, kind and size, the twin has the shapes that are wanted."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
from transformers import AutoConfig

from families import DISTINCT, family_config
from secateur import discover
from secateur.discovery.config_settings import stock_settings, twins, with_settings
from secateur.discovery.groups import Discovery
from secateur.discovery.sizes import PrunedSizes, name_after, shapes_after, shapes_of
from secateur.errors import PlanError
from secateur.models.loading import skeleton


@functools.cache
def found_in(family: str) -> Discovery:
    """What is found in the model of a family."""
    return discover(family_config(family))


def cut_of(discovery: Discovery, kind: str, kept: int) -> PrunedSizes:
    return PrunedSizes({group.name: kept for group in discovery.groups if group.kind == kind})


@pytest.mark.parametrize(
    ("family", "kind", "kept", "settings"),
    [
        ("llama", "attention", 2, {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("llama", "query", 1, {"num_attention_heads": 3}),
        ("llama", "mlp", 50, {"intermediate_size": 50}),
        ("llama", "hidden", 36, {"hidden_size": 36}),
        ("phi3", "attention", 2, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
        ("phi3", "hidden", 36, {"hidden_size": 36, "head_dim": 8}),
        ("gpt2", "mlp", 50, {"n_inner": 50}),
        ("gpt_neox", "mlp", 50, {"intermediate_size": 50}),
        ("opt", "mlp", 50, {"ffn_dim": 50}),
    ],
)
def test_settings_are_found(family: str, kind: str, kept: int, settings: dict[str, int]) -> None:
    config, discovery = family_config(family), found_in(family)
    assert stock_settings(config, discovery, cut_of(discovery, kind, kept)) == settings


def test_kinds_that_the_first_layer_lacks_are_found_together() -> None:
    """Three settings of experts, in a model whose first layers are without."""
    sizes = {
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "intermediate_size": 84,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    }
    widths = {"moe_intermediate_size": 28, "shared_expert_intermediate_size": 36}
    heads = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = AutoConfig.for_model("qwen2_moe", vocab_size=97, **sizes, **widths, **heads)
    discovery = discover(config)
    kept = {"mlp": 60, "expert": 3, "expert_mlp": 20, "shared_mlp": 24}
    assert not {"expert", "expert_mlp", "shared_mlp"} & {group.kind for group in discovery.groups if group.layer == 0}
    cut = PrunedSizes({group.name: kept[group.kind] for group in discovery.groups if group.kind in kept})
    assert stock_settings(config, discovery, cut) == {
        "intermediate_size": 60,
        "num_experts": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
    }


def test_a_setting_that_is_unset_can_be_set() -> None:
    """GPT-2's MLP width is unset by default, and four times the hidden width."""
    config = family_config("gpt2", n_inner=None)
    discovery = discover(config)
    assert discovery.group("layers.0.mlp").units == 192
    assert stock_settings(config, discovery, cut_of(discovery, "mlp", 100)) == {"n_inner": 100}


@pytest.mark.parametrize("family", DISTINCT)
def test_dropping_layers_shortens_what_counts_them(family: str) -> None:
    config, discovery = family_config(family), found_in(family)
    cut = PrunedSizes(dropped_layers=frozenset({1}))
    changed = with_settings(config, stock_settings(config, discovery, cut))
    assert changed.num_hidden_layers == 2
    if getattr(config, "layer_types", None):
        assert changed.layer_types == [config.layer_types[0], config.layer_types[2]]
    assert shapes_of(skeleton(changed)) == shapes_after(discovery, cut)


@pytest.mark.parametrize("family", DISTINCT)
def test_nothing_but_sizes_changes(family: str) -> None:
    """Special tokens keep their numbers even where they equal a size."""
    config, discovery = family_config(family), found_in(family)
    changed = with_settings(config, stock_settings(config, discovery, cut_of(discovery, "mlp", 50))).to_dict()
    before = config.to_dict()
    assert {name for name in before if before[name] != changed[name]} <= {"intermediate_size", "n_inner", "ffn_dim"}


def refusal(family: str, cut: PrunedSizes) -> str:
    with pytest.raises(PlanError) as caught:
        stock_settings(family_config(family), found_in(family), cut)
    return str(caught.value)


def test_a_refusal_quotes_the_config() -> None:
    text = refusal("llama", cut_of(found_in("llama"), "hidden", 37))
    assert text.startswith("LlamaConfig cannot describe the cut (hidden 37 of 48): the config refuses: hidden_size=37")
    assert "not a multiple of the number of attention heads (6)" in text


@pytest.mark.parametrize(
    ("kind", "kept", "asked", "because"),
    [
        ("hidden", 36, "hidden 36 of 48", "no setting of the config gives these sizes"),
        ("attention", 4, "attention 4 of 6", "the config refuses: n_embd=32"),
    ],
)
def test_a_cut_that_no_setting_says_is_refused(kind: str, kept: int, asked: str, because: str) -> None:
    """Its heads are as wide as the hidden width divided by their number, so neither changes alone."""
    text = refusal("gpt2", cut_of(found_in("gpt2"), kind, kept))
    assert text.startswith(f"GPT2Config cannot describe the cut ({asked}): {because}")


def test_layers_of_different_sizes_are_refused_without_a_search() -> None:
    text = refusal("llama", PrunedSizes({"layers.1.mlp": 50}))
    assert text == "mlp differs between layers: layers.1.mlp keeps 50 units and layers.0.mlp keeps 84"


def test_dropped_layers_leave_the_numbering() -> None:
    discovery = found_in("llama")
    cut = PrunedSizes(dropped_layers=frozenset({0}))
    assert name_after("model.layers.2.mlp.up_proj.weight", discovery, cut) == "model.layers.1.mlp.up_proj.weight"
    assert name_after("model.norm.weight", discovery, cut) == "model.norm.weight"


def test_a_search_does_not_change_the_config() -> None:
    config, discovery = family_config("phi3"), found_in("phi3")
    before: dict[str, Any] = config.to_dict()
    assert len(list(itertools.islice(twins(config, discovery, cut_of(discovery, "attention", 2), []), 20))) == 20
    assert config.to_dict() == before
