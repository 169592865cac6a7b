# mypy: ignore-errors
# ruff: noqa
"""Sweeps: the frontier, one load and one pass for many cuts, what is refused, and what a killed sweep has kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kills import after, commands
from recipes import recipe
from secateur import SecateurError, evaluate, load, load_tokenizer, plan_model
from secateur.errors import DataError, PlanError, ScoreError
from secateur.files import write_json
from secateur.pipeline.frontier import frontier
from secateur.pipeline.run import cut_as_planned
from secateur.pipeline.sweep import ratios_in, sweep
from secateur.planning.options import calibration_for

TEXTS = {"cats": "the cat sat on the mat and the dog sat on the log\n" * 30}
WHOLE: dict[str, Any] = {"calibration": {"samples": 6, "length": 24}, "seq_lens": (16,), "texts": TEXTS, "plot": False}
FAST = WHOLE | {"cut": {"axes": ("mlp",), "scope": "local", "shape": "uniform", "repair": "none"}}  # a stock config


def done(folder: Path) -> list[Path]:
    return sorted((folder / "sweep").glob("point-*.json"))


class TestFrontier:
    @given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 3, width=16)), max_size=12))
    def test_a_point_is_on_it_unless_another_beats_it(self, points: list[tuple[float, float]]) -> None:
        def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
            return a != b and a[0] <= b[0] and a[1] <= b[1]

        assert frontier(points) == [not any(beats(other, point) for other in points) for point in points]

    @given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 3)), min_size=1), st.randoms())
    def test_the_order_of_points_does_not_matter(self, points: list[tuple[float, float]], random: Any) -> None:
        by_point = dict(zip(points, frontier(points), strict=True))
        shuffled = random.sample(points, len(points))
        assert frontier(shuffled) == [by_point[point] for point in shuffled]

    def test_a_ruined_point_is_not_on_it_where_another_is_as_small(self) -> None:
        assert frontier([(5, float("inf")), (5, 2.0), (4, float("inf"))]) == [False, True, False]


class TestRatios:
    @pytest.mark.parametrize(
        ("text", "ratios"),
        [
            ("0.1:0.6:0.1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
            ("0.1:0.65:0.2", [0.1, 0.3, 0.5]),
            ("0.2", [0.2]),
            ("0.5,0.2", [0.5, 0.2]),
        ],
    )
    def test_both_ends_are_in(self, text: str, ratios: list[float]) -> None:
        assert ratios_in(text) == ratios

    @pytest.mark.parametrize(
        "text", ["", "a", "0.1:0.5", "0.1:0.5:0", "0.1:0.5:-1", "0.1:0.2:1e-9", "0.1:nan:0.1", "1;2"]
    )
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(
            PlanError, match=r"--ratios .*expected first:last:step or numbers, for example 0\.1:0\.6:0\.1"
        ):
            ratios_in(text)

    @pytest.mark.parametrize("text", ["0.5,1", "0:0.5:0.1", "-0.1", "20"])
    def test_shares_outside_are_refused(self, text: str) -> None:
        with pytest.raises(PlanError, match=r"ratio=.* is outside \(0, 1\)"):
            ratios_in(text)

    def test_a_range_that_holds_none(self) -> None:
        with pytest.raises(PlanError, match="there is no ratio"):
            ratios_in("0.5:0.4:0.2")


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the model is loaded, a pass for scores is made, and perplexity measured."""
    calls = dict.fromkeys(("load", "statistics_for", "evaluate"), 0)

    def count(module: str, name: str) -> None:
        real = getattr(sys.modules[module], name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(sys.modules[module], name, wrapped)

    count("secateur.pipeline.sweep", "load")
    count("secateur.pipeline.run", "statistics_for")
    count("secateur.pipeline.sweep", "evaluate")
    return calls


def test_one_load_and_one_pass_for_scores_of_a_kind(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    found = sweep(str(tiny), ratios=(0.2, 0.4), scores=("param_first", "vectorize"), run=tmp_path, **FAST)
    assert calls == {"load": 1, "statistics_for": 1, "evaluate": 5}
    assert [(row.label, row.ratio) for row in found.rows] == [
        ("dense", 0),
        ("param_first", 0.2),
        ("param_first", 0.4),
        ("vectorize", 0.2),
        ("vectorize", 0.4),
    ]
    assert found.rows[0].non_embedding_parameters > found.rows[1].non_embedding_parameters
    for row in found.rows[1:]:
        left = row.non_embedding_parameters / found.rows[0].non_embedding_parameters
        assert 1 - left == pytest.approx(row.ratio, abs=0.02)


def test_a_point_is_what_plan_and_evaluate_give(tiny: Path, tmp_path: Path) -> None:
    """The same cut by the commands for one cut has the same sizes and the same perplexity, repair and all."""
    found = sweep(str(tiny), ratios=(0.2,), presets=("best", "llm-pruner"), run=tmp_path, **WHOLE)
    row = next(row for row in found.rows if (row.label, row.ratio) == ("best", 0.2))
    calibration = calibration_for("best", **FAST["calibration"])
    decided = plan_model(recipe(str(tiny), cut={"ratio": 0.2}, calibration=calibration))
    tokenizer = load_tokenizer(str(tiny))
    [alone] = evaluate(
        cut_as_planned(load(str(tiny)), decided, tokenizer), tokenizer, TEXTS, protocols=["llm-pruner@16"]
    )
    assert (row.parameters, row.macs) == (decided.parameters["pruned"], decided.macs["pruned"])
    assert row.perplexity[0]["nll"] == pytest.approx(alone.nll, abs=1e-6)
    [dense] = evaluate(load(str(tiny)), tokenizer, TEXTS, protocols=["llm-pruner@16"])
    assert found.rows[0].perplexity[0]["nll"] == dense.nll
    assert {row.score for row in found.rows} == {"dense", "fisher", "param_first"}


def test_what_cannot_be_done_is_told_and_does_not_end_the_sweep(tiny: Path, tmp_path: Path) -> None:
    found = sweep(str(tiny), ratios=(0.95, 0.3), scores=("l2", "block_influence"), run=tmp_path, **FAST)
    assert [(row.label, row.ratio) for row in found.rows] == [("dense", 0), ("l2", 0.3)]
    refused = {(each.label, each.ratio): each.why for each in found.refused}
    assert "ratio=0.95 leaves" in refused["l2", 0.95]
    assert "use axes=layers with it" in refused["block_influence", 0.3]
    assert len(refused) == 3
    with pytest.raises(PlanError, match=r"none of the 1 cuts can be done; the first: ratio=0\.95 leaves"):
        sweep(str(tiny), ratios=(0.95,), scores=("l2",), run=tmp_path, **FAST)


class _Stopped(BaseException):
    """As Ctrl-C: not an error of ours."""


def test_points_that_are_done_are_not_done_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, number = evaluate, 0

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        if number == 3:
            raise _Stopped
        return real(*args, **kwargs)

    arguments: dict[str, Any] = {"ratios": (0.2, 0.4), "scores": ("l2", "param_first"), **FAST}
    monkeypatch.setattr(sys.modules["secateur.pipeline.sweep"], "evaluate", stops)
    with pytest.raises(_Stopped):
        sweep(str(tiny), run=tmp_path / "a", **arguments)
    assert len(done(tmp_path / "a")) == 2
    monkeypatch.setattr(sys.modules["secateur.pipeline.sweep"], "evaluate", real)
    calls = counted(monkeypatch)
    found = sweep(str(tiny), run=tmp_path / "a", resume=True, **arguments)
    assert (calls["evaluate"], found.resumed) == (3, 2)
    whole = sweep(str(tiny), run=tmp_path / "b", **arguments)
    assert found.rows == whole.rows
    calls = counted(monkeypatch)
    again = sweep(str(tiny), run=tmp_path / "a", resume=True, **arguments)
    assert calls == {"load": 0, "statistics_for": 0, "evaluate": 0}
    assert again.rows == whole.rows


def test_points_of_other_texts_windows_or_calibration_are_measured(tiny: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"ratios": (0.3,), "scores": ("param_first",), "run": tmp_path, "resume": True, **FAST}
    assert sweep(str(tiny), **arguments).resumed == 0
    assert sweep(str(tiny), **arguments).resumed == 2
    assert sweep(str(tiny), **{**arguments, "seq_lens": (8,)}).resumed == 0
    assert sweep(str(tiny), **{**arguments, "texts": {"cats": TEXTS["cats"] + "a cat"}}).resumed == 0
    assert sweep(str(tiny), **{**arguments, "calibration": {"samples": 5, "length": 24}}).resumed == 1  # the dense one


def test_a_damaged_point_is_measured_again(tiny: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"ratios": (0.3,), "scores": ("l2",), "run": tmp_path, **FAST}
    whole = sweep(str(tiny), **arguments)
    for number, text in enumerate(("", "[]", '{"score": 1}', '{"perplexity": [{}]}')):
        for path in done(tmp_path)[number % 2 :: 2]:
            path.write_text(text)
        found = sweep(str(tiny), resume=True, **arguments)
        assert (found.rows, found.resumed) == (whole.rows, 1)


def test_pictures(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments: dict[str, Any] = {**FAST, "plot": None, "seq_lens": (8, 16)}
    found = sweep(str(tiny), ratios=(0.2, 0.4), scores=("l2", "l1"), run=tmp_path, **arguments)
    png, svg = found.pictures
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first = svg.read_text()
    assert first.startswith("<?xml")
    sweep(str(tiny), ratios=(0.2, 0.4), scores=("l2", "l1"), run=tmp_path, resume=True, **arguments)
    assert svg.read_text() == first


def test_without_matplotlib(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    arguments: dict[str, Any] = {"ratios": (0.3,), "scores": ("l2",), "run": tmp_path, **FAST}
    with pytest.raises(DataError, match=r"needs the package matplotlib\. Run: pip install 'secateur\[plot\]'"):
        sweep(str(tiny), **{**arguments, "plot": True})
    assert sweep(str(tiny), **{**arguments, "plot": None}).pictures == ()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"scores": ("fischer",)}, ScoreError, r"unknown score 'fischer'. Did you mean fisher\?"),
        ({"presets": ("bets",)}, PlanError, "preset 'bets' is unknown. .*Did you mean best?"),
        ({"presets": ()}, PlanError, "presets is empty: name one, for example --presets best"),
        ({"texts": {}}, DataError, "there is no text to score: give one, for example --ppl"),
        ({"texts": {"short": "a"}}, DataError, "short: .* fewer than one window of 16"),
        ({"ratios": (1.5,)}, PlanError, r"ratio=1.5 is outside \(0, 1\)"),
    ],
)
def test_what_no_point_could_be_done_with(
    changes: dict[str, Any], error: type[SecateurError], match: str, tiny: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"ratios": (0.3,), "scores": ("l2",), "run": tmp_path, **FAST}
    with pytest.raises(error, match=match):
        sweep(str(tiny), **{**arguments, **changes})


def test_json_has_the_dense_row_first_and_evaluates_keys(tiny: Path, tmp_path: Path) -> None:
    found = sweep(str(tiny), ratios=(0.3,), scores=("l2",), run=tmp_path, **FAST)
    write_json(tmp_path / "a.json", found.to_json())
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["rows"][0]["ratio"] == 0
    assert {"score", "ratio", "label", "parameters", "non_embedding_parameters", "macs"} <= data["rows"][1].keys()
    assert {"data", "seq_len", "tokens", "ppl", "nll"} <= data["rows"][1]["perplexity"][0].keys()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_result(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXTS["cats"])
    line = (
        f"sweep {tiny} --ratios 0.1:0.5:0.1 --scores l2,param_first --ppl cats=text.txt --seq-len 16 --samples 6 "
        "--length 24 --no-plot --quiet --resume"
    ).split()
    run = commands()
    whole = run.run([*line, "--run", "whole", "--json", "whole.json"])
    kills = sum(run.kill([*line, "--run", "r", "--json", "r.json"], after(whole * share)) for share in (0.3, 0.5, 0.6))
    assert kills > 0
    run.run([*line, "--run", "r", "--json", "r.json"])
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "r.json"))
    assert first["rows"] == second["rows"]
    assert second["resumed"] > 0
