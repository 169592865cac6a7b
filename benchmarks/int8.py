"""Dense, pruned, and pruned with int8 weights: perplexity, bytes and speed of the demo model, in one table.

    python benchmarks/int8.py [--preset fast] [--ratio 0.2] [--text NAME=FILE]... [--tokens 4096] [--write]

Without a text it is the half of Python's language reference that calibration does not see. Speeds are of one prompt,
all models in turns; the process uses as many threads as torch takes (OMP_NUM_THREADS), and speeds are given relative
to the pruned model's. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.data.text import demo_texts
from secateur.evaluation.perplexity import evaluate
from secateur.evaluation.profile import profile
from secateur.evaluation.protocols import Protocol
from secateur.evaluation.texts import read_evaluation_text
from secateur.export.int8 import SCHEMES, export_int8
from secateur.export.options import Int8Options
from secateur.models.loading import load
from secateur.models.options import DEMO
from secateur.models.tokenizer import load_tokenizer
from secateur.models.weight_files import weight_file_bytes
from secateur.pipeline.recipe import prune_recipe
from secateur.pipeline.run import prune_model
from secateur.report.formatting import format_bytes
from tables import about, keep, markdown, show, told

SEQ_LENS = (128, 1024)


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and a row for every model: its bytes, how well it predicts the text, and how fast it is."""
    first, beside = next(iter(results["rows"].values())), results["rows"]["pruned"]
    table = [["", "weights", "files", *first["ppl"], "prefill", "decode"]]
    for name, row in results["rows"].items():
        cells = []
        for text, value in row["ppl"].items():
            more = f" ({100 * (value / beside['ppl'][text] - 1):+.1f} %)" if "int8" in name else ""
            cells.append(f"{value:.2f}{more}")
        speeds = [beside["prefill_seconds"] / row["prefill_seconds"], row["decode_rate"] / beside["decode_rate"]]
        sizes = [format_bytes(row["weights"]), "" if row["files"] is None else format_bytes(row["files"])]
        table.append([name, *sizes, *cells, *(f"{speed:.2f}" for speed in speeds)])
    return table


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    return f"{markdown(rows_of(results))}\n\n{told(results['about'])}, {results['threads']} threads."


def main() -> None:
    """Prune, pack, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where the folders go; by default they are removed in the end")
    parser.add_argument("--write", action="store_true", help="the table of docs/benchmarks.md")
    options = parser.parse_args()
    texts = {name: read_evaluation_text(file) for name, _, file in (text.partition("=") for text in options.text)}
    texts = texts or {"python reference": demo_texts()[1]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        pruned = folder / "pruned"
        if not pruned.exists():
            prune_model(prune_recipe(DEMO, preset=options.preset, cut={"ratio": options.ratio}), pruned)
        tokenizer = load_tokenizer(str(pruned))
        folders = {"dense": DEMO, "pruned": str(pruned)}
        for scheme in SCHEMES:
            out = folder / f"int8-{scheme}"
            export_int8(
                load(str(pruned), device="cpu"),
                out,
                Int8Options(dynamic=scheme == "dynamic"),
                tokenizer=tokenizer,
                source=pruned,
                overwrite=True,
            )
            folders[f"pruned, int8 {scheme}"] = str(out)
        models = {name: load(path, device="cpu") for name, path in folders.items()}
        results: dict[str, Any] = {"about": about(), "threads": torch.get_num_threads(), "rows": {}}
        for costs in profile(models):
            name, protocols = costs.model, [Protocol(n) for n in SEQ_LENS]
            found = evaluate(models[name], tokenizer, texts, protocols=protocols, max_tokens=options.tokens)
            assert costs.speed is not None
            results["rows"][name] = {
                "weights": costs.weight_bytes,
                "files": weight_file_bytes(folders[name]),
                "ppl": {f"{each.data}@{each.seq_len}": each.ppl for each in found},
                "prefill_seconds": costs.speed.prefill_seconds,
                "decode_rate": costs.speed.decode_tokens_per_second,
            }
    show(f"{options.preset}, {options.ratio:.0%} removed", rows_of(results))
    if options.write:
        keep("int8", results, block(results))


if __name__ == "__main__":
    main()
