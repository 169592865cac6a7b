"""The tables that benchmarks write into the docs: from whole results alone, and nothing else of a page changes."""

from __future__ import annotations

import doctest
import gzip
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import code_tasks
import discovery
import experts
import gpu
import half_precision
import int8
import llama_cpp_speed
import llm_pruner
import mbpp
import quality
import quality_plot
import recover
import recover_speed
import scale
import scoring
import serving
import tables
import vocabulary
import zoo
from quality_table import DENSE, LABELS, QUALITY, README_ROWS, Key, blocks, key_of, label_of, table, write_tables
from secateur import load, load_tokenizer
from tables import PAGE, TableError, between_marks, markdown, marks, result_file

ROOT = Path(__file__).parent.parent
BEGIN, END = marks(QUALITY)
TEXTS = ("WT2@128", "WT2@1024")
OTHER = {
    "model": "demo",
    "protocols": ["llm-pruner@128", "llm-pruner@1024"],
    "tokens": 10_000,
    "dtype": "float32",
    "samples": None,
    "calibration": "c4.jsonl",
    "texts": ["WT2"],
    "date": "2026-01-02",
    "cores": 2,
    "versions": {"Secateur": "0.1.0", "torch": "2.13.0"},
}


def result(row: str, ratio: float, seed: int, *damage: float, **changes: Any) -> dict[str, Any]:
    nll = {text: 4.0 + (damage[i] if damage else 0.0) for i, text in enumerate(TEXTS)}
    cut = {} if row == "dense" else {"removed": ratio + 0.0004, "seconds": 100.4 + seed, "peak_rss_bytes": 3 * 2**30}
    return {"row": row, "ratio": ratio, "seed": seed, "nll": nll, **cut, **OTHER, **changes}


WANTED: list[Key] = [
    (row, ratio, seed) for ratio in (0.2, 0.5) for row in README_ROWS for seed in (range(3) if row == "best" else (0,))
]
RESULTS = [result(*DENSE), *(result(*key, 0.4 + 0.01 * key[2], 0.575) for key in WANTED)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    result_file(QUALITY, root=tmp_path).parent.mkdir(parents=True)
    for path in ("README.md", "docs/benchmarks.md"):
        (tmp_path / path).write_text(f"# A page\n\n{BEGIN}\nwhat was\n{END}\n\nMore.\n")
    return tmp_path


def test_a_row_of_one_seed_and_one_of_three() -> None:
    keys: list[Key] = [("best, uniform", 0.2, 0), *[("best", 0.2, seed) for seed in range(3)]]
    assert table(RESULTS, keys, costs=False) == (
        "| removed | | WT2@128 | WT2@1024 |\n"
        "| --- | --- | --- | --- |\n"
        "| 20.0% | `best --shape uniform` | 0.400 | 0.575 |\n"
        "| 20.0% | `--preset best` (three seeds) | 0.410 ± 0.010 | 0.575 ± 0.000 |"
    )
    assert table(RESULTS, keys, costs=True).splitlines()[2:] == [
        "| 20.0% | `best --shape uniform` | 0.400 | 0.575 | 100 | 3.0 |",
        "| 20.0% | `--preset best` (three seeds) | 0.410 ± 0.010 | 0.575 ± 0.000 | 100 to 102 | 3.0 |",
    ]


def test_both_pages_and_the_results_are_written_and_nothing_else_changes(root: Path) -> None:
    pages = blocks(RESULTS, WANTED)
    kept = result_file(QUALITY, root=root)
    assert write_tables(RESULTS, WANTED, root=root) == [*(root / path for path in pages), kept]
    for path, block in pages.items():
        assert (root / path).read_text() == f"# A page\n\n{BEGIN}\n{block}\n{END}\n\nMore.\n"
    assert len([line for line in (root / "README.md").read_text().splitlines() if line.startswith("|")]) == 2 + 12
    assert json.loads(result_file(QUALITY, root=root).read_text()) == RESULTS


@pytest.mark.parametrize("gone", [DENSE, ("fast", 0.5, 0), ("best", 0.2, 2)])
def test_a_table_is_not_replaced_by_less(gone: Key, root: Path) -> None:
    partial = [each for each in RESULTS if (each["row"], each["ratio"], each["seed"]) != gone]
    before = {path: path.read_text() for path in root.rglob("*.md")}
    with pytest.raises(TableError, match=rf"1 of \d+ measurements are missing: {gone[0]}"):
        write_tables(partial, WANTED, root=root)
    assert {path: path.read_text() for path in root.rglob("*.md")} == before
    assert not [*result_file(QUALITY, root=root).parent.iterdir()]


def test_rows_measured_otherwise_go_into_no_table(root: Path) -> None:
    mixed = [*RESULTS[:-1], {**RESULTS[-1], "tokens": 40_000}]
    with pytest.raises(TableError, match="rows were measured with different tokens: 10000, 40000"):
        write_tables(mixed, WANTED, root=root)


def test_the_readme_has_all_its_rows_or_stays(root: Path) -> None:
    few = [key for key in WANTED if key[0] != "fast"]
    with pytest.raises(TableError, match=r"rows that were not asked for: fast at 20% \(seed 0\); fast at 50%"):
        write_tables(RESULTS, few, root=root)


def test_one_page_without_marks_and_none_is_written(root: Path) -> None:
    (root / "docs" / "benchmarks.md").write_text("no marks")
    with pytest.raises(TableError, match=r"benchmarks.md: expected <!-- quality:begin --> once"):
        write_tables(RESULTS, WANTED, root=root)
    assert "what was" in (root / "README.md").read_text()


def test_the_zoo_names_the_best_peer_and_the_worst_case() -> None:
    rows = {"dense": 0.0, "best": 0.3, "fast": 0.4, "llm-pruner": 1.0, "wanda-sp": 0.5}
    results = [
        result(row, 0.0 if row == "dense" else 0.2, seed, damage + 0.02 * seed, damage)
        for row, damage in rows.items()
        for seed in (range(2) if row == "best" else (0,))
    ]
    assert zoo.table(zoo.lines_of(results)).splitlines()[2:] == [
        "| demo | 20% | WT2@128 | 0.310 | 0.400 | 0.500 | Wanda-sp | 0.62 | 0.80 |",
        "| demo | 20% | WT2@1024 | 0.300 | 0.400 | 0.500 | Wanda-sp | 0.60 | 0.80 |",
        "| worst | | | | | | | 0.62 | 0.80 |",
    ]
    for gone, said in (("dense", "the dense model was not measured"), ("fast", "demo at 20% has no fast")):
        with pytest.raises(TableError, match=said):
            zoo.lines_of([each for each in results if each["row"] != gone])


@pytest.mark.parametrize("page", [END + BEGIN, BEGIN, f"{BEGIN}{BEGIN}{END}"])
def test_odd_marks_are_refused(page: str) -> None:
    with pytest.raises(TableError, match="once after it"):
        between_marks(page, "new", QUALITY)


def test_the_tables_of_quality_are_of_the_file_in_the_repository() -> None:
    results = json.loads(result_file(QUALITY).read_text())
    made = blocks(results, [key for key in map(key_of, results) if key != DENSE])
    for page, block in made.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert between_marks(text, block, QUALITY) == text, page
        assert "{tokens:,} tokens of each text".format(**results[0]) in " ".join(text.split())
    dense = [f"{nll:.3f}" for nll in results[0]["nll"].values()]
    told = f"The dense model has {', '.join(dense[:-1])} and {dense[-1]}."
    assert told in " ".join((ROOT / "docs/benchmarks.md").read_text().split())


def test_the_table_of_several_models_is_of_the_files_in_the_repository() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    kept = sorted(zoo.RESULTS.glob("*.json"), key=lambda file: page.index(f"| {file.stem} |"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in (result_file(QUALITY), *kept)]
    assert between_marks(page, zoo.table(line for each in results for line in zoo.lines_of(each)), "zoo") == page
    gemma = json.loads((zoo.RESULTS / "gemma.gguf.json").read_text())
    for ratio in (0.2, 0.5):
        rows = table(gemma, [("best", ratio, seed) for seed in range(3)], costs=False).splitlines()[-1]
        assert ", ".join(cell.strip() for cell in rows.split("|")[3:-1]) in " ".join(page.split())


def test_the_zoo_keeps_the_results_that_its_table_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"dense": 0.0, "best": 0.3, "fast": 0.4, "wanda-sp": 0.5}
    results = [result(row, 0.0 if row == "dense" else 0.2, 0, damage, damage) for row, damage in rows.items()]
    files = [tmp_path / "results" / "quality.json", tmp_path / "runs" / "other.json"]
    for file in files:
        file.parent.mkdir()
        file.write_text(json.dumps(results))
    written: list[str] = []
    monkeypatch.setattr(zoo, "RESULTS", tmp_path / "results" / "zoo")
    monkeypatch.setattr(zoo, "write_table", lambda _, made: written.append(made))
    monkeypatch.setattr(sys, "argv", ["zoo.py", *map(str, files), "--write"])
    zoo.main()
    assert written == [zoo.table(2 * zoo.lines_of(results))]
    assert json.loads((tmp_path / "results" / "zoo" / "other.json").read_text()) == results
    assert [path.name for path in (tmp_path / "results" / "zoo").iterdir()] == ["other.json"]


def test_every_row_has_a_label() -> None:
    names = set(quality.rows(0.2))
    assert [label_of(name) for name in names]
    assert set(LABELS) <= names
    assert set(README_ROWS) <= names


def test_the_command_writes_from_the_file_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(quality, "write_tables", partial(write_tables, root=root))
    line = ["quality.py", "--table", "--out", "r.json", "--rows", ";".join(README_ROWS), "--seeded", "best"]
    monkeypatch.setattr(sys, "argv", line)
    (root / "r.json").write_text(json.dumps(RESULTS[:-1]))
    with pytest.raises(SystemExit, match=r"1 of 17 measurements are missing: wanda-sp at 50% \(seed 0\)"):
        quality.main()
    assert "what was" in (root / "README.md").read_text()
    (root / "r.json").write_text(json.dumps(RESULTS))
    quality.main()
    assert f"wrote {root / 'README.md'}" in capsys.readouterr().out
    for page, block in blocks(RESULTS, WANTED).items():
        assert block in (root / page).read_text()


def test_what_training_gave_back_is_told_against_both_dense_models() -> None:
    def about(ppl: float) -> dict[str, Any]:
        trained = {"seconds": {"train": 90.0}, "peak_rss_bytes": 2**31, "tokens": 1000}
        return {"perplexity": {"WT2@128": ppl}, **trained}

    results = {
        "dense": {"perplexity": {"WT2@128": 10.0}},
        "20%": {"perplexity": {"WT2@128": 20.0}},
        "default | 20% | minutes=20": about(14.0),
        "default | dense | minutes=20": about(9.0),
    }
    lines = recover.block(results).splitlines()
    assert lines[2] == "| not trained | 20% | | 0.693 | | | |"
    assert lines[3] == "| default | 0% | minutes=20 | -0.105 | 1,000 | 1.5 | 2.00 GiB |"
    assert lines[4] == "| default | 20% | minutes=20 | 0.336 (51%, 36%) | 1,000 | 1.5 | 2.00 GiB |"
    assert len(lines) == 5
    # Another cut's damage is told beside that of the first.
    other = {"20%, layers": about(18.0), "default | 20%, layers | minutes=20": about(13.0)}
    lines = recover.block({**results, **other}).splitlines()
    assert lines[3] == "| not trained | 20%, layers | | 0.588 (15%) | | | |"
    assert lines[6] == "| default | 20%, layers | minutes=20 | 0.262 (62%, 47%) | 1,000 | 1.5 | 2.00 GiB |"


def test_what_the_vocabulary_gave_is_told_in_bits_per_byte() -> None:
    found = {
        "parameters": {"pruned": 94_200_000},
        "kept": {"mlp": [30, 60], "vocabulary": [20_000, 49_152]},
        "dense": {"WT2": 1.0},
        "pruned": {"WT2": 1.25},
    }
    lines = vocabulary.block({"demo | 30% | mlp,vocabulary": found}).splitlines()
    assert lines[0] == "| model | removed | axes | parameters left | tokens left | WT2 |"
    assert lines[2] == "| demo | 30% | mlp,vocabulary | 94.2 M | 20,000 | 1.250 (+0.250) |"


def test_what_is_said_of_the_vocabulary_is_in_the_results() -> None:
    found = json.loads(result_file("vocabulary").read_text(encoding="utf-8"))
    added = {
        cut: {text: bits - about["dense"][text] for text, bits in about["pruned"].items()}
        for cut, about in found.items()
    }
    alone, both = (added[f"SmolLM2-135M | 30% | {axes}"] for axes in vocabulary.AXES)
    less = [
        f"{100 * (1 - both[text] / alone[text]):.0f} % less on {of}"
        for text, of in (("WT2", "WikiText-2"), ("PTB", "PTB"), ("novel", "the novel"))
    ]
    page, readme = (" ".join((ROOT / name).read_text(encoding="utf-8").split()) for name in (PAGE, "README.md"))
    assert f"the cut costs {less[0]}, {less[1]} and {less[2]} than one of layers alone" in page
    half = added["Gemma-3-270M | 50% | attention,mlp,vocabulary"].values()
    told = f"[{min(half):.2f} to {max(half):.2f}](docs/benchmarks.md#vocabulary) bits per byte"
    assert f"half of Gemma-3-270M goes for {told}" in readme


def test_what_other_pages_say_is_in_the_results() -> None:
    """What the guides say of llama.cpp, int8 and discovery."""
    engine, packed, found = (json.loads(result_file(name).read_text()) for name in ("llama-cpp", "int8", "discovery"))
    export, serving, internals = (
        " ".join((ROOT / f"docs/{n}.md").read_text().split()) for n in ("export", "serving", "internals")
    )
    dense, pruned = (row for row in engine["results"] if row["type"] == "f16")
    read, wrote, size = (
        pruned[k] / dense[k] for k in ("prompt_tokens_per_second", "new_tokens_per_second", "parameters")
    )
    assert f"{read:.2f} x for prompts and {wrote:.2f} x for new tokens with {size:.2f} of the parameters" in export
    cut, small = packed["rows"]["pruned"], packed["rows"]["pruned, int8 weight-only"]
    more = max(100 * (small["ppl"][text] / ppl - 1) for text, ppl in cut["ppl"].items())
    speeds = cut["prefill_seconds"] / small["prefill_seconds"], small["decode_rate"] / cut["decode_rate"]
    told = "{:.2f} of the bytes, at most {:.1f} % more perplexity, and {:.2f} and {:.2f} of the speed of prefill and"
    assert told.format(small["weights"] / cut["weights"], more, *speeds) in serving
    recorded, exported = (each["seconds"] for each in found["rows"][:2])
    assert f"LLaMA-7B in {recorded:.1f} s (`torch.export` with decompositions: {exported:.1f} s;" in internals


def test_a_device_has_one_table(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    result_file("gpu", root=tmp_path).parent.mkdir(parents=True)
    begin, end = marks("gpu")
    page.write_text(f"# A page\n\n{begin}\n{end}\n\nMore.\n")
    step = {"seconds": 12.3, "device_bytes": 2**31, "process_bytes": 2**30, "told": "score 5"}
    about = {"name": "GPU H1", "torch": "2.13.0", "transformers": "5.24.0", "date": "2026-01-02"}
    results = {"about": about, "steps": {"tests": {"seconds": 9, "result": "8 passed"}, "demo | `prune`": step}}
    gpu.write(results, root=tmp_path)
    gpu.write({**results, "about": {**about, "name": "GPU H2"}}, root=tmp_path)
    gpu.write({**results, "about": {**about, "date": "2026-01-03"}}, root=tmp_path)
    text = page.read_text()
    assert text.startswith("# A page\n\n<!-- gpu:begin -->")
    assert text.endswith("<!-- gpu:end -->\n\nMore.\n")
    assert text.count("| demo | `prune` | 12 | score 5 | 2.0 | 1.0 |") == 2
    assert "**GPU H1: torch 2.13.0, transformers 5.24.0, 2026-01-03**" in text
    assert "**GPU H2: torch 2.13.0, transformers 5.24.0, 2026-01-02**" in text
    page.write_text("# Another page\n")
    with pytest.raises(TableError, match=r"expected <!-- gpu:end --> once"):
        gpu.write(results, root=tmp_path)


TABLES = {
    "discovery": discovery.block,
    "experts": experts.block,
    "half": half_precision.block,
    "int8": int8.block,
    "llama-cpp": llama_cpp_speed.block,
    "llm-pruner": llm_pruner.block,
    "recover-gemma": recover.block,
    "recover-speed": recover_speed.block,
    "scale": scale.block,
    "scoring": scoring.block,
    "serving": serving.block,
    "vocabulary": vocabulary.block,
}
# No GPU was at hand; the others were measured before results were kept.
WITHOUT_FILE = {"gpu", "recover", "recover-curve"}
OTHERS = {QUALITY, "zoo"}  # held to their files above
MARK = re.compile("<!-- (.*?):begin -->")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_of_the_file_in_the_repository(name: str) -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    made = TABLES[name](json.loads(result_file(name).read_text(encoding="utf-8")))
    assert between_marks(page, made, name) == page


def test_every_table_between_marks_is_held_to_its_file() -> None:
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in (PAGE, "README.md"))
    assert set(MARK.findall(page)) == {*TABLES, *WITHOUT_FILE, *OTHERS}
    results = json.loads(result_file("scale").read_text())
    assert between_marks(readme, markdown(scale.short_rows(results)), "scale") == readme
    assert set(MARK.findall(readme)) == {QUALITY, "scale"}


CUTS = ("20%", "50%")
GAIN = re.compile(r"\((-?\d+)%(?:, (-?\d+)%)?\)")


def gains(table: str, row: str) -> list[str]:
    """The least and the most that a row says is gone of the damage, in %, beside each of the dense models."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    begin, end = marks(table)
    lines = page[page.index(begin) : page.index(end)].splitlines()
    (line,) = (line for line in lines if line.startswith(f"| default | {row} |"))
    beside = zip(*[[int(each) for each in cell if each] for cell in GAIN.findall(line)], strict=True)
    return [f"{min(each)} to {max(each)}" for each in beside]


def test_what_readme_says_of_training_is_in_the_tables() -> None:
    readme = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", " ".join((ROOT / "README.md").read_text().split()))
    curve = "recover-curve"
    (half, half_alike), (fifth, fifth_alike) = (gains(curve, f"{cut} | tokens=400k") for cut in ("50%", "20%"))
    assert f"{half} % of the damage at 50 %, {fifth} at 20 %, on 400,000 tokens" in readme
    assert f"beside a dense model trained alike {half_alike}, {fifth_alike}" in readme
    (half, half_alike), (fifth, fifth_alike) = (gains("recover", f"{cut} | minutes=20") for cut in ("50%", "20%"))
    assert f"{half} and {fifth} in 20 minutes, layers first ({half_alike}, {fifth_alike})" in readme
    (gemma,) = gains("recover-gemma", "20% | minutes=20")
    assert f"Gemma: {gemma} at 20 %" in readme


def test_what_readme_says_of_other_models_is_in_the_table() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    lines = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()

    def ratios(model: str, removed: str, column: int) -> list[float]:
        rows = [line.split("|") for line in lines if line.startswith(f"| {model} | {removed} |")]
        return [float(row[column]) for row in rows]

    of_best, of_fast = -3, -2
    (fifth, half), (fast_fifth, fast_half) = (
        [f"{min(found):.2f} to {max(found):.2f}" for found in (ratios("gemma.gguf", cut, column) for cut in CUTS)]
        for column in (of_best, of_fast)
    )
    assert f"Gemma-3-270M `best` has {fifth} of the best peer's damage at 20 % and {half} at 50 %" in readme
    assert f"`fast` {fast_fifth} and {fast_half};" in readme
    worst = next(line.split("|") for line in lines if line.startswith("| worst |"))
    assert f"over all five models at most {worst[of_best].strip()} and {worst[of_fast].strip()}" in readme


EXAMPLES = (code_tasks, experts, half_precision, mbpp, quality_plot, recover, scale, scoring, serving, tables)


@pytest.mark.parametrize("module", EXAMPLES, ids=lambda module: module.__name__)
def test_examples_of_the_docstrings(module: Any) -> None:
    tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (tried.failed, tried.attempted > 0) == (0, True)


def test_a_function_that_never_ends_or_takes_all_memory_does_not_pass() -> None:
    problem = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1"}
    assert not code_tasks.passes(problem, "    while True:\n        pass", seconds=1)
    assert not code_tasks.passes(problem, "    return len(bytes(2 ** 33)) and 1")
    assert not code_tasks.passes(problem, "    return ]")
    assert code_tasks.passes(problem, "    return 1\n")


def test_a_machine_on_which_no_solution_passes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1"}
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({**problem, "canonical_solution": "    return 2"}))
    monkeypatch.setattr(sys, "argv", ["code_tasks", "demo", "--problems", str(file), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="even the solution of the first problem does not pass"):
        code_tasks.main()


@pytest.mark.demo_model
def test_problems_are_written_in_batches_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [{"task_id": str(at), "prompt": f"def f{at}():\n", "entry_point": f"f{at}"} for at in range(3)]
    problems = [{**each, "test": "def check(f):\n    assert f() is None"} for each in problems]
    file, out = tmp_path / "problems.jsonl.gz", tmp_path / "out.json"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, problems)).encode()))
    monkeypatch.setattr(sys, "argv", ["code_tasks", "demo", "--problems", str(file), "--out", str(out), "--batch", "2",
                                      "--new-tokens", "4", "--limit", "3"])  # fmt: skip
    monkeypatch.setattr(code_tasks, "function_of", lambda text: f"    pass  # {text!r}")
    code_tasks.main()
    found = json.loads(out.read_text())
    assert (found["value"], found["stderr"], found["problems"]) == (1.0, 0.0, 3)
    assert [each["task_id"] for each in found["answers"]] == ["0", "1", "2"]
    assert all(len(each["completion"]) > len("    pass  # ''") for each in found["answers"])


@pytest.mark.demo_model
def test_the_loss_on_what_another_model_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch as alone; a model that writes greedily would write its own answer again."""
    problems = [{"task_id": str(at), "prompt": "def f():\n" + at * "    # more\n"} for at in range(2)]
    model, tokenizer = load("demo"), load_tokenizer("demo")
    prompts = [each["prompt"] for each in problems]
    written = code_tasks.completions(model, tokenizer, prompts, batch=2, new_tokens=8)
    rows = [(prompt, text) for prompt, text in zip(prompts, written, strict=True)]
    own = [code_tasks.loss_on(model, tokenizer, [row], 1)[0] for row in rows]
    lengths = [len(tokenizer(text)["input_ids"]) for text in written]
    both = (own[0] * lengths[0] + own[1] * lengths[1]) / sum(lengths)
    other = [(prompt, "    return None") for prompt in prompts]
    assert both < code_tasks.loss_on(model, tokenizer, other, 2)[0]
    file, results, out = tmp_path / "problems.jsonl", tmp_path / "dense.json", tmp_path / "out.json"
    file.write_text("\n".join(map(json.dumps, problems)))
    answers = [{"task_id": each["task_id"], "completion": text} for each, text in zip(problems, written, strict=True)]
    results.write_text(json.dumps({"answers": answers}))
    monkeypatch.setattr(
        sys, "argv", ["code_tasks", "demo", "--problems", str(file), "--read", str(results), "--out", str(out)]
    )
    code_tasks.main()
    found = json.loads(out.read_text())
    assert found["loss"] == pytest.approx(both, rel=1e-3)
    assert found["same"] > 0.8


def test_what_is_said_of_functions_comes_from_their_files() -> None:
    """README's and the research log's figures of calibration on functions."""
    root = Path(__file__).parents[1]
    found = {file.stem: json.loads(file.read_text()) for file in (root / "benchmarks/results/functions").glob("*.json")}
    log, readme = ((root / name).read_text() for name in ("docs/research.md", "README.md"))
    rows = {
        "dense": "dense",
        "llm-pruner": "LLM-Pruner's recipe",
        "best": "`best`",
        "best-trained": "`best`, then trained on this text for 20 minutes",
        "fast-functions": "`fast`, two sevenths of the text the other 289 functions of MBPP",
        "best-functions": "`best`, the same text",
    }
    for name, row in rows.items():
        read = found[f"{name}-read"]
        assert f"| {row} | {read['loss']:.3f} | {read['same']:.1%} |".replace("%", " %") in log
    for name in ("fast-functions", "best-functions"):
        asked = found[f"{name}-humaneval"]
        assert f"| {100 * asked['value']:.1f} ± {100 * asked['stderr']:.1f} |" in log
    assert f"{100 * found['dense-answers']['value']:.1f} % of them rightly" in log
    assert f"[{100 * found['best-functions-humaneval']['value']:.0f} with" in readme
