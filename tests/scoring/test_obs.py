"""Closed forms against what a solver finds by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.scoring.obs import (
    STRIP,
    TOKENS_AT_ONCE,
    add_gram,
    fill_above,
    gram_dtype,
    least_squares,
    output_error,
    removal_costs,
    unit_costs,
)


def problem(seed: int, rows: int = 5, columns: int = 8, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A matrix and what it reads, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixed
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


@given(st.integers(0, 10**6), st.sets(st.integers(0, 7), min_size=1, max_size=7))
@settings(max_examples=25)
def test_least_squares_is_the_normal_equations_solution(seed: int, kept: set[int]) -> None:
    w, x = problem(seed)
    at = torch.tensor(sorted(kept))
    ours = least_squares(w, x.t() @ x, at, damping=0.0)
    solver = torch.linalg.lstsq(x[:, at], x @ w.t()).solution.t()
    assert torch.allclose(ours, solver, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damping", [0.0, 0.01, 10.0])
def test_removing_nothing_changes_nothing(damping: float) -> None:
    w, x = problem(1)
    assert torch.allclose(least_squares(w, x.t() @ x, torch.arange(8), damping=damping), w, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=12)
def test_a_units_cost_is_the_error_that_least_squares_leaves(seed: int) -> None:
    w, x = problem(seed)
    unit_of = torch.tensor([0, 0, 1, -1, 2, 2, 2, 3])
    gram = x.t() @ x
    for unit, cost in enumerate(unit_costs(w, gram, unit_of, damping=0.0).tolist()):
        at = torch.nonzero(unit_of != unit).flatten()
        change = torch.zeros_like(w)
        change[:, at] = least_squares(w, gram, at, damping=0.0)
        assert output_error(change - w, gram) == pytest.approx(cost, rel=1e-6)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 10.0]))
@settings(max_examples=12)
def test_damping_counts_the_changes_of_the_others_alone(seed: int, damping: float) -> None:
    w, x = problem(seed)
    gram, unit_of = x.t() @ x, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    ridge = damping * float(gram.diagonal().mean())

    def objective(gone: Sequence[int]) -> float:
        at = torch.nonzero(~torch.isin(unit_of, torch.tensor(gone))).flatten()
        change = -w.clone()
        change[:, at] = least_squares(w, gram, at, damping=damping) - w[:, at]
        return output_error(change, gram) + ridge * float(change[:, at].square().sum())

    for unit, cost in enumerate(unit_costs(w, gram, unit_of, damping=damping).tolist()):
        assert cost == pytest.approx(objective([unit]), rel=1e-6)
    order, costs = removal_costs(w, gram, unit_of, keep=1, damping=damping)
    assert float(costs.sum()) == pytest.approx(objective(order), rel=1e-6)


@pytest.mark.parametrize("unit_of", [range(8), (3, -1, 0, 1, -1, 4, 2, -1), (-1, 0, 1, 0, 2, -1, 1, 3)])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=12)
def test_greedy_costs_add_up_to_the_error_of_all_removed_units(unit_of: Sequence[int], seed: int) -> None:
    """Columns of no unit (-1) stay, and make up for the others."""
    w, x = problem(seed)
    gram, units = x.t() @ x, max(unit_of) + 1
    order, costs = removal_costs(w, gram, torch.tensor(unit_of), keep=2, damping=0.0)
    at = torch.tensor([column for column, unit in enumerate(unit_of) if unit not in order])
    change = torch.zeros_like(w)
    change[:, at] = least_squares(w, gram, at, damping=0.0)
    assert len(set(order)) == units - 2
    assert float(costs.sum()) == pytest.approx(output_error(change - w, gram), rel=1e-6)


def test_the_arguments_are_left_unchanged() -> None:
    w, x = problem(3)
    product = x.t() @ x
    w_before, product_before = w.clone(), product.clone()
    removal_costs(w, product, torch.arange(8))
    assert torch.equal(w, w_before)
    assert torch.equal(product, product_before)


def test_greedy_removal_finds_the_pair_that_single_costs_miss() -> None:
    # Columns 0 and 1 read the same feature: alone, each costs nothing; together they cost most.
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = torch.stack([x[:, 0], x[:, 0] + 1e-3 * x[:, 1], 0.5 * x[:, 2]], 1)
    w, gram = torch.ones(1, 3, dtype=torch.float64), x.t() @ x

    def error(gone: tuple[int, ...]) -> float:
        at = torch.tensor([i for i in range(3) if i not in gone])
        change = torch.zeros_like(w)
        change[:, at] = least_squares(w, gram, at, damping=0.0)
        return output_error(change - w, gram)

    order, _ = removal_costs(w, gram, torch.arange(3), keep=1, damping=0.0)
    assert set(unit_costs(w, gram, torch.arange(3), damping=0.0).argsort()[:2].tolist()) == {0, 1}
    assert error(tuple(order)) == pytest.approx(min(error(pair) for pair in itertools.combinations(range(3), 2)))


def test_units_without_columns_go_first_and_cost_nothing() -> None:
    w, x = problem(4)
    order, costs = removal_costs(w, x.t() @ x, torch.tensor([0, 0, 2, 2, 2, 3, 3, 3]), keep=2)
    assert order[0] == 1
    assert float(costs[0]) == 0


def test_damping_makes_a_singular_gram_matrix_invertible() -> None:
    w, x = problem(5, tokens=3)
    assert torch.isfinite(unit_costs(w, x.t() @ x, torch.arange(8))).all()


@pytest.mark.parametrize("columns", [1, 5, STRIP, STRIP + 1, 3 * STRIP - 7])
def test_a_gram_matrix_in_strips(columns: int) -> None:
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    total = torch.zeros(columns, columns, dtype=x.dtype)
    add_gram(total, x)
    fill_above(total)
    assert torch.allclose(total, x.t() @ x, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_over_blocks_of_tokens(dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS_AT_ONCE + 9, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    total, exact = torch.ones(5, 5, dtype=gram_dtype(x)), torch.zeros(5, 5, dtype=torch.float64)
    for each in (total, exact):
        add_gram(each, x)
        fill_above(each)
    assert torch.allclose(total.double(), 1 + x.double().t() @ x.double(), rtol=1e-5, atol=1e-3)
    assert torch.allclose(exact, x.double().t() @ x.double(), rtol=1e-12, atol=1e-9)
