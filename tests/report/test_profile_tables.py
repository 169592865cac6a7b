"""What people read of a profile or a sweep: whether a cut pays, and which cuts nothing beats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from secateur.evaluation.costs import BatchCost, Profile, RelativeCost
from secateur.evaluation.speed import Speed
from secateur.pipeline.frontier import Point, Refused, Sweep
from secateur.report.tables.evaluation import sweep_tables
from secateur.report.tables.profile import pays_little, profile_tables, verdicts


def shown(renderables: Iterable[RenderableType]) -> str:
    console = Console(width=220, highlight=False, markup=False)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return capture.get()


def row(name: str, macs: int, *milliseconds: float, first: str | None = None, macs_ratio: float = 1.0) -> Profile:
    """A profile of a grid with as many batches as there are times, each with quartiles of 5 % around it."""
    grid = []
    for number, each in enumerate(milliseconds):
        seconds, batch = each / 1000, 2**number
        speed = Speed(seconds, (0.95 * seconds, 1.05 * seconds), 50.0, 5 * 10**6)
        against = None if first is None else RelativeCost(macs_ratio, 100.0 / each, 1.1)
        grid.append(BatchCost(batch, 64, batch * macs, batch * 2048, speed, against))
    kinds = {"attention": macs // 4, "mlp": macs - macs // 4}
    counts = (10**6, 8 * 10**5, 64, macs, {"matmul": macs}, kinds, 4 * 10**6, 2048, (1024, 1024))
    return Profile(name, *counts, tuple(grid), first, None if first is None else 0.81)


DENSE = row("dense", 10**9, 100.0, 100.0)


def cut(*milliseconds: float, macs: int = 8 * 10**8) -> Profile:
    return row("cut", macs, *milliseconds, first="dense", macs_ratio=macs / 10**9)


def test_a_cut_that_pays_is_told_nothing() -> None:
    assert [*verdicts([DENSE, cut(82.0, 80.0)])] == []


def test_a_cut_that_does_not_pay_is_told_where() -> None:
    [line] = verdicts([DENSE, cut(82.0, 102.0)])
    assert line.startswith(
        "cut: 0.80 of the MACs promise 1.25 x, and reading a prompt is 0.98 x at batch 2 x 64: in time,"
    )
    assert "--round-to 64" in line


def test_noise_says_nothing() -> None:
    """0.97 x, but the quartiles reach half of the gain."""
    noisy = cut(103.0)
    [cost] = noisy.grid
    assert cost.speed is not None
    noisy = replace(noisy, grid=(replace(cost, speed=replace(cost.speed, prefill_quartiles=(0.085, 0.120))),))
    assert [*verdicts([replace(DENSE, grid=DENSE.grid[:1]), noisy])] == []


def test_a_model_with_more_macs_promises_nothing() -> None:
    assert [*verdicts([DENSE, cut(150.0, 150.0, macs=12 * 10**8)])] == []


@given(st.floats(0.01, 2), st.floats(0.01, 10))
def test_what_pays_is_at_least_half_of_the_gain(ratio: float, speedup: float) -> None:
    promised = 1 / ratio
    if ratio < 0.98:
        assert pays_little(ratio, speedup) == (speedup < 1 + (promised - 1) / 2)
        assert not pays_little(ratio, promised)
    else:
        assert not pays_little(ratio, speedup)


def test_the_table_of_a_profile() -> None:
    text = shown(profile_tables([DENSE, cut(82.0, 120.0)]))
    assert "1.22 x for 0.80 of the MACs" in text
    assert "1.10 x for 0.81 of the weights" in text
    assert "Batch and length" in text
    assert "0.83 x for 0.80 of the MACs" in text  # the second cell
    assert "mlp" in text
    assert "600.00 M (75.0%)" in text or "0.60 G (75.0%)" in text
    assert "MACs and cache are of one sequence of 64 tokens" in text


def test_sizes_alone_have_no_column_of_speed() -> None:
    sizes = Profile("m", 10, 8, 64, 100, {"matmul": 100}, {"mlp": 100}, 40, None, (), (BatchCost(1, 64, 100, None),))
    text = shown(profile_tables([sizes]))
    assert "prefill" not in text
    assert "unknown" in text  # the cache
    assert "Batch and length" not in text


def point(label: str, ratio: float, parameters: int, nll: float, **changes: Any) -> Point:
    perplexity = ({"data": "t", "seq_len": 128, "ppl": 10 * nll, "nll": nll, "tokens": 99},)
    return Point(label, "best", ratio, label, parameters, parameters, parameters, perplexity, **changes)


def test_the_table_of_a_sweep() -> None:
    rows = (point("dense", 0.0, 1000, 2.0, frontier=True), point("l2", 0.2, 800, 2.5))
    refused = (Refused("l2", "best", 0.99, "l2", "leaves [red]nothing"),)
    text = shown(sweep_tables(Sweep("m", "parameters", rows, refused)))
    lines = text.splitlines()
    [dense] = [line for line in lines if line.startswith("│ dense")]
    assert "*" in dense
    assert "100.0%" in dense
    [small] = [line for line in lines if line.startswith("│ l2") and "0.2" in line]
    assert "*" not in small
    assert "80.0%" in small
    assert any(line.startswith("│ l2") and "0.99" in line and "refused" in line for line in lines)
    assert "l2 0.99 refused: leaves [red]nothing" in text


def test_a_ruined_point_is_shown() -> None:
    ruined = point("l2", 0.9, 100, 800.0)
    ruined = replace(ruined, perplexity=({**ruined.perplexity[0], "ppl": None},))
    assert "inf" in shown(sweep_tables(Sweep("m", "parameters", (point("dense", 0, 1000, 2.0), ruined), ())))


@pytest.mark.parametrize("size", ["parameters", "macs"])
def test_what_the_mark_means_is_said(size: str) -> None:
    text = shown(sweep_tables(Sweep("m", size, (point("dense", 0.0, 1000, 2.0),), ())))
    assert f"as few {'MACs' if size == 'macs' else 'parameters'}" in text
