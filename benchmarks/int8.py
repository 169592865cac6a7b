"""Dense, pruned, and pruned with int8 weights: perplexity, bytes and speed of the demo model, in one table.

    python benchmarks/int8.py [--preset fast] [--ratio 0.2] [--text NAME=FILE]... [--tokens 4096] [--folder FOLDER]

Without a text it is the half of Python's language reference that calibration does not see. Speeds are of one prompt,
all models in turns; the process uses as many threads as torch takes (OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from secateur.data.text import demo_texts
from secateur.evaluation.costs import Profile
from secateur.evaluation.perplexity import Perplexity, evaluate
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

SEQ_LENS = (128, 1024)


def table(
    rows: list[Profile], perplexity: dict[str, list[Perplexity]], files: dict[str, int | None], dense: str
) -> Table:
    """A row for every model: what its weights take, how fast it is, and how well it predicts every text."""
    shown = Table()
    texts = [f"{p.data}@{p.seq_len}" for p in perplexity[dense]]
    for column in ("", "weights", "files", "peak memory", "prefill", "decode", *texts):
        shown.add_column(column, justify="right" if column else "left")
    for row in rows:
        size = files[row.model]
        assert row.speed is not None
        shown.add_row(
            row.model,
            format_bytes(row.weight_bytes),
            "" if size is None else format_bytes(size),
            format_bytes(row.speed.peak_bytes),
            f"{row.speed.prefill_seconds * 1000:.1f} ms",
            f"{row.speed.decode_tokens_per_second:.1f} tokens/s",
            *(f"{p.ppl:.2f}" for p in perplexity[row.model]),
        )
    return shown


def main() -> None:
    """Prune, pack, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where the folders go; by default they are removed in the end")
    options = parser.parse_args()
    texts = {name: read_evaluation_text(file) for name, _, file in (text.partition("=") for text in options.text)}
    texts = texts or {"python reference": demo_texts()[1]}
    console = Console(width=200)
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
        perplexity = {}
        for name, model in models.items():
            perplexity[name] = evaluate(
                model, tokenizer, texts, protocols=[Protocol(n) for n in SEQ_LENS], max_tokens=options.tokens
            )
            console.print(name, *(f"{p.data}@{p.seq_len} {p.ppl:.3f}" for p in perplexity[name]))
        rows = profile(models)
        files = {name: weight_file_bytes(path) for name, path in folders.items()}
        console.print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.preset}, {options.ratio}"
        )
        console.print(table(rows, perplexity, files, "dense"))


if __name__ == "__main__":
    main()
