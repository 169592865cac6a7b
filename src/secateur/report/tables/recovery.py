"""A training -> its measurements before and after."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from secateur.recovery.result import RecoverResult
from secateur.report.formatting import format_count
from secateur.report.tables.layout import make_table, titled


def recovery_tables(result: RecoverResult) -> Iterator[RenderableType]:
    """Validation loss and perplexity before the training, at its best and at its end; rows left out; notes."""
    measured = result.evaluation
    best = next((entry for entry in reversed(measured) if entry["step"] == result.best_step), None)
    if len(result.rounds) > 1:
        yield from _round_tables(result)
    elif best is not None:
        last = f"last, step {measured[-1]['step']}"
        table = make_table(("", "before", f"best, step {result.best_step}", last))
        shown = (measured[0], best, measured[-1])
        if best["validation"] is not None:
            table.add_row("validation, nats", *(f"{entry['validation']:.3f}" for entry in shown))
        for name in best["perplexity"]:
            table.add_row(f"perplexity, {name}", *(f"{entry['perplexity'][name]:.2f}" for entry in shown))
        yield from titled(f"{result.method}, {format_count(result.trained_parameters)} parameters trained", table)
    yield f"{result.steps} steps, {result.tokens:,} tokens of {result.rows:,} rows"
    for why, count in result.dropped.items():
        yield f"dropped: {count:,} rows {why}"
    yield from result.notes


def _round_tables(result: RecoverResult) -> Iterator[RenderableType]:
    """The size of every round, with its measurements after the cut and after the training."""
    texts = [] if result.rounds[-1]["best"] is None else [*result.rounds[-1]["best"]["perplexity"]]
    columns = ("round", "parameters", "steps", "validation, nats", *(f"perplexity, {name}" for name in texts))
    table = make_table(columns)
    for each in result.rounds:
        pairs = []
        if each["before"] is not None and each["best"] is not None:
            validation = [entry["validation"] for entry in (each["before"], each["best"])]
            pairs.append("" if None in validation else "{:.3f} -> {:.3f}".format(*validation))
            for name in texts:
                pairs.append(
                    "{:.2f} -> {:.2f}".format(*(each[when]["perplexity"][name] for when in ("before", "best")))
                )
        table.add_row(str(each["round"]), format_count(each["parameters"]), str(each["steps"]), *pairs)
    yield from titled(f"{result.method}, after the cut -> after the training", table)
