"""Sweeps: one load and one pass for many cuts, what is refused, and what a killed sweep has kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kills import after, commands
from secateur import SecateurError, evaluate, load, load_tokenizer, plan_model
from secateur.errors import CheckpointError, DataError, PlanError, ScoreError
from secateur.pipeline.frontier import Sweep
from secateur.pipeline.options import RunOptions, SweepOptions, ratios_in
from secateur.pipeline.recipe import prune_recipe
from secateur.pipeline.run import prune_as_planned
from secateur.pipeline.sweep import sweep
from tiny import write_tiny

TEXTS = {"cats": "the cat sat on the mat and the dog sat on the log\n" * 6}
CALIBRATION: dict[str, Any] = {"samples": 6, "length": 24}
MLP: dict[str, Any] = {"axes": ("mlp",), "scope": "local", "shape": "uniform", "repair": "none"}  # a stock config


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model of two layers."""
    return str(write_tiny(tmp_path_factory.mktemp("sweep") / "tiny", num_hidden_layers=2))


def options(**changes: Any) -> SweepOptions:
    """One ratio and the cheapest score, but for these changes."""
    usual = {"ratios": (0.3,), "scores": ("l2",), "protocols": ("llm-pruner@16",), "plot": False}
    return SweepOptions(**{**usual, **changes})


def run(model: str, folder: Path, chosen: SweepOptions, *, resume: bool = False, **changes: Any) -> Sweep:
    """A sweep of cheap cuts."""
    usual = {"texts": TEXTS, "cut": MLP, "calibration": CALIBRATION}
    return sweep(model, chosen, run=RunOptions(folder=folder, resume=resume), **{**usual, **changes})


def done(folder: Path) -> list[Path]:
    return sorted((folder / "sweep").glob("point-*.json"))


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
        assert list(ratios_in(text)) == ratios

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

        monkeypatch.setattr(f"{module}.{name}", wrapped)

    count("secateur.pipeline.pipeline", "load")
    count("secateur.pipeline.pipeline", "statistics_for")
    count("secateur.pipeline.sweep", "evaluate")
    return calls


def test_one_load_and_one_pass_for_scores_of_a_kind(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    found = run(small, tmp_path, options(ratios=(0.2, 0.4), scores=("param_first", "vectorize")))
    assert calls == {"load": 1, "statistics_for": 1, "evaluate": 5}
    assert [(row.label, row.ratio) for row in found.rows] == [
        ("dense", 0),
        ("param_first", 0.2),
        ("param_first", 0.4),
        ("vectorize", 0.2),
        ("vectorize", 0.4),
    ]
    for row in found.rows[1:]:
        left = row.non_embedding_parameters / found.rows[0].non_embedding_parameters
        assert 1 - left == pytest.approx(row.ratio, abs=0.02)


def test_a_point_is_what_plan_and_evaluate_give(small: str, tmp_path: Path) -> None:
    """The same cut by the commands for one cut has the same sizes and the same perplexity, repair and all."""
    chosen = options(ratios=(0.2,), scores=(), presets=("best", "llm-pruner"))
    found = sweep(small, chosen, texts=TEXTS, calibration=CALIBRATION, run=RunOptions(folder=tmp_path))
    row = next(row for row in found.rows if (row.label, row.ratio) == ("best", 0.2))
    decided = plan_model(prune_recipe(small, preset="best", cut={"ratio": 0.2}, calibration=CALIBRATION))
    tokenizer = load_tokenizer(small)
    pruned = prune_as_planned(load(small), decided, tokenizer)
    [alone] = evaluate(pruned, tokenizer, TEXTS, protocols=["llm-pruner@16"])
    assert (row.parameters, row.macs) == (decided.parameters["pruned"], decided.macs["pruned"])
    assert row.perplexity[0]["nll"] == pytest.approx(alone.nll, abs=1e-6)
    [dense] = evaluate(load(small), tokenizer, TEXTS, protocols=["llm-pruner@16"])
    assert found.rows[0].perplexity[0]["nll"] == dense.nll
    assert {row.score for row in found.rows} == {"dense", "fisher", "param_first"}


def test_what_cannot_be_done_is_listed_and_does_not_end_the_sweep(small: str, tmp_path: Path) -> None:
    found = run(small, tmp_path, options(ratios=(0.95, 0.3), scores=("l2", "block_influence")))
    assert [(row.label, row.ratio) for row in found.rows] == [("dense", 0), ("l2", 0.3)]
    refused = {(each.label, each.ratio): each.why for each in found.refused}
    assert "ratio=0.95 leaves" in refused["l2", 0.95]
    assert "use axes=layers with it" in refused["block_influence", 0.3]
    assert len(refused) == 3
    with pytest.raises(PlanError, match=r"none of the 1 cuts can be done; the first: ratio=0\.95 leaves"):
        run(small, tmp_path, options(ratios=(0.95,)), resume=True)


def test_a_stopped_sweep_resumes_after_its_last_point(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, number = options(ratios=(0.2, 0.4), scores=("l2", "param_first")), 0

    def stopped_in_the_third(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        if number == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("secateur.pipeline.sweep.evaluate", stopped_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(small, tmp_path / "a", chosen)
    assert len(done(tmp_path / "a")) == 2
    calls = counted(monkeypatch)
    found = run(small, tmp_path / "a", chosen, resume=True)
    assert (calls["evaluate"], found.resumed) == (3, 2)
    whole = run(small, tmp_path / "b", chosen)
    assert found.rows == whole.rows
    before = dict(calls)
    again = run(small, tmp_path / "a", chosen, resume=True)
    assert calls == before  # nothing is loaded, scored or measured
    assert again.rows == whole.rows


def test_points_of_other_texts_windows_or_calibration_are_measured(small: str, tmp_path: Path) -> None:
    chosen = options(scores=("param_first",))

    def resumed(options: SweepOptions = chosen, **changes: Any) -> int:
        return run(small, tmp_path, options, resume=True, **changes).resumed

    assert resumed() == 0
    assert resumed() == 2
    assert resumed(replace(chosen, protocols=("llm-pruner@8",))) == 0
    assert resumed(replace(chosen, max_tokens=64)) == 0
    assert resumed(texts={"cats": TEXTS["cats"] + "a cat"}) == 0
    assert resumed(calibration={**CALIBRATION, "samples": 5}) == 1  # the dense one
    assert resumed(cut={**MLP, "min_keep": 0.1}) == 1


def test_a_damaged_point_is_measured_again(small: str, tmp_path: Path) -> None:
    whole = run(small, tmp_path, options())
    for number, text in enumerate(("", "[]", '{"score": 1}', '{"perplexity": [{}]}')):
        for path in done(tmp_path)[number % 2 :: 2]:
            path.write_text(text)
        found = run(small, tmp_path, options(), resume=True)
        assert (found.rows, found.resumed) == (whole.rows, 1)


def test_pictures(small: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chosen = options(scores=("l2", "l1"), plot=None, protocols=("llm-pruner@8", "llm-pruner@16"))
    png, svg = run(small, tmp_path, chosen).pictures
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first = svg.read_text()
    assert first.startswith("<?xml")
    run(small, tmp_path, chosen, resume=True)
    assert svg.read_text() == first


def test_several_processes_are_refused(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.processes.count", lambda: 2)
    with pytest.raises(PlanError, match="a sweep runs in one process: start it without accelerate launch"):
        run(small, tmp_path, options())


def test_without_matplotlib(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(DataError, match=r"needs the package matplotlib\. Run: pip install 'secateur\[plot\]'"):
        options(plot=True)
    assert run(small, tmp_path, options(plot=None)).pictures == ()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"scores": ("fischer",)}, ScoreError, r"score='fischer' is unknown.*Did you mean fisher\?"),
        ({"presets": ("bets",)}, PlanError, r"preset='bets' is unknown. .*Did you mean best\?"),
        ({"presets": ()}, PlanError, "presets is empty: name one, for example --presets best"),
        ({"ratios": ()}, PlanError, "there is no ratio"),
        ({"ratios": (1.5,)}, PlanError, r"ratio=1.5 is outside \(0, 1\)"),
    ],
)
def test_options_that_no_point_could_be_done_with(
    changes: dict[str, Any], error: type[SecateurError], match: str, small: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        run(small, tmp_path, options(**changes))


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ({}, "there is no text to score: give one, for example --ppl"),
        ({"short": "a"}, "short: .* fewer than one window of 16"),
    ],
)
def test_texts_that_no_point_could_be_done_with(texts: dict[str, str], match: str, small: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        run(small, tmp_path, options(), texts=texts)


def test_points_need_a_run_folder(small: str) -> None:
    with pytest.raises(CheckpointError, match="name one with --run FOLDER"):
        sweep(small, options(), texts=TEXTS, run=RunOptions())


def test_json_has_the_dense_row_first_and_evaluates_keys(small: str, tmp_path: Path) -> None:
    found = run(small, tmp_path, options())
    data = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert data == json.loads(json.dumps(found.to_json()))
    assert data["rows"][0]["ratio"] == 0
    assert {"score", "ratio", "label", "parameters", "non_embedding_parameters", "macs"} <= data["rows"][1].keys()
    assert {"data", "seq_len", "tokens", "ppl", "nll"} <= data["rows"][1]["perplexity"][0].keys()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_result(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXTS["cats"])
    line = (
        f"sweep {small} --ratios 0.1:0.5:0.1 --scores l2,param_first --ppl cats=text.txt --protocol llm-pruner@16 "
        "--samples 6 --length 24 --no-plot --quiet --resume"
    ).split()
    server = commands()
    whole = server.run([*line, "--run", "whole", "--json", "whole.json"])
    interrupted = [*line, "--run", "r", "--json", "r.json"]
    kills = sum(server.kill(interrupted, after(whole * share)) for share in (0.3, 0.5, 0.6))
    assert kills > 0
    server.run(interrupted)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "r.json"))
    assert first["rows"] == second["rows"]
    assert second["resumed"] > 0
