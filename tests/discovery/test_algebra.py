"""After two dimensions are unified, the same index of both names the same unit of every variable that is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secateur.discovery.algebra import (
    ONE,
    Concat,
    Expression,
    Fixed,
    Product,
    Variable,
    concat,
    kept_along,
    product,
    size_after,
    units_along,
    variables_in,
)
from secateur.discovery.unification import CUT_INSIDE, FIXED_POSITIONS, NO_COMMON_FACTOR, Unifier

Unit = tuple[str, int]
Draw = Callable[[st.SearchStrategy[Any]], Any]

SIZES = st.sampled_from([2, 3, 4, 6, 8, 8, 9, 12, 12, 16, 16, 18, 20, 24, 24, 30, 32, 32])
SMALL = range(2, 7)  # sizes of the variables inside an expression; one that stands alone has any size

many = settings(max_examples=80)


# --- what the properties are about ------------------------------------------------------------------------------


def coordinates(unifier: Unifier, expression: Expression) -> list[frozenset[Unit]]:
    """For every index of the dimension the units of free variables that it belongs to."""
    match expression:
        case Variable(name=name, size=size):
            free = unifier.reason(expression) is None
            return [frozenset({(name, unit)} if free else ()) for unit in range(size)]
        case Fixed(size=size):
            return [frozenset()] * size
        case Product(factors=factors):
            rows: list[frozenset[Unit]] = [frozenset()]
            for factor in factors:
                inner = coordinates(unifier, factor)
                rows = [row | unit for row in rows for unit in inner]
            return rows
        case Concat(parts=parts):
            return [unit for part in parts for unit in coordinates(unifier, part)]


def resolved(unifier: Unifier, expression: Expression) -> list[frozenset[Unit]]:
    return coordinates(unifier, unifier.resolve(expression))


def pattern(unifier: Unifier, expressions: Sequence[Expression]) -> list[int]:
    """Which indices of the expressions are tied to each other, whatever the variables are called; -1 is not free."""
    numbers: dict[frozenset[Unit], int] = {frozenset(): -1}
    return [numbers.setdefault(here, len(numbers)) for e in expressions for here in resolved(unifier, e)]


class World:
    """A unifier and random expressions over its variables, some shared between them and some frozen."""

    def __init__(self, draw: Draw, *, frozen: bool = True) -> None:
        self.unifier = Unifier()
        self.variables: list[Variable] = []
        self.draw = draw
        self._reasons = [*[None] * 9, "from the start" if frozen else None]

    def variable(self, size: int) -> Expression:
        """A variable of that size: now and then one that is already there, sometimes a frozen one."""
        known = [variable for variable in self.variables if variable.size == size]
        if known and self.draw(st.integers(0, 9)) < 4:
            return known[self.draw(st.integers(0, len(known) - 1))]
        made = self.unifier.variable(size, frozen=self.draw(st.sampled_from(self._reasons)))
        if isinstance(made, Variable):
            self.variables.append(made)
        return made

    def expression(self, size: int, depth: int = 3) -> Expression:
        """An expression of exactly that size, not always in normal form."""
        divisors = [n for n in range(2, size) if size % n == 0]
        kinds = ["variable"] * 4 if depth == 3 or size in SMALL else []
        if depth and size > 1:
            kinds += ["product"] * 6 * bool(divisors) + ["concat"] * 4
        match self.draw(st.sampled_from([*kinds, "fixed"])):
            case "variable":
                return self.variable(size)
            case "fixed":
                return Fixed(size)
            case "product":
                inner = self.draw(st.sampled_from(divisors))
                return Product((self.expression(size // inner, depth - 1), self.expression(inner, depth - 1)))
        at = self.draw(st.sampled_from([*divisors * 4, *range(1, size)]))
        return Concat((self.expression(at, depth - 1), self.expression(size - at, depth - 1)))

    def inner(self, size: int) -> int:
        """A divisor of the size."""
        return int(self.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])))

    def parts(self, size: int) -> list[int]:
        """Sizes that add up to the size, zeros among them."""
        ends = sorted(self.draw(st.lists(st.integers(0, size), max_size=3)))
        return [b - a for a, b in pairwise([0, *ends, size])]


# --- unification ------------------------------------------------------------------------------------------------


@many
@given(st.data())
def test_whatever_was_made_to_agree_agrees_index_by_index_from_then_on(data: st.DataObject) -> None:
    world = World(data.draw)
    equal: list[tuple[Expression, Expression]] = []
    for step in data.draw(st.lists(st.sampled_from(["unify", "unify", "factor", "cut"]), min_size=1, max_size=5)):
        size = data.draw(SIZES)
        expression = world.expression(size)
        if step == "unify":
            other = world.expression(size)
            world.unifier.unify(expression, other)
            equal.append((expression, other))
        elif step == "factor":
            outer, inner = world.unifier.factor(expression, world.inner(size))
            equal.append((expression, Product((outer, inner))))
        else:
            equal.append((expression, Concat(tuple(world.unifier.cut(expression, world.parts(size))))))
        for left, right in equal:
            assert resolved(world.unifier, left) == resolved(world.unifier, right)


@many
@given(st.data())
def test_the_parts_of_a_factoring_or_a_cut_have_the_sizes_asked_for(data: st.DataObject) -> None:
    world = World(data.draw)
    size = data.draw(SIZES)
    expression, inner, sizes = world.expression(size), world.inner(size), world.parts(size)
    assert [part.size for part in world.unifier.factor(expression, inner)] == [size // inner, inner]
    assert [part.size for part in world.unifier.cut(expression, sizes)] == sizes


@many
@given(st.data())
def test_a_new_variable_takes_the_form_of_what_it_meets_and_teaches_it_nothing(data: st.DataObject) -> None:
    world = World(data.draw)
    expression = world.expression(data.draw(SIZES))
    before = pattern(world.unifier, [expression])
    whole = world.unifier.variable(expression.size)
    twice = product([whole, Fixed(2)])
    world.unifier.unify(whole, expression)
    assert pattern(world.unifier, [expression]) == before
    assert pattern(world.unifier, [twice]) == [here for here in before for _ in range(2)]


@many
@given(st.data())
def test_an_expression_and_its_copy_over_other_variables_become_one_and_freeze_nothing(data: st.DataObject) -> None:
    world = World(data.draw, frozen=False)
    expression = world.unifier.resolve(world.expression(data.draw(SIZES)))
    others = {variable.name: world.unifier.variable(variable.size) for variable in variables_in(expression)}

    def copied(e: Expression) -> Expression:
        match e:
            case Variable(name=name):
                return others[name]
            case Product(factors=factors):
                return product([copied(factor) for factor in factors])
            case Concat(parts=parts):
                return concat([copied(part) for part in parts])
            case Fixed():
                return e

    before = pattern(world.unifier, [expression])
    copy = copied(expression)
    world.unifier.unify(expression, copy)
    assert pattern(world.unifier, [expression]) == before
    assert world.unifier.resolve(expression) == world.unifier.resolve(copy)


@many
@given(st.data())
def test_unification_is_symmetric(data: st.DataObject) -> None:
    world = World(data.draw)
    size = data.draw(SIZES)
    left, right = world.expression(size), world.expression(size)
    other = Unifier()
    for variable in world.variables:
        assert other.variable(variable.size, frozen=world.unifier.reason(variable)) == variable
    world.unifier.unify(left, right)
    other.unify(right, left)
    assert pattern(world.unifier, world.variables) == pattern(other, world.variables)


@many
@given(st.data())
def test_what_is_frozen_stays_frozen_for_its_first_reason(data: st.DataObject) -> None:
    world = World(data.draw)
    size = data.draw(SIZES)
    left, right = world.expression(size), world.expression(size)
    reasons = {variable: world.unifier.reason(variable) for variable in world.variables}
    world.unifier.unify(left, right)
    world.unifier.freeze(left, "later")
    assert world.unifier.is_frozen(left)
    assert world.unifier.is_frozen(right) or not set(resolved(world.unifier, right)) - {frozenset()}
    for variable, reason in reasons.items():
        if reason is not None:
            assert world.unifier.reason(variable) == reason
            assert world.unifier.is_frozen(variable)


def test_different_sizes_cannot_be_unified() -> None:
    unifier = Unifier()
    with pytest.raises(ValueError, match=r"sizes differ: v0 is 4, \(2\)·v1 is 6"):
        unifier.unify(unifier.variable(4), product([Fixed(2), unifier.variable(3)]))


def test_nothing_and_a_single_unit_need_no_variable() -> None:
    unifier = Unifier()
    assert (unifier.variable(0), unifier.variable(1)) == (Fixed(0), ONE)


# --- normal form ------------------------------------------------------------------------------------------------


def is_normal(expression: Expression) -> bool:
    match expression:
        case Product(factors=items):
            return (
                len(items) > 1
                and all(is_normal(item) and item.size != 1 and not isinstance(item, Product) for item in items)
                and not any(isinstance(a, Fixed) and isinstance(b, Fixed) for a, b in pairwise(items))
            )
        case Concat(parts=items):
            return (
                len(items) > 1
                and all(is_normal(item) and item.size != 0 and not isinstance(item, Concat) for item in items)
                and not any(a == b or (isinstance(a, Fixed) and isinstance(b, Fixed)) for a, b in pairwise(items))
            )
    return True


@many
@given(st.data())
def test_resolving_gives_the_normal_form_and_keeps_every_index_where_it_is(data: st.DataObject) -> None:
    world = World(data.draw)
    size = data.draw(SIZES)
    expression, other = world.expression(size), world.expression(size)
    normal = world.unifier.resolve(expression)
    assert normal.size == expression.size == size
    assert coordinates(world.unifier, normal) == coordinates(world.unifier, expression)
    world.unifier.unify(expression, other)
    for e in (expression, other):
        normal = world.unifier.resolve(e)
        assert is_normal(normal)
        assert world.unifier.resolve(normal) == normal


# --- what a cut leaves ------------------------------------------------------------------------------------------


def keeps(draw: Draw, variables: Sequence[Variable]) -> dict[str, Sequence[int]]:
    """Units to keep for some of the variables."""
    chosen = [variable for variable in variables if draw(st.booleans())]
    return {v.name: sorted(draw(st.sets(st.integers(0, v.size - 1)))) for v in chosen}


@many
@given(st.data())
def test_an_index_is_kept_when_all_its_units_are(data: st.DataObject) -> None:
    world = World(data.draw, frozen=False)
    expression = world.expression(data.draw(SIZES))
    keep = keeps(data.draw, world.variables)
    expected = [
        index
        for index, units in enumerate(coordinates(world.unifier, expression))
        if all(unit in keep.get(name, [unit]) for name, unit in units)
    ]
    assert kept_along(expression, keep) == expected
    assert size_after(expression, {name: len(units) for name, units in keep.items()}) == len(expected)


@many
@given(st.data())
def test_unified_expressions_keep_the_same_indices(data: st.DataObject) -> None:
    world = World(data.draw)
    size = data.draw(SIZES)
    left, right = world.expression(size), world.expression(size)
    world.unifier.unify(left, right)
    left, right = world.unifier.resolve(left), world.unifier.resolve(right)
    free = [v for v in dict.fromkeys(variables_in(concat([left, right]))) if world.unifier.reason(v) is None]
    keep = keeps(data.draw, free)
    assert kept_along(left, keep) == kept_along(right, keep)


@many
@given(st.data())
def test_every_index_names_its_unit_of_a_variable_that_does_not_meet_itself(data: st.DataObject) -> None:
    world = World(data.draw, frozen=False)
    expression = world.expression(data.draw(SIZES))
    assume(world.variables)
    name = data.draw(st.sampled_from(world.variables)).name
    found = [[unit for other, unit in units if other == name] for units in coordinates(world.unifier, expression)]
    assume(all(len(units) < 2 for units in found))
    assert units_along(expression, name) == [units[0] if units else -1 for units in found]


# --- cases from models ------------------------------------------------------------------------------------------


def test_halves_joined_in_another_order_are_one_half_twice() -> None:
    unifier = Unifier()
    dim = unifier.variable(8)
    first, second = unifier.cut(dim, [4, 4])
    unifier.unify(dim, concat([second, first]))  # x * cos + rotate_half(x) * sin
    half = unifier.resolve(first)
    assert isinstance(half, Variable)
    assert unifier.resolve(dim) == product([Fixed(2), half])
    assert unifier.reason(half) is None


def test_grouped_query_rows_are_kv_heads_times_queries_times_two_halves() -> None:
    unifier = Unifier()
    q_rows, k_rows = unifier.variable(48), unifier.variable(16)
    heads, q_dim = unifier.factor(q_rows, 8)
    kv, k_dim = unifier.factor(k_rows, 8)
    for dim in (q_dim, k_dim):
        first, second = unifier.cut(dim, [4, 4])
        unifier.unify(dim, concat([second, first]))
    repeats = unifier.variable(3)  # keys are expanded, then viewed as one head per query head
    unifier.unify(heads, product([kv, repeats]))
    unifier.unify(q_dim, k_dim)
    half = unifier.resolve(unifier.cut(q_dim, [4, 4])[0])
    assert unifier.resolve(q_rows) == product([kv, repeats, Fixed(2), half])
    assert unifier.resolve(k_rows) == product([kv, Fixed(2), half])
    assert not any(unifier.is_frozen(e) for e in (kv, repeats, half))


def test_a_fused_projection_is_its_parts_one_after_another() -> None:
    unifier = Unifier()
    rows = unifier.variable(16)
    q, k, v = unifier.cut(rows, [8, 4, 4])
    kv, dim = unifier.factor(k, 2)
    heads, q_dim = unifier.factor(q, 2)
    repeats = unifier.variable(2)
    unifier.unify(q_dim, dim)
    unifier.unify(heads, product([kv, repeats]))
    dim = unifier.resolve(dim)
    assert unifier.resolve(rows) == concat([product([kv, repeats, dim]), product([kv, dim]), v])


def test_an_interleaved_projection_is_heads_times_the_three_parts_of_one_head() -> None:
    unifier = Unifier()
    rows = unifier.variable(24)
    heads, one_head = unifier.factor(rows, 6)
    q, k, v = unifier.cut(one_head, [2, 2, 2])
    assert unifier.resolve(rows) == product([heads, concat([q, k, v])])
    unifier.unify(q, k)
    unifier.unify(k, v)
    assert unifier.resolve(rows) == product([heads, Fixed(3), unifier.resolve(q)])


def test_a_reshape_without_a_common_factor_freezes_both_dimensions() -> None:
    unifier = Unifier()
    a, b = unifier.variable(4), unifier.variable(6)
    outer, inner = unifier.factor(product([a, b]), 8)
    assert [unifier.reason(v) for e in (a, b, outer, inner) for v in variables_in(e)] == [NO_COMMON_FACTOR] * 4


def test_products_without_a_common_factor_freeze_each_other() -> None:
    unifier = Unifier()
    a, b, c, d = unifier.variable(2), unifier.variable(3), unifier.variable(3), unifier.variable(2)
    unifier.unify(product([a, b]), product([c, d]))
    assert [unifier.reason(v) for e in (a, b, c, d) for v in variables_in(e)] == [NO_COMMON_FACTOR] * 4


def test_a_cut_inside_a_unit_freezes_the_outer_factor_alone() -> None:
    unifier = Unifier()
    heads, dim = unifier.variable(3), unifier.variable(4)
    left, right = unifier.cut(product([heads, dim]), [6, 6])
    first, second = unifier.cut(dim, [2, 2])
    assert [unifier.reason(v) for v in variables_in(heads)] == [CUT_INSIDE]
    assert unifier.resolve(left) == concat([first, second, first])
    assert unifier.resolve(right) == concat([second, first, second])
    assert not unifier.is_frozen(dim)


def test_a_variable_that_meets_positions_of_the_code_is_frozen_by_them() -> None:
    unifier = Unifier()
    whole, unit = unifier.variable(6), unifier.variable(3)
    unifier.unify(whole, Fixed(6))
    assert [unifier.reason(v) for v in variables_in(whole)] == [FIXED_POSITIONS]
    unifier.unify(product([unit, Fixed(2)]), product([unifier.variable(3), unifier.variable(2)]))
    assert not unifier.is_frozen(unit)


def test_freezing_one_name_of_a_dimension_freezes_all_of_them() -> None:
    unifier = Unifier()
    a, b, c = (unifier.variable(6) for _ in range(3))
    unifier.unify(a, b)
    unifier.unify(b, c)
    outer, inner = unifier.factor(c, 2)
    unifier.freeze(outer, "first")
    unifier.freeze(a, "second")
    assert unifier.resolve(b) == product([outer, inner])
    assert [unifier.reason(v) for v in variables_in(unifier.resolve(b))] == ["first", "second"]
