"""The same number of parameters, from layers alone or from the vocabulary as well: what a byte of text then costs.

    python benchmarks/vocabulary.py --model demo --ratio 0.3 --calibration FILE --text NAME=FILE

Every cut is a process of its own, `secateur prune --of parameters` as a user would call it. `secateur evaluate`
measures it beside the dense model, in bits per byte of the same text, since their tokens differ. A row is the axes of a
cut, given with `--axes`. Results go into a JSON file (`--out`) as they come, and the same command goes on after a stop;
`--write` puts them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.files import write_json
from tables import about, keep, markdown, secateur, show

AXES = ("attention,mlp", "attention,mlp,vocabulary")


def main() -> None:
    """Cut and measure; print the table."""
    options = _arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for axes in options.axes:
        name = f"{options.name or options.model} | {options.ratio:.0%} | {axes}"
        if name not in results:
            results[name] = _measured(axes, options)
            write_json(options.out, results)
    show("Bits per byte of each text, and what was added to those of the dense model", rows_of(results))
    if options.write:
        keep("vocabulary", results, block(results))


def _measured(axes: str, options: argparse.Namespace) -> dict[str, Any]:
    out = options.folder / axes.replace(",", "-")
    given = [f"--calibration={text}" for text in options.calibration] + options.cut.split()
    budget = ["--of", "parameters", "--ratio", str(options.ratio), "--axes", axes]
    cut, file = options.folder / "cut.json", options.folder / "evaluated.json"
    secateur("prune", options.model, str(out), *budget, *given, "--json", str(cut), "--overwrite", "--quiet")
    texts = [f"--ppl={text}" for text in options.text]
    panel = ["--protocol", options.protocol, "--max-tokens", str(options.tokens)]
    secateur("evaluate", options.model, str(out), *texts, *panel, "--json", str(file), "--quiet")
    cut_to = json.loads(cut.read_text())
    kept = {group["kind"]: 0 for group in cut_to["groups"]}
    units = dict(kept)
    for group in cut_to["groups"]:
        kept[group["kind"]] += group["kept"]
        units[group["kind"]] += group["units"]
    dense, pruned = (
        {each["data"]: each["bits_per_byte"] for each in result["perplexity"]}
        for result in json.loads(file.read_text())["results"]
    )
    return {
        "parameters": cut_to["parameters"],
        "kept": {kind: [kept[kind], units[kind]] for kind in kept},
        "seconds": cut_to["seconds"],
        "peak_rss_bytes": cut_to["peak_rss_bytes"],
        "dense": dense,
        "pruned": pruned,
        "about": about(),
    }


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and a row for each cut: tokens left, and bits per byte of each text with the difference."""
    texts = [*next(iter(results.values()))["dense"]] if results else []
    table = [["model", "removed", "axes", "parameters left", "tokens left", *texts]]
    for name, found in results.items():
        model, ratio, axes = name.split(" | ")
        tokens = found["kept"].get("vocabulary")
        cells = [f"{bits:.3f} ({bits - found['dense'][text]:+.3f})" for text, bits in found["pruned"].items()]
        left = f"{found['parameters']['pruned'] / 1e6:.1f} M"
        table.append([model, ratio, axes, left, f"{tokens[0]:,}" if tokens else "all", *cells])
    return table


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    return markdown(rows_of(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--calibration", action="append", required=True, metavar="FILE")
    add("--text", action="append", required=True, metavar="NAME=FILE", help="what is measured")
    add("--model", default="demo", help="the dense one")
    add("--name", help="of the model in the table")
    add("--ratio", type=float, default=0.3, help="of all parameters")
    add("--axes", action="append", help="of a cut; may be repeated [default: layers alone, and the vocabulary as well]")
    add("--cut", default="", help="more options of `secateur prune`")
    add("--tokens", type=int, default=10_000, help="of each text, as the dense model reads it")
    add("--protocol", default="served@1024")
    add("--write", action="store_true", help="the table of docs/benchmarks.md")
    add("--folder", type=Path, default=Path("runs/vocabulary"))
    add("--out", type=Path, default=Path("runs/vocabulary.json"))
    options = parser.parse_args()
    options.axes = options.axes or [*AXES]
    return options


if __name__ == "__main__":
    main()
