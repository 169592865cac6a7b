"""What a cut costs without any training: our presets, LLM-Pruner's recipe and the peers' methods on one model.

    python benchmarks/quality.py --calibration FILE... --text NAME=FILE... [--model NAME] [--rows "a;b"]

Every row cuts the model (the demo's by default) by the same share of its non-embedding parameters, then measures the
damage on every text under each protocol: ln(perplexity cut / perplexity dense), in nats per token. The calibration text
must not come from the evaluation's corpora. Results go to a JSON file as they come (`--out`); the same command goes on
after a stop and measures what is missing. Each row is a process of its own, so that its peak memory is its own. Rows
that look at the same statistics share a file of them, and each counts the seconds that it took to make. When all rows
are there, `--write` puts the tables into README.md and docs/benchmarks.md, and the results into benchmarks/results (see
quality_table.py); `--table` writes them from the JSON file alone. `--rows` names other rows than those of README's
table, such as the ablations.

Peers, as we implement them on our groups:
magnitude   Torch-Pruning's script for language models: W^2 over the whole group, the same share of every layer
wanda-sp    |W| norm(X), the same share of every layer (as FLAP's paper does it, arXiv 2312.11983)
shortgpt    whole layers by block influence (arXiv 2403.03853)
llm-pruner  its recipe: first-order Taylor scores, 10 windows of 64 tokens, the middle layers
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quality_table import DENSE, README_ROWS, SETTINGS, Key, missing, table, write_tables
from secateur import __version__
from secateur.data.calibration import COLUMN
from secateur.evaluation.perplexity import evaluate
from secateur.evaluation.texts import read_evaluation_text
from secateur.files import write_json
from secateur.models.loading import load
from secateur.models.options import LoadOptions
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.cache import StatisticsFolder
from secateur.pipeline.pipeline import Pipeline
from secateur.pipeline.recipe import PruneRecipe
from secateur.planning.options import CutOptions, with_preset
from secateur.planning.plan import Plan
from secateur.progress import peak_rss
from tables import TableError, cores

PROTOCOLS = ("llm-pruner@128", "llm-pruner@1024")
MAX_TOKENS = 40_000  # by default
BEST = CutOptions(round_to=1)  # all rows at the same size, to the unit; other rows say what multiples cost
SEEDED = ["best", "fast"]  # rows that are measured with every seed
PAPER_LAYERS = {0.2: (6 / 30, 24 / 30), 0.5: (3 / 30, 29 / 30)}  # of which the paper's share of units gives the ratio


@dataclass(frozen=True, slots=True)
class Row:
    """One way to cut."""

    about: str
    options: CutOptions
    preset: str = "best"  # whose calibration is used
    samples: int | None = None  # other than the preset's
    length: int | None = None
    varied: float | None = None  # other than the preset's


def rows(ratio: float) -> dict[str, Row]:
    """All rows at a ratio."""
    best = replace(BEST, ratio=ratio)
    local = CutOptions(
        ratio=ratio, score="param_second", scope="local", shape="uniform", choose="score", repair="none", min_keep=0.0
    )
    paper = replace(local, layers=PAPER_LAYERS.get(ratio))
    found = {
        "best": Row("our default", best),
        "best, uniform": Row("ablation: no allocation, the same share of every layer", replace(best, shape="uniform")),
        "fast": Row("the same on less text", best, preset="fast"),
        "best, no repair": Row("ablation", replace(best, repair="none", choose="score")),
        "best, reconstruct": Row("and every layer trained to the dense one", replace(best, repair="reconstruct")),
        "best, sublayers": Row("attention and MLP of layers may go whole", replace(best, sublayers=True)),
        "best, two iterations": Row("plan, cut, repair, score again", replace(best, iterations=2)),
        "best, longer windows": Row("as many tokens, in windows of 512", best, samples=64, length=512),
        "best, in order": Row("ablation: the text as it is written", best, varied=0.0),
        "best, score chooses": Row("ablation: units by Fisher information", replace(best, choose="score")),
        "llm-pruner": Row(
            "its recipe: heads and MLP of the middle layers", replace(paper, score="param_first"), preset="llm-pruner"
        ),
        "llm-pruner, MLP": Row(
            "its best on this model",
            replace(local, score="param_first", axes=("mlp",), layers=(3 / 30, 28 / 30)),
            preset="llm-pruner",
        ),
        "magnitude": Row("Torch-Pruning's script", replace(local, score="l2")),
        "wanda-sp": Row("", replace(local, score="wanda")),
        "shortgpt": Row("whole layers", CutOptions(ratio=ratio, score="block_influence", axes=("layers",))),
    }
    for preset in ("best", "fast"):
        whole_end = Row("nothing goes in the last sixteenth", replace(best, layers=(0.0, 0.9375)), preset=preset)
        found[f"{preset}, last layers whole"] = whole_end
    for multiple in (32, 64, 128):
        about = "widths that kernels and quantised formats read"
        for preset in ("best", "fast"):
            found[f"{preset}, multiples of {multiple}"] = Row(about, replace(best, round_to=multiple), preset=preset)
    for score in ("param_first", "param_second", "param_mix", "vectorize", "fluctuation", "obs", "fisher"):
        found[f"score {score}, local"] = Row("no repair", replace(local, score=score))
        found[f"score {score}, global"] = Row(
            "no repair", replace(local, score=score, scope="global", shape="per-layer", min_keep=0.05)
        )
    return found


# --- one row, in a process of its own --------------------------------------------------------------------------------


def measure(name: str, ratio: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cut as the row says, and measure. `dense` cuts nothing."""
    tokenizer = load_tokenizer(arguments.model)
    with quiet():
        model = load(arguments.model, dtype=arguments.dtype)
    found: dict[str, Any] = {"row": name, "ratio": ratio, "seed": seed, **settings(arguments)}
    found["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
    found["cores"] = cores()
    found["versions"] = {
        "Secateur": __version__,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
    }
    if name != "dense":
        start = time.perf_counter()
        model, decided, saved = cut(model, tokenizer, rows(ratio)[name], seed, arguments)
        found["seconds"], found["peak_rss_bytes"] = time.perf_counter() - start + saved, peak_rss()
        found["non_embedding"] = decided.parameters["pruned_non_embedding"]
        found["removed"] = 1 - found["non_embedding"] / decided.parameters["dense_non_embedding"]
        found["groups"] = [[g.name, g.units, g.kept] for g in decided.groups]
    texts = {each.partition("=")[0]: read_evaluation_text(each.partition("=")[2]) for each in arguments.text}
    results = evaluate(model, tokenizer, texts, protocols=arguments.protocols, max_tokens=arguments.tokens)
    found["nll"] = {column(result.data, result.protocol): result.nll for result in results}
    return found


def column(text: str, protocol: str) -> str:
    """The name of a column: windows are read without start tokens unless it says so.

    >>> column("WT2", "llm-pruner@128"), column("WT2", "served@128")
    ('WT2@128', 'WT2@128 served')
    """
    way, _, length = protocol.partition("@")
    return f"{text}@{length}" + ("" if way == "llm-pruner" else f" {way}")


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What results have in common that may stand in one table."""
    return {
        "model": Path(arguments.model).name,
        "protocols": arguments.protocols,
        "tokens": arguments.tokens,
        "dtype": arguments.dtype,
        "samples": arguments.samples,
        "calibration": " + ".join(Path(text).name for text in arguments.calibration),
        "texts": [text.partition("=")[0] for text in arguments.text],
    }


def cut(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: Row, seed: int, arguments: argparse.Namespace
) -> tuple[PreTrainedModel, Plan, float]:
    """The model cut as the row says, the plan, and the seconds that statistics made before have saved."""
    given = {
        "text": arguments.calibration,
        "column": arguments.column,
        "seed": seed,
        "samples": arguments.samples or row.samples,
        "length": row.length,
        "varied": row.varied,
    }
    text = with_preset(row.preset, {}, {name: value for name, value in given.items() if value is not None})[1]
    loading = LoadOptions(dtype=arguments.dtype)  # statistics are kept by it
    recipe = PruneRecipe(arguments.model, cut=row.options, calibration=text, loading=loading)
    pipeline = Pipeline(recipe, model=model, tokenizer=tokenizer)
    shared = StatisticsFolder(Path(arguments.shared), arguments.model, pipeline.calibration, loading)
    pipeline.statistics = shared
    pruned, decided = pipeline.cut()
    clock = shared.path.with_suffix(".seconds")  # of the pass that rows share
    if passed := sum(pipeline.clock.seconds.get(stage, 0.0) for stage in ("score", "price")):
        clock.write_text(str(passed))
    saved = float(clock.read_text()) if not passed and clock.exists() else 0.0
    return pruned, decided, saved


# --- all rows --------------------------------------------------------------------------------------------------------


def wanted(arguments: argparse.Namespace) -> list[Key]:
    """All that the arguments ask for, the dense model aside."""
    found: list[Key] = []
    for ratio in arguments.ratios:
        for name in arguments.rows:
            seeds = arguments.seeds if name in arguments.seeded else arguments.seeds[:1]
            found += [(name, ratio, seed) for seed in seeds]
    return found


def run_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is missing; results are on the disk after every row."""
    out = Path(arguments.out)
    results: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    for result in results:
        if any(result.get(name) != value for name, value in settings(arguments).items()):
            other = " ".join(f"{name}={result.get(name)}" for name in SETTINGS)
            raise TableError(f"{out} holds results with {other}; no table has both: name another file with --out")
    for name, ratio, seed in missing(results, [DENSE, *wanted(arguments)]):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name, str(ratio), str(seed)]
        print(f"{name}, {ratio:.0%}, seed {seed}", flush=True)
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(finished.stdout.splitlines()[-1]))
        write_json(out, results)
    return results


def main() -> None:
    """Measure one row, or all that are missing; write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="a name, folder or GGUF file")
    parser.add_argument("--protocols", default=[*PROTOCOLS], type=lambda text: text.split(","))
    parser.add_argument("--calibration", action="append", metavar="FILE[@WEIGHT]", help="text, jsonl, json or parquet")
    parser.add_argument("--column", default=COLUMN, help="the field of those files that have it")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--ratios", default=[0.2, 0.5], type=lambda text: [float(x) for x in text.split(",")])
    parser.add_argument("--rows", default=[*README_ROWS], type=lambda text: [x.strip() for x in text.split(";")])
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--seeded", default=SEEDED, type=lambda text: [x.strip() for x in text.split(";")])
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--tokens", type=int, default=MAX_TOKENS, help="of each text, the first")
    parser.add_argument("--samples", type=int, help="calibration windows, by default each preset's own number")
    parser.add_argument("--shared", default="runs/quality", help="a folder for statistics")
    parser.add_argument("--out", default="quality.json")
    parser.add_argument("--write", action="store_true", help="the tables of README.md and docs/benchmarks.md")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the tables from --out")
    parser.add_argument("--one", nargs=3, metavar=("ROW", "RATIO", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, ratio, seed = arguments.one
        print(json.dumps(measure(name, float(ratio), int(seed), arguments)))
        return
    try:
        if arguments.table:
            results = json.loads(Path(arguments.out).read_text())
        elif not arguments.calibration or not arguments.text:
            parser.error("expected --calibration FILE and --text NAME=FILE, or --table with --out FILE")
        else:
            results = run_all(arguments)
            print(table(results, wanted(arguments), costs=True))
        if arguments.table or arguments.write:
            for path in write_tables(results, wanted(arguments)):
                print(f"wrote {path}")
    except (TableError, OSError, ValueError) as error:
        sys.exit(f"quality.py: {error}")


if __name__ == "__main__":
    main()
