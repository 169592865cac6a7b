"""One ranking over all groups: prices, budgets, floors, widths, shapes; the score that it is made for."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from families import GROUPED, family_config, family_model
from recipes import cut_in_memory
from secateur import CutOptions, discover, plan, prune, score
from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.evaluation.latency import latency_table
from secateur.planning.latency import LatencyTable
from secateur.planning.plan import Plan
from secateur.report.tables.plan import plan_tables
from secateur.scoring.passes.memory import fitting_batches
from secateur.scoring.scores import Scores, statistics_for

CONFIG = family_config("llama", hidden_size=120, intermediate_size=800, num_hidden_layers=4)
GLOBAL: dict[str, Any] = {"min_keep": 0.0, "scope": "global", "shape": "per-layer", "score": "l2"}
WINDOWS = torch.randint(3, 97, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def discovery() -> Discovery:
    return discover(CONFIG)


def drawn(discovery: Discovery, seed: int, spread: float = 2.0) -> Scores:
    """Scores that differ between layers by factors."""
    generator = torch.Generator().manual_seed(seed)
    units = {}
    for group in discovery.groups:
        level = torch.exp(spread * torch.randn((), generator=generator))
        units[group.name] = torch.rand(group.units, generator=generator) * level
    return Scores("l2", "sum", units)


def kept(decided: Plan) -> dict[str, int]:
    return {group.name: group.kept for group in decided.groups}


@given(st.floats(0.05, 0.8), st.sampled_from(["parameters", "non-embedding", "macs", "memory"]), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_the_budget_is_met_within_half_a_percent(ratio: float, of: Any, seed: int) -> None:
    discovery = discover_once()
    decided = plan(discovery, CutOptions(ratio=ratio, of=of, **GLOBAL), scores=drawn(discovery, seed))
    sizes = decided.sizes.sizes
    if of == "macs":
        removed = 1 - sum(count_macs(discovery, sizes).values()) / sum(count_macs(discovery).values())
    else:
        embeddings = of != "non-embedding"
        removed = 1 - count_parameters(discovery, sizes, embeddings=embeddings) / count_parameters(
            discovery, embeddings=embeddings
        )
    assert removed == pytest.approx(ratio, abs=0.005)


_FOUND: list[Discovery] = []


def discover_once() -> Discovery:
    if not _FOUND:
        _FOUND.append(discover(CONFIG))
    return _FOUND[0]


@given(st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_no_unit_that_stays_is_cheaper_than_one_that_goes(seed: int) -> None:
    discovery = discover_once()
    scores = drawn(discovery, seed)
    options = CutOptions(ratio=0.3, axes=("mlp",), **GLOBAL)
    decided = plan(discovery, options, scores=scores)
    keep = {group.name: set(group.keep or ()) for group in decided.groups}
    stays: list[float] = []
    goes: list[float] = []
    for group in discovery.groups:
        if group.kind == "mlp":
            for unit, value in enumerate(scores.units[group.name].tolist()):
                (stays if unit in keep.get(group.name, range(group.units)) else goes).append(value)
                if group.name in keep and len(keep[group.name]) == 1:
                    (stays if unit in keep[group.name] else goes).pop()  # the last of a group stays at any price
    assert max(goes) <= min(stays)


def test_a_unit_is_weighed_by_what_goes_with_it(discovery: Discovery) -> None:
    """A head of equal worth per parameter competes with channels; at a thousandth of it, all heads go first."""
    sizes = {"attention": 0, "mlp": 0}
    for group in discovery.groups:
        if group.kind in sizes:
            sizes[group.kind] = count_parameters(discovery) - count_parameters(discovery, {group.name: group.units - 1})
    units = {
        group.name: torch.full((group.units,), float(sizes[group.kind]))
        + torch.rand(group.units, generator=torch.Generator().manual_seed(group.layer or 0))
        for group in discovery.groups
        if group.kind in sizes
    }
    even = plan(discovery, CutOptions(ratio=0.3, **GLOBAL), scores=Scores("l2", "sum", units))
    assert {group.kind for group in even.groups} == {"attention", "mlp"}
    cheap = {name: x / 1000 if name.endswith("attention") else x for name, x in units.items()}
    decided = plan(discovery, CutOptions(ratio=0.1, **GLOBAL), scores=Scores("l2", "sum", cheap))
    assert all(group.kept == 1 for group in decided.groups if group.kind == "attention")


def test_layers_that_matter_keep_all(discovery: Discovery) -> None:
    scores = drawn(discovery, 0, spread=0.0)
    scores.units["layers.0.mlp"].mul_(1e4)
    decided = plan(discovery, CutOptions(ratio=0.3, axes=("mlp",), **GLOBAL), scores=scores)
    assert "layers.0.mlp" not in kept(decided)


def test_what_must_stay(discovery: Discovery) -> None:
    scores = drawn(discovery, 0, spread=0.0)
    scores.units["layers.2.mlp"].mul_(1e-9)
    options = CutOptions(ratio=0.3, axes=("mlp",), **{**GLOBAL, "min_keep": 0.25})
    assert kept(plan(discovery, options, scores=scores))["layers.2.mlp"] == 200
    assert kept(plan(discovery, replace(options, min_keep=0.0), scores=scores))["layers.2.mlp"] == 1


@pytest.mark.parametrize("multiple", [8, 32, 64, 128])
def test_free_widths_are_multiples(discovery: Discovery, multiple: int) -> None:
    options = CutOptions(ratio=0.4, round_to=multiple, **GLOBAL)
    decided = plan(discovery, options, scores=drawn(discovery, 3))
    assert all(group.kept % multiple == 0 for group in decided.groups if group.kind == "mlp")


def test_a_uniform_shape_weighs_heads_against_channels(discovery: Discovery) -> None:
    scores = drawn(discovery, 1, spread=0.0)
    options = CutOptions(ratio=0.3, **{**GLOBAL, "shape": "uniform"})
    usual = plan(discovery, options, config=CONFIG, scores=scores)
    assert usual.settings is not None
    assert len({group.kept for group in usual.groups if group.kind == "mlp"}) == 1
    dear = Scores("l2", "sum", {n: x * (1e6 if n.endswith("attention") else 1) for n, x in scores.units.items()})
    assert {group.kind for group in plan(discovery, options, config=CONFIG, scores=dear).groups} == {"mlp"}
    cheap = Scores("l2", "sum", {n: x * (1e-6 if n.endswith("attention") else 1) for n, x in scores.units.items()})
    heads = [g for g in plan(discovery, options, config=CONFIG, scores=cheap).groups if g.kind == "attention"]
    assert len(heads) == 4


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_plan_says_what_rounding_costs(discovery: Discovery, scope: str) -> None:
    scores = drawn(discovery, 4)
    options = CutOptions(ratio=0.3, axes=("mlp",), **{**GLOBAL, "scope": scope}, round_to=128)
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
    console = Console(width=200, file=io.StringIO())
    for line in plan_tables(decided):
        console.print(line)
    found: str = console.file.getvalue()  # type: ignore[attr-defined]
    return found


def test_without_scores_every_group_gives_the_same_share(discovery: Discovery) -> None:
    sizes = plan(discovery, CutOptions(ratio=0.3, **GLOBAL))
    assert len({group.kept for group in sizes.groups if group.kind == "mlp"}) == 1


def test_scores_below_zero_have_no_price(discovery: Discovery) -> None:
    units = {group.name: -torch.ones(group.units) for group in discovery.groups}
    with pytest.raises(PlanError, match="below zero"):
        plan(discovery, CutOptions(ratio=0.3, **GLOBAL), scores=Scores("l2", "sum", units))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"scope": "globel"},
            r"scope='globel' is unknown\. Known: auto, local, global, sensitivity\. Did you mean global\?",
        ),
        ({"shape": "round"}, "shape='round'"),
        ({"repair": "glue"}, "repair='glue'"),
        ({"choose": "dice"}, "choose='dice'"),
        ({"min_keep": 1.0}, "min_keep=1 is outside"),
        ({"scope": "global", "of": "units"}, "use scope=local"),
        ({"scope": "sensitivity", "axes": ("layers",)}, "axes=layers needs scope=local"),
    ],
)
def test_refusals(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        CutOptions(ratio=0.2, **given)


def test_automatic_options_follow_from_the_others() -> None:
    assert CutOptions().choose == "obs"
    assert CutOptions(score="l2").choose == "score"
    units = CutOptions(of="units")
    assert (units.scope, units.shape, units.repair) == ("local", "uniform", "least-squares")
    hidden = CutOptions(axes=("hidden",))
    assert (hidden.scope, hidden.repair, hidden.choose) == ("local", "least-squares", "score")
    assert CutOptions(axes=("layers",), score="layer_loss").repair == "none"


# --- the Fisher information of masks ----------------------------------------------------------------------------------


def by_autograd(model: PreTrainedModel, masks: dict[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Group -> 1/2 tokens x sum over samples of the square of the mean loss's derivative by its masks."""
    parameters = {
        group: torch.ones(int(unit_of.max()) + 1, requires_grad=True) for group, (_, unit_of) in masks.items()
    }
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, group=group, unit_of=unit_of: (args[0] * parameters[group][unit_of], *args[1:])
        )
        for group, (path, unit_of) in masks.items()
    ]
    total = {group: torch.zeros_like(parameter) for group, parameter in parameters.items()}
    for window in WINDOWS:
        loss = model(input_ids=window[None], labels=window[None]).loss / len(WINDOWS)
        for group, gradient in zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True):
            total[group] += gradient.square()
    for handle in handles:
        handle.remove()
    return {group: each * WINDOWS.numel() / 2 * (1 - 1 / WINDOWS.shape[1]) for group, each in total.items()}


def test_fisher_information_is_autograds() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    scores = score(model, name="fisher", windows=WINDOWS)
    expected = by_autograd(
        model,
        {
            "layers.1.mlp": ("model.layers.1.mlp.down_proj", torch.arange(84)),
            "layers.2.attention": ("model.layers.2.self_attn.o_proj", torch.arange(60) // 20),
        },
    )
    for group, values in expected.items():
        assert torch.allclose(scores.units[group], values, rtol=1e-4)


def test_only_what_reads_the_groups_is_looked_at() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    discovery = discover(model)
    groups = [group for group in discovery.groups if group.kind in ("mlp", "attention")]
    found = statistics_for("fisher", model, discovery, WINDOWS, groups=groups)
    assert {name.split(".", 3)[3] for name in found.masks} == {"mlp.down_proj.weight", "self_attn.o_proj.weight"}
    whole = statistics_for("fisher", model, discovery, WINDOWS)
    assert len(whole.masks) > len(found.masks)
    for name, by_dim in found.masks.items():
        assert {dim: torch.allclose(each, whole.masks[name][dim]) for dim, each in by_dim.items()} == {1: True}


def test_fisher_information_of_conv1d() -> None:
    model = family_model(family_config("gpt2"), dtype=torch.float32)
    scores = score(model, name="fisher", windows=WINDOWS)
    expected = by_autograd(model, {"layers.1.mlp": ("transformer.h.1.mlp.c_proj", torch.arange(84))})
    assert torch.allclose(scores.units["layers.1.mlp"], expected["layers.1.mlp"], rtol=1e-4)


def test_fisher_information_of_stacked_experts() -> None:
    config = AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    model = family_model(config, dtype=torch.float32)
    scores = score(model, name="fisher", windows=WINDOWS)
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    experts, channels = torch.zeros(4), torch.zeros(84)
    for window in WINDOWS:
        loss = model(input_ids=window[None], labels=window[None]).loss / len(WINDOWS)
        (gradient,) = torch.autograd.grad(loss, [weight])
        channels += (weight * gradient).sum((0, 1)).square()
        experts += (weight * gradient).sum((1, 2)).square()
    tokens = WINDOWS.numel() * (1 - 1 / WINDOWS.shape[1]) / 2
    assert torch.allclose(scores.units["layers.0.expert_mlp"], channels * tokens, rtol=1e-3)
    whole = scores.units["layers.0.expert"]  # all that an expert reads: its first matrices' inputs as well
    assert whole.shape == (4,)
    assert bool((whole > 0).all())


# --- in steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["units", "parameters", "non-embedding", "macs", "memory"])
def test_steps_end_at_the_budget(of: Any) -> None:
    model = family_model(family_config("llama", intermediate_size=400), dtype=torch.float32)
    discovery = discover(model)
    options = CutOptions(ratio=0.4, of=of, axes=("mlp",), score="l2", iterations=3, scope="local", shape="uniform")
    smaller, decided = cut_in_memory(model, discovery, options, None)
    one = plan(discovery, replace(options, iterations=1), config=model.config)
    assert decided.parameters["dense"] == count_parameters(discovery)
    assert decided.parameters["pruned"] == sum(p.numel() for p in smaller.parameters())
    assert decided.parameters["pruned"] == pytest.approx(one.parameters["pruned"], rel=0.01)
    assert decided.settings == {"intermediate_size": smaller.config.intermediate_size}


def test_a_plan_made_in_steps_is_one_of_the_dense_model() -> None:
    model = family_model(family_config("llama"), dtype=torch.float64)
    discovery = discover(model)
    options = CutOptions(ratio=0.4, scope="global", shape="per-layer", score="l2", iterations=3, min_keep=0.0)
    smaller, decided = cut_in_memory(model, discovery, options, None)
    at_once = prune(model, decided, discovery=discovery)
    with torch.no_grad():
        assert torch.allclose(at_once(WINDOWS).logits, smaller(WINDOWS).logits, rtol=1e-9, atol=1e-9)


def test_every_step_scores_and_repairs_what_the_last_one_left() -> None:
    model = family_model(family_config("llama"), dtype=torch.float64)
    discovery = discover(model)
    options = CutOptions(ratio=0.4)
    seen: list[str] = []
    _, twice = cut_in_memory(model, discovery, replace(options, iterations=2), WINDOWS, seen)
    _, once = cut_in_memory(model, discovery, options, WINDOWS)
    assert seen == [
        *("score, iteration 1", "repair, iteration 1", "cut, iteration 1"),
        *("score, iteration 2", "repair, iteration 2", "cut, iteration 2"),
    ]
    assert twice.groups != once.groups
    assert twice.parameters["pruned"] == pytest.approx(once.parameters["pruned"], rel=0.02)


def test_no_steps() -> None:
    with pytest.raises(PlanError, match="iterations=0 cuts nothing"):
        CutOptions(ratio=0.2, iterations=0, scope="local", shape="uniform")


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_budget_of_time_is_met_by_the_table(discovery: Discovery) -> None:
    table = LatencyTable(
        "a machine", 64, 1.0, {"mlp": ((200, 0.15), (400, 0.1), (800, 0.0)), "attention": ((1, 0.04), (3, 0.0))}
    )
    decided = plan(discovery, CutOptions(ratio=0.3, of="latency", **GLOBAL), scores=drawn(discovery, 0), latency=table)
    assert table.seconds(discovery, decided.sizes.sizes) == pytest.approx(0.7, abs=0.005)
    with pytest.raises(PlanError, match="needs a latency table"):
        plan(discovery, CutOptions(ratio=0.3, of="latency", **GLOBAL), scores=drawn(discovery, 0))


def test_a_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    discovery = discover(model)
    groups = [group for group in discovery.groups if group.kind in ("attention", "mlp")]
    table = latency_table(model, discovery, groups, seq_len=8, cache=tmp_path)
    assert [units for units, _ in table.savings["attention"]] == [1, 2, 3]
    assert [units for units, _ in table.savings["mlp"]] == [21, 42, 63, 84]
    assert table.dense_seconds > 0
    monkeypatch.setattr("secateur.evaluation.latency.measure_speed", None)
    assert latency_table(model, discovery, groups, seq_len=8, cache=tmp_path) == table
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    with pytest.raises(TypeError):  # a damaged file is measured again
        latency_table(model, discovery, groups, seq_len=8, cache=tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fisher_information_in_parts_is_that_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "mixtral":
        config = AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    else:
        config = family_config(family)
    model = family_model(config, dtype=torch.float32)
    whole = score(model, name="fisher", windows=WINDOWS)
    monkeypatch.setattr(
        "secateur.scoring.collect_masks.fitting_batches", lambda model, windows, *_: list(windows.tensor_split(3))
    )
    parts = score(model, name="fisher", windows=WINDOWS)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    for group, values in whole.units.items():
        assert torch.allclose(parts.units[group], values, rtol=1e-3, atol=1e-9 * float(values.max())), group


def test_parts_are_as_many_as_fit() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    layers = [f"model.layers.{i}" for i in range(3)]
    assert len(fitting_batches(model, WINDOWS, layers, 2**30)) == 1
    assert [len(part) for part in fitting_batches(model, WINDOWS, layers, 1)] == [1] * 5
