"""Our LLM-Pruner preset beside LLM-Pruner's own code: the same model, layers, ratio, scores and evaluation.

    make bench DATA=/path/to/texts

DATA holds `wiki.test.raw` (WikiText-2 raw, test), `ptb.test.txt` (Penn Treebank, test) and a calibration text
`fiction.txt`, or the same under other names given with --wikitext, --ptb and --calibration. The figures of
LLM-Pruner were measured with its code made to run on a CPU (bf16, the first 4,096 tokens of each text, 10 calibration
windows of 64 tokens of public-domain fiction); its calibration windows cannot be drawn again, so ours are shown for
three seeds. Last comes our own default at the same size.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import secateur
from secateur.evaluation.protocols import Protocol
from secateur.evaluation.texts import read_evaluation_text
from secateur.planning.options import with_preset
from tables import about, keep, markdown, show, told

SEQ_LENS = (128, 1024)
BLOCK: Mapping[str, Any] = {"layers": (6, 24), "ratio": 0.3335, "of": "units"}  # 1 of 3 KV heads, 513 of 1536 channels
MLP: Mapping[str, Any] = {"layers": (3, 28), "ratio": 0.32, "of": "units", "axes": ("mlp",)}  # 492 of 1536 channels

# WikiText-2 and PTB at 128, then at 1024 tokens; None where 2,048 tokens were scored instead of 4,096.
THEIRS: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("dense", ""): (55.0, 111.3, 23.0, 47.9),
    ("mlp 3:28", "param_first"): (105.3, 213.1, 53.7, 131.3),
    ("block 6:24", "param_first"): (140.4, 283.2, 97.3, 197.6),
    ("block 6:24", "param_second"): (133.9, 299.0, 92.0, 195.1),
    ("block 6:24", "param_mix"): (140.5, 283.4, 97.2, 197.3),
    ("block 6:24", "vectorize"): (143.0, 281.1, 70.8, 137.4),
    ("block 6:24", "random"): (369.0, 614.0, 211.0, 333.0),
    ("block 6:24", "l2"): (622.0, 1364.0, 441.0, 1159.0),
    ("block 6:24", "l1"): (781.0, 1779.0, None, None),
    ("all layers", "param_second"): (None, None, None, None),  # alike, 64 windows of 128 tokens
}
ALIKE: Mapping[str, Any] = {"ratio": 0.2, "of": "non-embedding", "layers": None}
CUTS: dict[str, Mapping[str, Any]] = {"mlp 3:28": MLP, "block 6:24": BLOCK, "all layers": ALIKE}
COLUMNS = ("WT2@128", "PTB@128", "WT2@1024", "PTB@1024")


def main() -> None:
    """Run the comparison, print it as a table, and write it as JSON."""
    arguments = parsed()
    texts = {"WT2": read_evaluation_text(arguments.wikitext), "PTB": read_evaluation_text(arguments.ptb)}
    model, tokenizer = secateur.load("demo", device=arguments.device), secateur.load_tokenizer("demo")
    rows = []
    for (cut, score), theirs in THEIRS.items():
        if arguments.only and not any(word in f"{cut} {score}" for word in arguments.only):
            continue
        seeds = (0,) if cut == "dense" or score in ("l1", "l2") else tuple(range(arguments.seeds))
        ours = []
        for seed in seeds:
            start = time.perf_counter()
            pruned = model if cut == "dense" else cut_as(model, tokenizer, cut, score, seed, arguments.calibration)
            ours.append(measured(pruned, tokenizer, texts, arguments.max_tokens))
            seconds = time.perf_counter() - start
            print(f"{cut} {score} seed {seed}: {ours[-1]} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        rows.append({"cut": cut, "score": score, "seeds": list(seeds), "theirs": theirs, "ours": ours})
    results = json.loads(json.dumps({"about": about(), "rows": rows, "max_tokens": arguments.max_tokens}))
    show("Perplexity: ours (seeds) / LLM-Pruner's = ratio of means", rows_of(results))
    if arguments.write:
        keep("llm-pruner", results, block(results))


def parsed() -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with wiki.test.raw, ptb.test.txt and fiction.txt")
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--ptb", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="rows whose name holds one of these words")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", action="store_true", help="the table of docs/benchmarks.md")
    arguments = parser.parse_args()
    for name, file in (("wikitext", "wiki.test.raw"), ("ptb", "ptb.test.txt"), ("calibration", "fiction.txt")):
        if getattr(arguments, name) is None and arguments.data is not None:
            setattr(arguments, name, arguments.data / file)
        path = getattr(arguments, name)
        if path is None or not path.is_file():
            parser.error(f"--{name}: {path or 'not given'}: expected a text file; see --help")
    return arguments


def cut_as(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cut: str, score: str, seed: int, calibration: Path
) -> PreTrainedModel:
    """The model cut by the paper's preset with the options of that row."""
    discovery = secateur.discover(model)
    more: dict[str, Any] = {"samples": 64, "length": 128} if cut == "all layers" else {}
    text = {"text": str(calibration), "seed": seed, **more}
    options, windows = with_preset("llm-pruner", {**CUTS[cut], "score": score}, text)
    scores = secateur.score(model, tokenizer, discovery=discovery, name=score, calibration=windows)
    plan = secateur.plan(discovery, options, scores=scores)
    removed = 1 - plan.parameters["pruned_non_embedding"] / plan.parameters["dense_non_embedding"]
    assert abs(removed - 0.2) < 0.002, removed
    return secateur.prune(model, plan, discovery=discovery)


@torch.inference_mode()
def measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], max_tokens: int
) -> list[float]:
    """Perplexities in the order of `COLUMNS`."""
    found = secateur.evaluate(model, tokenizer, texts, protocols=[Protocol(n) for n in SEQ_LENS], max_tokens=max_tokens)
    by_name = {f"{p.data}@{p.seq_len}": p.ppl for p in found}
    return [round(by_name[column], 2) for column in COLUMNS]


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and a row for each score: ours (mean, and the range over seeds) beside theirs, and the ratio."""
    return [["cut", "score", *COLUMNS], *([row["cut"], row["score"], *cells(row)] for row in results["rows"])]


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    return f"{markdown(rows_of(results))}\n\n{told(results['about'])}."


def cells(row: Mapping[str, Any]) -> Iterator[str]:
    """One cell a column."""
    for values, theirs in zip(zip(*row["ours"], strict=True), row["theirs"], strict=True):
        average = math.exp(mean(math.log(value) for value in values))
        spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
        beside = f" / {theirs:.1f} = {average / theirs:.2f}" if theirs is not None else ""
        yield f"{average:.1f}{spread}{beside}"


if __name__ == "__main__":
    main()
