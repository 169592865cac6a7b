"""What was measured of the models: size, perplexity, tasks, speed, samples of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from secateur.report.blocks import Block, Cell, Figure, Paragraph, Section, Subheading, Table, Written, interval
from secateur.report.charts import Bar, bar_chart
from secateur.report.formatting import (
    TIMES,
    format_accuracy,
    format_bytes,
    format_change,
    format_count,
    format_macs,
    format_p_value,
    format_perplexity,
    format_seconds,
    format_signed,
    join_names,
)
from secateur.report.models import Facts, Model, same_model
from secateur.report.reading import SpeedRow, TaskRow

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


def models_section(facts: Facts) -> Section | None:
    """A row for every model with all that is known of its size and speed, beside the model it was made from."""
    costs = {model.name: facts.cost(model) for model in facts.models}
    columns = [each for each in _COSTS if any(getattr(cost, each[1]) is not None for cost in costs.values())]
    if not columns:
        return None
    rows = []
    for model in facts.models:
        base = facts.baseline(model)
        named = [word for word in (model.role, model.name) if word not in (model.label, "measured")]
        cells = [Cell(model.label, ": ".join(named))]
        for _, field, text in columns:
            value = getattr(costs[model.name], field)
            before = getattr(costs[base.name], field) if base is not None else None
            cells.append(Cell("" if value is None else text(value), format_change(before, value)))
        if any(cell.text for cell in cells[1:]):
            rows.append(tuple(cells))
    table = Table("Size and speed of every model", ("Model", *(name for name, _, _ in columns)), tuple(rows))
    note = "A difference is to the dense model that the row's was made from"
    compared = any(facts.baseline(model) for model in facts.models)
    said = f"{note}. MACs are multiply-accumulates of one pass." if compared else ""
    return Section("models", "The models", (table, *([Paragraph(said)] if said else ())))


def quality_section(facts: Facts) -> Section | None:
    """Perplexity and tasks, as bars and as tables with differences."""
    blocks: list[Block] = []
    if facts.run.perplexity:
        blocks += [Subheading("Perplexity"), _perplexity_figure(facts)]
    if facts.run.tasks:
        blocks += [Subheading("Zero-shot tasks"), _task_figure(facts)]
    return Section("quality", "Quality", tuple(blocks)) if blocks else None


def _perplexity_figure(facts: Facts) -> Figure:
    tests = list(dict.fromkeys(row.test for row in facts.run.perplexity))
    groups: dict[str, list[Bar]] = {}
    rows: list[tuple[Cell, ...]] = []
    bits = any(row.bits_per_byte is not None for row in facts.run.perplexity)
    for test in tests:
        for model in facts.models:
            row = facts.perplexity(model).get(test)
            if row is None:
                continue
            bar = Bar(model.label, row.ppl, format_perplexity(row.ppl), model.tone, row.low, row.high)
            groups.setdefault(test, []).append(bar)
            base = facts.baseline(model)
            before = facts.perplexity(base).get(test) if base is not None else None
            told = interval(format_perplexity(row.ppl), row.low, row.high, format_perplexity)
            per_byte = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
            cells = [Cell(test), Cell(model.label), told, Cell(format_change(before.ppl if before else None, row.ppl))]
            rows.append((*cells, *([Cell(per_byte)] if bits else ()), Cell(f"{row.tokens:,}")))
    columns = ("Text", "Model", "Perplexity", "Difference", *(("Bits per byte",) if bits else ()), "Tokens scored")
    bounded = any(row.low is not None for row in facts.run.perplexity)
    note = "Lower is better." + (" Lines are 95 % intervals over windows of the text." if bounded else "")
    title = f"Perplexity of {join_names([model.label for model in facts.models if facts.perplexity(model)])}"
    chart = bar_chart(title, f"Bars of perplexity for {join_names(tests)}. The numbers are in the table below.", groups)
    return Figure(chart, Table("Perplexity", columns, tuple(rows), words=(0, 1)), note)


def _task_figure(facts: Facts) -> Figure:
    tasks = list(dict.fromkeys(row.task for row in facts.run.tasks))
    groups: dict[str, list[Bar]] = {}
    rows: list[tuple[Cell, ...]] = []
    for task in (*tasks, "mean"):
        for model in facts.models:
            row = _task_or_mean(facts, model, task, tasks)
            if row is None:
                continue
            wide = 1.96 * row.stderr if row.stderr is not None else None
            low, high = (None, None) if wide is None else (row.value - wide, row.value + wide)
            bar = Bar(model.label, row.value, format_accuracy(row.value), model.tone, low, high)
            name = f"{task} ({row.metric})" if task != "mean" else f"mean of {len(tasks)} tasks"
            groups.setdefault(name, []).append(bar)
            told = "" if row.difference is None else format_signed(row.difference, f"{100 * abs(row.difference):.1f}")
            error = "" if row.stderr is None else f"{100 * row.stderr:.1f}"
            documents = "" if row.documents is None else f"{row.documents:,}"
            cells = (Cell(name), Cell(model.label), Cell(format_accuracy(row.value)), Cell(error))
            rows.append((*cells, Cell(told, format_p_value(row.p)), Cell(documents)))
    columns = ("Task", "Model", "Right", "Standard error", "Difference, points", "Documents")
    bounded = any(row.stderr is not None for row in facts.run.tasks)
    note = "Higher is better." + (" Lines are 95 % intervals, from the standard errors." if bounded else "")
    title = f"Right answers of {join_names([model.label for model in facts.models if facts.tasks(model)])}"
    chart = bar_chart(title, f"Bars of accuracy for {join_names(tasks)}. The numbers are in the table below.", groups)
    return Figure(chart, Table("Zero-shot tasks", columns, tuple(rows), words=(0, 1)), note)


def _task_or_mean(facts: Facts, model: Model, task: str, tasks: Sequence[str]) -> TaskRow | None:
    mine = facts.tasks(model)
    if task != "mean":
        return mine.get(task)
    if len(tasks) < 2 or set(mine) != set(tasks):
        return None
    known = next((row for row in facts.run.task_means if same_model(row.model, model.name)), None)
    return known or TaskRow(model.name, "mean", "mean", fmean(row.value for row in mine.values()))


def speed_section(facts: Facts) -> Section | None:
    """Speed against the arithmetic saved, over batches and lengths, and arithmetic by operator."""
    costs = {model: facts.cost(model) for model in facts.models}
    blocks: list[Block] = []
    if (paid := _paid(facts, costs)) is not None:
        blocks.append(paid)
    timed = [model for model, cost in costs.items() if cost.prefill_seconds]
    if len(timed) > 1:
        blocks.append(_speed_figure(facts, costs, timed))
    if any(cost.grid for cost in costs.values()):
        blocks += [Subheading("By batch and length"), _grid_table(costs)]
    if any(cost.macs_by_operator for cost in costs.values()):
        blocks += [Subheading("Arithmetic by operator"), _operator_table(costs)]
    return Section("speed", "Speed", tuple(blocks)) if blocks else None


def _paid(facts: Facts, costs: Mapping[Model, SpeedRow]) -> Table | None:
    """Whether the arithmetic saved is time saved."""
    rows = []
    for model, cost in costs.items():
        base = facts.baseline(model)
        before = costs.get(base) if base is not None else None
        if before is None or not (before.macs and cost.macs and before.prefill_seconds and cost.prefill_seconds):
            continue
        ideal, times = before.macs / cost.macs, before.prefill_seconds / cost.prefill_seconds
        cells = [Cell(model.label), Cell(f"{cost.macs / before.macs:.2f}"), Cell(f"{TIMES} {ideal:.2f}")]
        cells.append(Cell(f"{TIMES} {times:.2f}"))
        if before.decode_tokens_per_second and cost.decode_tokens_per_second:
            cells.append(Cell(f"{TIMES} {cost.decode_tokens_per_second / before.decode_tokens_per_second:.2f}"))
        else:
            cells.append(Cell(""))
        rows.append(tuple(cells))
    columns = ("Model", "MACs, of the dense model's", "Speed-up by MACs alone", "Prefill", "Decode")
    return Table("Does the cut pay?", columns, tuple(rows)) if rows else None


def _speed_figure(facts: Facts, costs: Mapping[Model, SpeedRow], timed: Sequence[Model]) -> Figure:
    groups: dict[str, list[Bar]] = {"prefill, milliseconds (shorter is better)": []}
    rows = []
    for model in timed:
        seconds, rate = costs[model].prefill_seconds or 0.0, costs[model].decode_tokens_per_second
        bars = groups["prefill, milliseconds (shorter is better)"]
        bars.append(Bar(model.label, 1000 * seconds, format_seconds(seconds), model.tone))
        rows.append((Cell(model.label), Cell(format_seconds(seconds)), Cell("" if rate is None else f"{rate:.1f}")))
    title = f"Time to read a prompt: {join_names([model.label for model in timed])}"
    chart = bar_chart(title, "Bars of milliseconds. The numbers are in the table below.", groups)
    columns = ("Model", "Prefill", "Decode, tokens/s")
    return Figure(chart, Table("Speed", columns, tuple(rows)), "All models took turns on one machine.")


def _grid_table(costs: Mapping[Model, SpeedRow]) -> Table:
    measured = [(model, cost) for model, cost in costs.items() if cost.grid]
    rows = []
    for at in sorted({(row.batch, row.seq_len) for _, cost in measured for row in cost.grid}):
        cells = [Cell(f"{at[0]} {TIMES} {at[1]}")]
        for _, cost in measured:
            row = next((row for row in cost.grid if (row.batch, row.seq_len) == at), None)
            prefill = row.prefill_seconds if row else None
            decode = row.decode_tokens_per_second if row else None
            peak = row.peak_bytes if row else None
            cells.append(Cell("" if prefill is None else format_seconds(prefill)))
            cells.append(Cell("" if decode is None else f"{decode:.1f}"))
            cells.append(Cell("" if peak is None else format_bytes(peak)))
        rows.append(tuple(cells))
    names = [f"{model.label}: {what}" for model, _ in measured for what in ("prefill", "tokens/s", "memory")]
    return Table("Prefill, decode and peak memory", ("Batch and length", *names), tuple(rows))


def _operator_table(costs: Mapping[Model, SpeedRow]) -> Table:
    measured = [(model, cost.macs_by_operator) for model, cost in costs.items() if cost.macs_by_operator]
    names = list(dict.fromkeys(name for _, macs in measured for name in macs))
    first = measured[0][1]
    rows = []
    for name in names:
        cells = [Cell(name)]
        for _, macs in measured:
            before = None if macs is first else first.get(name)
            cells.append(
                Cell("" if name not in macs else format_macs(macs[name]), format_change(before, macs.get(name)))
            )
        rows.append(tuple(cells))
    return Table("Multiply-accumulates", ("Operator", *(model.label for model, _ in measured)), tuple(rows))


def samples_section(facts: Facts) -> Section | None:
    """What the models write after the same prompts."""
    blocks = []
    for prompt in dict.fromkeys(row.prompt for row in facts.run.samples):
        texts = [
            (model.label, model.tone, row.text.strip())
            for model in facts.models
            for row in facts.run.samples
            if row.prompt == prompt and same_model(row.model, model.name)
        ]
        blocks.append(Written(prompt, tuple(texts)))
    note = Paragraph("Each model continues the prompt with its most likely tokens.")
    return Section("samples", "What they write", (note, *blocks)) if blocks else None
