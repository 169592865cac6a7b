"""The run in a few numbers and sentences: size, quality, speed and memory, before and after."""

from __future__ import annotations

import math
from statistics import fmean

from secateur.report.blocks import KeyFigure
from secateur.report.formatting import (
    ARROW,
    TIMES,
    format_accuracy,
    format_bytes,
    format_change,
    format_count,
    format_p_value,
    format_perplexity,
    format_seconds,
    format_signed,
    join_names,
)
from secateur.report.models import Facts, Model, same_model

ALIKE = 0.02  # times as fast that are no difference: speeds are measured on a machine that does other things, too


def headline(facts: Facts) -> tuple[tuple[KeyFigure, ...], tuple[str, ...]]:
    """The key figures, and the sentences that say the same."""
    result = facts.result
    dense = facts.baseline(result) if result is not None else None
    if result is None or dense is None:
        return (), _without_result(facts)
    found = [
        each
        for each in (
            _size(facts, dense, result),
            _quality(facts, dense, result),
            _speed(facts, dense, result),
            _memory(facts, dense, result),
        )
        if each is not None
    ]
    sentences = [sentence for _, sentence in found]
    if gained := _regained(facts, dense, result):
        sentences.insert(2 if len(sentences) > 1 else 1, gained)
    for pronoun, subject in (("It ", f"The {_role(result)} model "), ("Its ", f"The {_role(result)} model's ")):
        if sentences and sentences[0].startswith(pronoun):  # no other sentence before it says what "it" is
            sentences[0] = subject + sentences[0].removeprefix(pronoun)
    return tuple(figure for figure, _ in found), tuple(sentences)


def _without_result(facts: Facts) -> tuple[str, ...]:
    planned = [cut for cut in facts.run.cuts if cut.out is None]
    if planned and (plan := planned[-1]).parameters:
        before, after = plan.parameters["dense"], plan.parameters["pruned"]
        return (
            f"Nothing has been cut yet. The plan would take {plan.model} from {format_count(before)} to "
            f"{format_count(after)} parameters ({format_change(before, after)}).",
        )
    names = [model.label for model in facts.models]
    return (f"What was measured of {join_names(names)}; nothing has been cut in this run.",) if names else ()


def _size(facts: Facts, dense: Model, result: Model) -> tuple[KeyFigure, str] | None:
    before, after = facts.cost(dense), facts.cost(result)
    if before.parameters is None or after.parameters is None:
        return None
    sizes = f"{format_count(before.parameters)} {ARROW} {format_count(after.parameters)}"
    inner = format_change(before.non_embedding_parameters, after.non_embedding_parameters)
    outside = f", {inner} of those outside the embeddings" if inner else ""
    sentence = (
        f"The {_role(result)} model has {format_count(after.parameters)} parameters, {dense.name} has "
        f"{format_count(before.parameters)}: {format_change(before.parameters, after.parameters)}{outside}."
    )
    return KeyFigure("Parameters", format_change(before.parameters, after.parameters), sizes, None), sentence


def _quality(facts: Facts, dense: Model, result: Model) -> tuple[KeyFigure, str] | None:
    if (means := _means(facts, dense, result)) is not None:
        before, after, count, p = means
        points = format_signed(after - before, f"{100 * abs(after - before):.1f}") + " points"
        sure = f" ({format_p_value(p)})" if p is not None else ""
        sentence = (
            f"It answers {format_accuracy(after)} of {count} zero-shot tasks right on average, the dense model "
            f"{format_accuracy(before)}: {points}{sure}."
        )
        detail = f"{format_accuracy(before)} {ARROW} {format_accuracy(after)}, mean of {count} tasks"
        return KeyFigure("Accuracy", points, detail, after >= before), sentence
    test = _headline_test(facts, dense, result)
    if test is None:
        return None
    before_row, after_row = facts.perplexity(dense)[test], facts.perplexity(result)[test]
    worse = before_row.ppl is not None and (after_row.ppl is None or after_row.ppl > before_row.ppl)
    told = format_change(before_row.ppl, after_row.ppl) or ("infinite" if after_row.ppl is None else "")
    sentence = (
        f"Its perplexity on {test} is {format_perplexity(after_row.ppl)}, the dense model's "
        f"{format_perplexity(before_row.ppl)} ({told}; lower is better)."
    )
    detail = f"{format_perplexity(before_row.ppl)} {ARROW} {format_perplexity(after_row.ppl)}, {test}"
    return KeyFigure("Perplexity", told, detail, not worse), sentence


def _headline_test(facts: Facts, dense: Model, result: Model) -> str | None:
    """Of the tests that both have: the first text, in its longest windows."""
    both = [row for name, row in facts.perplexity(dense).items() if name in facts.perplexity(result)]
    first = [row for row in both if row.data == both[0].data]
    return max(first, key=lambda row: row.seq_len).test if first else None


def _means(facts: Facts, dense: Model, result: Model) -> tuple[float, float, int, float | None] | None:
    a, b = facts.tasks(dense), facts.tasks(result)
    both = [task for task in a if task in b]
    if not both:
        return None
    p = None
    if set(a) == set(b):
        p = next((row.p for row in facts.run.task_means if same_model(row.model, result.name)), None)
    return fmean(a[task].value for task in both), fmean(b[task].value for task in both), len(both), p


def _speed(facts: Facts, dense: Model, result: Model) -> tuple[KeyFigure, str] | None:
    before, after = facts.cost(dense), facts.cost(result)
    if not before.prefill_seconds or not after.prefill_seconds:
        return None
    times = before.prefill_seconds / after.prefill_seconds
    told = f"{TIMES} {times:.2f}"
    alike = abs(times - 1) <= ALIKE
    how = "reads a prompt as fast as the dense model" if alike else f"reads a prompt {times:.2f} times as fast"
    sentence = f"It {how} ({format_seconds(before.prefill_seconds)} {ARROW} {format_seconds(after.prefill_seconds)})"
    if before.decode_tokens_per_second and after.decode_tokens_per_second:
        rate = after.decode_tokens_per_second / before.decode_tokens_per_second
        sentence += (
            f" and writes {rate:.2f} times as fast ({before.decode_tokens_per_second:.1f} {ARROW} "
            f"{after.decode_tokens_per_second:.1f} tokens per second)"
        )
    if before.macs and after.macs:
        sentence += f"; the arithmetic of a pass is {after.macs / before.macs:.2f} of the dense model's"
    detail = f"{format_seconds(before.prefill_seconds)} {ARROW} {format_seconds(after.prefill_seconds)} for a prompt"
    return KeyFigure("Reading speed", told, detail, None if alike else times > 1), sentence + "."


def _memory(facts: Facts, dense: Model, result: Model) -> tuple[KeyFigure, str] | None:
    before, after = facts.cost(dense), facts.cost(result)
    for name, field in (("peak memory", "peak_bytes"), ("weights", "weight_bytes")):
        a, b = getattr(before, field), getattr(after, field)
        if a and b:
            verb = "needs" if field == "peak_bytes" else "has"
            sentence = f"It {verb} {format_bytes(b)} of {name} ({format_change(a, b)})."
            return KeyFigure(
                name.capitalize(), format_change(a, b), f"{format_bytes(a)} {ARROW} {format_bytes(b)}", b <= a
            ), sentence
    return None


def _regained(facts: Facts, dense: Model, result: Model) -> str | None:
    """How much of what the cut had cost the training has brought back."""
    if result.role != "recovered" or result.parent is None:
        return None
    cut = next((model for model in facts.models if same_model(model.name, result.parent)), None)
    test = _headline_test(facts, dense, result)
    if cut is None or test is None or test not in facts.perplexity(cut):
        return None
    dense_ppl, cut_ppl, result_ppl = (facts.perplexity(model)[test].ppl for model in (dense, cut, result))
    told = f"Before it was trained its perplexity was {format_perplexity(cut_ppl)}"
    if dense_ppl is None or cut_ppl is None or result_ppl is None or not dense_ppl < cut_ppl:
        return f"{told}."
    if result_ppl <= dense_ppl:
        return f"{told}; training brought back all that the cut had cost, and more."
    share = math.log(cut_ppl / result_ppl) / math.log(cut_ppl / dense_ppl)
    if share <= 0:
        return f"{told}; training brought nothing back."
    return f"{told}; training brought back {100 * share:.0f} % of what the cut had cost, in nats per token."


def _role(model: Model) -> str:
    return model.role if model.role != "measured" else model.label
