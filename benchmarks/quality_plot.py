"""The table of quality in docs/benchmarks.md -> docs/quality.svg: damage against the parameters that are left.

python benchmarks/quality_plot.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from quality_table import BEGIN, END

ROOT = Path(__file__).parent.parent
PAGE, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "quality.svg"
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


def points_of(page: str) -> Points:
    r"""Mean damage over the four columns, by row and share of the parameters removed.

    >>> row = "| 20.0% | `--preset best` (three seeds) | 0.3 ± 0.1 | 0.5 | 0.1 | 0.3 | 375 |"
    >>> points_of(f"{BEGIN}\n| removed | | WT2@128 | WT2@1024 | PTB@128 | PTB@1024 | seconds |\n{row}\n{END}")
    {'`--preset best`': {0.2: 0.3}}
    """
    block = page[page.index(BEGIN) : page.index(END)]
    points: Points = {}
    for line in block.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if re.fullmatch(r"[\d.]+%", cells[0]):
            damage = [float(cell.split(" ±")[0]) for cell in cells[2:6]]
            name = re.sub(r" \(\w+ seeds\)$", "", cells[1])
            points.setdefault(name, {})[float(cells[0][:-1]) / 100] = round(sum(damage) / len(damage), 4)
    return points


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
    """Read the page, write the picture."""
    points = points_of(PAGE.read_text(encoding="utf-8"))
    draw(points, [name for name in SHOWN if name in points], PICTURE)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
