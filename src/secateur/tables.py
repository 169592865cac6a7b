"""Results as people read them: rich tables and lines, which the command line prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.axes.algebra import Concat, Product, show, units_along
from secateur.axes.groups import Axis, Discovery, Group
from secateur.demo import PROMPT, Demonstration
from secateur.evaluate import Perplexity
from secateur.plan import Plan, by_kind
from secateur.profile import Profile


def _titled(title: str, table: Table) -> Iterator[RenderableType]:
    """A title, which may be wider than the table, and the table."""
    yield Text(title, style="italic")
    yield table


def discovery_tables(discovery: Discovery) -> Iterator[RenderableType]:
    """The groups with the slices of their first unit, layers that are alike folded; what is frozen and why."""
    table = Table()
    for column in ("group", "kind", "units", "weight", "dim", "made of", "unit 0 is"):
        table.add_column(column, justify="right" if column in ("units", "dim") else "left")
    for layers, groups in _folded(discovery):
        for group in groups:
            shown = group.axes if group.layer is not None else _representative(group, discovery)
            for i, axis in enumerate(shown):
                head = (_span(layers, group.name), group.kind, str(group.units)) if i == 0 else ("", "", "")
                made_of = show(axis.expression).replace(f"layers.{group.layer}.", "")
                table.add_row(*head, axis.weight, str(axis.dim), made_of, _slices(axis, group))
            if not shown:
                table.add_row(group.name, group.kind, str(group.units), "(whole layers)", "", "", "")
            hidden = len(group.axes) - len(shown)
            if hidden:
                table.add_row("", "", "", f"... and {hidden} more", "", "", "")
        table.add_section()
    yield from _titled(f"{discovery.model}: what can be cut", table)
    reasons: dict[str, list[str]] = {}
    for item in discovery.frozen:
        reasons.setdefault(item.reason, []).append(f"{item.weight} dim {item.dim} (size {item.size})")
    frozen = Table()
    for column in ("reason", "axes", "for example"):
        frozen.add_column(column, justify="right" if column == "axes" else "left")
    for reason, where in reasons.items():
        frozen.add_row(reason, str(len(where)), where[0])
    yield from _titled("What is frozen, and why", frozen)


def _folded(discovery: Discovery) -> list[tuple[list[int], list[Group]]]:
    """Layers with the same groups of the same sizes, once; then what runs through the model."""
    by_layer: dict[int, list[Group]] = {}
    for group in discovery.groups:
        if group.layer is not None:
            by_layer.setdefault(group.layer, []).append(group)
    alike: dict[Any, tuple[list[int], list[Group]]] = {}
    for layer, groups in by_layer.items():
        prefix = f"layers.{layer}."
        key = tuple(
            (g.name.removeprefix(prefix), g.units, tuple(show(a.expression).replace(prefix, "") for a in g.axes))
            for g in groups
        )
        alike.setdefault(key, ([], groups))[0].append(layer)
    rest = [group for group in discovery.groups if group.layer is None]
    return [*alike.values(), *([([], rest)] if rest else [])]


def _representative(group: Group, discovery: Discovery) -> tuple[Axis, ...]:
    """The axes of a group that runs through the model, with those of one layer standing for all."""
    layer_of = {weight.name: weight.layer for weight in discovery.weights}
    layers = [layer for axis in group.axes if (layer := layer_of[axis.weight]) is not None]
    first = min(layers, default=None)
    return tuple(axis for axis in group.axes if layer_of[axis.weight] in (None, first))


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs written as ranges.

    >>> _runs([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _span(layers: list[int], name: str) -> str:
    """The name of a group of the first of these layers, as it stands for all of them."""
    return name.replace(f"layers.{layers[0]}.", f"layers.{_runs(layers)}.", 1) if layers else name


def _slices(axis: Axis, group: Group) -> str:
    """The index ranges of the group's first unit, as Python slices."""
    if not isinstance(axis.expression, (Product, Concat)):
        return "0:1"
    ranges: list[list[int]] = []
    for index, unit in enumerate(units_along(axis.expression, group.name)):
        if unit == 0:
            if ranges and ranges[-1][1] == index:
                ranges[-1][1] = index + 1
            else:
                ranges.append([index, index + 1])
    shown = ", ".join(f"{a}:{b}" for a, b in ranges[:4])
    return shown + (f", ... ({len(ranges)} runs)" if len(ranges) > 4 else "")


def plan_tables(planned: Plan) -> Iterator[RenderableType]:
    """What every kind of group keeps, the sizes before and after, and how a config says it."""
    table = Table()
    for column in ("kind", "layers", "units", "kept"):
        table.add_column(column, justify="left" if column in ("kind", "layers") else "right")
    for kind, groups in by_kind(planned).items():
        sizes: dict[tuple[int, int], list[int]] = {}
        for group in groups:
            sizes.setdefault((group.units, group.kept), []).append(-1 if group.layer is None else group.layer)
        for (units, kept), layers in sizes.items():
            where = "the model" if layers == [-1] else _runs(layers)
            table.add_row(kind, where, str(units), str(kept))
    sizes_table = Table()
    for column in ("", "dense", "pruned", "removed"):
        sizes_table.add_column(column, justify="left" if not column else "right")
    for label, dense, pruned in (
        ("parameters", planned.parameters["dense"], planned.parameters["pruned"]),
        ("non-embedding", planned.parameters["dense_non_embedding"], planned.parameters["pruned_non_embedding"]),
        ("MACs of 64 tokens", planned.macs["dense"], planned.macs["pruned"]),
    ):
        text = giga if label.startswith("MACs") else short
        sizes_table.add_row(label, text(dense), text(pruned), f"{1 - pruned / dense:.2%}")
    yield from _titled(f"{planned.model}: what the cut leaves", table)
    yield sizes_table
    if planned.settings is not None:
        yield "config: " + ", ".join(f"{name} = {_setting(v)}" for name, v in planned.settings.items())
    elif planned.refusal is not None:
        yield f"no stock folder: {planned.refusal}"


def _setting(value: Any) -> str:
    return f"({len(value)} entries)" if isinstance(value, list) else str(value)


def perplexity_tables(results: Mapping[str, Sequence[Perplexity]]) -> Iterator[RenderableType]:
    """A row for every model, text and window."""
    table = Table()
    for column in ("model", "text", "window", "tokens scored", "nats/token", "perplexity"):
        table.add_column(column, justify="left" if column in ("model", "text") else "right")
    for name, found in results.items():
        for p in found:
            table.add_row(name, p.data, str(p.seq_len), f"{p.tokens:,}", f"{p.nll:.4f}", f"{p.ppl:.2f}")
    yield from _titled("Perplexity", table)


def profile_tables(rows: Sequence[Profile]) -> Iterator[RenderableType]:
    """A row for every model."""
    table = Table()
    for column in ("model", "parameters", "non-embedding", "MACs", "weights", "peak memory", "prefill", "decode"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(
            row.model,
            short(row.parameters),
            short(row.non_embedding_parameters),
            giga(row.macs),
            binary(row.weight_bytes),
            binary(row.peak_bytes),
            f"{row.prefill_seconds * 1000:.1f} ms",
            f"{row.decode_tokens_per_second:.1f} tokens/s",
        )
    yield from _titled("Size and speed", table)


def demo_tables(shown: Demonstration) -> Iterator[RenderableType]:
    """The plan, what it cost, and a sample of text of each model."""
    yield from plan_tables(shown.plan)
    table = Table()
    for column in ("", "dense", "pruned", "pruned / dense"):
        table.add_column(column, justify="left" if not column else "right")
    dense, pruned = shown.profiles
    for label, field, text in (
        ("parameters", "parameters", short),
        ("MACs of 64 tokens", "macs", giga),
        ("weights", "weight_bytes", binary),
        ("peak memory of 64 tokens", "peak_bytes", binary),
        ("prefill of 64 tokens", "prefill_seconds", lambda s: f"{s * 1000:.1f} ms"),
        ("decode", "decode_tokens_per_second", lambda s: f"{s:.1f} tokens/s"),
    ):
        a, b = getattr(dense, field), getattr(pruned, field)
        table.add_row(label, text(a), text(b), f"{b / a:.2f}")
    for before, after in zip(shown.perplexity["dense"], shown.perplexity["pruned"], strict=True):
        label = f"perplexity, {before.data} @{before.seq_len}"
        table.add_row(label, f"{before.ppl:.2f}", f"{after.ppl:.2f}", f"{after.ppl / before.ppl:.2f}")
    yield from _titled("What it cost", table)
    for name, continuation in shown.samples.items():
        yield Text.assemble(f"{name}: {PROMPT} ", (" ".join(continuation.split()), "bold"))
    total = sum(shown.seconds.values())
    yield f"the pruned model is in {shown.out / 'pruned'}; the whole took {total:.0f} s"


def short(count: int) -> str:
    """A count with two decimals and the suffix of its size.

    >>> short(5415936000), short(512)
    ('5.42 B', '512')
    """
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.2f} {suffix}"
    return str(count)


def giga(count: int) -> str:
    """Multiply-accumulates, in billions as the literature has them; those of tiny models in millions.

    >>> giga(339_602_636_800), giga(5_320_000)
    ('339.60 G', '5.32 M')
    """
    return f"{count / 1e9:.2f} G" if count >= 10**8 else f"{count / 1e6:.2f} M"


def binary(count: int) -> str:
    """Bytes in binary units.

    >>> binary(538_060_032)
    '513.1 MiB'
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
