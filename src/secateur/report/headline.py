"""A run -> its key figures: size, quality, speed and memory, before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

from secateur.report.content import KeyFigure
from secateur.report.formatting import (
    ARROW,
    TIMES,
    format_accuracy,
    format_bytes,
    format_change,
    format_count,
    format_p_value,
    format_perplexity,
    format_rate,
    format_seconds,
    format_signed,
)
from secateur.report.run import Model, Run

SAME_SPEED = 0.02  # a machine that does other things, too, gives speeds that differ by so much


def key_figures(run: Run) -> tuple[KeyFigure, ...]:
    """The run's result beside the dense model; the plan, where nothing was cut."""
    result = run.result
    dense = run.baseline(result) if result is not None else None
    if result is not None and dense is not None:
        found = (_size, _accuracy, _perplexity, _regained, _speed, _memory)
        return tuple(figure for each in found for figure in each(run, dense, result))
    if plans := [cut for cut in run.cuts if cut.out is None]:
        before, after = plans[-1].parameters["dense"], plans[-1].parameters["pruned"]
        detail = f"{plans[-1].model}: {_arrow(format_count, before, after)}, not cut yet"
        return (KeyFigure("Planned parameters", format_change(before, after), detail, None),)
    return ()


def _arrow(text: Callable[[Any], str], before: float | None, after: float | None) -> str:
    return f"{text(before)} {ARROW} {text(after)}"


def _size(_: Run, dense: Model, result: Model) -> Iterator[KeyFigure]:
    before, after = dense.cost, result.cost
    if before.parameters is not None and after.parameters is not None:
        inner = format_change(before.non_embedding_parameters, after.non_embedding_parameters)
        outside = f"; outside the embeddings {inner}" if inner else ""
        detail = _arrow(format_count, before.parameters, after.parameters) + outside
        yield KeyFigure("Parameters", format_change(before.parameters, after.parameters), detail, None)


def _accuracy(_: Run, dense: Model, result: Model) -> Iterator[KeyFigure]:
    both = [task for task in dense.tasks if task in result.tasks and dense.tasks[task].is_share]
    means, p = (dense.tasks_mean, result.tasks_mean), ""
    if both:
        before, after = (fmean(model.tasks[task].value for task in both) for model in (dense, result))
        if means[0] is not None and means[1] is not None and means[0].tasks == means[1].tasks:
            before, after, both = means[0].value, means[1].value, [*means[0].tasks]
            p = format_p_value(means[1].p)
        points = format_signed(after - before, f"{100 * abs(after - before):.1f}") + " points"
        of = both[0] if len(both) == 1 else f"mean of {len(both)} tasks"
        detail = f"{_arrow(format_accuracy, before, after)}, {of}" + (f", {p}" if p else "")
        yield KeyFigure("Accuracy", points, detail, after >= before)


def _perplexity(_: Run, dense: Model, result: Model) -> Iterator[KeyFigure]:
    if (test := _first_test(dense, result)) is not None:
        before, after = dense.perplexity[test].ppl, result.perplexity[test].ppl
        worse = before is not None and (after is None or after > before)
        change = format_change(before, after) or format_perplexity(after)
        yield KeyFigure("Perplexity", change, f"{_arrow(format_perplexity, before, after)}, {test}", not worse)


def _first_test(dense: Model, result: Model) -> str | None:
    """Of the tests that both models have: the first text, in its longest windows."""
    both = [row for test, row in dense.perplexity.items() if test in result.perplexity]
    first = [row for row in both if row.data == both[0].data]
    return max(first, key=lambda row: row.seq_len).test if first else None


def _regained(run: Run, dense: Model, result: Model) -> Iterator[KeyFigure]:
    """How much of the damage of the cut the training took back, in nats per token."""
    cut = run.model(result.parent) if result.role == "recovered" and result.parent else None
    test = _first_test(dense, result)
    if cut is None or test is None or test not in cut.perplexity:
        return
    before, worst, after = (model.perplexity[test].ppl for model in (dense, cut, result))
    if before is not None and worst is not None and after is not None and before < worst:
        share = math.log(worst / after) / math.log(worst / before)
        detail = f"of the damage in nats per token; perplexity was {format_perplexity(worst)} before the training"
        yield KeyFigure("Recovered", f"{100 * share:.0f} %", detail, share > 0)


def _speed(_: Run, dense: Model, result: Model) -> Iterator[KeyFigure]:
    before, after = dense.cost, result.cost
    if before.prefill_seconds and after.prefill_seconds and before.compares(after, "prefill_seconds"):
        detail = f"{_arrow(format_seconds, before.prefill_seconds, after.prefill_seconds)} for a prompt"
        if before.macs and after.macs and before.compares(after, "macs"):
            detail += f", {after.macs / before.macs:.2f} of the MACs"
        yield _speed_up("Prefill speed", before.prefill_seconds / after.prefill_seconds, detail)
    slow, fast = before.decode_tokens_per_second, after.decode_tokens_per_second
    if slow and fast:
        yield _speed_up("Decode speed", fast / slow, _arrow(format_rate, slow, fast))


def _speed_up(name: str, times: float, detail: str) -> KeyFigure:
    return KeyFigure(name, f"{TIMES} {times:.2f}", detail, None if abs(times - 1) <= SAME_SPEED else times > 1)


def _memory(_: Run, dense: Model, result: Model) -> Iterator[KeyFigure]:
    for name, field in (("Peak memory", "peak_bytes"), ("Weights", "weight_bytes")):
        before, after = getattr(dense.cost, field), getattr(result.cost, field)
        if before and after and dense.cost.compares(result.cost, field):
            yield KeyFigure(name, format_change(before, after), _arrow(format_bytes, before, after), after <= before)
            return
