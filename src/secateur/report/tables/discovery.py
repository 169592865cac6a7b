"""A discovery -> what can be cut, how much of the model that reaches, and what is frozen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from secateur.discovery.counting import count_parameters
from secateur.discovery.coverage import coverage_by_kind, frozen_reasons, total_coverage
from secateur.discovery.descriptions import KIND_DESCRIPTIONS
from secateur.discovery.groups import Discovery
from secateur.discovery.summary import GroupSummary, LayerSummary, summarize_layers
from secateur.discovery.weight_names import format_ranges
from secateur.report.formatting import format_count, format_percent
from secateur.report.tables.layout import make_table, titled

JUSTIFY: tuple[Literal["left", "right"], ...] = ("left", "right", "right")


def discovery_tables(discovery: Discovery) -> Iterator[RenderableType]:
    """The groups layer by layer, layers that are alike folded; how much they reach; what is frozen and why."""
    summaries = summarize_layers(discovery)
    layers = sum(len(summary.layers) for summary in summaries)
    size = f"{format_count(count_parameters(discovery))} parameters, {layers} layer{'s' * (layers != 1)}"
    yield Text(f"{discovery.model}: {size}; cuts reach {format_percent(total_coverage(discovery).share)}")
    if discovery.start_tokens:
        named = ", ".join(map(str, discovery.start_tokens))
        yield Text(f"Its code looks for tokens in every row, which therefore begins with {named}")
    yield ""
    yield Text("What can be cut", style="italic")
    heading = ("group", "units", "share", Text("one unit is"))
    rows = [
        [(g.name, f"{g.group.units:,}", format_percent(g.coverage.share), _unit(g)) for g in summary.groups]
        for summary in summaries
    ]
    columns = list(zip(heading, *itertools.chain(*rows), strict=True))
    widths = [max(map(len, column)) for column in columns[:-1]]
    yield Padding(_line(*heading, widths), (0, 0, 0, 4), expand=False)
    tree = Tree("", hide_root=True)
    for summary, lines in zip(summaries, rows, strict=True):
        branch = tree.add(_layers(summary))
        for line in lines:
            branch.add(_line(*line, widths))
    yield tree
    yield ""
    yield from titled("How much can be reached", _coverage_table(discovery))
    yield (
        "A share is of the model's parameters: all those of the weights in which a group has an axis, layers that are "
        "alike together. Several kinds may reach the same parameter."
    )
    yield ""
    yield Text("What is frozen, and why", style="italic")
    yield from _frozen(discovery)


def _line(name: str, units: str, share: str, unit: Text, widths: Sequence[int]) -> Table:
    """A line of columns, of which only the last may be broken."""
    line = Table.grid(padding=(0, 2, 0, 0))
    for width, justify in zip(widths, JUSTIFY, strict=True):
        line.add_column(width=width, no_wrap=True, justify=justify)
    line.add_column(overflow="fold")
    line.add_row(Text(name, style="cyan"), units, share, unit)
    return line


def _layers(summary: LayerSummary) -> Text:
    share = f"{format_percent(summary.share)} of the parameters"
    if not summary.layers:
        return Text.assemble(("the whole model", "bold"), f" ({share} lie outside the layers)")
    if len(summary.layers) == 1:
        return Text.assemble((f"layer {summary.layers[0]}", "bold"), f": {share}")
    layers = f"layers {format_ranges(summary.layers)}"
    return Text.assemble((layers, "bold"), f" ({len(summary.layers)} alike): {share}")


def _unit(summary: GroupSummary) -> Text:
    """What one unit is, in words and in slices; what to know before cutting."""
    text = Text(summary.unit)
    if summary.slices:
        text.append(": " + "; ".join(map(str, summary.slices)))
    group = summary.group
    if group.chosen:
        needed = f"; {group.least} must stay" if group.least > 1 else ""
        text.append(f". The model chooses among them{needed}", style="yellow")
    if group.normed:
        text.append(". A norm runs across them", style="yellow")
    return text


def _coverage_table(discovery: Discovery) -> Table:
    table = make_table(("kind", "groups", "units", "share", "its units are"), text=("kind", "its units are"))
    for kind, row in [*coverage_by_kind(discovery).items(), ("any", total_coverage(discovery))]:
        if kind == "any":
            table.add_section()
        unit = "" if kind == "any" else KIND_DESCRIPTIONS[kind].units
        table.add_row(kind, f"{row.groups:,}", f"{row.units:,}", format_percent(row.share), unit)
    return table


def _frozen(discovery: Discovery) -> Iterator[RenderableType]:
    tree = Tree("", hide_root=True)
    for frozen in frozen_reasons(discovery):
        branch = tree.add(Text(frozen.reason, style="bold"))
        axes = f"{frozen.axes:,} axes" if frozen.axes > 1 else "1 axis"
        if frozen.partly == frozen.axes:
            axes = f"a part of {axes}"
        elif frozen.partly:
            axes += f", of {frozen.partly:,} only a part"
        branch.add(f"{axes}; in weights with {format_percent(frozen.share)} of the parameters")
        branch.add(Text(", ".join(frozen.weights)))
    yield tree
    yield _out_of_reach(discovery)


def _out_of_reach(discovery: Discovery) -> str:
    parameters = count_parameters(discovery)
    by_axes = parameters - total_coverage(discovery, layers=False).parameters
    by_any = parameters - total_coverage(discovery).parameters
    if not by_axes:
        return "Every parameter is in a weight that some group has an axis in."
    any_share = format_percent(by_any / parameters) if by_any else "none of them"
    outside = f", {any_share} outside the layers" if by_any != by_axes else ""
    share = format_percent(by_axes / parameters)
    return f"{share} of the parameters lie in weights that no group has an axis in{outside}."
