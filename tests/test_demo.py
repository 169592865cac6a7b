"""The demo: the whole path once, with every stage's value on disk. The tiny model stands in where time counts."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur.cli.demo
from recipes import recipe
from secateur.cli.demo import demonstrate
from secateur.cli.main import run
from secateur.errors import CheckpointError
from secateur.pipeline.options import RunOptions
from secateur.pipeline.run_log import load_entries
from secateur.planning.plan import read_plan
from secateur.scoring.scores import load_scores
from tiny import names

FILES = ["log", "pruned", "report.html", "scores-fisher-*.safetensors", "statistics-*.safetensors", "summary.json"]
ROWS = (
    "parameters",
    "MACs of 64 tokens",
    "weights",
    "peak memory of 64 tokens",
    "prefill of 64 tokens",
    "decode",
    "perplexity, python reference @",
)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def check_folder(out: Path) -> None:
    """The folder is a run folder, and what it holds agrees."""
    found = sorted(path.name for path in out.iterdir())
    assert len(found) == len(FILES)
    assert all(fnmatch(name, wanted) for name, wanted in zip(found, FILES, strict=True))
    summary, plan = read(out / "summary.json"), read_plan(out / "pruned" / "secateur_plan.json")
    assert summary["plan"] == read(out / "pruned" / "secateur_plan.json")
    assert plan.decided
    scored = load_scores(next(out.glob("scores-*.safetensors"))).units.keys()
    assert {group.name for group in plan.groups} <= scored
    dense, pruned = summary["profiles"]
    assert (dense["model"], pruned["model"]) == ("dense", "pruned")
    assert dense["parameters"] == plan.parameters["dense"]
    assert pruned["parameters"] == plan.parameters["pruned"] < plan.parameters["dense"]
    entered = {entry.kind: entry for entry in load_entries(out)}
    assert list(entered) == ["prune", "evaluate", "profile"]
    assert entered["prune"].result["groups"] == summary["plan"]["groups"]
    assert entered["prune"].result["out"] == entered["evaluate"].result["results"][1]["model"]
    for i, name in enumerate(("dense", "pruned")):
        measured = entered["evaluate"].result["results"][i]
        alone = [{key: value for key, value in each.items() if key != "against"} for each in measured["perplexity"]]
        assert alone == summary["perplexity"][name]
        assert measured["samples"] == [{"prompt": summary["prompt"], "text": summary["samples"][name]}]
    page = (out / "report.html").read_text(encoding="utf-8")
    manifest = read(out / "pruned" / "secateur_manifest.json")
    assert manifest["files"]["model.safetensors"]["sha256"] in page  # of the folder, before it had its name
    for section in ("models", "quality", "speed", "units", "scores", "samples", "provenance"):
        assert f'<section id="{section}"' in page
    pruning = "discover load score price repair cut save reload"
    measuring = "evaluate_dense write_dense evaluate_pruned write_pruned profile"
    stages = [stage.replace("_", " ") for stage in f"{pruning} {measuring}".split()]
    assert list(summary["seconds"]) == stages
    loaded: Any = AutoModelForCausalLM.from_pretrained(out / "pruned", trust_remote_code=True, output_loading_info=True)
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(weight.numel() for weight in model.parameters()) == pruned["parameters"]
    ids = torch.tensor([AutoTokenizer.from_pretrained(out / "pruned")("A pruning saw").input_ids])
    assert torch.isfinite(model(input_ids=ids).logits).all()


@dataclass(frozen=True)
class Shown:
    """What the command has shown, and where its folder d lies."""

    place: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def small(tiny: Path) -> Iterator[None]:
    """The tiny model in place of the demo's, and less text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.cli.pages.DEMO", str(tiny))
        patch.setattr(secateur.cli.demo, "PROTOCOLS", ("llm-pruner@32", "llm-pruner@64"))
        patch.setattr(secateur.cli.demo, "MAX_TOKENS", 256)
        yield


@pytest.fixture(scope="module")
def shown(small: None, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The command, once."""
    place, out, err = tmp_path_factory.mktemp("demo"), io.StringIO(), io.StringIO()
    with chdir(place), redirect_stdout(out), redirect_stderr(err):
        assert run(["demo", "--out", "d", "--json", "d.json", "--seed", "2"]) == 0
    return Shown(place, out.getvalue(), err.getvalue())


class TestSmall:
    def test_every_stage_is_there(self, shown: Shown) -> None:
        assert shown.err == ""
        for row in ROWS:
            assert f"│ {row}" in shown.out
        assert "dense: A pruning saw cuts" in shown.out
        assert "pruned: A pruning saw cuts" in shown.out
        assert shown.out.endswith("\nreport: d/report.html\n")
        check_folder(shown.place / "d")
        assert read(shown.place / "d.json") == read(shown.place / "d" / "summary.json")
        record = read(shown.place / "d" / "pruned" / "secateur_record.json")
        assert (record["seed"], record["command"]) == (2, "secateur demo --out d --json d.json --seed 2")
        assert names(shown.place) == sorted({"d", "d.json", *(f"d/{name}" for name in names(shown.place / "d"))})

    def test_it_is_replaced_only_when_asked(
        self,
        shown: Shown,
        tiny: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(shown.place / "d", "d")
        before = names(tmp_path)
        assert run(["demo", "--out", "d"]) == 2
        assert capsys.readouterr().err.startswith("secateur: error: d exists; name another folder")
        assert names(tmp_path) == before
        first = read_plan(Path("d/pruned/secateur_plan.json"))
        layers_of_different_sizes = recipe(tiny, preset="fast", cut={"layers": (0, 1)})
        second = demonstrate(layers_of_different_sizes, "d", run=RunOptions(overwrite=True))
        assert read_plan(Path("d/pruned/secateur_plan.json")) == second.plan != first
        assert second.plan.settings is None
        assert "modeling_per_layer.py" in names(tmp_path / "d" / "pruned")

    def test_what_is_no_run_is_never_replaced(self, small: None, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "config.json").touch()
        with pytest.raises(CheckpointError, match=r"d holds other things: .* has no summary\.json"):
            demonstrate(recipe(tiny, preset="fast"), tmp_path / "d", run=RunOptions(overwrite=True))

    def test_a_failure_leaves_nothing(
        self, small: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(secateur.cli.demo, "evaluate_model", fail)
        cheap = recipe(tiny, cut={"score": "l2", "repair": "none"})
        with pytest.raises(RuntimeError):
            demonstrate(cheap, tmp_path / "d")
        assert names(tmp_path) == []


# --- README's three commands ------------------------------------------------------------------------------------------

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def shown_in_readme(command: str) -> list[str]:
    """The lines that README shows below a command."""
    lines = README[README.index(f"    $ {command}") :].splitlines()[1:]
    return [line.strip() for line in takewhile(lambda line: line.startswith("    "), lines)]


def as_written(text: str) -> str:
    """A text without the lines of tables, its spaces one each."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.demo_model
@pytest.mark.parametrize("command", ["discover demo", "plan demo --ratio 0.2 --shape uniform --sizes-only"])
def test_a_command_prints_what_the_readme_shows(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(command.split()) == 0
    printed = as_written(capsys.readouterr().out)
    wanted = shown_in_readme(f"secateur {command}")
    assert len(wanted) >= 2
    missing = [line for line in wanted for part in line.split(" ...") if as_written(part) not in printed]
    assert missing == []


@pytest.mark.slow
@pytest.mark.demo_model
def test_for_real(tmp_path: Path) -> None:
    """The command as a user types it: a few minutes on one core, less on more."""
    command = [str(Path(sys.executable).with_name("secateur")), "demo", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1800)
    assert (done.returncode, done.stderr) == (0, "")
    for row in ROWS:
        assert f"│ {row}" in done.stdout
    assert done.stdout.endswith("\nreport: run/report.html\n")
    check_folder(tmp_path / "run")
    assert names(tmp_path)[0] == "run"
    summary = read(tmp_path / "run" / "summary.json")
    for before, after in zip(summary["perplexity"]["dense"], summary["perplexity"]["pruned"], strict=True):
        assert before["ppl"] < after["ppl"] < 10 * before["ppl"]
    weights, perplexity = shown_in_readme("secateur demo  ")
    assert as_written(weights) in as_written(done.stdout)
    found = [summary["perplexity"][name][-1]["ppl"] for name in ("dense", "pruned")]
    name, *told = perplexity.rsplit(maxsplit=3)
    assert name == "perplexity, python reference @1024"
    assert [float(each) for each in told] == pytest.approx([*found, found[1] / found[0]], rel=0.01)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("secateur: error: run exists; name another folder")
    assert again.stderr.count("\n") == 1
