"""The report: valid and accessible HTML of whatever a run folder holds, and a clear error where it holds nothing."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import html5lib
import pytest

from runs import ENTRIES, evaluate_json, plan_json, profile_json, recover_json, write_run
from secateur.cli.main import run
from secateur.errors import CheckpointError
from secateur.pipeline.run_log import append_entry
from secateur.report.models import Facts, models_of
from secateur.report.page import TEMPLATES, Report, write_report
from secateur.report.reading import read_run
from tiny import names

SECTIONS = ["models", "quality", "speed", "frontier", "units", "scores", "recovery", "samples", "provenance"]
SVG = "{http://www.w3.org/2000/svg}"
HTML = "{http://www.w3.org/1999/xhtml}"


def page_of(folder: Path) -> tuple[Any, str, Report]:
    """The page of a run, parsed by the rules of HTML 5 with every departure an error; checked as all pages are."""
    out = folder.parent / f"{folder.name}.html"
    report = write_report(folder, out, overwrite=True)
    text = out.read_text(encoding="utf-8")
    tree = html5lib.HTMLParser(strict=True).parse(text)
    check_page(tree, text)
    return tree, text, report


def check_page(tree: Any, text: str) -> None:
    """What holds for every page, whatever is on it."""
    every = list(tree.iter())
    assert tree.get("lang") == "en"
    tags = [str(node.tag).rpartition("}")[2] for node in every if isinstance(node.tag, str)]
    assert {tag: tags.count(tag) for tag in ("header", "nav", "main", "footer", "h1")} == dict.fromkeys(
        ("header", "nav", "main", "footer", "h1"), 1
    )
    assert not {"script", "link", "img", "iframe", "object", "use", "foreignObject"} & set(tags)
    assert not re.findall(r"url\(|@import", text)
    for node in every:  # nothing is fetched, and nothing runs
        for name, value in node.attrib.items():
            assert name != "src"
            assert not str(name).startswith("on")
            assert str(name).rpartition("}")[2] != "href" or value.startswith("#")
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [node.get("id") for node in every if node.get("id")]
    assert len(ids) == len(set(ids))
    for node in every:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert all(target in ids for target in (node.get(reference) or "").split())
        if (node.get("href") or "").startswith("#"):
            assert node.get("href")[1:] in ids
    for chart in tree.iter(f"{SVG}svg"):
        if chart.get("role") == "img":
            title, description = chart.find(f"{SVG}title"), chart.find(f"{SVG}desc")
            assert title.get("id") == chart.get("aria-labelledby")
            assert title.text.strip()
            assert description.text.strip()
    for table in tree.iter(f"{HTML}table"):
        assert table.find(f"{HTML}caption").text.strip()
        widths = {len(row) for row in table.iter(f"{HTML}tr")}
        assert len(widths) == 1
        for row in table.find(f"{HTML}tbody"):
            assert row[0].get("scope") == "row"
        assert all(cell.get("scope") == "col" for cell in table.find(f"{HTML}thead")[0])
    charts = [figure for figure in tree.iter(f"{HTML}figure") if "chart" in (figure.get("class") or "")]
    for figure in charts:  # every chart has its numbers
        assert figure.find(f"{HTML}details/{HTML}summary") is not None
        assert figure.find(f".//{HTML}table") is not None
    assert not re.search(r"\b(nan|None|inf)\b", text)


def words(tree: Any) -> str:
    return " ".join("".join(tree.itertext()).split())


class TestWhole:
    def test_every_section(self, tmp_path: Path) -> None:
        tree, text, report = page_of(write_run(tmp_path / "run"))
        assert [section.id for section in report.sections] == SECTIONS
        assert len(text) < 400_000
        shown = words(tree)
        for expected in (
            "tiny: pruning report",
            "recovered",
            "Perplexity",
            "hellaswag (acc_norm)",
            "mean of 2 tasks",
            "p = 0.03",
            "bits per byte",
            "By batch and length",
            "Quality against size",
            "layer 5: 39 of 84",  # of the second cut
            "inner channels of the MLPs, 84 in a layer",
            "12 steps of lora over 12,275 tokens; the weights are those of step 9.",
            "wood, says better.",
            "secateur prune tiny small --run run",
            "a0c9" * 16,
        ):
            assert expected.lower() in shown.lower(), expected

    def test_headline(self, tmp_path: Path) -> None:
        _, _, report = page_of(write_run(tmp_path / "run", "prune", "recover", "evaluate", "profile"))
        figures = {figure.name: figure for figure in report.figures}
        assert figures["Accuracy"].change == "\N{MINUS SIGN}6.0 points"
        assert figures["Accuracy"].good is False
        assert figures["Parameters"].change == "\N{MINUS SIGN}20.0 %"  # of the pruned one: training changes no size
        assert "Reading speed" not in figures  # which was not measured
        assert any("60.0 %" in sentence and "54.0 %" in sentence for sentence in report.sentences)
        assert any("training brought back 61 % of what the cut had cost" in s for s in report.sentences)

    def test_the_first_sentence_says_of_what(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        append_entry(folder, "c", "recover", recover_json("b"), seed=0, models=["a", "b"])
        append_entry(folder, "c", "evaluate", evaluate_json({"a": 25.0, "b": 40.0}), seed=0, models=["a", "b"])
        assert page_of(folder)[2].sentences[0].startswith("The recovered model answers 58.0 % of 2 zero-shot tasks")

    def test_headline_of_a_cut(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        append_entry(folder, "c", "prune", plan_json(0.2, "small"), seed=0, models=["tiny", "small"])
        perplexity = evaluate_json({"tiny": 25.0, "small": 40.0})
        for row in perplexity["results"]:
            del row["tasks"], row["tasks_mean"]
        append_entry(folder, "c", "evaluate", perplexity, seed=0, models=["tiny", "small"])
        append_entry(folder, "c", "profile", profile_json({"tiny": 1, "small": 0.5}), seed=0, models=["tiny", "small"])
        figures = {figure.name: (figure.change, figure.good) for figure in page_of(folder)[2].figures}
        assert figures == {
            "Parameters": ("\N{MINUS SIGN}50.0 %", None),
            "Perplexity": ("+60.0 %", False),
            "Reading speed": ("\N{MULTIPLICATION SIGN} 2.00", True),
            "Peak memory": ("\N{MINUS SIGN}50.0 %", True),
        }

    def test_it_is_the_same_from_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _, first, _ = page_of(write_run(tmp_path / "run"))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert page_of(Path("..") / "run")[1] == first


class TestParts:
    @pytest.mark.parametrize(
        ("kinds", "sections"),
        [
            (("plan",), ["models", "units"]),
            (("prune",), ["models", "frontier", "units"]),
            (("prune", "scores"), ["models", "units", "scores"]),
            (("evaluate",), ["models", "quality", "samples"]),
            (("profile",), ["models", "speed"]),
            (("recover",), ["recovery"]),
            (("sweep",), ["frontier"]),
            (("export",), []),
            (("evaluate", "prune"), ["models", "quality", "frontier", "units", "samples"]),
        ],
    )
    def test_only_what_there_is(self, kinds: tuple[str, ...], sections: list[str], tmp_path: Path) -> None:
        _, _, report = page_of(write_run(tmp_path / "run", *kinds))
        if kinds == ("prune",):
            sections = ["models", "units"]  # sizes alone are no quality
        assert [section.id for section in report.sections] == [*sections, "provenance"]

    def test_as_older_versions_wrote_it(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        result = evaluate_json({"tiny": 25.0}, full=False)
        [row] = result["results"]
        del row["tasks_mean"], row["samples"]
        row["tasks"] = {"boolq": {"acc": 0.5}, "piqa": {"acc": 0.5, "acc_norm": 0.625}}
        append_entry(folder, "c", "evaluate", result, seed=0, models=["tiny"])
        tree, _, report = page_of(folder)
        assert [section.id for section in report.sections] == ["models", "quality", "provenance"]
        assert "ref (windows of 128)" in words(tree)
        assert "piqa (acc_norm) tiny 62.5 %" in words(tree)

    def test_a_kind_of_a_later_version(self, tmp_path: Path) -> None:
        append_entry(tmp_path / "run", "secateur shrink x", "shrink", {"x": 1}, seed=0, models=["x"])
        assert "secateur shrink x" in words(page_of(tmp_path / "run")[0])

    def test_infinite_perplexity(self, tmp_path: Path) -> None:
        append_entry(tmp_path / "run", "c", "evaluate", evaluate_json({"a": None}), seed=0, models=["a"])
        assert "infinite" in words(page_of(tmp_path / "run")[0])

    def test_one_step_and_equal_values(self, tmp_path: Path) -> None:
        result = recover_json("b", 3) | {"loss": [[1, 2.0], [2, 2.0], [3, 2.0]]}
        append_entry(tmp_path / "run", "c", "recover", result, seed=0, models=["a", "b"])
        page_of(tmp_path / "run")
        result["evaluation"] = [{"step": 0, "validation": None, "perplexity": {"t": None}}]
        append_entry(tmp_path / "run", "c", "recover", result, seed=0, models=["a", "b"])
        page_of(tmp_path / "run")

    def test_a_long_training_is_thinned(self, tmp_path: Path) -> None:
        append_entry(tmp_path / "run", "c", "recover", recover_json("b", 30_000), seed=0, models=["a", "b"])
        _, text, _ = page_of(tmp_path / "run")
        assert len(text) < 200_000
        assert "30,000" in text

    def test_layers_that_go_whole(self, tmp_path: Path) -> None:
        group = {"name": "layers", "kind": "layer", "layer": None, "units": 4, "kept": 3, "keep": [0, 1, 3]}
        append_entry(tmp_path / "run", "c", "prune", plan_json(0.2, "b", groups=[group]), seed=0, models=["a", "b"])
        shown = words(page_of(tmp_path / "run")[0])
        assert "layer 2: 0 of 1" in shown
        assert "layer 3: 1 of 1" in shown


class TestModels:
    def test_what_was_made_from_what(self, tmp_path: Path) -> None:
        found = models_of(read_run(write_run(tmp_path / "run")))
        assert [(model.label, model.role, model.parent) for model in found] == [
            ("dense", "dense", None),
            ("small", "pruned", "tiny"),
            ("recovered", "recovered", "small"),
            ("exported", "exported", "small"),
            ("smaller", "pruned", "tiny"),
        ]

    def test_one_folder_by_several_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "out" / "small").mkdir(parents=True)
        append_entry(Path("run"), "c", "prune", plan_json(0.2, "out/small"), seed=0, models=["tiny", "out/small"])
        for name in ("./out/small/", str(tmp_path / "out" / "small")):
            append_entry(Path("run"), "c", "evaluate", evaluate_json({name: 9.0}), seed=0, models=[name])
        assert [model.role for model in models_of(read_run(Path("run")))] == ["dense", "pruned"]

    def test_a_plan_evaluated_in_memory(self, tmp_path: Path) -> None:
        result = evaluate_json({"tiny": 9.0, "tiny + p.json": 12.0})
        append_entry(tmp_path / "run", "c", "evaluate", result, seed=0, models=["tiny"])
        assert [(m.role, m.parent) for m in models_of(read_run(tmp_path / "run"))] == [
            ("dense", None),
            ("pruned", "tiny"),
        ]

    def test_labels_differ(self, tmp_path: Path) -> None:
        for name in ("x/small", "y/small"):
            append_entry(tmp_path / "run", "c", "prune", plan_json(0.2, name), seed=0, models=["tiny", name])
        assert [model.label for model in models_of(read_run(tmp_path / "run"))] == ["dense", "small", "small (2)"]

    def test_what_was_measured_before_it_was_written_again(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        for ppl in (40.0, 50.0):
            append_entry(folder, "c", "prune", plan_json(0.2, "small"), seed=0, models=["tiny", "small"])
            if ppl == 40.0:
                append_entry(folder, "c", "evaluate", evaluate_json({"tiny": 25.0, "small": ppl}), seed=0, models=[])
        facts = Facts.of(read_run(folder))
        dense, small = facts.models
        assert facts.perplexity(dense)
        assert not facts.perplexity(small)
        assert "measured of small before it was last written is left out" in words(page_of(folder)[0])

    def test_the_last_measurement_counts(self, tmp_path: Path) -> None:
        for ppl in (40.0, 50.0):
            append_entry(tmp_path / "run", "c", "evaluate", evaluate_json({"a": ppl}), seed=0, models=["a"])
        facts = Facts.of(read_run(tmp_path / "run"))
        assert facts.perplexity(facts.models[0])["ref (llm-pruner@128)"].ppl == 50.0

    def test_a_folder_made_from_itself(self, tmp_path: Path) -> None:
        append_entry(tmp_path / "run", "c", "recover", recover_json("a"), seed=0, models=["a", "a"])
        page_of(tmp_path / "run")


HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}]]>--><!--"


def spoiled(data: Any, key: str = "") -> Any:
    """The same with every text hostile, but for what tells the form."""
    if isinstance(data, dict):
        return {k if k in KEYS else k + HOSTILE: spoiled(v, k) for k, v in data.items()}
    if isinstance(data, list):
        return [spoiled(value) for value in data]
    return data + HOSTILE if isinstance(data, str) and key != "kind" else data


KEYS = {
    *"format model options groups name kind layer units kept keep parameters macs settings refusal scored".split(),
    *"dense pruned dense_non_embedding pruned_non_embedding out results perplexity tasks samples prompt text".split(),
    *"tasks_mean weight_bytes file_bytes grid against data seq_len tokens ppl protocol rows evaluation step".split(),
    *"validation loss method steps best_step non_embedding_parameters peak_bytes prefill_seconds batch".split(),
    *"decode_tokens_per_second macs_by_operator kv_cache_bytes value stderr metric documents difference p".split(),
    *"ppl_low ppl_high bits_per_byte score ratio label of axes calibration calibration_options seed".split(),
    *"length scope shape choose repair target reduce".split(),
}


class TestHostile:
    def test_text_stays_text(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        for kind, models, result in ENTRIES:
            named = [name + HOSTILE for name in models]
            append_entry(folder, f"secateur {HOSTILE}", kind, spoiled(result), seed=0, models=named)
        tree, text, report = page_of(folder)  # which has no script, no img and no attribute that runs
        assert {section.id for section in report.sections} == set(SECTIONS) - {"scores"}
        assert "<script" not in text
        assert f"secateur {HOSTILE}" in "".join(tree.itertext())
        assert "{{ 7*7 }}" in words(tree)

    def test_control_characters_and_surrogates(self, tmp_path: Path) -> None:
        name = "a\x00\x08\ud800\ufffe\u202e"
        append_entry(tmp_path / "run", name, "evaluate", evaluate_json({name: 3.0}), seed=0, models=[name])
        page_of(tmp_path / "run")


class TestErrors:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"nowhere is no folder; name one that --run was given"):
            write_report(tmp_path / "nowhere", tmp_path / "r.html")
        with pytest.raises(CheckpointError, match=r"has no log, so there is nothing to report: .* --run"):
            write_report(tmp_path, tmp_path / "r.html")
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        ("kind", "path", "value", "why"),
        [
            ("prune", ("groups",), None, "expected a list of objects, found None"),
            ("prune", ("groups", 0, "kept"), 85, "keeps 85 of 84 units"),
            ("prune", ("groups", 0, "kept"), "1", "expected a whole number, found '1'"),
            ("prune", ("parameters",), 3, "not iterable"),
            ("prune", ("out",), 3, "expected a text, found 3"),
            ("evaluate", ("results", 0, "perplexity", 0, "ppl"), "<b>", "expected a number, found '<b>'"),
            ("evaluate", ("results", 0, "tasks", "boolq"), {}, ""),
            ("profile", ("results", 0, "macs"), 1.5, "expected a whole number, found 1.5"),
            ("recover", ("loss",), [[1]], "not enough values"),
            ("sweep", ("rows", 0, "ratio"), None, "expected a number, found None"),
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
            write_report(folder, tmp_path / "r.html")
        assert str(raised.value).startswith(f"{file} is damaged (the result of {kind}: ")
        assert why in str(raised.value)
        assert not (tmp_path / "r.html").exists()

    def test_damaged_scores_are_named(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run")
        (folder / "scores.safetensors").write_bytes(b"no scores")
        with pytest.raises(CheckpointError, match=r"run/scores\.safetensors holds no scores .* Remove it"):
            write_report(folder, tmp_path / "r.html")

    def test_it_is_not_replaced_unless_asked(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder, out = write_run(tmp_path / "run", "profile"), tmp_path / "r.html"
        out.write_text("mine", encoding="utf-8")
        assert run(["report", str(folder), str(out)]) == 2
        assert capsys.readouterr().err == (
            f"secateur: error: {out} exists; name another file, or replace it with --overwrite (overwrite=True)\n"
        )
        assert out.read_text(encoding="utf-8") == "mine"
        assert run(["report", str(folder), str(out), "--overwrite", "--json", str(tmp_path / "r.json")]) == 0
        assert capsys.readouterr().out.endswith(f"report: {out}\n")
        about = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
        assert about["sections"] == ["models", "speed", "provenance"]


# --- colours ----------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_known() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)


def test_contrast_of_every_scheme() -> None:
    """Text 4.5 to 1 on what it stands on, areas and lines 3 to 1 on the page."""
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes:
        colours = {
            name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:])
            for name, value in scheme.items()
        }
        for name in ("ink", "soft", "good", "bad", "link"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        assert contrast(colours["ink"], colours["shade"]) >= 4.5
        for tone in range(5):
            assert contrast(colours[f"tone{tone}"], colours["paper"]) >= 3, tone


@pytest.mark.slow
def test_a_real_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands as a user types them, on the tiny model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 60, encoding="utf-8")
    for line in (
        "plan tiny --ratio 0.3 --samples 8 --length 64",
        "prune tiny small --samples 8 --length 64",
        "prune tiny smaller --ratio 0.4 --samples 8 --length 64",
        "recover small better --data text.txt --length 64 --max-steps 4 --eval-every 2 --eval cats=text.txt",
        "evaluate tiny small smaller better --ppl cats=text.txt --seq-len 64",
        "profile tiny small better --seq-len 16 --new-tokens 2",
        "export small small.gguf --no-check",
    ):
        assert run([*line.split(), "--run", "run", "--quiet"]) == 0, line
    assert run(["report", "run", "r.html", "--json", "r.json"]) == 0
    capsys.readouterr()
    tree, _, report = page_of(tmp_path / "run")
    assert {s.id for s in report.sections} >= {
        *"models quality speed frontier units scores recovery provenance".split()
    }
    shown = words(tree)
    for folder in ("small", "smaller", "better"):  # the hashes of what lies on the disk
        manifest = json.loads((tmp_path / folder / "secateur_manifest.json").read_text(encoding="utf-8"))
        assert manifest["files"]["model.safetensors"]["sha256"] in shown
    assert run(["prune", "tiny", "small", "--ratio", "0.5", "--score", "l2", "--overwrite", "--quiet"]) == 0
    capsys.readouterr()
    assert "small: not there any more, or another model now." in words(page_of(tmp_path / "run")[0])
