"""A run -> its curves: quality against size, and the course of every training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from secateur.report.charts import line_chart
from secateur.report.content import Cell, Figure, Section, Table
from secateur.report.entries import Training
from secateur.report.formatting import format_count, format_perplexity
from secateur.report.run import Run

MOST_STEPS = 60  # rows of a table of steps


def frontier_section(run: Run) -> Section | None:
    """Perplexity against parameters: of sweeps, and of the run's models where they have three sizes."""
    curves: dict[str, dict[str, dict[int, float]]] = {}  # test -> line -> parameters -> perplexity
    for sweep in run.sweeps:
        for score in dict.fromkeys(row.score for row in sweep.rows if row.ratio and row.score):
            for row in sweep.rows:
                for measured in row.perplexity if row.score == score or not row.ratio else ():
                    if measured.ppl is not None:
                        curves.setdefault(measured.test, {}).setdefault(score, {})[row.parameters] = measured.ppl
    for model in run.models if len(run.cuts) > 1 else ():
        for test, measured in model.perplexity.items():
            if model.cost.parameters and measured.ppl is not None and model.role in ("dense", "pruned"):
                line = curves.setdefault(test, {}).setdefault("models of this run", {})
                line[model.cost.parameters] = measured.ppl
    figures = []
    for test, lines in curves.items():
        shown = {name: sorted(points.items()) for name, points in lines.items() if len(points) > 2}
        if shown:
            rows = [
                (Cell(name), Cell(format_count(parameters)), Cell(format_perplexity(ppl)))
                for name, points in shown.items()
                for parameters, ppl in points
            ]
            title = f"Perplexity on {test} by parameters"
            svg = line_chart(shown, x_label="parameters", y_label="perplexity", log_y=True)
            figures.append(Figure(title, svg, Table(title, ("Line", "Parameters", "Perplexity"), tuple(rows))))
    return Section("frontier", "Quality against size", tuple(figures)) if figures else None


def recovery_section(run: Run) -> Section | None:
    """The loss, and the perplexity on held-out texts, of every training."""
    blocks: list[str | Figure] = []
    for training in run.trainings:
        model = run.model(training.out)
        label = model.label if model is not None else training.out
        blocks.append(
            f"{label}: {training.steps:,} steps of {training.method} over {training.tokens:,} tokens; the weights are "
            f"those of step {training.best_step:,}."
        )
        blocks += _training_figures(label, training)
    return Section("recovery", "Recovery", tuple(blocks)) if blocks else None


def _training_figures(label: str, training: Training) -> Iterator[Figure]:
    losses = {"training": training.loss, "validation": [(each.step, each.validation) for each in training.evaluation]}
    texts = {
        name: [(each.step, each.perplexity.get(name)) for each in training.evaluation]
        for name in dict.fromkeys(name for each in training.evaluation for name in each.perplexity)
    }
    for curves, title, y_label in ((losses, "Loss", "nats per token"), (texts, "Perplexity", "perplexity")):
        known = {name: [(x, y) for x, y in points if y is not None] for name, points in curves.items()}
        shown = {name: points for name, points in known.items() if len(points) > 1}
        if shown:
            svg = line_chart(shown, x_label="step", y_label=y_label, log_y=title == "Perplexity")
            yield Figure(f"{title} of {label} by step", svg, _by_step(f"{title} of {label}", shown))


def _by_step(caption: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> Table:
    """A row for each step; of a long training, for evenly chosen ones."""
    values = [dict(points) for points in curves.values()]
    steps = sorted({step for each in values for step in each})
    shown = sorted({*steps[:: 1 + len(steps) // MOST_STEPS], steps[-1]})
    rows = tuple(
        (Cell(f"{step:,}"), *(Cell(f"{each[step]:.4g}" if step in each else "") for each in values)) for step in shown
    )
    return Table(caption, ("Step", *curves), rows)
