"""The results of quality.py -> the tables of README.md and docs/benchmarks.md, between two marks in each page.

A page is written only when every row that its table is to have has been measured with every seed, and all with the same
settings, so that what has been measured before is never replaced by less. The results are kept beside the tables, in
benchmarks/results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from secateur.files import atomic_file, write_json
from tables import ROOT, TableError, between_marks, markdown, result_file

QUALITY = "quality"  # of the marks, and of the file of results
Key = tuple[str, float, int]  # row, ratio, seed
DENSE: Key = ("dense", 0.0, 0)
SETTINGS = (
    "model",
    "protocols",
    "tokens",
    "dtype",
    "samples",
    "calibration",
    "texts",
)  # what all rows of a table have in common

LABELS = {
    "best": "`--preset best`",
    "best, uniform": "`best --shape uniform`",
    "fast": "`--preset fast`",
    "best, no repair": "`best`, ranking alone (no repair)",
    "best, longer windows": "`best --samples 128 --length 512`",
    "best, in order": "`best --varied 0`",
    "best, score chooses": "`best`, units by score (no choice while repairing)",
    "best, last layers whole": "`best`, nothing cut in the last sixteenth",
    "fast, last layers whole": "`fast`, nothing cut in the last sixteenth",
    "best, reconstruct": "`best --repair reconstruct`",
    "best, sublayers": "`best --sublayers`",
    "best, two iterations": "`best --iterations 2`",
    "llm-pruner, MLP": "LLM-Pruner's recipe, MLP",
    "llm-pruner": "LLM-Pruner's recipe, heads and MLP",
    "wanda-sp": "Wanda-sp",
    "shortgpt": "ShortGPT, whole layers",
    "magnitude": "magnitude, as Torch-Pruning's script",
}
README_ROWS = ("best", "best, uniform", "fast", "llm-pruner, MLP", "llm-pruner", "wanda-sp")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def key_of(result: Mapping[str, Any]) -> Key:
    """What tells one result from another.

    >>> key_of({"row": "best", "ratio": 0.2, "seed": 1, "nll": {}})
    ('best', 0.2, 1)
    """
    return str(result["row"]), float(result["ratio"]), int(result["seed"])


def label_of(row: str) -> str:
    """A row's name as the tables have it; scores alone are named after the score.

    >>> label_of("fast"), label_of("score fisher, global"), label_of("fast, multiples of 64")
    ('`--preset fast`', '`fisher` alone, global', '`--preset fast --round-to 64`')
    """
    if ", multiples of " in row:
        preset, _, multiple = row.partition(", multiples of ")
        return f"`--preset {preset} --round-to {multiple}`"
    if row.startswith("score "):
        name, _, scope = row.removeprefix("score ").partition(", ")
        return f"`{name}` alone, {scope}"
    return LABELS[row]


def missing(results: Sequence[Mapping[str, Any]], wanted: Iterable[Key]) -> list[Key]:
    """What has not been measured yet, in order.

    >>> missing([{"row": "dense", "ratio": 0, "seed": 0}], [DENSE, ("fast", 0.2, 0)])
    [('fast', 0.2, 0)]
    """
    done = {key_of(result) for result in results}
    return [key for key in wanted if key not in done]


def table(results: Sequence[Mapping[str, Any]], wanted: Sequence[Key], *, costs: bool) -> str:
    """The Markdown table of the rows wanted: damage in nats per token, with `costs` the seconds and memory of the cut.

    With several seeds, the mean and half the range. Raises `TableError` when a result is missing, or was measured with
    other settings than the rest.
    """
    gone = missing(results, [DENSE, *wanted])
    if gone:
        raise TableError(f"{len(gone)} of {len(set(wanted)) + 1} measurements are missing: {in_words(gone)}")
    found = {key_of(result): result for result in results}
    for setting in SETTINGS:
        different = {str(found[key].get(setting)) for key in [DENSE, *wanted]}
        if len(different) > 1:
            raise TableError(f"rows were measured with different {setting}: {', '.join(sorted(different))}")
    dense = found[DENSE]["nll"]
    lines = [["removed", "", *dense, *(["seconds", "peak GiB"] if costs else [])]]
    for (row, _), keys in groupby(wanted, key=lambda key: key[:2]):
        mine = [found[key] for key in keys]
        seeds = f" ({NUMBERS[len(mine)]} seeds)" if len(mine) > 1 else ""
        cells = [f"{mine[0]['removed']:.1%}", label_of(row) + seeds]
        for text in dense:
            values = [result["nll"][text] - dense[text] for result in mine]
            spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.3f}{spread}")
        if costs:
            seconds = sorted({f"{result['seconds']:.0f}" for result in mine}, key=int)
            cells.append(seconds[0] if len(seconds) == 1 else f"{seconds[0]} to {seconds[-1]}")
            cells.append(f"{max(result['peak_rss_bytes'] for result in mine) / 2**30:.1f}")
        lines.append(cells)
    return markdown(lines)


def in_words(keys: Sequence[Key], most: int = 6) -> str:
    """Some measurements, named.

    >>> in_words([("best", 0.2, 1), ("dense", 0.0, 0)])
    'best at 20% (seed 1); dense'
    """
    named = ["dense" if row == "dense" else f"{row} at {ratio:.0%} (seed {seed})" for row, ratio, seed in keys[:most]]
    return "; ".join([*named, *([f"and {len(keys) - most} more"] if len(keys) > most else [])])


def blocks(results: Sequence[Mapping[str, Any]], wanted: Sequence[Key]) -> dict[str, str]:
    """Page -> the table between its marks: README.md has some of the rows, docs/benchmarks.md all and what they cost.

    Raises `TableError` as `table` does, and where a row of README.md is not wanted at one of the ratios.
    """
    rows = [key for key in wanted if key[0] in README_ROWS]
    rows.sort(key=lambda key: (key[1], README_ROWS.index(key[0]), key[2]))
    absent = [(row, ratio, 0) for row in README_ROWS for ratio in sorted({key[1] for key in wanted})]
    absent = [key for key in absent if key[:2] not in {(row, ratio) for row, ratio, _ in rows}]
    if absent:
        raise TableError(f"the README's table has rows that were not asked for: {in_words(absent)}")
    return {
        "README.md": table(results, rows, costs=False),
        "docs/benchmarks.md": table(results, wanted, costs=True),
    }


def write_tables(results: Sequence[Mapping[str, Any]], wanted: Sequence[Key], *, root: Path = ROOT) -> list[Path]:
    """Write both tables and the results that they are of, or nothing; returns the files.

    Raises `TableError` when a measurement is missing, rows were measured with different settings, or a page lacks its
    marks.
    """
    made = {}
    for page, block in blocks(results, wanted).items():
        try:
            made[root / page] = between_marks((root / page).read_text(encoding="utf-8"), block, QUALITY)
        except TableError as error:
            raise TableError(f"{page}: {error}") from error
    for path, text in made.items():
        with atomic_file(path, overwrite=True) as file:
            file.write_text(text, encoding="utf-8")
    write_json(file := result_file(QUALITY, root=root), results)
    return [*made, file]
