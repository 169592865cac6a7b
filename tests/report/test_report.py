"""The page of a run: valid HTML of whatever the folder holds, in one file, the same each time."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import html5lib
import pytest
import torch

from runs import CALIBRATION, ENTRIES, evaluate_json, plan_json, profile_json, recover_json, sweep_json, write_run
from secateur.cli.main import run
from secateur.decoding import build_known
from secateur.pipeline.run_log import append_entry
from secateur.report.content import Figure, Table
from secateur.report.cuts import _made_from
from secateur.report.entries import Cut
from secateur.report.page import Report, write_report
from secateur.scoring.scores import Scores

SECTIONS = ["models", "quality", "speed", "frontier", "units", "scores", "recovery", "samples", "provenance"]


def page_of(folder: Path) -> tuple[Any, str, Report]:
    """The page of a run, parsed by the rules of HTML 5 with every departure an error; nothing on it loads or runs."""
    out = folder.parent / f"{folder.name}.html"
    report = write_report(folder, out, overwrite=True)
    text = out.read_text(encoding="utf-8")
    tree = html5lib.HTMLParser(strict=True).parse(text)
    every = [node for node in tree.iter() if isinstance(node.tag, str)]
    assert not {"script", "link", "img", "iframe", "object"} & {node.tag.rpartition("}")[2] for node in every}
    for node in every:
        for name, value in node.attrib.items():
            assert name != "src"
            assert not str(name).startswith("on")
            assert str(name).rpartition("}")[2] != "href" or value.startswith("#")
    ids = [node.get("id") for node in every if node.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', text)) <= set(ids)
    assert not re.search(r"\b(nan|None|inf)\b", text)
    return tree, text, report


def words(tree: Any) -> str:
    return " ".join("".join(tree.itertext()).split())


class TestWhole:
    def test_every_section(self, tmp_path: Path) -> None:
        tree, text, report = page_of(write_run(tmp_path / "run"))
        assert [section.id for section in report.sections] == SECTIONS
        assert len(text) < 400_000
        assert text.count("<svg") == report.to_json()["charts"] == 14
        shown = words(tree)
        for expected in (
            "tiny: pruning report",
            "hellaswag (acc_norm)",
            "mean of 2 tasks",
            "p = 0.030",
            "Bits per byte",
            "By batch and length",
            "Quality against size",
            "39 of 84",  # the last layer of the second cut
            "inner channels of the MLPs",
            "12 steps of lora over 12,275 tokens; the weights are those of step 9.",
            "wood, says better.",
            "secateur prune tiny small --run run",
            "a0c9" * 16,
        ):
            assert expected in shown, expected

    def test_it_is_the_same_from_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _, first, _ = page_of(write_run(tmp_path / "run", "prune", "recover"))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert page_of(Path("..") / "run")[1] == first

    def test_without_matplotlib_it_has_tables_and_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write_run(tmp_path / "run", "evaluate")
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        tree, text, _ = page_of(folder)
        assert "<svg" not in text
        assert "pip install 'secateur[plot]'" in words(tree)
        assert "22.50 to 27.50" in words(tree)

    def test_it_is_not_replaced_unless_asked(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder, out = write_run(tmp_path / "run", "profile"), tmp_path / "r.html"
        out.write_text("mine", encoding="utf-8")
        assert run(["report", str(folder), str(out)]) == 2
        assert capsys.readouterr().err.startswith(f"secateur: error: {out} exists; ")
        assert out.read_text(encoding="utf-8") == "mine"
        assert run(["report", str(folder), str(out), "--overwrite", "--json", str(tmp_path / "r.json")]) == 0
        assert capsys.readouterr().out.endswith(f"report: {out}\n")
        assert json.loads((tmp_path / "r.json").read_text())["sections"] == ["models", "speed", "provenance"]


class TestHeadline:
    def test_of_a_recovered_model(self, tmp_path: Path) -> None:
        _, _, report = page_of(write_run(tmp_path / "run", "prune", "recover", "evaluate", "profile"))
        figures = {figure.name: (figure.change, figure.good) for figure in report.key_figures}
        assert figures == {  # its speed was not measured; training changes no size
            "Parameters": ("\N{MINUS SIGN}20.0 %", None),
            "Accuracy": ("\N{MINUS SIGN}6.0 points", False),
            "Perplexity": ("+20.0 %", False),
            "Recovered": ("61 %", True),
            "Weights": ("\N{MINUS SIGN}35.1 %", True),
        }
        assert "60.0 % \N{RIGHTWARDS ARROW} 54.0 %" in str(report.key_figures[1])

    def test_of_a_cut(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        append_entry(folder, "c", "prune", plan_json(0.2, "small"), seed=0, models=["tiny", "small"])
        append_entry(folder, "c", "profile", profile_json({"tiny": 1, "small": 0.5}), seed=0, models=["tiny", "small"])
        figures = {figure.name: (figure.change, figure.good) for figure in page_of(folder)[2].key_figures}
        assert figures == {
            "Parameters": ("\N{MINUS SIGN}50.0 %", None),
            "Prefill speed": ("\N{MULTIPLICATION SIGN} 2.00", True),
            "Decode speed": ("\N{MULTIPLICATION SIGN} 2.00", True),
            "Peak memory": ("\N{MINUS SIGN}50.0 %", True),
        }

    def test_of_a_plan(self, tmp_path: Path) -> None:
        [figure] = page_of(write_run(tmp_path / "run", "plan"))[2].key_figures
        assert (figure.name, figure.change) == ("Planned parameters", "\N{MINUS SIGN}30.0 %")


@pytest.mark.parametrize(
    ("kinds", "sections"),
    [
        (("plan",), ["models", "units"]),
        (("prune", "scores"), ["models", "units", "scores"]),
        (("evaluate",), ["models", "quality", "samples"]),
        (("sweep",), ["frontier"]),
        (("export",), []),
        (("evaluate", "prune"), ["models", "quality", "frontier", "units", "samples"]),
    ],
)
def test_a_section_is_there_when_the_log_has_data_for_it(
    kinds: tuple[str, ...], sections: list[str], tmp_path: Path
) -> None:
    _, _, report = page_of(write_run(tmp_path / "run", *kinds))
    assert [section.id for section in report.sections] == [*sections, "provenance"]


class TestNumbers:
    def test_infinite_perplexity(self, tmp_path: Path) -> None:
        append_entry(tmp_path / "run", "c", "evaluate", evaluate_json({"a": None}), seed=0, models=["a"])
        assert "infinite" in words(page_of(tmp_path / "run")[0])

    def test_equal_values_and_missing_measurements(self, tmp_path: Path) -> None:
        result = recover_json("b", 3) | {"loss": [[1, 2.0], [2, 2.0], [3, 2.0]]}
        append_entry(tmp_path / "run", "c", "recover", result, seed=0, models=["a", "b"])
        result = result | {"evaluation": [{"step": 0, "validation": None, "perplexity": {"t": None}}]}
        append_entry(tmp_path / "run", "c", "recover", result, seed=0, models=["a", "b"])
        assert page_of(tmp_path / "run")[2].to_json()["charts"] == 4 - 1

    def test_costs_of_other_lengths_are_not_compared(self, tmp_path: Path) -> None:
        for name, share in (("small", 0.2), ("smaller", 0.4)):
            append_entry(tmp_path, "c", "prune", plan_json(share, name), seed=0, models=["tiny", name])
        append_entry(
            tmp_path, "c", "profile", profile_json({"tiny": 1, "small": 0.8}, 512), seed=0, models=["tiny", "small"]
        )
        (section,) = (each for each in page_of(tmp_path)[2].sections if each.id == "models")
        (table,) = (block for block in section.blocks if isinstance(block, Table))
        macs = table.columns.index("MACs")
        assert [row[macs].note for row in table.rows] == ["", "\N{MINUS SIGN}20.0 %", ""]
        assert all(row[macs].text for row in table.rows)

    def test_a_mean_and_its_p_are_of_the_same_tasks(self, tmp_path: Path) -> None:
        plan = plan_json(0.2, "small")
        append_entry(tmp_path, "c", "prune", plan, seed=0, models=["tiny", "small"])
        for chosen in (["boolq"], ["hellaswag"]):
            result = evaluate_json({"tiny": 9.0, "small": 12.0})
            for i, row in enumerate(result["results"]):
                row["tasks"] = {task: row["tasks"][task] for task in chosen}
                row["tasks"]["wikitext"] = {"metric": "word_perplexity", "value": 25.3, "stderr": None, "documents": 62}
                row["tasks_mean"] = {"value": 0.7 - i / 10, "p": 0.04 + i / 100, "tasks": chosen}
            append_entry(tmp_path, "c", "evaluate", result, seed=0, models=["tiny", "small"])
        _, text, report = page_of(tmp_path)
        (accuracy,) = (figure for figure in report.key_figures if figure.name == "Accuracy")
        assert accuracy.change == "\N{MINUS SIGN}10.0 points"
        assert "hellaswag, p = 0.05" in accuracy.detail
        assert "2530" not in text
        assert "25.3" in text

    def test_presets_of_one_score_are_lines_of_their_own(self, tmp_path: Path) -> None:
        result = sweep_json()
        for row in result["rows"]:
            row["score"], row["label"] = "fisher", {"fisher": "best", "l2": "fast"}[row["label"]]
        append_entry(tmp_path, "c", "sweep", result, seed=0, models=["tiny"])
        (section,) = (each for each in page_of(tmp_path)[2].sections if each.id == "frontier")
        (figure,) = section.blocks
        assert isinstance(figure, Figure)
        assert {row[0].text for row in figure.numbers.rows} == {"best", "fast"}

    def test_scores_of_another_model_belong_to_no_cut(self) -> None:
        cut = build_known(Cut, plan_json(0.2))
        group = cut.groups[0]
        fitting, other = (Scores("fisher", "sum", {group.name: torch.rand(n)}, CALIBRATION) for n in (group.units, 999))
        assert [_made_from(cut, scores) for scores in (fitting, other)] == [True, False]

    def test_a_long_training_is_thinned(self, tmp_path: Path) -> None:
        append_entry(tmp_path / "run", "c", "recover", recover_json("b", 30_000), seed=0, models=["a", "b"])
        tree, text, _ = page_of(tmp_path / "run")
        assert len(text) < 200_000
        assert "30,000" in words(tree)

    def test_layers_that_go_whole(self, tmp_path: Path) -> None:
        group = {"name": "layers", "kind": "layer", "layer": None, "units": 4, "kept": 3, "keep": [0, 1, 3]}
        append_entry(tmp_path / "run", "c", "prune", plan_json(0.2, "b", groups=[group]), seed=0, models=["a", "b"])
        assert "0 1 of 1 1 1 of 1 2 0 of 1 3 1 of 1" in words(page_of(tmp_path / "run")[0])


HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}]]>--><!--$x_$"
KEPT_KEYS = {  # that tell the form; all other keys are names
    *"format model options groups name kind layer units kept keep parameters macs settings refusal scored".split(),
    *"dense pruned dense_non_embedding pruned_non_embedding out results perplexity tasks samples prompt text".split(),
    *"tasks_mean weight_bytes file_bytes grid against data seq_len tokens ppl protocol rows evaluation step".split(),
    *"validation loss method steps best_step non_embedding_parameters peak_bytes prefill_seconds batch".split(),
    *"decode_tokens_per_second macs_by_operator kv_cache_bytes value stderr metric documents difference p".split(),
    *"ppl_low ppl_high bits_per_byte score ratio label of axes calibration calibration_options seed".split(),
    *"length scope shape choose repair target reduce".split(),
}


def spoiled(data: Any, suffix: str, key: str = "") -> Any:
    """The same with a suffix to every text, but for what tells the form."""
    if isinstance(data, dict):
        return {k if k in KEPT_KEYS else k + suffix: spoiled(v, suffix, k) for k, v in data.items()}
    if isinstance(data, list):
        return [spoiled(value, suffix) for value in data]
    return data + suffix if isinstance(data, str) and key != "kind" else data


@pytest.mark.parametrize("suffix", [HOSTILE, "\x00\x08\ud800\ufffe\u202e\u4f60"], ids=["markup", "characters"])
def test_text_of_the_log_stays_text(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for kind, models, result in ENTRIES:
        named = [name + suffix for name in models]
        append_entry(folder, f"secateur {suffix}", kind, spoiled(result, suffix), seed=0, models=named)
    tree, text, report = page_of(folder)  # which checks that nothing runs
    assert {section.id for section in report.sections} == set(SECTIONS) - {"scores"}
    assert "<script" not in text
    if suffix == HOSTILE:
        assert f"secateur {HOSTILE}" in "".join(tree.itertext())


@pytest.mark.slow
def test_the_report_of_real_commands(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 60, encoding="utf-8")
    for line in (
        "plan tiny --ratio 0.3 --samples 8 --length 64",
        "prune tiny small --samples 8 --length 64",
        "prune tiny smaller --ratio 0.4 --samples 8 --length 64",
        "recover small better --data text.txt --max-length 64 --max-steps 4 --eval-steps 2 --eval cats=text.txt",
        "evaluate tiny small smaller better --ppl cats=text.txt --protocol llm-pruner@64",
        "profile tiny small better --seq-len 16 --new-tokens 2",
        "export small small.gguf --no-check",
    ):
        assert run([*line.split(), "--run", "run", "--quiet"]) == 0, line
    capsys.readouterr()
    tree, _, report = page_of(tmp_path / "run")
    assert {section.id for section in report.sections} == set(SECTIONS) - {"samples"}
    for folder in ("small", "smaller", "better"):  # the hashes of what lies on the disk
        manifest = json.loads((tmp_path / folder / "secateur_manifest.json").read_text(encoding="utf-8"))
        assert manifest["files"]["model.safetensors"]["sha256"] in words(tree)
    assert run(["prune", "tiny", "small", "--ratio", "0.5", "--score", "l2", "--overwrite", "--quiet"]) == 0
    capsys.readouterr()
    assert "small: the folder is gone, or holds another model now." in words(page_of(tmp_path / "run")[0])
