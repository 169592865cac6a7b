"""Sizes by one ranking of all units: budgets, floors, widths, shapes."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import family_config
from secateur import CutOptions, discover, plan
from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.planning.budget import COUNTERS
from secateur.planning.latency import LatencyTable
from secateur.planning.options import BudgetName
from secateur.planning.plan import Plan
from secateur.scoring.scores import Scores

CONFIG = family_config("llama", hidden_size=120, intermediate_size=800, num_hidden_layers=4)
GLOBAL: dict[str, Any] = {"min_keep": 0.0, "scope": "global", "shape": "per-layer", "score": "l2"}


@functools.cache
def discover_once() -> Discovery:
    return discover(CONFIG)


@pytest.fixture(scope="module")
def discovery() -> Discovery:
    return discover_once()


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
@settings(max_examples=25)
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


@given(st.integers(0, 99))
@settings(max_examples=15)
def test_no_unit_that_stays_is_cheaper_than_one_that_goes(seed: int) -> None:
    discovery = discover_once()
    scores = drawn(discovery, seed)
    options = CutOptions(ratio=0.3, axes=("mlp",), round_to=1, **GLOBAL)
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
    options = CutOptions(ratio=0.3, axes=("mlp",), round_to=1, **{**GLOBAL, "min_keep": 0.25})
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


def test_without_scores_every_group_gives_the_same_share(discovery: Discovery) -> None:
    sizes = plan(discovery, CutOptions(ratio=0.3, **GLOBAL))
    assert len({group.kept for group in sizes.groups if group.kind == "mlp"}) == 1


def test_scores_below_zero_have_no_price(discovery: Discovery) -> None:
    units = {group.name: -torch.ones(group.units) for group in discovery.groups}
    with pytest.raises(PlanError, match="below zero"):
        plan(discovery, CutOptions(ratio=0.3, **GLOBAL), scores=Scores("l2", "sum", units))


def test_a_budget_of_time_is_met_by_the_table(discovery: Discovery) -> None:
    table = LatencyTable(
        *("a machine", 64, 1.0),
        {"mlp": ((0.25, 0.15 / 800), (0.5, 0.1 / 800), (1.0, 0.0)), "attention": ((1 / 3, 0.04 / 3), (1.0, 0.0))},
    )
    decided = plan(discovery, CutOptions(ratio=0.3, of="latency", **GLOBAL), scores=drawn(discovery, 0), latency=table)
    assert table.seconds(discovery, decided.sizes.sizes) == pytest.approx(0.7, abs=0.005)
    with pytest.raises(PlanError, match="needs a latency table"):
        plan(discovery, CutOptions(ratio=0.3, of="latency", **GLOBAL), scores=drawn(discovery, 0))


@pytest.mark.parametrize("round_to", [None, 16])
def test_the_share_that_stays_is_of_every_scope(round_to: int | None, discovery: Discovery) -> None:
    options = CutOptions(ratio=0.6, of="units", score="l2", axes=("mlp",), min_keep=0.5, round_to=round_to)
    mlps = [group for group in discovery.groups if group.kind == "mlp"]
    sizes, fewer = (
        kept(plan(discovery, each, scores=drawn(discovery, 0))) for each in (options, replace(options, min_keep=0.0))
    )
    assert all(sizes[group.name] >= group.units / 2 > fewer[group.name] for group in mlps)
    assert all(sizes[group.name] % (round_to or 1) == 0 for group in mlps)
    with pytest.raises(PlanError, match=r"cutting mlp down to the fewest units leaves .*: at most ratio=0\."):
        plan(discovery, replace(options, of="parameters"), scores=drawn(discovery, 0))


def test_every_budget_that_the_options_offer_has_a_counter() -> None:
    assert {"units", *COUNTERS} == set(get_args(BudgetName))
