"""Plain data becomes the value that a type declares, or one line says which part of it cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.checkpoint.record import Record
from secateur.decoding import build, build_known, decode, values_by_field
from secateur.evaluation.options import ProfileOptions
from secateur.pipeline.recipe import PruneRecipe
from secateur.planning.plan import Plan

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@pytest.mark.parametrize(
    ("kind", "data", "value"),
    [
        (float, "1e-4", 1e-4),
        (float, 2, 2),
        (float | None, None, None),
        (Literal["a", "b"], "a", "a"),
        (Path, "a/b", Path("a/b")),
        (tuple[int, float], [1, 2.5], (1, 2.5)),
        (Mapping[str, tuple[int, ...]], {"a": [1]}, {"a": (1,)}),
        (Any, [{}], [{}]),
        (ProfileOptions, {"seq_lens": [8]}, ProfileOptions(seq_lens=(8,))),
    ],
)
def test_values(kind: Any, data: Any, value: Any) -> None:
    found = decode(kind, data)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("kind", "data", "why"),
    [
        (int, True, "True is no int"),
        (int, 1.0, "1.0 is no int"),
        (float, float("nan"), "nan is no float"),
        (float, True, "True is no float"),
        (str, None, "None is no str"),
        (int | None, "a", "'a' is no int"),
        (Literal["mlp", "query"], "mpl", "'mpl' is no mlp or query. Did you mean mlp?"),
        (tuple[int, ...], {}, "{} is no list"),
        (tuple[int, int], [1], "[1] is no list of 2"),
        (Mapping[str, int], {"a": "b"}, "a: 'b' is no int"),
        (ProfileOptions, [], "[] is no ProfileOptions"),
        (Record, {}, "model is missing"),
    ],
)
def test_a_value_of_another_type_is_named(kind: Any, data: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(why)}$"):
        decode(kind, data)


def test_what_an_unknown_key_is_taken_for() -> None:
    with pytest.raises(ValueError, match=r"f: 'repeat' is unknown\. Known: seq_lens, .* Did you mean repeats\?"):
        build(ProfileOptions, {"repeat": 3}, "f")
    assert build_known(ProfileOptions, {"repeat": 3}) == ProfileOptions()
    assert values_by_field(PruneRecipe, {"cut": {"ratio": 0.5}}) == {"cut": {"ratio": 0.5}}


@given(JSON)
def test_no_data_fails_in_another_way(data: Any) -> None:
    for kind in (Record, Plan, PruneRecipe):
        with pytest.raises(ValueError, match=r"is no |is unknown|is missing"):
            decode(kind, data)
