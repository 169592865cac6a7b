"""The results of quality.py -> docs/quality.svg: damage against the parameters that are left.

python benchmarks/quality_plot.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from quality_table import DENSE, QUALITY, key_of, label_of
from tables import ROOT, result_file

PICTURE = ROOT / "docs" / "quality.svg"
MOST = 6.5  # nats: rows above it (magnitude) are off the scale
SHOWN = {  # row of the table -> its name in the picture
    "`--preset best`": "Secateur (best)",
    "`--preset fast`": "Secateur (fast)",
    "`best --shape uniform`": "Secateur (best, uniform)",
    "LLM-Pruner's recipe, MLP": "LLM-Pruner, MLP",
    "LLM-Pruner's recipe, heads and MLP": "LLM-Pruner, heads and MLP",
    "ShortGPT, whole layers": "ShortGPT",
    "Wanda-sp": "Wanda-sp",
}
Points = dict[str, dict[float, float]]  # row -> share removed -> damage


def points_of(results: Sequence[Mapping[str, Any]]) -> Points:
    """Mean damage over the columns and seeds, by row and share of the parameters removed.

    >>> dense = {"row": "dense", "ratio": 0, "seed": 0, "nll": {"WT2": 4.0, "PTB": 5.0}}
    >>> points_of([dense, {**dense, "row": "best", "ratio": 0.2, "nll": {"WT2": 4.5, "PTB": 5.1}}])
    {'`--preset best`': {0.2: 0.3}}
    """
    (dense,) = (each["nll"] for each in results if key_of(each) == DENSE)
    found: dict[str, dict[float, list[float]]] = {}
    for each in results:
        if key_of(each) != DENSE:
            damages = [each["nll"][column] - loss for column, loss in dense.items()]
            found.setdefault(label_of(each["row"]), {}).setdefault(each["ratio"], []).append(mean(damages))
    return {row: {ratio: round(mean(seeds), 4) for ratio, seeds in by.items()} for row, by in found.items()}


def draw(points: Mapping[str, Mapping[float, float]], names: Sequence[str], out: Path) -> None:
    """Draw the rows named; every line starts at the dense model, which has no damage."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "secateur", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for number, name in enumerate(names):
        cuts = {0.0: 0.0, **points[name]}
        ours = SHOWN[name].startswith("Secateur")
        axes.plot(
            [100 * (1 - removed) for removed in cuts],
            [*cuts.values()],
            marker="o" if ours else "s",
            linewidth=2.4 if ours else 1.2,
            linestyle="-" if ours else "--",
            color=f"C{number}",
            label=SHOWN[name],
        )
    axes.set_xlim(102, 48)
    axes.set_ylim(0, MOST)
    axes.set_xlabel("non-embedding parameters left, %")
    axes.set_ylabel("damage, nats per token")
    axes.set_title("SmolLM2-135M-Instruct, no training; mean of WikiText-2 and PTB", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Read the results, write the picture."""
    points = points_of(json.loads(result_file(QUALITY).read_text(encoding="utf-8")))
    draw(points, [name for name in SHOWN if name in points], PICTURE)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
