"""A sweep -> quality against size."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from secateur.pipeline.frontier import Sweep
from secateur.report.formatting import format_count, format_macs
from secateur.report.tables.layout import make_table, titled


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
