"""A run -> how fast its models are, beside the arithmetic that a cut saves."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.report.charts import Bar, bar_chart
from secateur.report.content import Cell, Figure, Section, Table, optional
from secateur.report.formatting import TIMES, format_bytes, format_change, format_macs, format_seconds
from secateur.report.run import Run


def speed_section(run: Run) -> Section | None:
    """Speed-up against MACs saved, prefill time, speed by batch and length, MACs by operator."""
    blocks: tuple[Table | Figure, ...] = (*_speed_ups(run), *_prefill(run), *_grid(run), *_operators(run))
    return Section("speed", "Speed", blocks) if blocks else None


def _speed_ups(run: Run) -> Iterator[Table]:
    rows = []
    for model in run.models:
        before, after = getattr(run.baseline(model), "cost", None), model.cost
        if before is None or not before.compares(after, "macs"):
            continue
        if before.macs and after.macs and before.prefill_seconds and after.prefill_seconds:
            slow, fast = before.decode_tokens_per_second, after.decode_tokens_per_second
            speed_ups = [before.macs / after.macs, before.prefill_seconds / after.prefill_seconds]
            speed_ups += [fast / slow] if slow and fast else []
            cells = [*(Cell(f"{TIMES} {times:.2f}") for times in speed_ups), Cell("")][:3]
            rows.append((Cell(model.label), Cell(f"{after.macs / before.macs:.2f}"), *cells))
    if rows:
        columns = ("Model", "MACs, share of dense", "Speed-up by MACs alone", "Prefill", "Decode")
        yield Table("Speed-up beside the MACs saved", columns, tuple(rows))


def _prefill(run: Run) -> Iterator[Figure]:
    timed = [(model, model.cost.prefill_seconds) for model in run.models if model.cost.prefill_seconds]
    if len(timed) > 1:
        bars = [Bar(model.label, seconds, format_seconds(seconds), model.color) for model, seconds in timed]
        rates = [optional(model.cost.decode_tokens_per_second, "{:.1f}".format) for model, _ in timed]
        rows = tuple((Cell(bar.label), Cell(bar.text), rate) for bar, rate in zip(bars, rates, strict=True))
        table = Table("Prefill and decode", ("Model", "Prefill", "Decode, tokens/s"), rows)
        yield Figure("Prefill time; lower is better", bar_chart({"prompt of one sequence": bars}), table)


def _grid(run: Run) -> Iterator[Table]:
    rows = []
    cells = [(model.label, cell) for model in run.models for cell in model.cost.grid]
    for label, cell in sorted(cells, key=lambda each: (each[1].batch, each[1].seq_len)):
        numbers = (
            optional(cell.prefill_seconds, format_seconds),
            optional(cell.decode_tokens_per_second, lambda rate: f"{rate:.1f}"),
            optional(cell.peak_bytes, lambda count: format_bytes(int(count))),
        )
        rows.append((Cell(f"{cell.batch} {TIMES} {cell.seq_len}"), Cell(label), *numbers))
    if rows:
        columns = ("Batch and length", "Model", "Prefill", "Decode, tokens/s", "Peak memory")
        yield Table("By batch and length", columns, tuple(rows), text_columns=(0, 1))


def _operators(run: Run) -> Iterator[Table]:
    models = [model for model in run.models if model.cost.macs_by_operator]
    rows = []
    for name in dict.fromkeys(name for model in models for name in model.cost.macs_by_operator):
        cells = [Cell(name)]
        for model in models:
            comparable = model is not models[0] and model.cost.compares(models[0].cost, "macs")
            before = models[0].cost.macs_by_operator.get(name) if comparable else None
            macs = model.cost.macs_by_operator.get(name)
            cells.append(Cell("" if macs is None else format_macs(macs), format_change(before, macs)))
        rows.append(tuple(cells))
    if rows:
        yield Table("MACs by operator", ("Operator", *(model.label for model in models)), tuple(rows))
