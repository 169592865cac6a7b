"""What training gives back of what a cut cost, by tokens; beside a dense model that was trained alike.

    python benchmarks/recover.py --calibration FILE --text NAME=FILE [--budget minutes=20] [--row "NAME=--OPTION X"]

The demo model is cut by each `--ratio` and trained for each `--budget` (tokens=100k, minutes=20) with the options of
each `--row`, on the texts of `--calibration` unless a row names other data. The dense model is trained in the same way,
with itself as the teacher: what it gains is no repair, but more of the text that all are trained on. Damage is
ln(perplexity / perplexity of the dense model), in nats per token, and is given against the dense model as it is and
against the one that was trained alike. `--other-cut "layers trained=--repair reconstruct"` cuts in another way as well;
what is gone of its damage is counted from the first cut's.

Each is a process of its own, `secateur recover` as a user would call it, so that its peak memory is its own. The best
checkpoint is picked by a text that is none of those reported (`--development`). Every result goes into a JSON file as
it comes (`--out`), and the same command goes on after a stop. `--write recover` puts the table into docs/benchmarks.md;
`--picture FILE` draws damage against tokens. `--tasks FOLDER` asks the dense model, the cuts and the last training of
each LLM-Pruner's seven tasks, from files in the folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.evaluation.perplexity import evaluate
from secateur.evaluation.protocols import Protocol
from secateur.evaluation.texts import read_evaluation_text
from secateur.files import write_json
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from tables import about, keep, markdown, secateur, show

LENGTHS = (128, 1024)
DENSE = "dense"


def main() -> None:
    """Cut, train, measure; print tables."""
    options = _arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    texts = {name: read_evaluation_text(file) for name, file in options.text}
    models = {DENSE: options.model}
    for ratio, (other, more) in itertools.product(options.ratio, [("", []), *options.other_cut]):
        name = f"{ratio:.0%}, {other}" if other else f"{ratio:.0%}"
        models[name] = str(options.folder / f"cut-{'-'.join([str(ratio), *other.split()])}")
        if not Path(models[name]).exists():
            given = [*_given(options.cut), *more, *_texts(options)]
            secateur("prune", options.model, models[name], "--ratio", str(ratio), *given)
    for name, folder in models.items():
        if name not in results:
            results[name] = {"perplexity": _perplexity(folder, texts, options.tokens)}
            write_json(options.out, results)
    for run, command in _runs(models, options):
        if run not in results and options.only in (None, run.split(" | ")[1]):
            results[run] = _trained(command, options, texts)
            write_json(options.out, results)
            _show(results)
    _show(results)
    if options.tasks and "tasks" not in results:
        results["tasks"] = _answered(models, options)
        write_json(options.out, results)
    if options.write:
        keep(options.write, measured(results), block(results))
    if options.picture:
        _draw(results, options.picture)


def _runs(models: Mapping[str, str], options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The name of every training, and its command."""
    for (row, given), budget in itertools.product(options.row, options.budget):
        flag, _, amount = budget.partition("=")
        for model, folder in (*itertools.islice(models.items(), 1, None), (DENSE, models[DENSE])):
            data = [] if "--data" in given else [f"--data={text}" for text in options.calibration]
            teacher = [f"--teacher={options.model}"] if model == DENSE else []
            yield (
                " | ".join((row, model, budget)),
                ["recover", folder, _trained_folder(model, options), f"--{flag}={amount}", *data, *given, *teacher],
            )


def _trained_folder(model: str, options: argparse.Namespace) -> str:
    return str(options.folder / f"trained-{model}")


def _trained(command: list[str], options: argparse.Namespace, texts: Mapping[str, str]) -> dict[str, Any]:
    """Train in a process of its own and measure what it wrote."""
    file = options.folder / "recovered.json"
    development = [f"--eval={text}" for text in options.development]
    secateur(*command, *development, "--json", str(file), "--overwrite", "--resume", "--quiet")
    found: dict[str, Any] = json.loads(file.read_text())
    kept = ("method", "steps", "best_step", "tokens", "rows", "seconds", "peak_rss_bytes", "evaluation", "notes")
    trained = {name: found[name] for name in kept} | {"command": ["secateur", *command, *development], "about": about()}
    return trained | {"perplexity": _perplexity(found["out"], texts, options.tokens)}


def _perplexity(folder: str, texts: Mapping[str, str], tokens: int) -> dict[str, float]:
    model, tokenizer = load(folder, device="cpu"), load_tokenizer(folder)
    found = evaluate(
        model,
        tokenizer,
        texts,
        protocols=[Protocol(length, start_tokens=True) for length in LENGTHS],
        max_tokens=tokens,
    )
    return {f"{each.data}@{each.seq_len}": each.ppl for each in found}


def _answered(models: Mapping[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """By model, the mean accuracy over the tasks, and the difference to the dense one."""
    folders = dict(models)
    for name in models:
        if Path(trained := _trained_folder(name, options)).exists():
            folders[f"{name}, trained"] = trained
    file = options.folder / "tasks.json"
    questions = ["--tasks", "zero-shot", "--tasks-data", str(options.tasks), "--limit", str(options.questions)]
    secateur("evaluate", *folders.values(), *questions, "--dtype", "bfloat16", "--json", str(file), "--quiet")
    found = json.loads(file.read_text())["results"]
    return {name: each["tasks_mean"] for name, each in zip(folders, found, strict=True)}


def _texts(options: argparse.Namespace) -> list[str]:
    return [f"--calibration={text}" for text in options.calibration]


def _given(options: list[str]) -> list[str]:
    return [part for text in options for part in shlex.split(text)]


def damage(results: Mapping[str, Any], name: str, reference: str = DENSE) -> dict[str, float]:
    """Nats per token that a model loses against another, by text and window."""
    found, other = (results[each]["perplexity"] for each in (name, reference))
    return {column: math.log(found[column] / other[column]) for column in other}


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The table: its head, and a row for each model that was measured.

    A cell has the damage of a text, and after a training the share of the cut's damage that is gone, against the dense
    model and against the one that was trained alike.
    """
    columns = list(results[DENSE]["perplexity"])
    table = [["", "removed", "budget", *columns, "tokens", "minutes", "peak memory"]]
    cuts = cuts_in(results)
    for cut in cuts:
        first, cells = damage(results, _first_cut(cut)), []
        for column, value in damage(results, cut).items():
            cells.append(_cell(value, [] if cut == _first_cut(cut) else [1 - value / first[column]]))
        table.append(["not trained", cut, "", *cells, "", "", ""])
    for row, budget, cut in itertools.product(*trainings_in(results), [DENSE, *cuts]):
        name, alike = (" | ".join((row, each, budget)) for each in (cut, DENSE))
        if name not in results:
            continue
        cells = []
        for column, value in damage(results, name).items():
            before = damage(results, _first_cut(cut))[column]
            left = [value, *([damage(results, name, alike)[column]] if alike in results else [])]
            cells.append(_cell(value, [] if cut == DENSE else [1 - each / before for each in left]))
        trained = results[name]
        minutes = sum(trained["seconds"].values()) / 60
        memory = f"{trained['peak_rss_bytes'] / 2**30:.2f} GiB"
        table.append(
            [row, "0%" if cut == DENSE else cut, budget, *cells, f"{trained['tokens']:,}", f"{minutes:.1f}", memory]
        )
    return table


def _cell(value: float, shares: Sequence[float]) -> str:
    return f"{value:.3f} ({', '.join(f'{share:.0%}' for share in shares)})" if shares else f"{value:.3f}"


def _first_cut(name: str) -> str:
    """The cut of the same ratio without the options of another.

    >>> _first_cut("20%, layers trained")
    '20%'
    """
    return name.partition(", ")[0]


def cuts_in(results: Mapping[str, Any]) -> list[str]:
    """The names of the pruned models."""
    return [name for name in results if "|" not in name and name not in (DENSE, "tasks")]


def trainings_in(results: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The ways of training, and how long.

    >>> trainings_in({"dense": {}, "default | 20% | minutes=20": {}, "default | dense | minutes=20": {}})
    (['default'], ['minutes=20'])
    """
    named = [name.split(" | ") for name in results if "|" in name]
    return list(dict.fromkeys(row for row, _, _ in named)), list(dict.fromkeys(budget for *_, budget in named))


def _show(results: Mapping[str, Any]) -> None:
    title = "Damage in nats per token; the share of it that is gone, against the dense model and one alike"
    show(title, rows_of(results))


def measured(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the table is made of, without the names of files.

    >>> measured({"20%": {"perplexity": {"WT2@128": 20.0}, "command": ["secateur", "recover"]}})
    {'20%': {'perplexity': {'WT2@128': 20.0}}}
    """
    names = ("perplexity", "tokens", "seconds", "peak_rss_bytes", "about")
    return {
        run: found if run == "tasks" else {name: found[name] for name in names if name in found}
        for run, found in results.items()
    }


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    table = markdown(rows_of(results))
    return f"{table}\n\n{tasks_block(results['tasks'])}" if "tasks" in results else table


def tasks_block(tasks: Mapping[str, Any]) -> str:
    """The table of the tasks: means in per cent, their standard errors, and what they are of the dense model's.

    >>> dense = {"value": 0.4, "stderr": 0.008}
    >>> cut = {"value": 0.38, "stderr": 0.008, "difference": -0.02, "difference_stderr": 0.005}
    >>> print(tasks_block({"dense": dense, "20%": cut}))
    | | mean of seven tasks | difference | share of the dense model's |
    | --- | --- | --- | --- |
    | dense | 40.0 ± 0.8 | | |
    | 20% | 38.0 ± 0.8 | -2.0 ± 0.5 | 95 % |
    """
    rows = [["", "mean of seven tasks", "difference", "share of the dense model's"]]
    for name, found in tasks.items():
        share = found["value"] / tasks[DENSE]["value"]
        apart = f"{100 * found['difference']:+.1f} ± {100 * found['difference_stderr']:.1f}" if name != DENSE else ""
        mean = f"{100 * found['value']:.1f} ± {100 * found['stderr']:.1f}"
        rows.append([name, mean, apart, f"{100 * share:.0f} %" if name != DENSE else ""])
    return markdown(rows)


def _draw(results: Mapping[str, Any], out: Path) -> None:
    """Mean damage over all columns against tokens: a line for each ratio, and one against the dense model alike."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "secateur", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    (row, *_), budgets = trainings_in(results)
    for number, cut in enumerate(cuts_in(results)):
        for reference, style, label in ((DENSE, "-", "the dense model"), (None, "--", "the dense model trained alike")):
            points = {0: _mean(damage(results, cut))}
            for budget in budgets:
                name, alike = (" | ".join((row, each, budget)) for each in (cut, DENSE))
                if name in results and alike in results:
                    points[results[name]["tokens"]] = _mean(damage(results, name, reference or alike))
            tokens = sorted(points)
            axes.plot(
                [each / 1000 for each in tokens],
                [points[each] for each in tokens],
                style,
                marker="o",
                color=f"C{number}",
                label=f"{cut} cut, against {label}",
            )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens trained on, thousands")
    axes.set_ylabel("damage, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def _named(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _row(text: str) -> tuple[str, list[str]]:
    name, options = _named(text)
    return name, shlex.split(options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--calibration", action="append", required=True, metavar="FILE", help="text of the cut and of the training")
    add("--text", type=_named, action="append", required=True, metavar="NAME=FILE", help="what is measured")
    add("--development", action="append", default=[], metavar="NAME=FILE", help="picks the checkpoint")
    add("--model", default="demo", help="the dense one")
    add("--ratio", type=float, action="append", help="of the cut; may be repeated [default: 0.2 and 0.5]")
    add("--budget", action="append", help="minutes=N or tokens=N; may be repeated [default: minutes=20]")
    add("--row", type=_row, action="append", help="NAME=OPTIONS of `secateur recover` [default: those by default]")
    add("--only", help="train this one now: dense, 20%%, ...")
    add("--cut", action="append", default=[], help="options of `secateur prune`")
    add("--other-cut", type=_row, action="append", default=[], help="NAME=more options of it, for another cut")
    add("--tokens", type=int, default=10_000, help="of each text that are scored")
    add("--tasks", type=Path, metavar="FOLDER", help="also ask the questions in the files of the folder")
    add("--questions", type=int, default=500, help="of each task")
    add("--write", metavar="NAME", help="the table NAME of docs/benchmarks.md, and benchmarks/results/NAME.json")
    add("--picture", type=Path, help="draw damage against tokens, as SVG")
    add("--folder", type=Path, default=Path("runs/recover"))
    add("--out", type=Path, default=Path("runs/recover.json"))
    options = parser.parse_args()
    options.ratio = options.ratio or [0.2, 0.5]
    options.budget = options.budget or ["minutes=20"]
    options.row = options.row or [("default", [])]
    return options


if __name__ == "__main__":
    main()
