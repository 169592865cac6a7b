"""Plans: what is kept, how many and which; sizes by arithmetic; every refusal."""

from __future__ import annotations

import functools
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoConfig

from every_type import tiny_config
from families import family_config, family_model
from secateur import CutOptions, discover, plan, prune, score
from secateur.discovery.groups import Discovery, Group
from secateur.errors import PlanError, ScoreError
from secateur.planning.options import with_preset
from secateur.planning.plan import Plan, plan_from_json, read_plan
from secateur.planning.selection import groups_to_cut, top_units
from secateur.planning.sizes import SizeSearch, removed_units
from secateur.report.tables.plan import plan_tables
from secateur.scoring.scores import Scores

CONFIG = family_config("llama", hidden_size=120, intermediate_size=800, num_hidden_layers=4)


@pytest.fixture(scope="module")
def discovery() -> Discovery:
    return discover(CONFIG)


@pytest.fixture(scope="module")
def scores(discovery: Discovery) -> Scores:
    return score(family_model(CONFIG, dtype=torch.float32), discovery=discovery, name="l2")


def kept(decided: Plan) -> dict[str, int]:
    return {group.name: group.kept for group in decided.groups}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=64), st.data())
def test_no_dropped_unit_beats_a_kept_one(values: list[float], data: st.DataObject) -> None:
    number = data.draw(st.integers(1, len(values)))
    keep = top_units(torch.tensor(values, dtype=torch.float64), number)
    assert len(keep) == number
    assert list(keep) == sorted(set(keep))
    assert all(values[d] <= min(values[k] for k in keep) for d in set(range(len(values))) - set(keep))


@pytest.mark.parametrize(
    ("units", "ratio", "removed"),
    [
        (32, 0.25, 8),
        (32, 0.6, 19),
        (11008, 0.25, 2752),
        (11008, 0.6, 6605),
        (4096, 0.2, 820),
        (3, 0.25, 0),
        (1536, 0.3335, 513),
    ],
)
def test_shares_round_as_llm_pruner_rounds_them(units: int, ratio: float, removed: int) -> None:
    assert removed_units(units, ratio) == removed


@functools.cache
def seven_billion() -> Discovery:
    return discover(AutoConfig.for_model("llama"))  # its defaults are LLaMA-7B's sizes


def paper(**cut: Any) -> tuple[str, str]:
    """Parameters in B and MACs in G of LLaMA-7B after a cut, with the paper's decimals."""
    decided = plan(seven_billion(), with_preset("llm-pruner", cut)[0])
    return f"{decided.parameters['pruned'] / 1e9:.2f}", f"{decided.macs['pruned'] / 1e9:.2f}"


def test_the_papers_sizes_of_a_7b_model() -> None:
    """LLM-Pruner, table of sizes: the whole model, 20 % and 50 %, block and channel."""
    whole = plan(seven_billion(), with_preset("llm-pruner")[0])
    assert (f"{whole.parameters['dense'] / 1e9:.2f}", f"{whole.macs['dense'] / 1e9:.2f}") == ("6.74", "424.02")
    assert paper() == ("5.42", "339.60")
    assert paper(ratio=0.6, of="units", layers=(3, 31)) == ("3.35", "206.59")
    assert paper(ratio=0.2, of="units", axes=("hidden",)) == ("5.39", "339.36")
    assert paper(ratio=0.5, of="units", axes=("hidden",)) == ("3.37", "212.58")


@pytest.mark.parametrize("of", ["non-embedding", "parameters", "macs"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.7])
def test_a_budget_is_met(discovery: Discovery, of: Any, ratio: float) -> None:
    decided = plan(discovery, CutOptions(ratio=ratio, of=of, scope="local", shape="uniform"))
    before, after = {
        "non-embedding": (decided.parameters["dense_non_embedding"], decided.parameters["pruned_non_embedding"]),
        "parameters": (decided.parameters["dense"], decided.parameters["pruned"]),
        "macs": (decided.macs["dense"], decided.macs["pruned"]),
    }[of]
    assert 1 - after / before == pytest.approx(ratio, abs=0.005)


def test_a_target_is_what_is_left(discovery: Discovery) -> None:
    dense = plan(discovery, CutOptions(ratio=0.2, scope="local", shape="uniform")).parameters["dense_non_embedding"]
    decided = plan(discovery, CutOptions(target=dense // 2, scope="local", shape="uniform"))
    assert decided.parameters["pruned_non_embedding"] == pytest.approx(dense // 2, rel=0.005)


def test_sizes_are_those_of_the_model_that_is_cut(discovery: Discovery, scores: Scores) -> None:
    decided = plan(discovery, CutOptions(ratio=0.3, scope="local", shape="uniform"), config=CONFIG, scores=scores)
    pruned = prune(family_model(CONFIG, dtype=torch.float32), decided)
    assert sum(p.numel() for p in pruned.parameters()) == decided.parameters["pruned"]
    assert discover(pruned.config).group("layers.0.mlp").units == kept(decided)["layers.0.mlp"]


def test_all_layers_are_cut_alike_unless_some_are_named(discovery: Discovery) -> None:
    everywhere = plan(discovery, CutOptions(ratio=0.3, of="units"), config=CONFIG)
    assert everywhere.settings == {"intermediate_size": 560}
    some = plan(discovery, CutOptions(ratio=0.4, of="units", layers=(1, 3)), config=CONFIG)
    assert {group.layer for group in some.groups} == {1, 2}
    assert some.settings is None
    assert some.refusal is not None
    assert "differs between layers" in some.refusal


def test_units_kept_are_the_best(discovery: Discovery, scores: Scores) -> None:
    for group in plan(discovery, CutOptions(ratio=0.4, of="units"), scores=scores).groups:
        assert group.keep is not None
        values = scores.units[group.name]
        dropped = [i for i in range(group.units) if i not in group.keep]
        assert len(group.keep) == group.kept
        assert max(values[dropped]) <= min(values[list(group.keep)])


def test_axes_hidden_cuts_the_hidden_width(discovery: Discovery) -> None:
    options = CutOptions(axes=("hidden",), ratio=0.25, of="units")
    assert kept(plan(discovery, options, config=CONFIG)) == {"hidden": 90}


def test_axes_layers_drops_the_lowest_layers(discovery: Discovery, scores: Scores) -> None:
    options = CutOptions(axes=("layers",), ratio=0.25)
    (group,) = plan(discovery, options, scores=scores, config=CONFIG).groups
    assert (group.name, group.kept) == ("layers", 3)
    assert set(range(4)) - set(group.keep or ()) == {int(scores.units["layers"].argmin())}


def test_layers_out_of_range_are_not_dropped(discovery: Discovery, scores: Scores) -> None:
    lowest = int(scores.units["layers"].argmin())
    outside = (0, lowest) if lowest > 1 else (lowest + 1, 4)
    options = CutOptions(axes=("layers",), ratio=0.25, layers=outside)
    (group,) = plan(discovery, options, scores=scores).groups
    assert lowest in (group.keep or ())


@pytest.mark.parametrize("multiple", [8, 32])
def test_widths_are_multiples(discovery: Discovery, multiple: int) -> None:
    decided = plan(discovery, CutOptions(ratio=0.3, round_to=multiple, scope="local", shape="uniform"))
    assert {size % multiple for name, size in kept(decided).items() if name.endswith("mlp")} == {0}


@given(st.integers(64, 600), st.integers(1, 130), st.data())
def test_a_rounded_width_leaves_what_must_stay(units: int, multiple: int, data: st.DataObject) -> None:
    """Of a vocabulary of 512 tokens 260 may have to stay, which is no multiple of 64."""
    multiple = min(multiple, units)
    least = data.draw(st.integers(1, units))
    group = Group("vocabulary", "vocabulary", None, units, (), least=least)
    search = SizeSearch(seven_billion(), {"vocabulary": [group]}, CutOptions(ratio=0.3, round_to=multiple))
    wanted = data.draw(st.integers(least, units))
    found = search.rounded(group, wanted)
    multiples = [size for size in range(multiple, units + 1, multiple) if size >= least]
    if not multiples or wanted == units:
        assert found == units
    else:
        assert found in multiples
        assert abs(found - wanted) == min(abs(size - wanted) for size in multiples)
    exact = replace(search, options=CutOptions(ratio=0.3, round_to=1))
    with pytest.raises(PlanError, match="would empty it" if least == 1 else f"fewer than the {least} that must stay"):
        exact.rounded(group, least - 1)


def test_stacked_experts_keep_to_widths_that_grouped_products_take() -> None:
    """Rows of a multiple of 16 bytes, in 16 bits a number; what is asked for is a multiple of that too."""
    config = tiny_config("mixtral")
    found = discover(config)
    experts = [group for group in found.groups if group.kind == "expert_mlp"]
    assert {(group.units, group.multiple) for group in experts} == {(84, 4)}
    assert found.group("hidden").multiple == 8
    assert {group.multiple for group in found.groups if group.kind == "attention"} == {1}
    for ratio in (0.1, 0.25, 0.4):
        for of in ("units", "non-embedding"):
            for multiple, each in ((1, 4), (3, 12)):
                decided = plan(
                    found,
                    CutOptions(ratio=ratio, of=of, axes=("mlp",), round_to=multiple, scope="local", shape="uniform"),
                )
                assert {group.kept % each for group in decided.groups} == {0}


@pytest.mark.parametrize(("first", "last"), [(0.5, 1.5), (1.5, 0.5), (0.0, 2.0), (1.0, 1.0)])
def test_a_schedule_gives_layers_shares_on_a_line(discovery: Discovery, first: float, last: float) -> None:
    options = CutOptions(ratio=0.3, shape="per-layer", schedule=(first, last))
    decided = plan(discovery, options)
    assert plan_from_json(json.loads(json.dumps(decided.to_json()))) == decided
    left = decided.parameters["pruned_non_embedding"] / decided.parameters["dense_non_embedding"]
    assert left == pytest.approx(0.7, abs=0.005)
    removed = [800 - kept(decided).get(f"layers.{i}.mlp", 800) for i in range(4)]
    mean = sum(removed) / 4
    expected = [mean * 2 * (first + (last - first) * i / 3) / (first + last) for i in range(4)]
    assert removed == pytest.approx(expected, abs=2)
    units = plan(discovery, replace(options, of="units", axes=("mlp",)))
    removed = [800 - kept(units).get(f"layers.{i}.mlp", 800) for i in range(4)]
    assert removed == pytest.approx(
        [240 * 2 * (first + (last - first) * i / 3) / (first + last) for i in range(4)], abs=1
    )


def test_a_schedule_never_empties_a_layer(discovery: Discovery) -> None:
    for of in ("units", "non-embedding"):
        decided = plan(discovery, CutOptions(ratio=0.6, of=of, axes=("mlp",), shape="per-layer", schedule=(0, 1)))
        assert min(kept(decided).values()) >= 1
    one = plan(
        discovery, CutOptions(ratio=0.5, of="units", axes=("mlp",), layers=(1, 2), shape="per-layer", schedule=(0, 1))
    )
    assert kept(one) == {"layers.1.mlp": 400}


def test_heads_that_the_config_refuses_are_left_whole() -> None:
    """The config wants the hidden width to divide by the heads; what no number of heads can give, the MLP gives."""
    config = family_config("llama", hidden_size=112, num_attention_heads=7, num_key_value_heads=7, head_dim=16)
    found = discover(config)
    decided = plan(found, CutOptions(ratio=0.3, scope="local", shape="uniform"), config=config)
    assert decided.settings is not None
    assert decided.parameters["pruned_non_embedding"] / decided.parameters["dense_non_embedding"] == pytest.approx(
        0.7, abs=0.02
    )


def test_mlps_as_wide_as_experts_stay_so() -> None:
    config = tiny_config("jamba")
    config.update({"intermediate_size": 80})
    decided = plan(discover(config), CutOptions(ratio=0.13, scope="local", shape="uniform"), config=config)
    assert {group.kind for group in decided.groups} >= {"mlp", "expert_mlp"}
    assert decided.settings is not None, decided.refusal
    assert decided.settings["intermediate_size"] % 8 == 0


def test_widths_that_no_multiple_of_8_divides_are_cut_in_proportion() -> None:
    config = tiny_config("deepseek_v3")
    config.update({"moe_intermediate_size": 12, "n_shared_experts": 2, "num_hidden_layers": 2})
    found = discover(config)
    wider = [replace(group, multiple=math.gcd(8, group.units)) for group in found.groups if "shared" in group.kind]
    narrow = [group for group in found.groups if group.kind == "expert_mlp"]
    search = SizeSearch(found, {"mlp": [*narrow, *wider]}, CutOptions(ratio=0.3, scope="local", shape="uniform"))
    assert [search.multiple_of(group) for group in (narrow[0], wider[0])] == [4, 8]


@pytest.mark.parametrize("shared", [1, 2, 3])
@pytest.mark.parametrize("of", ["non-embedding", "units"])
def test_experts_that_share_a_setting_stay_in_proportion(of: Any, shared: int) -> None:
    """Stacked experts have a width that is a multiple of 8; the shared one, which needs none, has so many times it."""
    config = tiny_config("deepseek_v3")
    config.update({"moe_intermediate_size": 80, "n_shared_experts": shared, "num_hidden_layers": 2})
    found = discover(config)
    for ratio in (0.13, 0.2, 0.37, 0.5):
        decided = plan(found, CutOptions(ratio=ratio, of=of, scope="local", shape="uniform"), config=config)
        assert decided.settings is not None, decided.refusal
        widths = {group.kind: group.kept for group in decided.groups}
        assert (
            widths["shared_mlp"] == shared * widths["expert_mlp"] == shared * decided.settings["moe_intermediate_size"]
        )


def test_a_plan_survives_json(discovery: Discovery, scores: Scores, tmp_path: Path) -> None:
    decided = plan(
        discovery, CutOptions(ratio=0.3, layers=(1, 3), scope="local", shape="uniform"), config=CONFIG, scores=scores
    )
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(decided.to_json()))
    assert read_plan(file) == decided
    sizes = plan(discovery, CutOptions(ratio=0.3, scope="local", shape="uniform"), config=CONFIG)
    assert not sizes.decided
    assert plan_from_json(json.loads(json.dumps(sizes.to_json()))) == sizes


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"layers": (2, 9)}, r"layers=2:9 is outside the model: it has layers 0:4"),
        ({"layers": (3, 3)}, r"layers=3:3 is outside the model"),
        ({"axes": ("hidden",), "layers": (0, 2)}, "hidden runs through every layer"),
        ({"ratio": 0.0}, r"ratio=0 of non-embedding removes no unit .* removes one unit"),
        (
            {"ratio": 0.0001, "of": "units", "axes": ("attention",)},
            r"removes no unit of any group \(units: attention 3\)",
        ),
        (
            {"ratio": 0.9999, "of": "units", "axes": ("mlp",)},
            r"layers\.0\.mlp: removing 800 of its 800 units would empty it",
        ),
        ({"ratio": 0.99}, r"ratio=0\.99 leaves .* at most ratio=0\.\d+"),
        ({"ratio": None, "target": 10**12}, r"target=1,000,000,000,000 is more than the dense model's"),
        ({"round_to": 1000}, r"round_to=1000 is more than the 800 units of layers\.0\.mlp"),
    ],
)
def test_what_cannot_be_done_is_refused(discovery: Discovery, cut: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(discovery, CutOptions(**cut), config=CONFIG)


def test_a_kind_that_the_model_lacks_is_refused() -> None:
    found = discover(family_config("gpt2"))
    with pytest.raises(PlanError, match=r"axes=query: .* has no group of that kind in layers 0:3; it has: attention"):
        plan(found, CutOptions(ratio=0.5, of="units", axes=("query",)))


@pytest.mark.parametrize(("model_type", "axis"), [("bloom", "mlp"), ("zamba", "attention")])
def test_of_the_usual_axes_those_are_cut_that_the_model_has(model_type: str, axis: str) -> None:
    found = discover(tiny_config(model_type))
    assert plan(found, CutOptions(ratio=0.4, of="units")).groups
    assert [*groups_to_cut(found, CutOptions())] == [axis]
    both = CutOptions(axes=("mlp", "attention"))
    with pytest.raises(PlanError, match=rf"has no group of that kind .*\. Cut what it has, for example axes={axis}$"):
        groups_to_cut(found, both)


def test_a_model_without_any_of_the_usual_axes_is_refused() -> None:
    with pytest.raises(PlanError, match=r"axes=attention: .*; it has: .*state.*, for example axes=state$"):
        groups_to_cut(discover(tiny_config("mamba")), CutOptions())


def test_a_hidden_width_that_the_config_refuses_names_the_nearest(discovery: Discovery) -> None:
    decided = plan(discovery, CutOptions(ratio=0.27, of="units", axes=("hidden",)), config=CONFIG)
    assert decided.settings is None
    assert decided.refusal is not None
    assert "hidden 87 of 120" in decided.refusal
    assert "nearest widths that it accepts are 84 and 90; --round-to 6" in decided.refusal


def test_memory_is_counted_in_the_dtype_that_is_named(discovery: Discovery) -> None:
    target = plan(discovery, CutOptions(ratio=0.2, of="parameters")).parameters["pruned"]
    parameters = plan(discovery, CutOptions(ratio=None, target=target, of="parameters")).groups
    sizes: dict[Any, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
    for dtype, size in sizes.items():
        options = CutOptions(ratio=None, target=size * target, of="memory", memory_dtype=dtype)
        assert plan(discovery, options).groups == parameters


def test_more_layers_than_there_are_in_the_range(discovery: Discovery) -> None:
    options = CutOptions(ratio=0.75, of="units", axes=("layers",), layers=(0, 2), score="block_influence")
    scores = Scores("block_influence", "sum", {"layers": torch.arange(4.0)})
    with pytest.raises(PlanError, match=r"layers=0:2 holds 2 layers, fewer than the 3 to drop"):
        plan(discovery, options, scores=scores)


def test_scores_must_fit(discovery: Discovery) -> None:
    def with_units(units: dict[str, torch.Tensor]) -> Plan:
        return plan(discovery, CutOptions(ratio=0.5, of="units", axes=("mlp",)), scores=Scores("l2", "sum", units))

    with pytest.raises(ScoreError, match=r"no scores for layers\.0\.mlp"):
        with_units({})
    names = [f"layers.{i}.mlp" for i in range(4)]
    with pytest.raises(ScoreError, match="has 800 units and 5 scores"):
        with_units({name: torch.ones(5) for name in names})
    with pytest.raises(ScoreError, match=r"the scores of layers\.0\.mlp hold NaN or Inf"):
        with_units({name: torch.full((800,), math.nan) for name in names})


def test_plan_files_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with pytest.raises(PlanError, match=r"no plan at .*: write one with `secateur plan MODEL --out"):
        read_plan(file)
    for text, message in (
        ("{", "is not a plan"),
        ("[]", "expected a JSON object, found list"),
        ('{"format": 0}', "has format 0, this version reads 2"),
        ('{"format": 2, "modle": 1}', r"'modle' is unknown.*Did you mean model"),
    ):
        file.write_text(text)
        with pytest.raises(PlanError, match=message):
            read_plan(file)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_plan_says_what_rounding_costs(discovery: Discovery, scope: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    units = {f"layers.{i}.mlp": torch.rand(800, generator=generator) * level for i, level in enumerate((1, 9, 2, 5))}
    scores = Scores("l2", "sum", units)
    options = CutOptions(ratio=0.3, axes=("mlp",), shape="per-layer", score="l2", scope=scope, round_to=128)
    assert "rounding" not in plan(discovery, replace(options, round_to=1), scores=scores).scored
    decided = plan(discovery, options, scores=scores)
    found = decided.scored["rounding"]
    whole = sum(float(scores.units[f"layers.{i}.mlp"].sum()) for i in range(4))
    gone = 0.0
    for group in decided.groups:
        assert group.keep is not None
        gone += float(scores.units[group.name].sum() - scores.units[group.name][list(group.keep)].sum())
    assert found["planned"] == pytest.approx(gone / whole, rel=1e-5)
    other = plan(discovery, replace(options, round_to=1), scores=scores)
    assert found["any_widths"] != found["planned"]
    kept = {g.name: g.keep for g in other.groups}
    names = [f"layers.{i}.mlp" for i in range(4)]
    stays = sum(float(scores.units[name][list(kept.get(name) or range(800))].sum()) for name in names)
    assert found["any_widths"] == pytest.approx(1 - stays / whole, rel=1e-4)
    assert "rounded to multiples of 128, the cut takes" in printed(decided)


def printed(decided: Plan) -> str:
    """The table of a plan, as text."""
    text = io.StringIO()
    console = Console(width=200, file=text)
    for line in plan_tables(decided):
        console.print(line)
    return text.getvalue()
