"""An evaluation, a sweep or a training -> how good models are, beside the first, by size, before and after."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.evaluation.evaluate import ModelEvaluation
from secateur.evaluation.perplexity import bits_difference, loss_difference
from secateur.evaluation.significance import Difference
from secateur.evaluation.task_results import HEADLINES, mean_accuracy, task_difference
from secateur.pipeline.frontier import Sweep
from secateur.recovery.result import RecoverResult
from secateur.report.formatting import format_bytes, format_count, format_macs, format_p_value, format_with_error
from secateur.report.tables.layout import make_table, titled


def evaluation_tables(results: Sequence[ModelEvaluation]) -> Iterator[RenderableType]:
    """Perplexity by text and protocol, accuracy by task, samples of text and bytes, for every model."""
    if any(result.perplexity for result in results):
        yield from titled("Perplexity", _perplexity_table(results))
        yield from _other_tokens(results)
    if any(measured.tasks for measured in results):
        yield from titled("Accuracy, %", _task_table(results))
        notes = {result.task: result.note for measured in results for result in measured.tasks.values() if result.note}
        yield from (f"{task}: {note}" for task, note in notes.items())
        if len(results) > 1:
            yield f"in brackets: difference to {results[0].model}, paired by question, with its p-value"
    yield from sample_lines(results)
    for measured in results:
        if measured.weight_bytes is not None:
            files = "" if measured.file_bytes is None else f", {format_bytes(measured.file_bytes)} in files"
            yield f"{measured.model}: {format_bytes(measured.weight_bytes)} of weights{files}"


def sample_lines(results: Iterable[ModelEvaluation]) -> Iterator[Text]:
    r"""Prompts, each with what a model has written after it, in one line.

    >>> (line,) = sample_lines([ModelEvaluation("tiny", samples={"Once upon a time": ", there was\na girl."})])
    >>> line.plain
    'tiny: Once upon a time, there was a girl.'
    """
    for measured in results:
        for prompt, text in measured.samples.items():
            yield Text.assemble(f"{measured.model}: {prompt}", (re.sub(r"\s+", " ", text).rstrip(), "bold"))


def _perplexity_table(results: Sequence[ModelEvaluation]) -> Table:
    """A row for every model, text and protocol, with the difference to the first model in nats per token."""
    difference = ("difference, nats/token",) * (len(results) > 1)
    columns = ("model", "text", "protocol", "tokens scored", "nats/token", "bits/byte", "perplexity", "95 % interval")
    table = make_table((*columns, *difference), text=("model", "text", "protocol"))
    for measured in results:
        for p in measured.perplexity:
            ends = "" if p.ppl_low is None or p.ppl_high is None else f"{p.ppl_low:.2f} to {p.ppl_high:.2f}"
            bits = "" if p.bits_per_byte is None else f"{p.bits_per_byte:.4f}"
            scored = (p.data, p.protocol, f"{p.tokens:,}", f"{p.nll:.4f}", bits, f"{p.ppl:.2f}", ends)
            worse = None if measured is results[0] else loss_difference(p, results[0].perplexity_like(p))
            text = "" if worse is None else format_with_error(worse.difference, worse.stderr, "+.4f")
            more = None if measured is results[0] else bits_difference(p, results[0].perplexity_like(p))
            text = text if more is None else f"{more:+.4f} bits/byte"
            table.add_row(measured.model, *scored, *((text,) if difference else ()))
    return table


def _other_tokens(results: Sequence[ModelEvaluation]) -> Iterator[str]:
    """What compares models whose vocabularies differ, and how long a text is for each."""
    for p in results[0].perplexity:
        beside = [(each.model, like) for each in results if (like := each.perplexity_like(p)) is not None]
        if any(bits_difference(like, p) is not None for _, like in beside):
            lengths = ", ".join(f"{model} {like.tokens_per_byte or 0:.4f}" for model, like in beside)
            yield f"vocabularies differ: bits/byte of the same text compares them; tokens/byte of {p.data}: {lengths}"


def _task_table(results: Sequence[ModelEvaluation]) -> Table:
    """A row for every task and one for their mean, a column for every model."""
    columns = ("task", "metric", "questions", *(measured.model for measured in results))
    table = make_table(columns, text=("task", "metric"))
    first = results[0]
    for name in dict.fromkeys(name for measured in results for name in measured.tasks):
        found = [measured.tasks.get(name) for measured in results]
        shown = next(result for result in found if result is not None)
        scale = 100.0 if shown.metric in HEADLINES else 1.0  # an accuracy is in percent
        cells = [""] * len(found)
        for number, result in enumerate(found):
            if result is not None:
                beside = task_difference(result, first.tasks.get(name)) if number else None
                cells[number] = _with_difference(result.value, result.stderr, beside, scale)
        table.add_row(name, shown.metric, f"{shown.documents:,}", *cells)
    means = [mean_accuracy(measured.tasks, first.tasks if number else None) for number, measured in enumerate(results)]
    if means[0] is not None and len(means[0]["tasks"]) > 1:
        table.add_section()
        cells = [""] * len(means)
        for number, mean in enumerate(means):
            if mean is not None:
                known = "difference" in mean
                beside = Difference(mean["difference"], mean["difference_stderr"], mean["p"]) if known else None
                cells[number] = _with_difference(mean["value"], mean["stderr"], beside, 100.0)
        table.add_row("mean", f"of {len(means[0]['tasks'])}", "", *cells)
    return table


def _with_difference(value: float, stderr: float | None, beside: Difference | None, scale: float) -> str:
    """A value with its difference to the first model."""
    text = format_with_error(value, stderr, ".2f", scale)
    if beside is None:
        return text
    return f"{text} ({format_with_error(beside.difference, beside.stderr, '+.2f', scale)}, {format_p_value(beside.p)})"


def sweep_tables(found: Sweep) -> Iterator[RenderableType]:
    """A row for every cut, the largest model first; the frontier is marked, and refused cuts are listed."""
    panels = [f"{entry['data']} @{entry['seq_len']}" for entry in found.rows[0].perplexity]
    columns = ["", "ratio", "parameters", "left", "MACs", *panels, "nats/token", "frontier"]
    table = make_table(columns, text=("",))
    dense = found.rows[0]
    for row in found.rows:
        table.add_row(
            row.label,
            f"{row.ratio:g}",
            format_count(row.parameters),
            f"{row.parameters / dense.parameters:.1%}",
            format_macs(row.macs),
            *("inf" if entry["ppl"] is None else f"{entry['ppl']:.2f}" for entry in row.perplexity),
            f"{row.nll:.4f}",
            "*" if row.frontier else "",
        )
    if found.refused:
        table.add_section()
    for refused in found.refused:
        table.add_row(refused.label, f"{refused.ratio:g}", *[""] * (len(panels) + 4), "refused")
    yield from titled(f"{found.model}: quality against size", table)
    yield f"*: no other cut has as few {'MACs' if found.size == 'macs' else found.size} and as few nats per token"
    for refused in found.refused:
        yield Text(f"{refused.label} {refused.ratio:g} refused: {refused.why}")
    for path in found.pictures:
        yield Text(f"drawn: {path}")


def recovery_tables(result: RecoverResult) -> Iterator[RenderableType]:
    """Validation loss and perplexity before the training, at its best and at its end; rows left out; notes."""
    measured = result.evaluation
    best = next((entry for entry in reversed(measured) if entry["step"] == result.best_step), None)
    if best is not None:
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
