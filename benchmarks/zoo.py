"""Results of quality.py on several models -> one table: our presets beside the best peer, the worst case last.

    python benchmarks/zoo.py benchmarks/results/quality.json runs/zoo/*.json [--write]

For every model, ratio and column, the damage of `best` (the mean of its seeds) and of `fast`, that of the peer which
loses least there, and the ratios, which have no meaning where a peer hardly loses anything. `--write` puts the table
into docs/benchmarks.md, and the results into benchmarks/results/zoo.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from quality_table import DENSE, key_of, label_of
from secateur.files import write_json
from tables import TableError, markdown, write_table

RESULTS = Path(__file__).parent / "results" / "zoo"  # those of the demo are quality.py's
OURS = ("best", "fast")
PEERS = ("llm-pruner", "llm-pruner, MLP", "wanda-sp", "shortgpt")
NOTHING = 0.02  # nats: a damage below it is none
Line = tuple[str, float, str, float, float, float, str]  # model, removed, column, best, fast, peer, the peer's name


def lines_of(results: Sequence[dict[str, Any]]) -> list[Line]:
    """The lines of one model. Raises `TableError` where a row of ours, all peers or the dense model are missing."""
    dense = [result for result in results if key_of(result) == DENSE]
    if not dense:
        raise TableError("the dense model was not measured")
    model = str(dense[0]["model"])
    found: list[Line] = []
    for ratio in sorted({float(result["ratio"]) for result in results} - {0.0}):
        for column, loss in dense[0]["nll"].items():
            damage = {
                row: mean(each["nll"][column] - loss for each in results if key_of(each)[:2] == (row, ratio))
                for row in dict.fromkeys(str(each["row"]) for each in results if float(each["ratio"]) == ratio)
            }
            absent = [row for row in OURS if row not in damage]
            peer = min((row for row in PEERS if row in damage), key=damage.__getitem__, default=None)
            if absent or peer is None:
                raise TableError(f"{model} at {ratio:.0%} has no {absent[0] if absent else 'peer'}")
            found.append((model, ratio, column, *(damage[row] for row in OURS), damage[peer], label_of(peer)))
    return found


def table(lines: Iterable[Line]) -> str:
    """The Markdown table; the last line has the highest ratios of each kind.

    >>> print(table([("demo", 0.2, "WT2@128", 0.3, 0.4, 0.6, "Wanda-sp")]).splitlines()[-1])
    | worst | | | | | | | 0.50 | 0.67 |
    >>> print(table([("demo", 0.2, "WT2@128", 0.001, 0.002, 0.003, "Wanda-sp")]).splitlines()[-2])
    | demo | 20% | WT2@128 | 0.001 | 0.002 | 0.003 | Wanda-sp | | |
    """
    rows = [["model", "removed", "text", "`best`", "`fast`", "best peer", "", "`best` / peer", "`fast` / peer"]]
    worst = [0.0, 0.0]
    for model, ratio, column, best, fast, peer, name in lines:
        shown = ("", "")
        if peer >= NOTHING:
            ratios = [best / peer, fast / peer]
            worst = [max(pair) for pair in zip(worst, ratios, strict=True)]
            shown = (f"{ratios[0]:.2f}", f"{ratios[1]:.2f}")
        numbers = (f"{damage:.3f}" for damage in (best, fast, peer))
        rows.append([model, f"{ratio:.0%}", column, *numbers, name, *shown])
    rows.append(["worst", *[""] * 6, *(f"{ratio:.2f}" for ratio in worst)])
    return markdown(rows)


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="what quality.py wrote, one file a model")
    parser.add_argument("--write", action="store_true", help="the table of docs/benchmarks.md")
    arguments = parser.parse_args()
    try:
        results = {file: json.loads(file.read_text()) for file in arguments.files}
        made = table(line for found in results.values() for line in lines_of(found))
        print(made)
        if arguments.write:
            write_table("zoo", made)
            RESULTS.mkdir(parents=True, exist_ok=True)
            for file, found in results.items():
                if RESULTS.parent not in file.resolve().parents:  # it lies there already
                    write_json(RESULTS / file.name, found)
    except (TableError, OSError, ValueError) as error:
        sys.exit(f"zoo.py: {error}")


if __name__ == "__main__":
    main()
