"""Sizes, answers and plans as pieces of HTML; every name and text from outside is escaped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape

from secateur.compare.answers import END, FAILED, LENGTH, STOPPED, Answer
from secateur.compare.cuts import Kept
from secateur.compare.sides import HEADLINE_TOKENS, Side, Size
from secateur.planning.plan import Plan
from secateur.report.formatting import format_bytes, format_count, format_macs


def note(text: str) -> str:
    """A line of state, which screen readers say when it changes.

    >>> note("A & B write")
    '<p class="note" role="status">A &amp; B write</p>'
    """
    return f'<p class="note" role="status">{_marked(text)}</p>'


def refusal(text: str) -> str:
    """A line that says why something was not done.

    >>> refusal("no text")
    '<p class="refusal" role="alert">no text</p>'
    """
    return f'<p class="refusal" role="alert">{_marked(text)}</p>'


def headline(sides: Sequence[Side]) -> str:
    """Both models' sizes, beside each other, with B's as a share of A's."""
    a, b = (side.size for side in sides)
    rows = [
        ("parameters", format_count, a.parameters, b.parameters),
        ("non-embedding parameters", format_count, a.non_embedding_parameters, b.non_embedding_parameters),
        (f"MACs of {HEADLINE_TOKENS} tokens", format_macs, a.macs, b.macs),
        ("weights", format_bytes, a.weight_bytes, b.weight_bytes),
        *_peak(a, b),
    ]
    body = "".join(
        f'<tr><th scope="row">{label}</th><td>{shown(x)}</td><td>{shown(y)}</td><td>{_ratio(x, y)}</td></tr>'
        for label, shown, x, y in rows
    )
    letters = "".join(f'<th scope="col">{side.letter}</th>' for side in sides)
    names = " and ".join(f"{side.letter}, <b>{escape(side.name)}</b>" for side in sides)
    return (
        f"{_scroll('What the models cost')}<table><caption>What the models cost: {names}</caption>"
        f'<thead><tr><th scope="col">size</th>{letters}<th scope="col">B / A</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def numbers(side: Side, answer: Answer | None, *, characters: bool) -> str:
    """How fast an answer is written and what it takes; `characters` too, where tokens cannot be compared.

    Memory is the weights and what the model keeps of the text.
    """
    weights = side.size.weight_bytes
    if answer is None:
        shown = {"speed": "-", "first token": "-", "tokens": "-", "memory held": format_bytes(weights)}
        return _numbers(shown)
    shown = {
        "speed": _speed(answer.tokens_per_second, "tokens/s"),
        **({"speed in characters": _speed(answer.characters_per_second, "/s")} if characters else {}),
        "first token": "-" if answer.first_seconds is None else f"{answer.first_seconds:.2f} s",
        "tokens": f"{answer.prompt_tokens:,} read, {answer.tokens:,} written",
        "memory held": format_bytes(weights + answer.state_bytes),
        "of it for the text": format_bytes(answer.state_bytes),
    }
    return _numbers(shown) + (refusal(answer.error) if answer.error else "")


def outcome(sides: Sequence[Side], found: Sequence[Answer], *, characters: bool) -> str:
    """What is going on, or how it ended and who was faster."""
    if any(answer.ended is None for answer in found):
        return "The models write, one token of each in turns."
    ends = {LENGTH: "has the length asked for", END: "came to its end", STOPPED: "was stopped", FAILED: "failed"}
    told = [f"{side.letter} {ends[answer.ended or FAILED]}" for side, answer in zip(sides, found, strict=True)]
    a, b = ((answer.characters_per_second if characters else answer.tokens_per_second) for answer in found)
    unit = "characters" if characters else "tokens"
    faster = f" B wrote {b / a:.2f} times as many {unit} per second as A." if a and b else ""
    return f"{', '.join(told)}.{faster}"


def plan_sizes(planned: Plan) -> str:
    """The sizes before and after, in parameters, MACs and bytes."""
    item = planned.options.item_bytes
    dense, pruned = (planned.parameters[name] for name in ("dense", "pruned"))
    rows = [
        ("parameters", format_count, dense, pruned),
        (
            "non-embedding parameters",
            format_count,
            planned.parameters["dense_non_embedding"],
            planned.parameters["pruned_non_embedding"],
        ),
        (f"MACs of {HEADLINE_TOKENS} tokens", format_macs, planned.macs["dense"], planned.macs["pruned"]),
        (f"bytes of weights in {planned.options.memory_dtype}", format_bytes, dense * item, pruned * item),
    ]
    body = "".join(
        f'<tr><th scope="row">{label}</th><td>{shown(x)}</td><td>{shown(y)}</td><td>{1 - y / x:.2%}</td></tr>'
        for label, shown, x, y in rows
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("size", "dense", "pruned", "removed"))
    return (
        f"{_scroll('What the cut leaves')}<table><caption>What the cut leaves of the whole model</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def layer_sizes(kept: Sequence[Kept]) -> str:
    """What every layer keeps, as numbers with bars; one column for each kind of units."""
    kinds = list(dict.fromkeys(row.kind for row in kept))
    cells: dict[int | None, dict[str, Kept]] = defaultdict(dict)
    for row in kept:
        cells[row.layer][row.kind] = row
    heads = "".join(f'<th scope="col">{escape(kind)} units</th>' for kind in kinds)
    body = "".join(
        f'<tr><th scope="row">{"the model" if layer is None else f"layer {layer}"}</th>'
        + "".join(_bar(row.get(kind)) for kind in kinds)
        + "</tr>"
        for layer, row in cells.items()
    )
    return (
        f"{_scroll('What every layer keeps', kind='scroll layers')}"
        "<table><caption>What every layer keeps, of the units that it has</caption>"
        f'<thead><tr><th scope="col">layer</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _scroll(label: str, *, kind: str = "scroll") -> str:
    """The start of a part that scrolls where it has no room; with a keyboard, too."""
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{label}">'


def _bar(row: Kept | None) -> str:
    if row is None:
        return "<td>none</td>"
    share = row.kept / row.units
    return (
        f"<td>{row.kept:,} of {row.units:,}"
        f'<span class="bar" aria-hidden="true"><i style="width:{share:.1%}"></i></span></td>'
    )


def _marked(text: str) -> str:
    """Escaped, with `code` as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _peak(a: Size, b: Size) -> list[tuple[str, Callable[[int], str], int, int]]:
    if a.peak_bytes is None or b.peak_bytes is None:
        return []
    return [(f"peak memory of {HEADLINE_TOKENS} tokens", format_bytes, a.peak_bytes, b.peak_bytes)]


def _numbers(shown: dict[str, str]) -> str:
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items())
    return f'<dl class="numbers">{cells}</dl>'


def _speed(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.1f} {unit}"


def _ratio(a: int, b: int) -> str:
    return f"{b / a:.2f}" if a else "-"
