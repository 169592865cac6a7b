"""Matrices that keep the dense layout: the parts of each dimension, what is left to a config, what cannot be padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from contract import masked, uneven
from every_type import tiny_config
from families import family_config, family_model
from secateur import CutOptions, discover, load, prune, save
from secateur.discovery.discover import discover_groups
from secateur.discovery.padding import module_changes, padding_after
from secateur.discovery.sizes import PrunedSizes
from secateur.errors import DiscoveryError
from secateur.models.loading import skeleton
from secateur.models.modeling_per_layer import padded_in
from secateur.planning.plan import Plan, PlannedGroup

QKV = {"llama": "self_attn.v_proj", "phi3": "self_attn.qkv_proj", "gpt2": "attn.c_attn"}


def padded(config: PreTrainedConfig, **sizes: int) -> dict[str, dict[str, list[list[int]]]]:
    """The padding of the first layer, by the module's name in it."""
    dense = skeleton(config)
    pruned = PrunedSizes({f"layers.0.{name}": size for name, size in sizes.items()})
    _, found = padding_after(config, dense, discover_groups(dense), pruned)
    return {path.partition(".0.")[2]: sides for path, sides in found.items()}


@pytest.mark.parametrize(
    ("family", "sizes", "outputs"),
    [
        ("llama", {"head_dim": 7}, [[3, 7, 10]]),
        ("llama", {"head_dim": 7, "attention": 2}, [[2, 7, 10]]),  # of the heads that stay
        ("phi3", {"head_dim": 5}, [[1, 72, 72], [3, 5, 8]]),  # queries and keys, then values
        ("gpt2", {"head_dim.1": 5}, [[1, 96, 96], [6, 5, 8]]),
        ("gpt2", {"head_dim.0": 3, "head_dim.1": 5}, [[12, 3, 8], [6, 5, 8]]),
    ],
)
def test_a_dimension_is_laid_out_as_before_the_cut(
    family: str, sizes: dict[str, int], outputs: list[list[int]]
) -> None:
    assert padded(family_config(family), **sizes)[QKV[family]]["outputs"] == outputs


def test_heads_that_lie_interleaved() -> None:
    found = padded(family_config("gpt_neox"), **{"head_dim.0": 3, "head_dim.1": 5})
    per_head = [[1, 4, 4], [1, 3, 4], [1, 4, 4], [1, 3, 4], [1, 5, 8]]
    assert found["attention.query_key_value"]["outputs"] == per_head * 6
    assert found["attention.dense"] == {"inputs": [[6, 5, 8]]}


def test_a_norm_sees_the_channels_that_stay() -> None:
    found = padded(tiny_config("exaone4"), head_dim=3)
    assert {side for sides in found.values() for side in sides} == {"inputs", "outputs"}
    config = tiny_config("bitnet")
    sub_norm = padded(config, head_dim=3)["self_attn.attn_sub_norm"]
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    assert sub_norm == {"inputs": [[heads, 3, size]], "outputs": [[heads, 3, size]]}


def test_what_a_config_can_say_is_left_to_it() -> None:
    assert padded(tiny_config("deepseek_v2"), head_dim=3) == {}


def test_one_head_size_for_all_needs_no_padding() -> None:
    config = family_config("opt")
    discovery = discover_groups(skeleton(config))
    sizes = {group.name: 6 for group in discovery.groups if group.kind == "head_dim"}
    changes = module_changes(config, discovery, PrunedSizes(sizes))
    assert changes.padded == {}
    assert {each.name for each in changes.attributes} >= {"head_dim", "in_features", "out_features"}


@pytest.mark.slow
def test_a_norm_without_weights_is_refused() -> None:
    config = tiny_config("diffllama")
    with pytest.raises(DiscoveryError, match=r"does not run with layers\.0\.head_dim=3"):
        module_changes(config, discover_groups(skeleton(config)), PrunedSizes({"layers.0.head_dim": 3}))


def test_nothing_is_padded_where_no_head_changes() -> None:
    config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    assert module_changes(config, discover_groups(skeleton(config)), PrunedSizes({"layers.0.mlp": 8})).padded == {}


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [True, False])
def test_cut_again(in_memory: bool, tmp_path: Path) -> None:
    model = family_model(family_config("llama"))
    model = prune(model, first := uneven(model, ("head_dim", "attention")))
    if not in_memory:
        save(model, tmp_path / "once", plan=first)
        model = load(str(tmp_path / "once"), device="cpu")
    discovery = discover(model)
    wanted = {"layers.0.head_dim": 2, "layers.1.mlp": 40, "layers.2.attention": 1}
    groups = tuple(
        PlannedGroup(group.name, group.kind, group.layer, group.units, kept, tuple(range(kept)))
        for group in discovery.groups
        if (kept := wanted.get(group.name)) is not None
    )
    second = Plan("tiny", CutOptions(ratio=0.3, of="units"), groups, {}, {})
    again = prune(model, second, discovery=discovery)
    ids = torch.arange(3, 33).reshape(2, 15)
    with torch.no_grad():
        expected = masked(model, second, discovery)(ids).logits
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-6, rtol=0)
        save(again, tmp_path / "twice", plan=second)
        found = load(str(tmp_path / "twice"), device="cpu")
        torch.testing.assert_close(found(ids).logits, expected, atol=1e-4, rtol=0)  # rotary tables in float32
    outputs = [padded_in(found)[f"model.layers.{i}.self_attn.v_proj"]["outputs"] for i in range(3)]
    assert outputs == [[[2, 2, 10]], [[1, 1, 10]], [[1, 1, 10]]]
    assert len(groups) == len(wanted)
