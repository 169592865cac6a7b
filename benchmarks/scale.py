"""A larger model, dense, cut by LLM-Pruner's recipe and by ours, with and without training: what is lost and gained.

    python benchmarks/scale.py MODEL --calibration FILE --text NAME=FILE [--ratio 0.2] [--row fast] [--minutes 20]

MODEL is a folder, so that its weights stay on the disk. Every step is a process of its own, a command of Secateur as a
user would call it: the cut, the training (`--minutes`, of the row that is named last), the loss on every text beside
the dense model, prefill and decoding beside the dense model in transformers, with `--vllm` in vLLM (in `.venv-vllm`),
with `--gguf TYPE` in llama.cpp, with `--tasks FOLDER` LLM-Pruner's seven tasks from files in the folder, and with
`--problems FILE` the functions that a model writes for HumanEval's, which are run.
Damage is ln(perplexity / perplexity of the dense model), in nats per token. Every result goes into a JSON file as it
comes (`--out`), and the same command goes on after a stop; `--write` copies the results into benchmarks/results, puts
the table into docs/benchmarks.md, a short one into README.md, and draws docs/scale.svg. To go on from the results that
are in the repository, name them as `--out`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secateur.files import write_json
from serving import measure
from tables import ROOT, cores, keep, markdown, processor, secateur, show, write_table

ROWS = {  # name -> as the table has it, and what `secateur prune` is told besides the ratio and the text
    "llm-pruner": ("LLM-Pruner's recipe", ["--preset", "llm-pruner"]),
    "fast": ("`fast`", ["--preset", "fast"]),
    "fast-estimated": ("`fast --prices estimated`", ["--preset", "fast", "--prices", "estimated"]),
    "best": ("`best`", ["--preset", "best"]),
}
DENSE, TRAINED = "dense", ", then trained"
QUESTIONS = {"tasks": "tasks", "HumanEval": "code tasks"}
ENGINES = {"transformers": "speed", "vLLM": "vLLM", "llama.cpp": "llama.cpp"}  # both by head of the table
PICTURE = ROOT / "docs" / "scale.svg"


def main() -> None:
    """Measure what is missing; print the table."""
    options = _arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for ratio in [] if options.table else options.ratio:
        for row in options.row:
            _measure(f"{ratio:.0%} | {ROWS[row][0]}", ratio, row, results, options)
        if options.minutes:
            last = options.row[-1]
            _measure(f"{ratio:.0%} | {ROWS[last][0]}{TRAINED}", ratio, last, results, options)
    show(f"{options.name or options.model}: damage in nats per token", rows_of(results))
    if options.write:
        keep("scale", results, block(results))
        write_table("scale", markdown(short_rows(results)), page="README.md")
        draw(results, options.name or options.model, PICTURE)


def _measure(key: str, ratio: float, row: str, results: dict[str, Any], options: argparse.Namespace) -> None:
    """Take each step of a row that is not there; a folder that a later step needs is made again."""
    found = results.setdefault(key, {})
    cut = options.folder / f"{ratio:.2f}-{row}"
    folder = cut.with_name(f"{cut.name}-trained") if key.endswith(TRAINED) else cut
    if cut.exists() and "cut" in (known := results.get(key.removesuffix(TRAINED), {})):
        found.setdefault("cut", known["cut"])  # what is trained was cut already
    texts = [f"--calibration={text}" for text in options.calibration]
    steps: dict[str, Any] = {
        "cut": lambda file: _secateur(
            file, "prune", options.model, str(cut), "--ratio", str(ratio), *ROWS[row][1], *texts, *options.cut.split()
        )
    }
    if folder != cut:
        more = [*(f"--data={text}" for text in options.calibration), *options.recover.split()]
        steps["training"] = lambda file: _secateur(
            file, "recover", str(cut), str(folder), "--teacher", options.model, "--minutes", str(options.minutes), *more
        )
    panel = ["--protocol", options.protocol, "--max-tokens", str(options.tokens)]
    panel += [f"--ppl={text}" for text in options.text]
    if DENSE not in results:
        losses = _losses(_secateur(options.folder / "step.json", "evaluate", options.model, *panel))
        results[DENSE] = {"losses": losses, "on": f"{processor()}, {datetime.now(UTC):%Y-%m-%d}"}
        write_json(options.out, results)
    steps["losses"] = lambda file: _losses(_secateur(file, "evaluate", str(folder), *panel))
    if folder == cut:  # training changes no shape, and so no speed
        steps["speed"] = lambda file: _secateur(file, "profile", options.model, str(folder), "--repeats", "9")
        if options.vllm:
            steps["vLLM"] = lambda _: _vllm(folder, options)
        if options.gguf:
            steps["llama.cpp"] = lambda file: _llama_cpp(file, folder, options)
    asked = {"tasks": _tasks} if options.tasks else {}
    asked |= {"code tasks": _code_tasks} if options.problems else {}
    for name, ask in asked.items():
        steps[name] = lambda file, ask=ask: ask(file, str(folder), options)
        if name not in results[DENSE]:
            results[DENSE][name] = ask(options.folder / "step.json", options.model, options)
            write_json(options.out, results)
    made = {"cut": cut, "training": folder}
    for name, step in steps.items():
        missing = name not in found or (name in made and not made[name].exists() and not {*steps} <= {*found})
        if missing:
            start = time.perf_counter()
            given = step(options.folder / "step.json")
            found[name] = _short(name, given) if name in ("cut", "training", "speed", "llama.cpp") else given
            found[name]["minutes"] = (time.perf_counter() - start) / 60
            found[name]["on"] = f"{processor()}, {datetime.now(UTC):%Y-%m-%d}"
            write_json(options.out, results)
    if not options.keep and key.endswith(TRAINED):
        shutil.rmtree(folder, ignore_errors=True)


def _secateur(file: Path, command: str, *arguments: str) -> Any:
    """Run a command and read what it wrote as JSON."""
    more = ["--overwrite"] if command in ("prune", "recover") else []
    secateur(command, *arguments, *more, "--json", str(file), "--quiet")
    return json.loads(file.read_text())


def _llama_cpp(file: Path, folder: Path, options: argparse.Namespace) -> Any:
    program = Path(__file__).with_name("llama_cpp_speed.py")
    kind = ["--types", options.gguf, "--threads", str(cores()), "--rounds", "3"]
    command = [sys.executable, str(program), str(folder), "--dense", options.model, *kind, "--out", str(file)]
    subprocess.run(command, check=True)
    return json.loads(file.read_text())


def _vllm(folder: Path, options: argparse.Namespace) -> Any:
    """How many times as fast as the dense model a folder is served, in bfloat16, compiled as vLLM does it."""
    folders = {"dense": Path(options.model), "cut": folder}
    dense, own = measure(folders, 9, eager=False, dtype="bfloat16", batches=[1]).values()
    return {name: dense[f"{name} 1"] / own[f"{name} 1"] for name in ("prefill", "decode")}


def _tasks(file: Path, model: str, options: argparse.Namespace) -> Any:
    """The mean accuracy over the tasks, and its standard error."""
    asked = ["--tasks", "zero-shot", "--tasks-data", str(options.tasks), "--limit", str(options.questions)]
    mean = _secateur(file, "evaluate", model, *asked)["results"][0]["tasks_mean"]
    return {"value": mean["value"], "stderr": mean["stderr"]}


def _code_tasks(file: Path, model: str, options: argparse.Namespace) -> Any:
    """The share of HumanEval's problems that a model solves at once, and its standard error."""
    program = Path(__file__).with_name("code_tasks.py")
    command = [sys.executable, str(program), model, "--problems", str(options.problems), "--out", str(file)]
    subprocess.run(command, check=True)
    found = json.loads(file.read_text())
    return {name: found[name] for name in ("value", "stderr", "problems")}


def _losses(evaluated: Any) -> dict[str, Any]:
    return {each["data"]: each["nll"] for each in evaluated["results"][0]["perplexity"]}


def _short(name: str, given: Any) -> dict[str, Any]:
    """What the table needs of a command's result, as ratios to the dense model where both were measured."""
    match name:
        case "cut":
            return {key: given[key] for key in ("parameters", "peak_rss_bytes", "seconds")}  # by stage
        case "training":
            return {key: given.get(key) for key in ("tokens", "peak_rss_bytes")}
        case "speed":
            dense, smaller = given["results"]
            return {
                "bytes": smaller["weight_bytes"] / dense["weight_bytes"],
                "prefill": dense["prefill_seconds"] / smaller["prefill_seconds"],
                "decode": smaller["decode_tokens_per_second"] / dense["decode_tokens_per_second"],
            }
        case _:
            dense, smaller = given["results"]
            return {
                "bytes": smaller["bytes"] / dense["bytes"],
                "prefill": smaller["prompt_tokens_per_second"] / dense["prompt_tokens_per_second"],
                "decode": smaller["new_tokens_per_second"] / dense["new_tokens_per_second"],
            }


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head, the dense model's losses, and a row for each cut; damage with its share of the recipe's in brackets.

    >>> cut = {"minutes": 2.0, "peak_rss_bytes": 2**30, "parameters": {"dense": 4e9, "pruned": 3e9}}
    >>> results = {"dense": {"losses": {"WT2": 3.0}}, "20% | `fast`": {"cut": cut, "losses": {"WT2": 3.25}}}
    >>> results["20% | LLM-Pruner's recipe"] = {"cut": cut, "losses": {"WT2": 3.5}}
    >>> for row in rows_of(results)[1:]:
    ...     print(" ".join(filter(None, row)))
    dense 4.00 B 3.000
    20% `fast` 3.00 B +0.250 (0.50) 2 1.0
    20% LLM-Pruner's recipe 3.00 B +0.500 2 1.0
    """
    dense = results.get(DENSE, {}).get("losses", {})
    head = ["removed", "", "parameters", "bytes", *dense, *QUESTIONS, *ENGINES, "minutes", "GiB"]
    rows = [head]
    for key, found in sorted(results.items(), key=lambda each: each[0].partition(" | ")[0]):
        if key == DENSE or not {"cut", "losses"} <= found.keys():
            continue
        removed, _, row = key.partition(" | ")
        parameters = found["cut"]["parameters"]
        if len(rows) == 1:
            losses = [f"{loss:.3f}" for loss in dense.values()]
            answered = [_accuracy(results[DENSE].get(step)) for step in QUESTIONS.values()]
            size = f"{parameters['dense'] / 1e9:.2f} B"
            rows.append(["", DENSE, size, "", *losses, *answered, *[""] * len(ENGINES), "", ""])
        found = {**_speeds(results.get(key.removesuffix(TRAINED), {})), **found}
        stages = [found[step] for step in ("cut", "training") if step in found]
        rows.append(
            [
                *(removed, row, f"{parameters['pruned'] / 1e9:.2f} B"),
                f"{found['speed']['bytes']:.2f}" if "speed" in found else "",
                *(_damage(results, key, text) for text in dense),
                *(_accuracy(found.get(step)) for step in QUESTIONS.values()),
                *(_faster(found.get(step, {})) for step in ENGINES.values()),
                " + ".join(f"{stage['minutes']:.0f}" for stage in stages),
                ", ".join(f"{stage['peak_rss_bytes'] / 2**30:.1f}" for stage in stages),
            ]
        )
    columns = [at for at in range(len(head)) if at < 2 or any(row[at] for row in rows[1:])]  # what has been measured
    return [[row[at] for at in columns] for row in rows]


def _speeds(cut: Mapping[str, Any]) -> dict[str, Any]:
    """What training does not change: the shapes, and with them bytes and speed."""
    return {step: cut[step] for step in ENGINES.values() if step in cut}


def short_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The same table with a line for the dense model and one for each row, and a cell for all ratios.

    >>> cut = {"minutes": 2.0, "peak_rss_bytes": 2**30, "parameters": {"dense": 4e9, "pruned": 3e9}}
    >>> rows = {f"{share} | `fast`": {"cut": cut, "losses": {"WT2": 3.25}} for share in ("20%", "35%")}
    >>> short_rows({"dense": {"losses": {"WT2": 3.0}}, **rows})
    [['20%, 35% removed', 'WT2'], ['dense', '3.000'], ['`fast`', '+0.250 / +0.250']]
    """
    head, *rows = rows_of(results)
    dense, rows = rows[:1], rows[1:]
    left_out = ("removed", "", "parameters", "bytes", "minutes", "GiB")
    columns = [at for at, name in enumerate(head) if name not in left_out and all(row[at] for row in rows)]
    removed = [*dict.fromkeys(row[0] for row in rows)]
    short = [[f"{', '.join(removed)} removed", *(head[at] for at in columns)]]
    short += [[DENSE, *(row[at] for at in columns)] for row in dense]
    for name in dict.fromkeys(row[1] for row in rows):
        mine = [row for row in rows if row[1] == name]
        short.append([name, *(" / ".join(row[at] for row in mine if row[at]) for at in columns)])
    return short


def _damage(results: Mapping[str, Any], key: str, text: str) -> str:
    """In nats per token; in brackets the share of what the recipe of LLM-Pruner loses at the same ratio."""
    of_dense = results[DENSE]["losses"][text]
    damage = results[key]["losses"][text] - of_dense
    recipe = f"{key.partition(' | ')[0]} | {ROWS['llm-pruner'][0]}"
    if key == recipe or "losses" not in results.get(recipe, {}):
        return f"{damage:+.3f}"
    return f"{damage:+.3f} ({damage / (results[recipe]['losses'][text] - of_dense):.2f})"


def _accuracy(found: Mapping[str, float] | None) -> str:
    """In per cent, with the standard error."""
    return f"{100 * found['value']:.1f} ± {100 * found['stderr']:.1f}" if found else ""


def _faster(speed: Mapping[str, float]) -> str:
    """Prefill and decoding, times the dense model's."""
    return f"{speed['prefill']:.2f}, {speed['decode']:.2f}" if speed else ""


def bars_of(results: Mapping[str, Any], text: str) -> dict[str, dict[str, float]]:
    """Row -> share removed -> the damage on a text.

    >>> rows = {"dense": {"losses": {"WT2": 3.0}}, "20% | `fast`": {"losses": {"WT2": 3.25}}}
    >>> bars_of(rows, "WT2")
    {'fast': {'20%': 0.25}}
    """
    bars: dict[str, dict[str, float]] = {}
    for key, found in results.items():
        removed, _, row = key.partition(" | ")
        if row and "losses" in found:
            bars.setdefault(row.replace("`", ""), {})[removed] = found["losses"][text] - results[DENSE]["losses"][text]
    return bars


def draw(results: Mapping[str, Any], model: str, out: Path) -> None:
    """Draw the damage on each text, a bar for each row at each ratio."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "secateur", "svg.fonttype": "none", "font.family": "sans-serif"}
    texts = [*results[DENSE]["losses"]]
    figure, panels = plt.subplots(1, len(texts), figsize=(7.2, 3.2), layout="constrained", sharey=True, squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        bars = bars_of(results, text)
        removed = sorted({share for row in bars.values() for share in row})
        width = 0.8 / len(bars)
        for number, (row, damage) in enumerate(bars.items()):
            places = [removed.index(share) + (number - (len(bars) - 1) / 2) * width for share in damage]
            axes.bar(places, [*damage.values()], width, label=row)
        axes.set_xticks(range(len(removed)), [f"{share} removed" for share in removed], fontsize=8)
        axes.set_title(text, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel("damage, nats per token")
    panels[0][0].legend(fontsize=7, loc="upper left")
    figure.suptitle(model, fontsize=10)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def block(results: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    return markdown(rows_of(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a folder, or a name")
    add("--name", help="of the model in the table")
    add("--calibration", action="append", required=True, metavar="FILE[@WEIGHT]")
    add("--text", action="append", required=True, metavar="NAME=FILE", help="what is measured")
    add("--ratio", action="append", type=float, help="of the non-embedding parameters [default: 0.2 and 0.35]")
    add("--row", action="append", choices=[*ROWS], help="may be repeated [default: all]")
    add("--minutes", type=float, default=0, help="of training for the last row [default: none]")
    add("--cut", default="", help="more options of `secateur prune`")
    add("--recover", default="", help="more options of `secateur recover`")
    add("--tokens", type=int, default=4096, help="of each text")
    add("--protocol", default="served@1024")
    add("--vllm", action="store_true", help="also serve each folder with vLLM")
    add("--tasks", type=Path, metavar="FOLDER", help="also ask the questions in the files of the folder")
    add("--problems", type=Path, metavar="FILE", help="also HumanEval's problems: runs what the models write")
    add("--questions", type=int, default=100, help="of each task")
    add("--gguf", help="also run llama.cpp on files of this type, for example q8_0")
    add("--keep", action="store_true", help="keep the folders of trained models, too")
    add("--write", action="store_true", help="the table of docs/benchmarks.md")
    add("--table", action="store_true", help="measure nothing: the table of what is there")
    add("--folder", type=Path, default=Path("runs/scale"))
    add("--out", type=Path, default=Path("runs/scale.json"))
    options = parser.parse_args()
    options.ratio, options.row = options.ratio or [0.2, 0.35], options.row or [*ROWS]
    return options


if __name__ == "__main__":
    main()
