"""The frontier of a sweep: the points that no other beats."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from secateur.pipeline.frontier import frontier


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 3, width=16)), max_size=12))
def test_a_point_is_on_it_unless_another_beats_it(points: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    assert frontier(points) == [not any(beats(other, point) for other in points) for point in points]


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 3)), min_size=1), st.randoms())
def test_the_order_of_points_does_not_matter(points: list[tuple[float, float]], order: random.Random) -> None:
    by_point = dict(zip(points, frontier(points), strict=True))
    shuffled = order.sample(points, len(points))
    assert frontier(shuffled) == [by_point[point] for point in shuffled]


def test_a_ruined_point_is_not_on_it_where_another_is_as_small() -> None:
    assert frontier([(5, float("inf")), (5, 2.0), (4, float("inf"))]) == [False, True, False]
