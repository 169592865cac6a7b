"""A run folder as the report reads it: which model is which, what counts, and damaged files by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runs import evaluate_json, plan_json, recover_json, write_run
from secateur.errors import CheckpointError
from secateur.pipeline.run_log import append_entry
from secateur.report.run import load_run


def add(folder: Path, kind: str, result: Mapping[str, Any], *models: str) -> Path:
    return append_entry(folder, "c", kind, result, seed=0, models=models)


class TestModels:
    def test_each_model_has_its_role_and_parent(self, tmp_path: Path) -> None:
        found = load_run(write_run(tmp_path / "run")).models
        assert {(model.label, model.role, model.parent) for model in found} == {
            ("dense", "dense", None),
            ("small", "pruned", "tiny"),
            ("smaller", "pruned", "tiny"),
            ("recovered", "recovered", "small"),
            ("exported", "exported", "small"),
        }

    def test_a_recovered_model_is_compared_with_the_dense_one(self, tmp_path: Path) -> None:
        run = load_run(write_run(tmp_path / "run", "prune", "recover"))
        assert run.result is not None
        assert run.result.name == "better"
        base = run.baseline(run.result)
        assert base is not None
        assert base.name == "tiny"

    def test_spellings_of_one_path_are_one_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "out" / "small").mkdir(parents=True)
        add(Path("run"), "prune", plan_json(0.2, "out/small"), "tiny", "out/small")
        for name in ("./out/small/", str(tmp_path / "out" / "small")):
            add(Path("run"), "evaluate", evaluate_json({name: 9.0}), name)
        assert [model.role for model in load_run(Path("run")).models] == ["dense", "pruned"]

    def test_a_folder_beside_us_is_one_model_with_and_without_a_slash(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "small").mkdir()
        add(Path("run"), "prune", plan_json(0.2, "small"), "tiny", "small")
        add(Path("run"), "evaluate", evaluate_json({"tiny": 9.0, "small/": 12.0}), "tiny", "small/")
        assert [(model.name, model.role) for model in load_run(Path("run")).models] == [
            ("tiny", "dense"),
            ("small", "pruned"),
        ]

    def test_a_plan_evaluated_in_memory_has_its_model_as_parent(self, tmp_path: Path) -> None:
        add(tmp_path, "evaluate", evaluate_json({"tiny": 9.0, "tiny + p.json": 12.0}), "tiny")
        assert [(model.role, model.parent) for model in load_run(tmp_path).models] == [
            ("dense", None),
            ("pruned", "tiny"),
        ]

    def test_labels_differ(self, tmp_path: Path) -> None:
        for name in ("x/small", "y/small"):
            add(tmp_path, "prune", plan_json(0.2, name), "tiny", name)
        assert [model.label for model in load_run(tmp_path).models] == ["dense", "small", "small (2)"]

    def test_measurements_of_a_folder_that_was_written_again_are_dropped(self, tmp_path: Path) -> None:
        add(tmp_path, "prune", plan_json(0.2, "small"), "tiny", "small")
        add(tmp_path, "evaluate", evaluate_json({"tiny": 25.0, "small": 40.0}))
        add(tmp_path, "prune", plan_json(0.2, "small"), "tiny", "small")
        run = load_run(tmp_path)
        dense, small = run.models
        assert dense.perplexity
        assert not small.perplexity
        assert run.notes == (
            "Measurements of small from before it was last written are left out: it was another model.",
        )

    def test_the_last_measurement_counts(self, tmp_path: Path) -> None:
        for ppl in (40.0, 50.0):
            add(tmp_path, "evaluate", evaluate_json({"a": ppl}), "a")
        [model] = load_run(tmp_path).models
        assert model.perplexity["ref (llm-pruner@128)"].ppl == 50.0

    def test_a_folder_made_from_itself_has_no_baseline(self, tmp_path: Path) -> None:
        add(tmp_path, "recover", recover_json("a"), "a", "a")
        run = load_run(tmp_path)
        assert run.baseline(run.models[0]) is None


class TestErrors:
    def test_a_folder_without_a_log(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"nowhere is no folder; name one that --run was given"):
            load_run(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"has no log, so there is nothing to report: .* --run"):
            load_run(tmp_path)

    @pytest.mark.parametrize(
        ("kind", "path", "value", "why"),
        [
            ("prune", ("groups",), None, "groups: None is no list"),
            ("prune", ("groups", 0, "kept"), 85, "keeps 85 of 84 units"),
            ("prune", ("out",), 3, "out: 3 is no str"),
            ("evaluate", ("results", 0, "perplexity", 0, "ppl"), "<b>", "ppl: '<b>' is no float"),
            ("evaluate", ("results", 0, "tasks", "boolq"), {}, "tasks: boolq: value is missing"),
            ("recover", ("loss",), [[1]], "loss: [1] is no list of 2"),
            ("sweep", ("rows", 0, "ratio"), None, "rows: ratio: None is no float"),
        ],
    )
    def test_a_damaged_result_is_named(
        self, kind: str, path: tuple[Any, ...], value: Any, why: str, tmp_path: Path
    ) -> None:
        folder = write_run(tmp_path / "run", kind)
        [*_, file] = sorted((folder / "log").iterdir())
        data = json.loads(file.read_text(encoding="utf-8"))
        at = data["result"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        file.write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(CheckpointError) as raised:
            load_run(folder)
        assert str(raised.value).startswith(f"{file} is damaged (the result of {kind}: ")
        assert why in str(raised.value)

    def test_damaged_scores_are_named(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", "plan")
        (folder / "scores.safetensors").write_bytes(b"no scores")
        with pytest.raises(CheckpointError, match=r"run/scores\.safetensors holds no scores .* Remove it"):
            load_run(folder)
