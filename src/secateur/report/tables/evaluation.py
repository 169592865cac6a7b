"""An evaluation -> perplexities, accuracies and samples, with every model beside the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.evaluation.evaluate import ModelEvaluation
from secateur.evaluation.perplexity import loss_difference
from secateur.evaluation.significance import Difference
from secateur.evaluation.task_results import HEADLINES, TaskResult, mean_accuracy, task_difference
from secateur.report.formatting import format_bytes, format_p_value, format_with_error
from secateur.report.tables.layout import make_table, titled


def evaluation_tables(results: Sequence[ModelEvaluation]) -> Iterator[RenderableType]:
    """Perplexity by text and protocol, accuracy by task, samples of text and bytes, for every model."""
    if any(result.perplexity for result in results):
        yield from titled("Perplexity", _perplexity_table(results))
    if any(measured.tasks for measured in results):
        yield from titled("Accuracy, %", _task_table(results))
        notes = {result.task: result.note for measured in results for result in measured.tasks.values() if result.note}
        yield from (f"{task}: {note}" for task, note in notes.items())
        if len(results) > 1:
            yield f"in brackets: difference to {results[0].model}, paired by question, with its p-value"
    for measured in results:
        for prompt, text in measured.samples.items():
            yield Text.assemble(f"{measured.model}: {prompt}", (" ".join(["", *text.split()]), "bold"))
    for measured in results:
        if measured.weight_bytes is not None:
            files = "" if measured.file_bytes is None else f", {format_bytes(measured.file_bytes)} in files"
            yield f"{measured.model}: {format_bytes(measured.weight_bytes)} of weights{files}"


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
            table.add_row(measured.model, *scored, *((text,) if difference else ()))
    return table


def _task_table(results: Sequence[ModelEvaluation]) -> Table:
    """A row for every task and one for their mean, a column for every model."""
    columns = ("task", "metric", "questions", *(measured.model for measured in results))
    table = make_table(columns, text=("task", "metric"))
    first = results[0]
    for name in dict.fromkeys(name for measured in results for name in measured.tasks):
        found = [measured.tasks.get(name) for measured in results]
        shown = next(result for result in found if result is not None)
        cells = []
        for result in found:
            beside = None if result is None else task_difference(result, first.tasks.get(name))
            cells.append("" if result is None else _accuracy(result, None if result is found[0] else beside))
        table.add_row(name, shown.metric, f"{shown.documents:,}", *cells)
    means = [mean_accuracy(measured.tasks, first.tasks) for measured in results]
    if means[0] is not None and len(means[0]["tasks"]) > 1:
        table.add_section()
        cells = []
        for number, mean in enumerate(means):
            text = "" if mean is None else format_with_error(100 * mean["value"], _hundred(mean["stderr"]), ".2f")
            if number and mean is not None and "difference" in mean:
                error = _hundred(mean["difference_stderr"])
                text += f" ({format_with_error(100 * mean['difference'], error, '+.2f')}, {format_p_value(mean['p'])})"
            cells.append(text)
        table.add_row("mean", f"of {len(means[0]['tasks'])}", "", *cells)
    return table


def _accuracy(result: TaskResult, beside: Difference | None) -> str:
    """A value, in percent where it is an accuracy, with its difference to the first model."""
    scale = 100.0 if result.metric in HEADLINES else 1.0
    text = format_with_error(scale * result.value, None if result.stderr is None else scale * result.stderr, ".2f")
    if beside is None:
        return text
    error = None if beside.stderr is None else scale * beside.stderr
    return f"{text} ({format_with_error(scale * beside.difference, error, '+.2f')}, {format_p_value(beside.p)})"


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value
