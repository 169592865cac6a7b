"""A run -> what its models cost and how good they are: sizes, perplexity, tasks, samples, and the curves of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from secateur.evaluation.significance import interval
from secateur.report.charts import Bar, bar_chart, line_chart
from secateur.report.content import Cell, Figure, Section, Table, optional
from secateur.report.entries import Accuracy, Training
from secateur.report.formatting import (
    format_accuracy,
    format_bytes,
    format_change,
    format_count,
    format_macs,
    format_p_value,
    format_perplexity,
    format_seconds,
    format_signed,
)
from secateur.report.run import Run, model_key

_COSTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("Parameters", "parameters", format_count),
    ("Outside embeddings", "non_embedding_parameters", format_count),
    ("MACs", "macs", format_macs),
    ("Weights", "weight_bytes", format_bytes),
    ("File", "file_bytes", format_bytes),
    ("Peak memory", "peak_bytes", format_bytes),
    ("KV cache", "kv_cache_bytes", format_bytes),
    ("Prefill", "prefill_seconds", format_seconds),
    ("Decode, tokens/s", "decode_tokens_per_second", lambda rate: f"{rate:.1f}"),
)


def models_section(run: Run) -> Section | None:
    """A row for every model with all that is known of its size and speed, beside the model it was made from."""
    columns = [each for each in _COSTS if any(getattr(model.cost, each[1]) is not None for model in run.models)]
    rows = []
    for model in run.models:
        base = run.baseline(model)
        cells = [Cell(model.label, ": ".join(word for word in (model.role, model.name) if word != model.label))]
        for _, field, text in columns:
            value, before = getattr(model.cost, field), None
            if base is not None and model.cost.compares(base.cost, field):
                before = getattr(base.cost, field)
            cells.append(Cell("" if value is None else text(value), format_change(before, value)))
        if any(cell.text for cell in cells[1:]):
            rows.append(tuple(cells))
    if not rows:
        return None
    table = Table("Size and speed", ("Model", *(name for name, _, _ in columns)), tuple(rows))
    note = "Changes are relative to the dense model. MACs are multiply-accumulates of one pass."
    return Section("models", "Models", (table, note))


def quality_section(run: Run) -> Section | None:
    """Perplexity and tasks, as bars and as tables with differences."""
    blocks = [_perplexity_figure(run)] if any(model.perplexity for model in run.models) else []
    blocks += [_task_figure(run)] if any(model.tasks for model in run.models) else []
    return Section("quality", "Quality", tuple(blocks)) if blocks else None


def _perplexity_figure(run: Run) -> Figure:
    groups: dict[str, list[Bar]] = {}
    rows = []
    for test in dict.fromkeys(test for model in run.models for test in model.perplexity):
        for model in run.models:
            if (row := model.perplexity.get(test)) is not None:
                ppl, ends = format_perplexity(row.ppl), (row.ppl_low, row.ppl_high)
                groups.setdefault(test, []).append(Bar(model.label, row.ppl, ppl, model.color, *ends))
                base = run.baseline(model)
                before = base.perplexity.get(test) if base is not None else None
                interval = "" if None in ends else f"{format_perplexity(ends[0])} to {format_perplexity(ends[1])}"
                change = Cell(format_change(before.ppl if before else None, row.ppl))
                bits = optional(row.bits_per_byte, lambda bits: f"{bits:.4f}")
                rows.append((Cell(test), Cell(model.label), Cell(ppl, interval), change, bits, Cell(f"{row.tokens:,}")))
    columns = ("Text", "Model", "Perplexity", "Change", "Bits per byte", "Tokens scored")
    table = Table("Perplexity", columns, tuple(rows), text_columns=(0, 1))
    return Figure("Perplexity, with 95 % intervals over windows; lower is better", bar_chart(groups), table)


def _task_figure(run: Run) -> Figure:
    groups: dict[str, list[Bar]] = {}
    rows = []
    every = [(model, f"{task} ({row.metric})", row) for model in run.models for task, row in model.tasks.items()]
    for model in run.models:
        if model.tasks_mean is not None and len(model.tasks_mean.tasks) > 1:
            every.append((model, f"mean of {len(model.tasks_mean.tasks)} tasks", model.tasks_mean))
    for task in dict.fromkeys(name for _, name, _ in every):
        for model, _, row in (each for each in every if each[1] == task):
            text, points = (format_accuracy if row.is_share else "{:.4g}".format), _points(row)
            ends = interval(row.value, row.stderr or None) or (None, None)
            if row.is_share:
                groups.setdefault(task, []).append(Bar(model.label, row.value, text(row.value), model.color, *ends))
            difference = _paired(row.paired.difference, points)
            paired = Cell(difference, format_p_value(row.paired.p))
            error = optional(row.stderr, points)
            documents = optional(row.documents, lambda count: f"{count:,}")
            rows.append((Cell(task), Cell(model.label), Cell(text(row.value)), error, paired, documents))
    columns = ("Task", "Model", "Right", "Standard error", "Paired difference", "Documents")
    table = Table("Zero-shot tasks", columns, tuple(rows), text_columns=(0, 1))
    title = "Zero-shot tasks, with 95 % intervals; higher is better; in per cent, differences in points"
    return Figure(title, bar_chart(groups) if groups else None, table)


def _points(row: Accuracy) -> Callable[[float], str]:
    """How errors and differences of a task are written: in points of a share, other metrics as they are."""
    return (lambda value: f"{100 * value:.1f}") if row.is_share else "{:.4g}".format


def _paired(difference: float | None, points: Callable[[float], str]) -> str:
    return "" if difference is None else format_signed(difference, points(abs(difference)))


def samples_section(run: Run) -> Section | None:
    """What the models write after the same prompts."""
    tables = []
    for prompt in dict.fromkeys(prompt for model in run.models for prompt in model.samples):
        rows = tuple((Cell(m.label), Cell(m.samples[prompt].strip())) for m in run.models if prompt in m.samples)
        tables.append(Table(prompt, ("Model", "Continuation"), rows, text_columns=(0, 1)))
    note = "Greedy continuations of the same prompt."
    return Section("samples", "Samples", (note, *tables)) if tables else None


MOST_STEPS = 60  # rows of a table of steps


def frontier_section(run: Run) -> Section | None:
    """Perplexity against parameters: of sweeps, and of the run's models where they have three sizes."""
    curves: dict[str, dict[str, dict[int, float]]] = {}  # test -> line -> parameters -> perplexity
    several = len({model_key(sweep.model) for sweep in run.sweeps}) > 1
    for sweep in run.sweeps:
        for line in dict.fromkeys(row.line for row in sweep.rows if row.ratio and row.line):
            name = f"{sweep.model}, {line}" if several else line
            for row in sweep.rows:
                for measured in row.perplexity if row.line == line or not row.ratio else ():
                    if measured.ppl is not None:
                        curves.setdefault(measured.test, {}).setdefault(name, {})[row.parameters] = measured.ppl
    for model in run.models if len(run.cuts) > 1 else ():
        base = run.baseline(model) or model
        for test, measured in model.perplexity.items():
            if model.cost.parameters and measured.ppl is not None and model.role in ("dense", "pruned"):
                several_dense = sum(each.role == "dense" for each in run.models) > 1
                name = f"models made from {base.label}" if several_dense else "models of this run"
                curves.setdefault(test, {}).setdefault(name, {})[model.cost.parameters] = measured.ppl
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
    cells = [[Cell(f"{each[step]:.4g}" if step in each else "") for each in values] for step in shown]
    rows = tuple((Cell(f"{step:,}"), *row) for step, row in zip(shown, cells, strict=True))
    return Table(caption, ("Step", *curves), rows)
