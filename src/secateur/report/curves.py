"""What changes along a line: quality with size, and loss with the steps of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from secateur.report.blocks import Block, Cell, Figure, Paragraph, Section, Subheading, Table
from secateur.report.charts import Series, line_plot
from secateur.report.formatting import format_count, format_perplexity, join_names
from secateur.report.models import Facts, same_model

LINES = 4  # tones of lines
MOST_STEPS = 60  # rows of a table of steps


def frontier_section(facts: Facts) -> Section | None:
    """Perplexity against parameters, where there are several sizes: of sweeps, and of this run's models."""
    curves: dict[str, dict[str, list[tuple[int, float, str]]]] = {}  # test -> line -> parameters, perplexity, what
    for sweep in facts.run.sweeps:
        dense = [row for row in sweep if row.ratio == 0]
        scores = list(dict.fromkeys(row.score for row in sweep if row.ratio))
        for score in scores:
            for row in (*dense, *(row for row in sweep if row.ratio and row.score == score)):
                for measured in row.perplexity:
                    if measured.ppl is not None:
                        line = curves.setdefault(measured.test, {}).setdefault(score, [])
                        line.append((row.parameters, measured.ppl, f"ratio {row.ratio:g}"))
    for model in facts.models:
        parameters = facts.cost(model).parameters
        for test, measured in facts.perplexity(model).items():
            if parameters is not None and measured.ppl is not None and model.role in ("dense", "pruned"):
                line = curves.setdefault(test, {}).setdefault("models of this run", [])
                line.append((parameters, measured.ppl, model.label))
    figures = [
        figure
        for test, lines in curves.items()
        if (figure := _frontier(test, {name: sorted(line) for name, line in lines.items()})) is not None
    ]
    return Section("frontier", "Quality against size", tuple(figures)) if figures else None


def _frontier(test: str, lines: Mapping[str, Sequence[tuple[int, float, str]]]) -> Figure | None:
    shown = {name: line for name, line in lines.items() if len({size for size, _, _ in line}) > 2}
    if not shown:
        return None
    series = [
        Series(name, i % LINES, tuple((float(size), ppl) for size, ppl, _ in line))
        for i, (name, line) in enumerate(shown.items())
    ]
    rows = [
        (Cell(name), Cell(what), Cell(format_count(size)), Cell(format_perplexity(ppl)))
        for name, line in shown.items()
        for size, ppl, what in line
    ]
    chart = line_plot(
        f"Perplexity on {test} against parameters",
        f"Lines for {join_names(list(shown))}; the dense model is at the right. The numbers are in the table below.",
        series,
        x_label="parameters",
        y_label="perplexity",
        log_y=True,
    )
    columns = ("Line", "Cut", "Parameters", "Perplexity")
    return Figure(chart, Table(f"Perplexity on {test}", columns, tuple(rows), words=(0, 1)), f"On {test}.")


def recovery_section(facts: Facts) -> Section | None:
    """How each training went."""
    blocks: list[Block] = []
    for training in facts.run.trainings:
        label = next((m.label for m in facts.models if same_model(m.name, training.out)), training.out)
        if len(facts.run.trainings) > 1:
            blocks.append(Subheading(f"{label}: {training.out}" if label != training.out else label))
        blocks.append(
            Paragraph(
                f"{training.steps:,} steps of {training.method or 'training'} over {training.tokens:,} tokens; the "
                f"weights are those of step {training.best_step:,}."
            )
        )
        curves = [
            Series(name, tone, points)
            for name, tone, points in (("training", 0, training.loss), ("validation", 1, training.validation))
            if len(points) > 1
        ]
        if curves:
            plot = line_plot(
                f"Loss of {label} by step",
                f"Lines for {join_names([each.label for each in curves])}. The numbers are in the table below.",
                curves,
                x_label="step",
                y_label="nats per token",
            )
            blocks.append(Figure(plot, _by_step("Loss, nats per token", curves)))
        texts = [
            Series(name, i % LINES, points)
            for i, (name, points) in enumerate(training.perplexity.items())
            if len(points) > 1
        ]
        if texts:
            plot = line_plot(
                f"Perplexity of {label} by step",
                f"Lines for {join_names([each.label for each in texts])}. The numbers are in the table below.",
                texts,
                x_label="step",
                y_label="perplexity",
                log_y=True,
            )
            blocks.append(Figure(plot, _by_step("Perplexity on held-out text", texts)))
    return Section("recovery", "Recovery", tuple(blocks)) if blocks else None


def _by_step(caption: str, curves: Sequence[Series]) -> Table:
    """A row for each step at which all but the longest curve has a value, or else evenly chosen ones."""
    values = [dict(each.points) for each in curves]
    steps = sorted({x for each in curves for x, _ in each.points})
    if len(steps) > MOST_STEPS:
        every = math.ceil(len(steps) / MOST_STEPS)
        fewest = min((set(each) for each in values), key=len)
        steps = sorted(set(steps[::every]) | (fewest if len(fewest) <= MOST_STEPS else set()) | {steps[-1]})
    rows = tuple(
        (Cell(f"{step:,.0f}"), *(Cell(f"{each[step]:.4g}" if step in each else "") for each in values))
        for step in steps
    )
    return Table(caption, ("Step", *(each.label for each in curves)), rows)
