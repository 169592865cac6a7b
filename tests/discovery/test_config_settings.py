"""Config settings are found, not listed: for every family, kind and size, the twin has the shapes that are wanted."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedConfig

from families import DISTINCT, family_config
from secateur import discover
from secateur.discovery.config_settings import stock_settings, twins, with_settings
from secateur.discovery.groups import Discovery
from secateur.discovery.sizes import PrunedSizes, name_after, shapes_after, shapes_of
from secateur.errors import PlanError
from secateur.models.loading import skeleton


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
    config = family_config(family)
    discovery = discover(config)
    assert stock_settings(config, discovery, cut_of(discovery, kind, kept)) == settings


def test_a_setting_that_is_unset_can_be_set() -> None:
    """GPT-2's MLP width is unset by default, and four times the hidden width."""
    config = family_config("gpt2", n_inner=None)
    discovery = discover(config)
    assert discovery.group("layers.0.mlp").units == 192
    assert stock_settings(config, discovery, cut_of(discovery, "mlp", 100)) == {"n_inner": 100}


@pytest.mark.parametrize("family", DISTINCT)
def test_dropping_layers_shortens_what_counts_them(family: str) -> None:
    config = family_config(family)
    discovery = discover(config)
    cut = PrunedSizes(dropped_layers=frozenset({1}))
    changed = with_settings(config, stock_settings(config, discovery, cut))
    assert changed.num_hidden_layers == 2
    if getattr(config, "layer_types", None):
        assert changed.layer_types == [config.layer_types[0], config.layer_types[2]]
    assert shapes_of(skeleton(changed)) == shapes_after(discovery, cut)


@pytest.mark.parametrize("family", DISTINCT)
def test_nothing_but_sizes_changes(family: str) -> None:
    """Special tokens keep their numbers even where they equal a size."""
    config = family_config(family)
    discovery = discover(config)
    changed = with_settings(config, stock_settings(config, discovery, cut_of(discovery, "mlp", 50))).to_dict()
    before = config.to_dict()
    assert {name for name in before if before[name] != changed[name]} <= {"intermediate_size", "n_inner", "ffn_dim"}


def refusal(config: PreTrainedConfig, cut: PrunedSizes) -> str:
    with pytest.raises(PlanError) as caught:
        stock_settings(config, discover(config), cut)
    return str(caught.value)


def test_a_refusal_quotes_the_config() -> None:
    config = family_config("llama")
    text = refusal(config, cut_of(discover(config), "hidden", 37))
    assert text.startswith("LlamaConfig cannot describe the cut (hidden 37 of 48): the config refuses: hidden_size=37")
    assert "not a multiple of the number of attention heads (6)" in text


@pytest.mark.parametrize(("kind", "kept", "units"), [("hidden", 36, 48), ("attention", 4, 6)])
def test_a_cut_that_no_setting_says_is_refused(kind: str, kept: int, units: int) -> None:
    """Its heads are as wide as the hidden width divided by their number, so neither changes alone."""
    config = family_config("gpt2")
    text = refusal(config, cut_of(discover(config), kind, kept))
    assert text.startswith(f"GPT2Config cannot describe the cut ({kind} {kept} of {units}): ")


def test_layers_of_different_sizes_are_refused_without_a_search() -> None:
    config = family_config("llama")
    text = refusal(config, PrunedSizes({"layers.1.mlp": 50}))
    assert text == "mlp differs between layers: layers.1.mlp keeps 50 units and layers.0.mlp keeps 84"


def test_dropped_layers_leave_the_numbering() -> None:
    discovery = discover(family_config("llama"))
    cut = PrunedSizes(dropped_layers=frozenset({0}))
    assert name_after("model.layers.2.mlp.up_proj.weight", discovery, cut) == "model.layers.1.mlp.up_proj.weight"
    assert name_after("model.norm.weight", discovery, cut) == "model.norm.weight"


def test_a_search_does_not_change_the_config() -> None:
    config = family_config("phi3")
    before: dict[str, Any] = config.to_dict()
    discovery = discover(config)
    list(twins(config, discovery, cut_of(discovery, "attention", 2), []))
    assert config.to_dict() == before
