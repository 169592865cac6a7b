"""A discovery reads well: layers are folded, units are said in words, shares add up, and no page cuts a word off."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaConfig

from every_type import tiny_config
from secateur.cli.main import run
from secateur.discovery.algebra import Variable, units_along
from secateur.discovery.counting import count_parameters
from secateur.discovery.coverage import (
    FrozenReason,
    coverage_as_json,
    coverage_by_kind,
    frozen_reasons,
    total_coverage,
)
from secateur.discovery.descriptions import KIND_DESCRIPTIONS
from secateur.discovery.discover import discover
from secateur.discovery.groups import KINDS, Discovery, Frozen, Weight
from secateur.discovery.summary import GroupSummary, summarize_layers
from secateur.discovery.weight_names import fold_names, format_ranges
from secateur.report.tables.discovery import discovery_tables

TYPES = ("deepseek_v3", "gemma3_text", "gpt2", "jamba", "mamba2", "mixtral")
every_type = pytest.mark.parametrize("model_type", TYPES)


@functools.cache
def of_type(model_type: str) -> Discovery:
    return discover(tiny_config(model_type), name=model_type)


@functools.cache
def small(*, tied: bool = False) -> Discovery:
    """Two layers whose parameters can be counted by hand."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=24,
        tie_word_embeddings=tied,
    )
    return discover(config, name="small")


def group_of(discovery: Discovery, name: str) -> GroupSummary:
    """The first group of that name in the folds."""
    return next(group for fold in summarize_layers(discovery) for group in fold.groups if group.name == name)


def without_numbers(text: str) -> str:
    return re.sub(r"\b\d+\b", "#", text)


# --- folding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        ("llama", [(0, 1, 2), ()]),
        ("gemma3_text", [(0, 2), (1,), ()]),  # sliding, full: they differ in why the rotary axes are frozen
        ("deepseek_v3", [(0,), (1, 2), ()]),  # one dense layer, then experts
        ("jamba", [(0, 2), (1,), ()]),
        ("qwen3_next", [(0,), (1,), (2,), ()]),
    ],
)
def test_layers_that_are_alike_come_once(model_type: str, layers: list[tuple[int, ...]]) -> None:
    assert [fold.layers for fold in summarize_layers(of_type(model_type))] == layers


def first_group_normed(discovery: Discovery) -> Discovery:
    first, *rest = discovery.groups
    return dataclasses.replace(discovery, groups=(dataclasses.replace(first, normed=not first.normed), *rest))


def first_weight_saved(discovery: Discovery) -> Discovery:
    at = next(i for i, weight in enumerate(discovery.weights) if weight.layer == 0)
    weights = list(discovery.weights)
    weights[at] = dataclasses.replace(weights[at], parameter=False)
    return dataclasses.replace(discovery, weights=tuple(weights))


def first_reason_other(discovery: Discovery) -> Discovery:
    first, *rest = discovery.frozen
    return dataclasses.replace(discovery, frozen=(dataclasses.replace(first, reason="the moon is full"), *rest))


@pytest.mark.parametrize("change", [first_group_normed, first_weight_saved, first_reason_other])
def test_layers_that_differ_do_not(change: Callable[[Discovery], Discovery]) -> None:
    assert [fold.layers for fold in summarize_layers(change(of_type("llama")))] == [(0,), (1, 2), ()]


@every_type
def test_folds_hold_every_layer_and_group(model_type: str) -> None:
    discovery = of_type(model_type)
    *folds, whole = summarize_layers(discovery)
    layers = sorted(layer for fold in folds for layer in fold.layers)
    assert layers == sorted({weight.layer for weight in discovery.weights if weight.layer is not None})
    held = [f"layers.{layer}.{group.name}" for fold in folds for layer in fold.layers for group in fold.groups]
    assert sorted([*held, *(group.name for group in whole.groups)]) == sorted(discovery.names)
    assert sum(fold.parameters for fold in (*folds, whole)) == count_parameters(discovery)


# --- one unit ---------------------------------------------------------------------------------------------------


def test_every_kind_has_words() -> None:
    assert set(KIND_DESCRIPTIONS) == set(KINDS)


@pytest.mark.parametrize(
    ("group", "unit", "slices"),
    [
        (
            "attention",
            "KV head with its 2 query heads",
            ["8 rows of q_proj", "4 rows of k_proj, v_proj", "8 columns of o_proj"],
        ),
        ("query", "query head in each of the 2 KV heads", ["8 rows of q_proj", "8 columns of o_proj"]),
        ("head_dim", "channel in each of the 4 heads", ["2 rows of v_proj", "4 columns of o_proj"]),
        ("mlp", "inner channel of the MLP", ["1 row of gate_proj, up_proj", "1 column of down_proj"]),
        ("vocabulary", "token", ["1 row of embed_tokens, lm_head"]),
        ("layers", "whole layer", []),
        (
            "hidden",
            "channel that runs through all layers",
            [
                "1 column of embed_tokens, q_proj, k_proj, v_proj, gate_proj, up_proj, lm_head",
                "1 row of o_proj, down_proj",
                "1 entry of input_layernorm, post_attention_layernorm, norm",
            ],
        ),
    ],
)
def test_a_unit(group: str, unit: str, slices: list[str]) -> None:
    found = group_of(small(), group)
    assert found.unit == unit
    assert list(map(str, found.slices)) == slices


@pytest.mark.parametrize(
    ("model_type", "group", "unit", "slices"),
    [
        ("gpt2", "attention", "attention head", "# columns of c_attn+bias; # rows of attn.c_proj"),
        ("gpt2", "mlp", "inner channel of the MLP", "# column of c_fc+bias; # row of mlp.c_proj"),
        ("bloom", "head_dim", "channel of each head", "# columns of dense; # rows of query_key_value+bias"),
        ("mixtral", "expert", "whole expert", "# matrix of gate_up_proj, down_proj; # row of gate"),
        (
            "mixtral",
            "expert_mlp",
            "inner channel in each of the # experts",
            "# column of each matrix of down_proj; # rows of each matrix of gate_up_proj",
        ),
    ],
)
def test_a_unit_of_other_types(model_type: str, group: str, unit: str, slices: str) -> None:
    found = group_of(of_type(model_type), group)
    assert without_numbers(found.unit) == unit
    assert sorted(without_numbers(str(part)) for part in found.slices) == slices.split("; ")


def test_units_of_a_state_lie_in_each_other() -> None:
    names = [f"state.{number}" for number in range(4)]
    assert [without_numbers(group_of(of_type("qwen3_next"), name).unit) for name in names] == [
        "group of # heads of the state",
        "head of the state in each of the # groups",
        "channel of the state in each of the # heads",
        "channel of the state in each of the # heads",
    ]


@every_type
def test_slices_are_as_large_as_the_axes_say(model_type: str) -> None:
    discovery = of_type(model_type)
    for fold in summarize_layers(discovery)[:-1]:
        for folded in fold.groups:
            group = discovery.group(f"layers.{fold.layers[0]}.{folded.name}")
            wanted = Counter(units_along(axis.expression, group.name).count(0) for axis in group.axes)
            found: Counter[int] = Counter()
            for part in folded.slices:
                found[part.count] += sum(1 + name.endswith("+bias") for name in part.weights)
            assert found == wanted


@every_type
def test_short_names_tell_weights_apart(model_type: str) -> None:
    discovery = of_type(model_type)
    names = [weight.name.removesuffix(".weight") for weight in discovery.weights]
    paths = {re.sub(r"^.*?\.\d+\.|\.\d+$", "", name) for name in names}
    for fold in summarize_layers(discovery):
        for group in fold.groups:
            for part in group.slices:
                assert len(set(part.weights)) == len(part.weights)
                for name in part.weights:
                    plain = name.removesuffix("+bias")
                    matching = {path for path in paths if f".{path}".endswith(f".{plain}")}
                    assert plain in paths or len(matching) == 1


# --- numbers and names ------------------------------------------------------------------------------------------


def numbers_in(text: str) -> set[int]:
    """Read back what `format_ranges` wrote."""
    held, _, lacking = text.partition(" except ")
    if lacking:
        return numbers_in(held) - numbers_in(lacking)
    found: set[int] = set()
    for part in text.split(", "):
        ends, _, step = part.partition(" by ")
        first, _, last = ends.partition("-")
        found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


@given(st.sets(st.integers(0, 70), min_size=1))
def test_ranges_can_be_read_back(numbers: set[int]) -> None:
    assert numbers_in(format_ranges(sorted(numbers))) == numbers


@given(st.integers(0, 9), st.integers(1, 9), st.integers(4, 40))
def test_a_regular_list_is_one_range(first: int, step: int, count: int) -> None:
    numbers = range(first, first + step * count, step)
    assert format_ranges(numbers) == f"{first}-{numbers[-1]}" + (f" by {step}" if step > 1 else "")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([7], "7"),
        ([0, 1], "0-1"),
        ([0, 2, 4], "0, 2, 4"),
        ([1, 3], "1, 3"),
        (range(0, 24, 2), "0-22 by 2"),
        ([0, *range(3, 61)], "0, 3-60"),
        ([n for n in range(61) if n % 6 != 5], "0-60 except 5-59 by 6"),
    ],
)
def test_format_ranges(numbers: list[int], text: str) -> None:
    assert format_ranges(numbers) == text


def test_names_are_folded_at_every_number() -> None:
    names = [f"h.{layer}.experts.{expert}.w" for layer in (0, 2) for expert in (0, 1, 2)]
    assert fold_names([*names, "head"], [*names, "h.1.x"]) == ("h.{0,2}.experts.{0-2}.w", "head")


# --- shares -----------------------------------------------------------------------------------------------------


def test_coverage_counted_by_hand() -> None:
    q = o = 16 * 16
    k = v = 8 * 16
    mlp = 3 * 24 * 16
    norms = 2 * 16
    layers = 2 * (q + k + v + o + mlp + norms)
    everything = layers + 2 * 50 * 16 + 16
    wanted = {  # groups, units, parameters
        "attention": (2, 4, 2 * (q + k + v + o)),
        "query": (2, 4, 2 * (q + o)),
        "head_dim": (2, 8, 2 * (v + o)),
        "mlp": (2, 48, 2 * mlp),
        "hidden": (1, 16, everything),
        "vocabulary": (1, 50, 2 * 50 * 16),
        "layer": (1, 2, layers),
    }
    found = coverage_by_kind(small())
    assert {kind: (r.groups, r.units, r.parameters) for kind, r in found.items()} == wanted
    assert all(r.share == r.parameters / everything for r in found.values())
    assert total_coverage(small()).share == 1
    for fold in summarize_layers(small()):
        for group in fold.groups:
            assert group.coverage.parameters == found[group.group.kind].parameters


def test_tied_parameters_count_once() -> None:
    assert coverage_by_kind(small(tied=True))["vocabulary"].parameters == 50 * 16
    assert total_coverage(small(tied=True)).parameters == total_coverage(small()).parameters - 50 * 16


def test_coverage_with_and_without_layers() -> None:
    discovery = small()
    only_layers = dataclasses.replace(discovery, groups=tuple(g for g in discovery.groups if g.kind == "layer"))
    assert total_coverage(only_layers).parameters == coverage_by_kind(discovery)["layer"].parameters
    assert total_coverage(only_layers, layers=False).parameters == 0


def test_frozen_reasons_counted_by_hand() -> None:
    (rotary,) = frozen_reasons(small())
    assert rotary == FrozenReason(
        reason="the code computes the buffer model.rotary_emb.inv_freq",
        axes=4,
        partly=4,
        weights=("model.layers.*.self_attn.q_proj[0]", "model.layers.*.self_attn.k_proj[0]"),
        parameters=2 * (16 * 16 + 8 * 16),
        share=2 * (16 * 16 + 8 * 16) / count_parameters(small()),
    )


def test_frozen_axes_that_are_frozen_wholly() -> None:
    (positions,) = frozen_reasons(of_type("gpt2"))
    assert (positions.axes, positions.partly, positions.weights) == (1, 0, ("transformer.wpe[0]",))


def test_frozen_axes_of_some_layers() -> None:
    sliding, full = frozen_reasons(of_type("gemma3_text"))
    assert sliding.weights[0] == "model.layers.{0,2}.self_attn.q_proj[0]"
    assert full.weights[0] == "model.layers.1.self_attn.q_proj[0]"
    assert sliding.partly == sliding.axes / 2  # the norms within heads hold nothing else


def test_modules_that_are_frozen_wholly_stand_for_their_weights() -> None:
    discovery = small()
    unused = [
        Frozen(weight.name, dim, size, "it is not used")
        for weight in discovery.weights
        if ".1.self_attn." in weight.name or weight.name == "lm_head.weight"
        for dim, size in enumerate(weight.shape)
    ]
    (found,) = frozen_reasons(dataclasses.replace(discovery, frozen=tuple(unused)))
    assert (found.axes, sorted(found.weights)) == (10, ["lm_head[0]", "lm_head[1]", "model.layers.1.self_attn.*"])


def test_frozen_axes_of_buffers_do_not_count() -> None:
    discovery = of_type("gpt2")
    saved = tuple(dataclasses.replace(w, parameter=False) for w in discovery.weights)
    assert frozen_reasons(dataclasses.replace(discovery, weights=(*saved[:-1], discovery.weights[-1]))) == ()


def test_reasons_are_told_without_the_number_of_the_layer() -> None:
    discovery = of_type("llama")
    frozen = tuple(
        dataclasses.replace(f, reason=f"it meets model.layers.{f.weight.split('.')[2]}.x.weight")
        for f in discovery.frozen
    )
    changed = dataclasses.replace(discovery, frozen=frozen)
    assert [reason.reason for reason in frozen_reasons(changed)] == ["it meets model.layers.*.x.weight"]
    assert [fold.layers for fold in summarize_layers(changed)] == [(0, 1, 2), ()]


# --- the page and the JSON --------------------------------------------------------------------------------------


def page(discovery: Discovery, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    for renderable in discovery_tables(discovery):
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def words(text: str) -> list[str]:
    return sorted(re.sub(r"[─-╿]", " ", text).split())


def test_a_dimension_may_follow_the_sequence() -> None:
    discovery = small()
    table = Weight("model.layers.0.table", (Variable("sequence", 13), Variable("hidden", 16)), layer=0, parameter=False)
    folds = summarize_layers(dataclasses.replace(discovery, weights=(*discovery.weights, table)))
    assert [fold.layers for fold in folds] == [(0,), (1,), ()]


@every_type
@pytest.mark.parametrize("width", [80])
def test_a_page_cuts_nothing_off(model_type: str, width: int) -> None:
    narrow, wide = page(of_type(model_type), width), page(of_type(model_type), 2000)
    assert max(map(len, narrow.splitlines())) <= width
    assert words(narrow) == words(wide)


def test_what_a_page_says() -> None:
    text = page(small(), 200)
    assert text.startswith("small: 5.52 K parameters, 2 layers; cuts reach 100%\n")
    assert "\nlayers 0-1 (2 alike): 70.7% of the parameters\n" in text
    assert re.search(r"├── attention +2 +27\.8%  KV head with its 2 query heads: 8 rows of q_proj; ", text)
    assert "a part of 4 axes; in weights with 13.9% of the parameters\n" in text
    assert text.endswith("Every parameter is in a weight that some group has an axis in.\n")


def test_a_page_says_what_to_know_before_a_cut() -> None:
    text = page(of_type("deepseek_v3"), 2000)
    assert "\nlayer 0: " in text
    assert re.search(r"── expert .* whole expert: .*\. The model chooses among them; \d must stay\n", text)
    assert re.search(r"── latent\.0 .* channel of a bottleneck: .*\. A norm runs across them\n", text)


def test_what_a_page_says_of_what_is_out_of_reach() -> None:
    discovery = small()
    groups = tuple(g if g.kind == "attention" else dataclasses.replace(g, axes=()) for g in discovery.groups)
    embeddings = (2 * 50 * 16 + 16) / count_parameters(discovery)
    rest = 1 - coverage_by_kind(discovery)["attention"].share
    start = f"\n{rest:.1%} of the parameters lie in weights that no group has an axis in"
    without_layers = page(dataclasses.replace(discovery, groups=groups[:-1]), 200)
    with_layers = page(dataclasses.replace(discovery, groups=groups), 200)
    assert f"{start}.\n" in without_layers
    assert f"{start}, {embeddings:.1%} outside the layers.\n" in with_layers


def test_json_holds_the_discovery_and_its_coverage(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    assert run(["discover", str(tiny), "--quiet", "--json", str(file)]) == 0
    data = json.loads(file.read_text(encoding="utf-8"))
    discovery = discover(str(tiny))
    assert data == discovery.to_json() | {"coverage": coverage_as_json(discovery)}
    assert data["coverage"]["any"]["share"] == 1
