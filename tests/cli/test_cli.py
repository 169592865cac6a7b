"""The command line in process: what it prints (against tests/golden), its JSON, its exit codes, and what it refuses.

`UPDATE_GOLDEN=1` rewrites the golden files; read the difference before you commit it.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import secateur
from question_files import write_questions
from recipes import recipe
from secateur import SecateurError
from secateur.cli import options
from secateur.cli.main import run
from secateur.cli.options import CUTTING, Cut
from secateur.cli.output import progress_bars
from secateur.files import write_json
from secateur.pipeline.run import plan_model
from secateur.pipeline.run_log import load_entries
from secateur.planning.options import CutOptions
from secateur.scoring.registry import SCORES
from tiny import names, write_tiny

GOLDEN = Path(__file__).parents[1] / "golden"
COMMANDS = tuple("discover plan prune recover evaluate profile sweep verify export push report demo compare".split())
RECOVER = "recover tiny out --data alpaca.json --max-length 128 --max-steps 4 --eval-steps 4 --seed 1".split()
OWN_SCORE = """
from secateur import register_score

@register_score("mine")
def mine(evidence):  # the first channels are worth most
    import torch
    order = torch.arange(evidence.weight.shape[0], 0, -1.0)
    return order[:, None].expand_as(evidence.weight)
"""
CHEAP = ("--score", "l2", "--repair", "none")
PRUNE_AND_TRAIN = (
    *"prune tiny out --ratio 0.3 --iterations 2 --calibration text.txt --samples 4 --length 16 --recover".split(),
    "max_steps=3,method=full,max_length=32,global_batch_size=2",
)
SMALL_SWEEP = (
    "--axes mlp --shape uniform --scope local --repair none --ppl cats=text.txt --protocol llm-pruner@32 --no-plot"
)
TEXT = "the cat sat on the mat and the dog sat on the log\n" * 40


@pytest.fixture(scope="module", autouse=True)
def as_of_a_large_model() -> Iterator[None]:
    """A tiny model is read and repaired as a large one, without more windows and without training of its layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.data.calibration.SMALL", 0)
        yield


@pytest.fixture(scope="module")
def shelf(as_of_a_large_model: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts and plans, most of them with something wrong."""
    folder = tmp_path_factory.mktemp("shelf")
    shutil.copytree(tiny, folder / "tiny")
    write_tiny(folder / "deep", num_hidden_layers=4)
    write_tiny(folder / "wordy", vocab_size=310)
    write_tiny(folder / "shardless", shard="100KB")
    next((folder / "shardless").glob("*-00002-*")).unlink()
    for name, bad in (("nan", float("nan")), ("inf", float("inf"))):
        shutil.copytree(tiny, folder / name)
        weights = load_file(folder / name / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
    (folder / "sizes").mkdir()
    shutil.copy(tiny / "config.json", folder / "sizes")
    shutil.copytree(tiny, folder / "packed")
    config = json.loads((tiny / "config.json").read_text())
    (folder / "packed" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}})
    )
    for kind in ("vit", "clip"):
        AutoConfig.for_model(kind).save_pretrained(folder / kind)
    shutil.copytree(tiny, folder / "pickle", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pickle" / "pytorch_model.bin").touch()
    write_questions(folder / "questions")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").touch()
    (folder / "fails.py").write_text("1 / 0")
    (folder / "short.txt").write_text("a cat")
    (folder / "rows.jsonl").write_text(json.dumps({"body": TEXT}))
    rows = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i)))} for i in range(2, 18)]
    (folder / "alpaca.json").write_text(json.dumps([*rows, {"instruction": "Say nothing.", "output": ""}]))
    cut = {"score": "l2"}
    decided = plan_model(recipe(str(folder / "tiny"), cut=cut)).to_json()
    write_json(folder / "plan.json", decided)
    write_json(folder / "deep.json", plan_model(recipe(str(folder / "deep"), cut=cut)).to_json())
    write_json(folder / "wordy.json", plan_model(recipe(str(folder / "wordy"), cut=cut)).to_json())
    write_json(folder / "undecided.json", plan_model(recipe(str(folder / "tiny"), cut=cut), sizes_only=True).to_json())
    write_json(
        folder / "uneven.json", plan_model(recipe(str(folder / "tiny"), cut={**cut, "layers": (0, 1)})).to_json()
    )
    write_json(folder / "format.json", {**decided, "format": 99})
    write_json(folder / "unknown.json", {**decided, "colour": "green"})
    write_json(folder / "damaged.json", {**decided, "groups": [{**decided["groups"][0], "keep": ["a"]}]})
    write_json(folder / "groupless.json", {**decided, "groups": 3})
    write_json(folder / "odd.json", {**decided, "options": {**decided["options"], "colour": "green"}})
    odd = {**decided["scored"], "calibration_options": {"samples": "many"}}
    write_json(folder / "oddtext.json", {**decided, "scored": odd})
    write_json(folder / "list.json", [])
    (folder / "half.json").write_text("{")
    (folder / "typo.yaml").write_text("cut: {ratoi: 0.2}\n")
    (folder / "text.yaml").write_text("cut: {ratio: much}\n")
    (folder / "planned.yaml").write_text("model: tiny\nplan: plan.json\n")
    (folder / "packed.yaml").write_text("command: export\nmodel: tiny\nint8: {dynamic: true}\n")
    (folder / "other.yaml").write_text("command: recover\nmodel: tiny\n")
    (folder / "modelless.yaml").write_text("cut: {ratio: 0.2}\n")
    return folder


@pytest.fixture(autouse=True)
def place(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for every test, with the shelf in reach under short names."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")  # the width of the parser's help
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def steady(text: str) -> str:
    """What a command printed, but for what differs between runs and machines."""
    text = re.sub(r"\d+\.\d+ s\b", "# s", text)
    text = re.sub(r"peak memory [\d.#]+ [KMG]iB", "peak memory #", text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def loose(text: str) -> str:
    """The same for tables of measurements: no numbers with a point in them, and no widths."""
    text = re.sub(r"(?<![\w.])[-+]?\d[\d,]*\.\d+", "#", text)
    return steady(re.sub(r"([━─ ])\1+", r"\1", text))


def check_golden(name: str, text: str) -> None:
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.is_file(), f"{file} is missing: UPDATE_GOLDEN=1 writes it"
    assert text == file.read_text(encoding="utf-8")


def succeed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must succeed without a word on stderr; returns what it printed."""
    capsys.readouterr()
    status = run(arguments)
    shown = capsys.readouterr()
    assert (status, shown.err) == (0, "")
    return shown.out


def refuse(capsys: pytest.CaptureFixture[str], match: str, *arguments: str) -> None:
    """Run a command that must fail with status 2, one line on stderr that holds `match`, and nothing left behind."""
    capsys.readouterr()
    before = names(Path())
    status = run(arguments)
    shown = capsys.readouterr()
    assert (status, shown.out) == (2, "")
    assert re.fullmatch(r"secateur: error: [^\n]+\n", shown.err), shown.err
    assert re.search(match, shown.err), shown.err
    assert names(Path()) == before


def test_options_of_which_none_is_given_are_a_dictionary() -> None:
    """From Python 3.12 on, the parser lets pydantic refuse anything else, where another package has imported it."""

    def shown(*, cut: Cut) -> None:
        assert not cut

    parameters = inspect.signature(options.command(shown)).parameters
    assert parameters["cut"].default == {}


class TestGolden:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_help(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        check_golden(f"help_{command}", succeed(capsys, command, "--help"))

    def test_root_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = succeed(capsys, "--help")
        check_golden("help", text)
        assert succeed(capsys) == text  # without arguments, too
        listed = re.findall(r"^│ (\w+)  ", text, re.MULTILINE)
        assert tuple(listed) == COMMANDS

    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_first_section_has_at_most_fifteen_options(
        self, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shown = succeed(capsys, command, "--help").partition("─ Options ─")[2].partition("╰─")[0]
        assert len(re.findall(r"^│ \*? *--", shown, re.MULTILINE)) <= 15

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert succeed(capsys, "--version") == f"secateur {secateur.__version__}\n"

    def test_discover(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = succeed(capsys, "discover", "tiny")
        check_golden("discover", steady(text))
        assert "…" not in text  # no name is cut short

    def test_plan(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = steady(succeed(capsys, "plan", "tiny", "--preset", "llm-pruner", "--ratio", "0.34"))
        check_golden("plan", re.sub(r" +\d\.\d{4,}", " #", text))  # Python's own pages, which are scored on, differ

    def test_plan_of_a_config(self, capsys: pytest.CaptureFixture[str]) -> None:
        check_golden("plan_sizes", steady(succeed(capsys, "plan", "sizes/config.json", "--target", "70K")))

    def test_prune(self, capsys: pytest.CaptureFixture[str]) -> None:
        check_golden("prune", steady(succeed(capsys, "prune", "tiny", "out", "--axes", "layers", "--ratio", "0.4")))

    def test_recover(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = (*RECOVER, "--eval", "cats=text.txt", "--warmup-steps", "100")
        check_golden("recover", loose(succeed(capsys, *arguments)))

    def test_evaluate(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = (
            "tiny",
            "--plan",
            "uneven.json",
            "--ppl",
            "cats=text.txt",
            "--protocol",
            "llm-pruner@32",
            "--protocol",
            "llm-pruner@64",
        )
        check_golden("evaluate", loose(succeed(capsys, "evaluate", *arguments)))

    def test_evaluate_tasks(self, capsys: pytest.CaptureFixture[str]) -> None:
        tasks = ("--tasks", "zero-shot", "--tasks-data", "questions", "--limit", "2")
        texts = ("--ppl", "cats=text.txt", "--protocol", "llm-pruner@64", "--protocol", "sliding@32/16")
        text = succeed(capsys, "evaluate", "tiny", "--plan", "uneven.json", *tasks, *texts)
        check_golden("evaluate_tasks", loose(re.sub(r"p < [\d.]+", "p #", text)))

    def test_export_int8(self, capsys: pytest.CaptureFixture[str]) -> None:
        check_golden("export_int8", steady(succeed(capsys, "export", "tiny", "out", "--int8", "--dynamic")))

    def test_profile(self, capsys: pytest.CaptureFixture[str]) -> None:
        check_golden(
            "profile", loose(succeed(capsys, "profile", "tiny", "deep", "--seq-len", "8", "--new-tokens", "2"))
        )

    def test_profile_of_a_config(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("sizes/config.json", "--plan", "undecided.json", "--seq-len", "8,32")
        check_golden("profile_sizes", succeed(capsys, "profile", *arguments))

    def test_sweep(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = f"tiny --ratios 0.2,0.99 --scores l2 {SMALL_SWEEP}".split()
        check_golden("sweep", loose(succeed(capsys, "sweep", *arguments)))

    def test_export(self, capsys: pytest.CaptureFixture[str]) -> None:
        check_golden("export", succeed(capsys, "export", "tiny", "out.gguf", "--gguf", "bf16", "--no-check"))


class TestOutput:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("export", "tiny", "out.gguf", "--no-check"),
            ("discover", "tiny"),
            ("plan", "tiny", "--score", "l1"),
            ("prune", "tiny", "out", "--score", "l1"),
            ("recover", "tiny", "out", "--data", "alpaca.json", "--max-steps", "1", "--max-length", "128"),
            ("evaluate", "tiny", "--ppl", "cats=text.txt"),
            ("profile", "tiny", "--seq-len", "4", "--new-tokens", "1"),
            ("profile", "sizes/config.json"),
            ("sweep", "tiny", "--ratios", "0.2", "--scores", "l2", *SMALL_SWEEP.split()),
            ("export", "tiny", "out", "--int8"),
        ],
    )
    def test_quiet_prints_nothing(self, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert succeed(capsys, *arguments, "--quiet") == ""

    def test_names_are_text_not_markup(self, tiny: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (place / "[red]x:cat:").symlink_to(tiny)
        assert "[red]x:cat:: what the cut leaves" in succeed(capsys, "plan", "./[red]x:cat:", "--sizes-only")

    def test_a_reader_that_stops_reading(self, place: Path) -> None:
        frozen = "print(gc.get_freeze_count(), file=sys.stderr)"  # triton would report what is kept as leaked
        code = f"import atexit, gc, sys; atexit.register(lambda: {frozen}); from secateur.cli.main import main; main()"
        command = [sys.executable, "-c", code, "discover", "tiny"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == "0\n"
        assert process.returncode == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def test_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = Terminal()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bars(quiet=False)("score") as progress:
            assert progress is not None
            progress(3, 10, "loss 2.500")
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
        assert re.search(r"score ━+.* 30% +loss 2.500 +(-:--:--|\d:\d\d:\d\d) +[\d.]+ (MiB|GiB)", shown)
        assert terminal.getvalue().endswith("\x1b[2K")  # the bar is gone

    @pytest.mark.parametrize(("stream", "quiet"), [(Terminal(), True), (io.StringIO(), False)])
    def test_without_one_or_quiet(self, stream: io.StringIO, quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bars(quiet=quiet)("score") as progress:
            assert progress is None
        assert stream.getvalue() == ""


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON of a command."""
    succeed(capsys, *arguments, "--json", "x.json")
    data: dict[str, Any] = json.loads(Path("x.json").read_text(encoding="utf-8"))
    return data


def is_whole(*values: Any) -> bool:
    return all(type(value) is int for value in values)


class TestJson:
    """The keys that the documentation promises."""

    def check_plan(self, data: dict[str, Any]) -> None:
        assert data["model"] == "tiny"
        assert data["parameters"].keys() == {"dense", "pruned", "dense_non_embedding", "pruned_non_embedding"}
        assert data["macs"].keys() == {"dense", "pruned"}
        assert is_whole(*data["parameters"].values(), *data["macs"].values())
        assert data["parameters"]["pruned"] < data["parameters"]["dense"]
        assert data["groups"]
        for group in data["groups"]:
            assert group.keys() >= {"name", "units", "kept"}
            assert 0 < group["kept"] < group["units"]

    def test_discover(self, capsys: pytest.CaptureFixture[str]) -> None:
        data = written(capsys, "discover", "tiny")
        assert data.keys() >= {"model", "groups", "frozen"}
        assert {group["name"] for group in data["groups"]} >= {"layers.2.mlp", "layers.0.attention", "hidden", "layers"}
        for group in data["groups"]:
            assert group.keys() >= {"name", "kind", "layer", "units", "axes"}
            for axis in group["axes"]:
                assert axis.keys() >= {"weight", "dim", "expression"}
        for frozen in data["frozen"]:
            assert frozen.keys() >= {"weight", "dim", "reason"}

    def test_plan(self, capsys: pytest.CaptureFixture[str]) -> None:
        data = written(capsys, "plan", "tiny", "--out", "p.json")
        self.check_plan(data)
        assert json.loads(Path("p.json").read_text()) == data
        assert all(len(group["keep"]) == group["kept"] for group in data["groups"])

    def test_plan_by_a_score_of_ones_own(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("mine.py").write_text(OWN_SCORE)
        given = ("--axes", "mlp", "--repair", "none", "--choose", "score", "--score", "mine")
        try:
            data = written(capsys, "plan", "tiny", *given, "--score-file", "mine.py")
        finally:
            SCORES.pop("mine", None)
        assert data["options"]["score"] == data["scored"]["score"] == "mine"
        assert all(group["keep"] == [*range(group["kept"])] for group in data["groups"])

    def test_plan_for_a_program(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = written(capsys, "plan", "tiny", "--sizes-only", "--for", "sglang")["options"]
        assert (options["engine"], options["shape"]) == ("sglang", "uniform")

    def test_plan_of_sizes(self, capsys: pytest.CaptureFixture[str]) -> None:
        data = written(capsys, "plan", "tiny", "--sizes-only")
        self.check_plan(data)
        assert all(group["keep"] is None for group in data["groups"])

    def test_prune(self, capsys: pytest.CaptureFixture[str]) -> None:
        data = written(capsys, "prune", "tiny", "out")
        self.check_plan(data)
        assert data["out"] == "out"
        assert {"discover", "load", "score", "price", "repair", "cut", "save"} == data["seconds"].keys()
        assert all(seconds >= 0 for seconds in data["seconds"].values())
        assert is_whole(data["peak_rss_bytes"])
        assert data["peak_rss_bytes"] > 10**7
        weights = load_file("out/model.safetensors")
        assert sum(weight.numel() for weight in weights.values()) == data["parameters"]["pruned"]
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        files = {"config.json", "tokenizer.json", "secateur_plan.json", "secateur_record.json"}
        assert set(names(Path("out"))) >= files

    def test_prune_with_its_json_in_the_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "prune", "tiny", "out", *CHEAP, "--json", "out/prune.json")
        assert Path("out/prune.json").is_file()

    @pytest.mark.slow
    def test_prune_and_recover(self, capsys: pytest.CaptureFixture[str]) -> None:
        data = written(capsys, *PRUNE_AND_TRAIN)
        assert (data["steps"], data["method"]) == (3, "full")
        record = json.loads(Path("out/secateur_record.json").read_text())
        assert record["recovery"]["data"]["sources"] == ["text.txt"]
        assert json.loads(Path("out/secateur_plan.json").read_text())["options"]["iterations"] == 2
        succeed(capsys, "recover", "again", "--recipe", "out/recipe.yaml")

    def test_recover(self, capsys: pytest.CaptureFixture[str]) -> None:
        data = written(capsys, *RECOVER, "--method", "lora", "--eval", "cats=text.txt", "--rank", "2")
        assert data["out"] == "out"
        assert is_whole(data["steps"], data["tokens"], data["best_step"], data["peak_rss_bytes"])
        assert [step for step, _ in data["loss"]] == [1, 2, 3, 4]
        assert data["seconds"].keys() == {"read", "load", "train", "save"}
        assert [entry["step"] for entry in data["evaluation"]] == [0, 4]
        assert all(entry["perplexity"].keys() == {"cats"} for entry in data["evaluation"])
        record = json.loads(Path("out/secateur_record.json").read_text())
        assert record["recovery"]["command"].startswith("secateur recover tiny out --data alpaca.json")
        assert record["recovery"]["options"]["lora"]["rank"] == 2

    def test_evaluate(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("tiny", "deep", "--ppl", "cats=text.txt", "--protocol", "llm-pruner@16", "--max-tokens", "100")
        data = written(capsys, "evaluate", *arguments)
        assert [result["model"] for result in data["results"]] == ["tiny", "deep"]
        for result in data["results"]:
            assert result["tasks"] == {}
            [row] = result["perplexity"]
            assert row.keys() >= {"data", "seq_len", "tokens", "ppl", "nll"}
            assert (row["data"], row["seq_len"], row["tokens"]) == ("cats", 16, 6 * 15)
            assert is_whole(result["weight_bytes"], result["file_bytes"])
            assert result["weight_bytes"] <= result["file_bytes"]

    def test_evaluate_by_protocols(self, capsys: pytest.CaptureFixture[str]) -> None:
        protocols = ["--protocol", "llm-pruner@32", "--protocol", "llm-pruner@64", "--protocol", "sliding@64/16"]
        data = written(capsys, "evaluate", "tiny", "deep", "tiny", "--ppl", "cats=text.txt", *protocols)
        first, second, again = (result["perplexity"] for result in data["results"])
        assert [row["protocol"] for row in first] == ["llm-pruner@32", "llm-pruner@64", "sliding@64/16"]
        assert [row["stride"] for row in first] == [32, 64, 16]
        for row in first:
            assert row["ppl_low"] < row["ppl"] < row["ppl_high"]
            assert row["bits_per_byte"] > 0
            assert row["nll_stderr"] > 0
            assert "against" not in row
        for row, other in zip(second, first, strict=True):
            assert row["against"]["model"] == "tiny"
            assert row["against"]["difference"] == pytest.approx(row["nll"] - other["nll"])
            assert row["against"].keys() == {"model", "difference", "stderr", "p"}
        assert [row["against"]["p"] for row in again] == [1.0] * 3

    def test_evaluate_tasks(self, capsys: pytest.CaptureFixture[str]) -> None:
        data = written(capsys, "evaluate", "tiny", "deep", "--tasks", "zero-shot", "--tasks-data", "questions")
        first, second = data["results"]
        assert first["perplexity"] == []
        seven = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
        assert list(first["tasks"]) == list(second["tasks"]) == seven
        for name, row in second["tasks"].items():
            keys = {"acc", "acc_stderr", "documents", "metric", "value", "stderr", "data", "against"}
            assert row.keys() - {"acc_norm", "acc_norm_stderr", "note"} == keys
            assert row["metric"] == ("acc" if name in ("boolq", "winogrande") else "acc_norm")
            assert (row["value"], row["stderr"]) == (row[row["metric"]], row[f"{row['metric']}_stderr"])
            assert row["against"].keys() == {"model", "difference", "stderr", "p"}
            assert row["against"]["difference"] == pytest.approx(row["value"] - first["tasks"][name]["value"])
            assert "against" not in first["tasks"][name]
        assert first["tasks_mean"]["value"] == pytest.approx(sum(row["value"] for row in first["tasks"].values()) / 7)
        assert first["tasks_mean"].keys() == {"value", "stderr", "tasks"}
        assert second["tasks_mean"].keys() == {"value", "stderr", "tasks", "difference", "difference_stderr", "p"}

    def test_evaluate_writes_samples(self, capsys: pytest.CaptureFixture[str]) -> None:
        prompts = ["--prompt", "the cat", "--prompt", "a dog", "--new-tokens", "4"]
        data = written(capsys, "evaluate", "tiny", "--plan", "plan.json", *prompts)
        for result in data["results"]:
            assert [sample["prompt"] for sample in result["samples"]] == ["the cat", "a dog"]
            assert (result["perplexity"], result["tasks"]) == ([], {})
        shown = succeed(capsys, "evaluate", "tiny", *prompts)
        assert len(re.findall("^tiny: (the cat|a dog)", shown, re.MULTILINE)) == 2

    def test_evaluate_a_per_layer_folder_in_bfloat16(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "prune", "tiny", "out", *CHEAP, "--layers", "0:1")
        tasks = ["--tasks", "boolq,arc_easy", "--tasks-data", "questions", "--limit", "2", "--dtype", "bfloat16"]
        data = written(capsys, "evaluate", "tiny", "out", *tasks, "--trust-remote-code")
        assert [row["tasks"]["boolq"]["documents"] for row in data["results"]] == [2, 2]
        assert data["results"][1]["tasks"]["arc_easy"]["against"]["model"] == "tiny"

    def test_evaluate_warns_of_what_a_model_was_trained_on(
        self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        succeed(capsys, *RECOVER)
        prompt = "Below is an instruction that describes a task. Write a response that appropriately completes it."
        Path("seen.txt").write_text(f"{prompt.replace('it.', 'the request.')}{' And more.' * 60}")
        caplog.clear()
        assert (
            run(["evaluate", "out", "--ppl", "seen=seen.txt", "--ppl", "cats=text.txt", "--protocol", "llm-pruner@16"])
            == 0
        )
        [message] = [message for message in caplog.messages if "share" in message]
        assert re.match(r"out: [\d.]+ % of the rows it was trained on, from alpaca\.json, share 13 words ", message)
        assert "evaluation text seen" in message

    def test_evaluate_what_a_plan_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        data = written(capsys, "evaluate", "tiny", "--plan", "plan.json", "--ppl", "cats=text.txt")
        dense, pruned = data["results"]
        assert pruned["weight_bytes"] < dense["weight_bytes"]
        assert pruned["file_bytes"] is None

    def test_export_int8(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "prune", "tiny", "out", *CHEAP, "--layers", "1:3")
        data = written(capsys, "export", "out", "int8", "--int8")
        assert data["scheme"] == "weight-only"
        assert len(data["layers"]) == 21
        assert data["left"] == {
            "model.embed_tokens.weight": "Embedding is no linear layer",
            "lm_head.weight": "it gives the logits",
        }
        assert Path("int8/secateur_plan.json").read_bytes() == Path("out/secateur_plan.json").read_bytes()
        measured = written(capsys, "evaluate", "tiny", "out", "int8", "--ppl", "cats=text.txt")["results"]
        assert [row["weight_bytes"] for row in measured][1:] == [
            data["weight_bytes"]["before"],
            measured[2]["weight_bytes"],
        ]
        assert measured[2]["weight_bytes"] == data["weight_bytes"]["after"] < measured[1]["weight_bytes"]
        assert measured[2]["file_bytes"] == data["file_bytes"]
        succeed(capsys, "profile", "out", "int8", "--seq-len", "4", "--new-tokens", "1")

    def test_profile(self, capsys: pytest.CaptureFixture[str]) -> None:
        [row] = written(capsys, "profile", "tiny", "--seq-len", "4", "--new-tokens", "2")["results"]
        sizes = ("parameters", "non_embedding_parameters", "macs", "weight_bytes", "peak_bytes", "kv_cache_bytes")
        assert row.keys() >= {"model", *sizes, "prefill_seconds", "decode_tokens_per_second"}
        assert is_whole(*(row[name] for name in sizes))
        assert sum(row["macs_by_operator"].values()) == sum(row["macs_by_kind"].values()) == row["macs"]
        assert "against" not in row

    def test_profile_of_a_grid(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = "profile tiny deep --seq-len 4,8 --batch 1,2 --new-tokens 1 --repeats 1".split()
        dense, other = written(capsys, *line)["results"]
        keys = {"batch", "seq_len", "prefill_seconds", "decode_tokens_per_second", "peak_bytes"}
        assert all(cell.keys() >= keys for cell in dense["grid"])
        assert [(cell["batch"], cell["seq_len"]) for cell in dense["grid"]] == [(1, 4), (2, 4), (1, 8), (2, 8)]
        assert other["against"].keys() >= {"model", "macs_ratio", "prefill_speedup", "decode_speedup"}
        assert other["against"]["model"] == "tiny"

    def test_sweep(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = f"sweep tiny --ratios 0.2,0.99 --scores l2 --run r {SMALL_SWEEP}".split()
        data = written(capsys, *line)
        assert [row["ratio"] for row in data["rows"]] == [0, 0.2]
        keys = {"score", "ratio", "label", "parameters", "non_embedding_parameters", "macs", "perplexity"}
        assert all(row.keys() >= keys for row in data["rows"])
        assert [(row["label"], row["ratio"]) for row in data["refused"]] == [("l2", 0.99)]
        assert json.loads(Path("r/sweep/sweep.json").read_text()) == data

    def test_into_a_pipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Such a path is written to; to replace it, as files are, would break the machine (think of /dev/stdout)."""
        reading, writing = os.pipe()
        with os.fdopen(reading) as pipe, ThreadPoolExecutor() as pool:
            text = pool.submit(pipe.read)
            with os.fdopen(writing, "w"):
                succeed(capsys, "discover", "tiny", "--quiet", "--json", f"/proc/self/fd/{writing}")
            assert json.loads(text.result())["model"] == "tiny"


class TestPlanFile:
    def test_prune_what_a_plan_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "plan", "tiny", "--out", "p.json", "--seed", "3")
        data = written(capsys, "prune", "tiny", "one", "--plan", "p.json")
        assert "score" not in data["seconds"]
        succeed(capsys, "prune", "tiny", "two", "--seed", "3")
        assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
        record = json.loads(Path("one/secateur_record.json").read_text())
        assert record["command"] == "secateur prune tiny one --plan p.json --json x.json"
        assert record["seed"] == 3

    def test_settings_come_from_the_model_not_from_the_plan(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "plan", "tiny", "--axes", "mlp", "--shape", "uniform", "--out", "even.json", *CHEAP)
        plan = json.loads(Path("even.json").read_text())
        write_json(Path("edited.json"), {**plan, "settings": {"intermediate_size": 5}})
        succeed(capsys, "prune", "tiny", "out", "--plan", "edited.json")
        assert json.loads(Path("out/config.json").read_text())["intermediate_size"] == plan["groups"][0]["kept"]


PRUNE = ("prune", "tiny", "out")
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    # the model
    "hub name offline": (
        "'no/such': its config cannot be read; no file .*not in the cache",
        ("prune", "no/such", "out"),
    ),
    "no such path": (r"'\./no-such': no such file or folder\. Expected", ("prune", "./no-such", "out")),
    "image model": ("'vit' has a config and no weights to cut", ("prune", "vit", "out")),
    "image and text model": ("'clip' is a CLIPModel, which continues no text, and evaluate is", ("evaluate", "clip")),
    "NaN": (r"layers\.1\.mlp\.up_proj\.weight: 1 of 4032 values are NaN or Inf", ("prune", "nan", "out")),
    "Inf": (r"layers\.1\.mlp\.up_proj\.weight: 1 of 4032 values are NaN or Inf", ("plan", "inf")),
    "missing shard": (r"the shard model-00002-of-\d+\.safetensors is missing", ("prune", "shardless", "out")),
    "no weights": ("'sizes' has a config and no weights to cut; `secateur plan sizes`", ("prune", "sizes", "out")),
    "a config file": ("no weights to cut; `secateur plan sizes/", ("prune", "sizes/config.json", "out")),
    "pickled weights": ("its weights are a pickle", ("prune", "pickle", "out")),
    "quantized": (
        r"'packed' is quantized \(gptq\).* Prune the model that it was made from",
        ("prune", "packed", "out"),
    ),
    "quantized plan": ("'packed' is quantized .*--sizes-only", ("plan", "packed")),
    "dtype": ('Invalid value "int3" for --dtype. Choose from: "auto", "float32"', (*PRUNE, "--dtype", "int3")),
    "device": ("device 'abacus' is unknown. Expected auto, cpu", (*PRUNE, "--device", "abacus")),
    # calibration
    "no calibration file": (r"'no\.txt': no such file", (*PRUNE, "--calibration", "no.txt")),
    "empty calibration": (r"'empty\.txt': there is no text in it", (*PRUNE, "--calibration", "empty.txt")),
    "tiny calibration": ("has [2-9] tokens, but one window needs 256", (*PRUNE, "--calibration", "short.txt")),
    "column of a text": (
        "column='body' names a field of documents, and this is one text",
        (*PRUNE, "--calibration", "text.txt", "--column", "body"),
    ),
    "wrong column": (
        r"rows\.jsonl', line 1: no column 'text' among \['body'\]\. 'body' holds text",
        (*PRUNE, "--calibration", "rows.jsonl"),
    ),
    "chat without a template": ("the tokenizer has no chat template", (*PRUNE, "--chat")),
    "self and chat": ("'self' is what the model generates", (*PRUNE, "--calibration", "self", "--chat")),
    "longer than the model": (
        "length=300 is longer than the model's 256 positions",
        (*PRUNE, "--length", "300"),
    ),
    "too many samples": ("tiny calibration text", (*PRUNE, "--calibration", "text.txt", "--samples", "9999")),
    "no samples": ("samples=0 is too small. Expected at least 1", (*PRUNE, "--samples", "0")),
    "short windows": ("length=1 is too small. Expected at least 2", (*PRUNE, "--length", "1")),
    # the budget
    "ratio 1": (r"ratio=1 is outside \[0, 1\)", (*PRUNE, "--ratio", "1.0")),
    "ratio below 0": (r"ratio=-0\.1 is outside \[0, 1\)", (*PRUNE, "--ratio", "-0.1")),
    "ratio nan": (r"ratio=nan is outside \[0, 1\)", (*PRUNE, "--ratio", "nan")),
    "ratio that is no number": ("Invalid value for --ratio.* See: secateur prune --help", (*PRUNE, "--ratio", "x")),
    "ratio too small": ("ratio=1e-07 of non-embedding removes no unit of any group", (*PRUNE, "--ratio", "1e-7")),
    "units too few": (
        r"ratio=0\.0001 of units .*removes one unit",
        (*PRUNE, "--ratio", "0.0001", "--of", "units", "--axes", "attention"),
    ),
    "ratio that empties": ("would empty it; ratio=0.9881 is the most", (*PRUNE, "--ratio", "0.99", "--of", "units")),
    "ratio out of reach": ("down to the fewest units leaves .*: at most ratio=0", (*PRUNE, "--ratio", "0.99")),
    "target that is no number": ("--target many: expected a number such as 100M", (*PRUNE, "--target", "many")),
    "target inf": ("--target inf: expected a number", (*PRUNE, "--target", "inf")),
    "target too large": ("target=9,000,000 is more than the dense model's", (*PRUNE, "--target", "9M")),
    "ratio and target": ("give either a ratio", (*PRUNE, "--target", "70K", "--ratio", "0.2")),
    # layers and widths
    "layers outside": (r"layers=4:30 is outside the model: it has layers 0:3", (*PRUNE, "--layers", "4:30")),
    "layers backwards": ("layers=2:1 is outside the model", (*PRUNE, "--layers", "2:1")),
    "layers malformed": ("--layers 4-30: expected first:last", (*PRUNE, "--layers", "4-30")),
    "schedule malformed": ("--schedule 0.5-1.5: expected two numbers", (*PRUNE, "--schedule", "0.5-1.5")),
    "tensor_parallel 0": ("tensor_parallel=0 is too small. Expected at least 1", (*PRUNE, "--tensor-parallel", "0")),
    "round_to 0": ("round_to=0 is too small. Expected at least 1", (*PRUNE, "--round-to", "0")),
    # names
    "score": ("score='parm_first' is unknown.* Did you mean param_first?", (*PRUNE, "--score", "parm_first")),
    "preset": ('Invalid value "bset" for --preset.* Did you mean "best"\\?', (*PRUNE, "--preset", "bset")),
    "axes": ("axes='mpl' is unknown.* Did you mean mlp?", (*PRUNE, "--axes", "mpl")),
    "no axes": ("axes is empty: name what to cut", (*PRUNE, "--axes", ",")),
    "of": ('Invalid value "unit" for --of.* Did you mean "units"\\?', (*PRUNE, "--of", "unit")),
    "reduce": ('Invalid value "avg" for --reduce.*"sum", "mean"', (*PRUNE, "--reduce", "avg")),
    # the plan file
    "plan and ratio": (
        "--plan plan.json says all about the cut: leave out --ratio",
        (*PRUNE, "--plan", "plan.json", "--ratio", "0.2"),
    ),
    "plan and preset": ("leave out --preset", (*PRUNE, "--plan", "plan.json", "--preset", "best")),
    "plan and calibration": ("leave out --calibration", (*PRUNE, "--plan", "plan.json", "--calibration", "text.txt")),
    "plan and column": ("leave out --column", (*PRUNE, "--plan", "plan.json", "--column", "body")),
    "varied": ("varied=1 is no share of the windows", (*PRUNE, "--varied", "1")),
    "varied without repair": (
        "varied=0.5 is for repair, and repair=none does without",
        (*PRUNE, "--preset", "llm-pruner", "--varied", "0.5"),
    ),
    "plan and varied": ("leave out --varied", (*PRUNE, "--plan", "plan.json", "--varied", "0.5")),
    "plan and chat": ("leave out --chat", (*PRUNE, "--plan", "plan.json", "--chat")),
    "plan of another depth": (
        r"layers\.3\.mlp, which tiny does not have: it is of another model",
        (*PRUNE, "--plan", "deep.json"),
    ),
    "plan of another vocabulary": (
        "of another model: of one with 107856 parameters .*, and tiny has 106896",
        (*PRUNE, "--plan", "wordy.json"),
    ),
    "plan of sizes": ("how many units stay, not which", (*PRUNE, "--plan", "undecided.json")),
    "no plan": ("no plan at no.json: write one with `secateur plan", (*PRUNE, "--plan", "no.json")),
    "half a plan": (r"half\.json is not a plan: ", (*PRUNE, "--plan", "half.json")),
    "a list": (r"list\.json is not a plan: expected a JSON object, found list", (*PRUNE, "--plan", "list.json")),
    "a folder": ("tiny is not a plan", (*PRUNE, "--plan", "tiny")),
    "plan of another format": (
        r"format\.json: the plan has format 99, this version reads 2",
        (*PRUNE, "--plan", "format.json"),
    ),
    "score file, none": (r"--score-file no\.py: no such file", (*PRUNE, "--score-file", "no.py")),
    "score file that fails": (r"--score-file fails\.py: ZeroDivisionError", (*PRUNE, "--score-file", "fails.py")),
    "score file without one": (
        r"--score-file empty\.txt: it registers no score; decorate a function with",
        (*PRUNE, "--score-file", "empty.txt"),
    ),
    "plan with more keys": (r"the plan is damaged \('colour' is unknown", (*PRUNE, "--plan", "unknown.json")),
    "damaged plan": (
        r"damaged\.json: the plan is damaged \(groups: keep: 'a' is no int\): plan again",
        (*PRUNE, "--plan", "damaged.json"),
    ),
    "plan without groups": (r"the plan is damaged \(groups: 3 is no list\)", (*PRUNE, "--plan", "groupless.json")),
    "plan with an odd text": (
        r"the plan is damaged \(calibration_options: samples: 'many' is no int\)",
        (*PRUNE, "--plan", "oddtext.json"),
    ),
    "plan with odd options": ("the plan is damaged .*colour", (*PRUNE, "--plan", "odd.json")),
    "evaluate a plan of sizes": ("how many units stay, not which", ("evaluate", "tiny", "--plan", "undecided.json")),
    # where to write
    "OUT exists": ("deep exists; name another folder, or replace it with --overwrite", ("prune", "tiny", "deep")),
    "OUT is a file": (
        "text.txt is a file, and a folder is to be written",
        ("prune", "tiny", "text.txt", "--overwrite"),
    ),
    "OUT is other things": (r"\. holds other things: .* has no config\.json", ("prune", "tiny", ".", "--overwrite")),
    "OUT is the model": ("tiny holds the MODEL itself", ("prune", "tiny", "tiny", "--overwrite")),
    "OUT without a parent": ("the folder .*/no does not exist; make it first: mkdir -p", ("prune", "tiny", "no/out")),
    "OUT that no disk takes": ("cannot be written: File name too long", ("prune", "tiny", "x" * 300)),
    "OUT in /proc": ("cannot be written: ", ("prune", "tiny", "/proc/x")),
    "JSON without a parent": (
        "no/x.json: the folder .*/no does not exist",
        ("discover", "tiny", "--json", "no/x.json"),
    ),
    "JSON is a folder": ("tiny is a folder, and a file is to be written", (*PRUNE, "--json", "tiny")),
    "plan without a parent": ("no/p.json: the folder .*/no does not exist", ("plan", "tiny", "--out", "no/p.json")),
    "demo exists": ("tiny exists", ("demo", "--out", "tiny")),
    "export to nothing": (
        "out: no format to write. Expected --quantize SCHEME, --gguf TYPE or --int8",
        ("export", "tiny", "out"),
    ),
    "export both": (
        "--quantize and --int8 write a folder each, and --gguf a .gguf file: export once for each",
        ("export", "tiny", "out", "--int8", "--gguf", "f16"),
    ),
    "export int8 to a file": (
        "--quantize and --int8 write a folder each, and --gguf a .gguf file: export once for each",
        ("export", "tiny", "out.gguf", "--int8"),
    ),
    "export what is packed": (
        r"'packed' is quantized \(gptq\), and packed weights cannot be scored, cut or packed again",
        ("export", "packed", "out", "--int8", "--dynamic"),
    ),
    "export onto the model": (
        "tiny holds the MODEL itself",
        ("export", "tiny", "tiny", "--int8", "--dynamic", "--overwrite"),
    ),
    "export over others": ("deep exists", ("export", "tiny", "deep", "--int8", "--dynamic")),
    "export nothing": ("'./no-such': no such file", ("export", "./no-such", "out", "--int8", "--dynamic")),
    # evaluation
    "ppl malformed": ("--ppl text.txt: expected NAME=FILE, for example", ("evaluate", "tiny", "--ppl", "text.txt")),
    "no ppl file": (r"'no\.txt': no such file", ("evaluate", "tiny", "--ppl", "cats=no.txt")),
    "text too short": (
        r"cats: \d+ tokens are fewer than one window of 9999",
        ("evaluate", "tiny", "--ppl", "cats=text.txt", "--protocol", "llm-pruner@9999"),
    ),
    "second model missing": ("'./no-such': no such file", ("evaluate", "tiny", "./no-such")),
    "second profile missing": ("'./no-such': no such file", ("profile", "tiny", "./no-such")),
    "unknown protocol": (
        "protocol='gtpq@9' is unknown. Expected served@N, llm-pruner@N or sliding@N/STRIDE, for example",
        ("evaluate", "tiny", "--protocol", "gtpq@9"),
    ),
    "unknown local task": (
        "task 'arc_hard' has no local files. Did you mean arc_easy",
        ("evaluate", "tiny", "--tasks", "boolq,arc_hard", "--tasks-data", "questions"),
    ),
    "no questions": (
        "piqa: its questions are not in 'tiny'. Expected there: piqa_original/valid.jsonl with",
        ("evaluate", "tiny", "--tasks", "piqa", "--tasks-data", "tiny"),
    ),
    "no limit": (
        "limit=0 is too small. Expected at least 1, for example limit=200",
        ("evaluate", "tiny", "--tasks", "piqa", "--tasks-data", "questions", "--limit", "0"),
    ),
    "questions of no task": (
        "tasks_data=questions is about tasks",
        ("evaluate", "tiny", "--tasks-data", "questions"),
    ),
    "no task": ("tasks=',' names no task", ("evaluate", "tiny", "--tasks", ",")),
    "an empty prompt": ("prompt='' has no tokens", ("evaluate", "tiny", "--prompt", "")),
    "windows of one": (
        "llm-pruner@1: a window of 1 scores nothing",
        ("evaluate", "tiny", "--protocol", "llm-pruner@1"),
    ),
    "no tokens": ("max_tokens=0 is too small. Expected at least 1", ("evaluate", "tiny", "--max-tokens", "0")),
    "profile letters": ("--seq-len 8;9: expected whole numbers", ("profile", "tiny", "--seq-len", "8;9")),
    "profile no batch": (
        "batch_sizes=0 is too small. Expected at least 1",
        ("profile", "sizes/config.json", "--batch", "0"),
    ),
    "profile another plan": ("the plan cuts layers.3", ("profile", "tiny", "--plan", "deep.json", "--sizes-only")),
    "sweep letters": ("--ratios a:b: expected first:last:step", ("sweep", "tiny", "--ratios", "a:b")),
    "sweep unknown": ("score='l3' is unknown", ("sweep", "tiny", "--ratios", "0.2", "--scores", "l3")),
    "sweep of nothing": ("--ratios is missing: name the shares .*--ratios 0.1:0.6:0.1", ("sweep", "tiny")),
    "sweep in a file": (
        "plan.json is a file, and --run needs a folder for the run.s log",
        ("sweep", "tiny", "--ratios", "0.2", "--run", "plan.json"),
    ),
    "profile nothing": ("seq_lens=0 is too small. Expected at least 1", ("profile", "tiny", "--seq-len", "0")),
    # comparing
    "compare one": ('Command "compare" parameter B requires an argument', ("compare", "--port", "0", "tiny")),
    "compare with nothing": ("'./no-such': no such file", ("compare", "--port", "0", "tiny", "./no-such")),
    "compare, shard missing": ("shardless.*is missing", ("compare", "--port", "0", "tiny", "shardless")),
    "compare, NaN": ("values are NaN or Inf", ("compare", "--port", "0", "nan", "tiny")),
    "compare, sizes alone": ("a config file holds no weights", ("compare", "--port", "0", "tiny", "sizes/config.json")),
    "compare, a host of others": (
        "--host 203.0.113.9 .*cannot be",
        ("compare", "tiny", "deep", "--host", "203.0.113.9"),
    ),
    "compare, no port": ("--port.*65535", ("compare", "tiny", "deep", "--port", "70000")),
    "compare, one model": (r"parameter B requires an argument\. See: secateur compare --help", ("compare", "tiny")),
    # the parser
    "unknown option": (
        r"Unknown option: --rato\. Did you mean --ratio.* See: secateur prune --help",
        (*PRUNE, "--rato", "1"),
    ),
    "unknown root option": (r"--no-such.* See: secateur --help", ("--no-such",)),
    "unknown command": (r'Unknown command "prun"\. Did you mean "prune"\?.* See: secateur --help', ("prun",)),
    "missing argument": (r"OUT is missing: secateur prune tiny OUT writes a folder", ("prune", "tiny")),
    "missing models": (r"no MODEL is named: .*secateur evaluate demo", ("evaluate",)),
    "missing value": ("--ratio.* requires an argument", (*PRUNE, "--ratio")),
    "too many arguments": (r"Unused Tokens: \['c'\]", (*PRUNE, "c")),
    "recover without data": (
        r"--data is missing, and 'tiny' has no recipe.yaml .*, demo or self to train on, .* --data alpaca.json",
        ("recover", "tiny", "out"),
    ),
    "recover, two budgets": (
        r"tokens=400000 and minutes=2 both say when to stop",
        ("recover", "tiny", "out", "--data", "alpaca.json", "--minutes", "2", "--tokens", "400k"),
    ),
    "recover, tokens": (
        r"--tokens many: expected a number such as 400k",
        ("recover", "tiny", "out", "--data", "alpaca.json", "--tokens", "many"),
    ),
    "prune --recover, no budget": (
        r"--recover method=full: for how long is not said\. Expected one of minutes, tokens",
        ("prune", "tiny", "out", "--recover", "method=full"),
    ),
    "prune --recover, no value": (
        r"--recover minutes: minutes\. Expected, for example, --recover minutes=20",
        ("prune", "tiny", "out", "--recover", "minutes"),
    ),
    "prune --recover, no option": (
        r"--recover minute=20: 'minute' is unknown.*Did you mean minutes",
        ("prune", "tiny", "out", "--recover", "minute=20"),
    ),
    "prune --recover, no number": (
        r"--recover minutes=many: minutes: 'many' is no float",
        ("prune", "tiny", "out", "--recover", "minutes=many"),
    ),
    "prune --recover, no YAML": (
        r"--recover minutes=2,data=\*\.txt: data=\*\.txt is no value as YAML has it; in quotes it is one",
        ("prune", "tiny", "out", "--recover", "minutes=2,data=*.txt"),
    ),
    "prune --recover, endless": (
        r"--recover tokens=inf: inf is no number",
        ("prune", "tiny", "out", "--recover", "tokens=inf"),
    ),
    "prune --recover, a plan": (
        r"--recover: a plan that was made before is cut alone; then run secateur recover",
        ("prune", "tiny", "out", "--plan", "plan.json", "--recover", "minutes=2"),
    ),
    "recover, no file": (r"'nothing.json': no such file", ("recover", "tiny", "out", "--data", "nothing.json")),
    "recover, columns": (
        r"no fields to train on among \['body'\]. .*--column NAME",
        ("recover", "tiny", "out", "--data", "rows.jsonl"),
    ),
    "recover, length": (
        "nothing is left of its 17 rows .* --max-length 16",
        ("recover", "tiny", "out", "--data", "alpaca.json", "--max-length", "8", "--loss-on", "answers"),
    ),
    "recover, float16": (
        "dtype='float16' overflows in training",
        ("recover", "tiny", "out", "--data", "alpaca.json", "--dtype", "float16"),
    ),
    "recover, teacher": (
        "teacher 'wordy' has a vocabulary of 310 tokens, and 'tiny' one of 300",
        ("recover", "tiny", "out", "--data", "alpaca.json", "--method", "distill", "--teacher", "wordy"),
    ),
    "recover, no record": (
        "'tiny' has no record .* --teacher MODEL",
        ("recover", "tiny", "out", "--data", "alpaca.json", "--method", "distill"),
    ),
    "recover, text": (
        "--eval cats: expected NAME=FILE, for example --eval",
        ("recover", "tiny", "out", "--data", "alpaca.json", "--eval", "cats"),
    ),
    "recover, method": (
        'Invalid value "magic" for --method',
        ("recover", "tiny", "out", "--data", "alpaca.json", "--method", "magic"),
    ),
    # recipes
    "no recipe": (r"no\.yaml: no recipe can be read", (*PRUNE, "--recipe", "no.yaml")),
    "unknown key": (
        r"typo\.yaml: cut: 'ratoi' is unknown\. Known: ratio, of, .* Did you mean ratio\?",
        (*PRUNE, "--recipe", "typo.yaml"),
    ),
    "wrong type": (r"text\.yaml: cut: ratio: 'much' is no float", (*PRUNE, "--recipe", "text.yaml")),
    "another command's": (r"other\.yaml: this is a recipe of another command", (*PRUNE, "--recipe", "other.yaml")),
    "no model": (r"modelless\.yaml: no model", ("prune", "out", "--recipe", "modelless.yaml")),
    "recipe of a plan, and ratio": (
        r"planned\.yaml prunes what plan\.json says, which says all about the cut: leave out --ratio",
        ("prune", "out", "--recipe", "planned.yaml", "--ratio", "0.5"),
    ),
    "recipe of a plan, to be planned": (
        r"planned\.yaml prunes what plan\.json says, so nothing is left to plan",
        ("plan", "tiny", "--recipe", "planned.yaml"),
    ),
    "export recipe and MODEL": (
        r"--recipe packed\.yaml says all about the export: leave out MODEL and all options but OUT",
        ("export", "tiny", "out", "--recipe", "packed.yaml"),
    ),
    "export recipe and options": (
        r"--recipe packed\.yaml says all about the export: leave out MODEL and all options but OUT",
        ("export", "out", "--recipe", "packed.yaml", "--int8"),
    ),
    "fp8 and text": (
        "quantize=fp8 looks at no text, and calibration options were given: .* --quantize w8a8",
        ("export", "tiny", "out", "--quantize", "fp8", "--samples", "4"),
    ),
    "recipe and plan": ("leave out --recipe", (*PRUNE, "--plan", "plan.json", "--recipe", "typo.yaml")),
    "merge nothing": ("'tiny' is no folder with an adapter_config.json", ("export", "tiny", "out", "--merge-lora")),
    "merge and pack": (
        "merge first, then export that folder",
        ("export", "tiny", "out", "--merge-lora", "--int8"),
    ),
}


READS_WEIGHTS = {"dtype", "device"}  # or begins to, of those that name a sound model


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    match, arguments = REFUSED[case]
    if arguments[:2] == ("prune", "tiny") and case not in READS_WEIGHTS:
        monkeypatch.setattr("secateur.pipeline.pipeline.load", lambda *_, **__: pytest.fail("weights were read"))
    if arguments[2:] == ("./no-such",):
        for place in ("models.loading", "evaluation.profile"):
            monkeypatch.setattr(f"secateur.{place}.load", lambda *_, **__: pytest.fail("weights were read"))
    refuse(capsys, match, *arguments)


class TestExitCodes:
    def test_a_failure_of_ours(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("a bug\nof ours")

        monkeypatch.setattr("secateur.pipeline.pipeline.prune", fail)
        before = names(Path())
        assert run([*PRUNE, *CHEAP, "--quiet"]) == 1
        *trace, last = capsys.readouterr().err.splitlines()
        assert last == "secateur: failed: RuntimeError: a bug of ours"
        assert trace[0] == "Traceback (most recent call last):"
        assert "out" not in set(names(Path())) - set(before)

    def test_ctrl_c(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("secateur.pipeline.pipeline.load", interrupt)
        before = names(Path())
        assert run([*PRUNE, "--quiet"]) == 130
        assert capsys.readouterr().err == (
            "secateur: interrupted; the same command with --resume continues where it can\n"
        )
        assert names(Path()) == before  # nothing was worth keeping yet
        assert run(["plan", "tiny", "--quiet"]) == 130
        assert capsys.readouterr().err == "secateur: interrupted\n"

    def test_an_error_of_many_lines_is_one(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise SecateurError("one\n  two")

        monkeypatch.setattr("secateur.pipeline.pipeline.load", fail)
        refuse(capsys, "secateur: error: one two$", "plan", "tiny")

    def test_main_exits_with_the_status(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from secateur.cli.main import main

        monkeypatch.setattr(sys, "argv", ["secateur", "--version"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        with pytest.raises(SystemExit) as stop:
            main(["no-such"])
        assert stop.value.code == 2


class TestCalibration:
    FEW = ("--samples", "4", "--length", "32")

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(Path("out/secateur_record.json").read_text())
        return record

    def test_column(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "prune", "tiny", "out", "--calibration", "rows.jsonl", "--column", "body", *self.FEW)
        options = {"text": ["rows.jsonl"], "samples": 4, "length": 32, "seed": 0, "column": "body", "chat": False}
        options |= {
            "tokens_per_column": 0.0,
            "held_out": 8,
            "score_samples": 64,
            "varied": 0.375,
            "copied": 0.125,
            "start_tokens": None,
        }
        assert self.record()["calibration_options"] == options

    def test_several_texts(self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        texts = ("--calibration", "text.txt@3", "--calibration", "rows.jsonl", "--column", "body")
        succeed(capsys, "prune", "tiny", "out", *texts, *self.FEW)
        assert self.record()["calibration_options"]["text"] == ["text.txt@3", "rows.jsonl"]
        run(["evaluate", "out", "--ppl", "cats=text.txt"])
        assert "its calibration windows, from text.txt, rows.jsonl, share" in caplog.text
        weights = Path("out/model.safetensors").read_bytes()
        succeed(capsys, "prune", "--recipe", "out/recipe.yaml", "again")
        assert Path("again/model.safetensors").read_bytes() == weights

    def test_self(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "prune", "tiny", "out", "--calibration", "self", "--seed", "3", *self.FEW)
        assert self.record()["calibration_options"]["text"] == ["self"]
        assert self.record()["calibration_options"]["seed"] == 3
        assert succeed(capsys, "evaluate", "out", "--ppl", "cats=text.txt")

    def test_a_text_that_was_calibrated_on(
        self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        succeed(capsys, "prune", "tiny", "out", "--calibration", "text.txt", *self.FEW)
        run(["evaluate", "out", "--ppl", "cats=text.txt", "--ppl", "other=short.txt", "--protocol", "llm-pruner@2"])
        assert [record.getMessage() for record in caplog.records] == [
            "out: 100 % of its calibration windows, from text.txt, share 13 words in a row with the evaluation text "
            "cats; this flatters the result, so calibrate on another text"
        ]
        caplog.clear()
        run(["evaluate", "out", "--ppl", "cats=text.txt", "--quiet"])
        assert not caplog.records
        run(["evaluate", "tiny", "--plan", "out/secateur_plan.json", "--ppl", "cats=text.txt"])
        assert [record.getMessage()[:12] for record in caplog.records] == ["tiny: 100 % "]

    def test_windows_in_random_order_are_no_part_of_a_text(
        self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        for out, share in (("plain", 0.0), ("out", 0.5)):
            succeed(capsys, "prune", "tiny", out, "--calibration", "text.txt", "--varied", str(share), *self.FEW)
            record = json.loads(Path(out, "secateur_record.json").read_text())
            assert record["calibration_options"]["varied"] == share
        assert Path("plain/model.safetensors").read_bytes() != Path("out/model.safetensors").read_bytes()
        run(["evaluate", "out", "--ppl", "cats=text.txt"])
        assert [record.getMessage()[:29] for record in caplog.records] == ["out: 100 % of its calibration"]

    def test_the_demo_texts_are_apart(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "prune", "tiny", "out")
        succeed(capsys, "evaluate", "out")  # without a word on stderr


class TestHeldOut:
    def test_the_plan_says_what_the_cut_has_cost(self, capsys: pytest.CaptureFixture[str]) -> None:
        few = ("--calibration", "text.txt", "--samples", "4", "--length", "32", "--held-out", "2")
        succeed(capsys, "prune", "tiny", "out", *few)
        losses = json.loads(Path("out", "secateur_plan.json").read_text())["scored"]["held_out_loss"]
        assert set(losses) == {"before", "cut", "repaired"}
        assert all(0 < loss < 20 for loss in losses.values())


class TestRecipe:
    FEW = ("--samples", "4", "--length", "32", "--calibration", "text.txt", "--seed", "3")

    @pytest.mark.parametrize(
        "cut",
        [
            ("--ratio", "0.3", "--axes", "mlp", "--shape", "uniform"),
            ("--preset", "llm-pruner", "--layers", "0:2"),
            ("--target", "70K", "--iterations", "2"),
        ],
    )
    def test_a_folder_replays_to_the_same_bytes(self, cut: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "prune", "tiny", "one", *cut, *self.FEW)
        succeed(capsys, "prune", "two", "--recipe", "one/recipe.yaml")
        for name in names(Path("one")):
            if name not in (
                "secateur_record.json",
                "secateur_manifest.json",
                "README.md",
            ):  # the command line is another one
                assert Path("two", name).read_bytes() == Path("one", name).read_bytes(), name

    def test_a_cut_by_a_plan_replays(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "prune", "tiny", "one", "--plan", "plan.json")
        succeed(capsys, "prune", "two", "--recipe", "one/recipe.yaml")
        for name in ("model.safetensors", "secateur_plan.json", "recipe.yaml"):
            assert Path("two", name).read_bytes() == Path("one", name).read_bytes()

    def test_an_exported_folder_replays(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "export", "tiny", "one", "--int8", "--dynamic", "--dtype", "float32")
        succeed(capsys, "export", "two", "--recipe", "one/recipe.yaml")
        assert "torchao" in Path("two/README.md").read_text()
        for name in ("model.safetensors", "config.json", "recipe.yaml"):
            assert Path("two", name).read_bytes() == Path("one", name).read_bytes()

    def test_a_trained_folder_replays(self, capsys: pytest.CaptureFixture[str]) -> None:
        succeed(capsys, "recover", "tiny", "one", *RECOVER[3:], "--rank", "2")
        succeed(capsys, "recover", "two", "--recipe", "one/recipe.yaml")
        assert "secateur recover --recipe recipe.yaml" in Path("two/README.md").read_text()
        for name in ("model.safetensors", "config.json", "recipe.yaml"):
            assert Path("two", name).read_bytes() == Path("one", name).read_bytes()

    def test_options_of_the_command_line_win(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("r.yaml").write_text("model: tiny\npreset: fast\ncut: {ratio: 0.1, axes: [mlp], score: l2}\n")
        data = written(capsys, "plan", "--recipe", "r.yaml", "--target", "90K", "--of", "parameters")
        assert (data["options"]["ratio"], data["options"]["target"]) == (None, 90_000)
        assert (data["options"]["axes"], data["options"]["score"]) == (["mlp"], "l2")


def test_every_option_of_a_cut_is_an_option_of_plan_and_prune(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("plan", "prune"):
        text = succeed(capsys, command, "--help")
        for name, field in CutOptions.__dataclass_fields__.items():
            assert f"{CUTTING.option(f'cut.{name}')} " in text
            for choice in get_args(get_type_hints(CutOptions)[field.name]):
                assert not isinstance(choice, str) or choice in text


class TestRunLog:
    @pytest.mark.parametrize(
        ("arguments", "models"),
        [
            (("plan", "tiny", "--score", "l1"), ["tiny"]),
            (("prune", "tiny", "out", *CHEAP, "--seed", "3"), ["tiny", "out"]),
            (("evaluate", "tiny", "deep", "--ppl", "cats=text.txt", "--max-tokens", "300"), ["tiny", "deep"]),
            (("profile", "tiny", "--seq-len", "4", "--new-tokens", "1"), ["tiny"]),
            (("export", "tiny", "out.gguf", "--no-check"), ["tiny", "out.gguf"]),
            (("export", "tiny", "out", "--int8"), ["tiny", "out"]),
        ],
    )
    def test_a_result_is_entered_as_it_is_written(
        self, arguments: tuple[str, ...], models: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = written(capsys, *arguments, "--run", "runs/mine")
        [entry] = load_entries(Path("runs/mine"))
        assert entry.result == data
        assert (entry.kind, list(entry.models)) == (arguments[0], models)
        assert entry.command == f"secateur {' '.join(arguments)} --run runs/mine --json x.json"
        assert entry.seed == (3 if "--seed" in arguments else 0)
        succeed(capsys, "report", "runs/mine", "r.html")
        assert Path("r.html").stat().st_size > 1000

    @pytest.mark.parametrize(
        "arguments",
        [
            ("plan", "tiny"),
            ("prune", "tiny", "out"),
            ("recover", "tiny", "out", "--data", "alpaca.json"),
            ("evaluate", "tiny"),
            ("profile", "tiny"),
            ("export", "tiny", "out.gguf"),
            ("export", "tiny", "out", "--int8"),
        ],
    )
    def test_a_file_in_the_way_is_refused_before_any_work(
        self, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        works = ["pipeline.run.plan_model", "pipeline.run.prune_model", "recovery.recover.recover"]
        for work in (*works, "models.config.load_config", "export.formats.export_model"):
            monkeypatch.setattr(f"secateur.{work}", lambda *_, **__: pytest.fail("work had begun"))
        refuse(
            capsys, "text.txt is a file, and --run needs a folder for the run.s log", *arguments, "--run", "text.txt"
        )

    def test_a_run_without_a_log(self, capsys: pytest.CaptureFixture[str]) -> None:
        refuse(capsys, "tiny has no log, so there is nothing to report", "report", "tiny", "r.html")
        refuse(capsys, "none is no folder; name one that --run was given", "report", "none", "r.html")


def test_all_commands_take_the_common_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        text = succeed(capsys, command, "--help")
        for option in ("--quiet", "--json"):
            assert re.search(rf"^│ {option} ", text, re.MULTILINE), (command, option)


def test_a_budget_that_whole_units_cannot_meet_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = succeed(capsys, "plan", "tiny", "--sizes-only", "--axes", "layers", "--score", "l2", "--ratio", "0.4")
    assert "the nearest that whole units allow: 33.31% of non-embedding" in " ".join(said.split())
    exact = succeed(capsys, "plan", "tiny", "--sizes-only", "--axes", "mlp", "--score", "l2", "--ratio", "0.4")
    assert "whole units" not in exact


def test_layers_of_many_sizes_are_one_row_with_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    said = succeed(capsys, "plan", "tiny", "--axes", "mlp", "--ratio", "0.3", "--score", "random", "--repair", "none")
    assert "│ mlp " in said
