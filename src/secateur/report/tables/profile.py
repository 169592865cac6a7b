"""A profile -> size and speed of every model, and whether a cut saves the time that its MACs promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from secateur.evaluation.costs import BatchCost, Profile
from secateur.evaluation.speed import Speed
from secateur.report.formatting import (
    format_bytes,
    format_count,
    format_macs,
    format_percent,
    format_rate,
    format_seconds,
)
from secateur.report.tables.layout import make_table, titled

PAYS = 0.5  # of the gain that the MACs promise; what brings less is said to pay little
SMALL = 0.98  # of the MACs: cuts that leave more promise nothing that could be told from noise


COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {  # as a profile's JSON names them, of 64 tokens
    "parameters": ("parameters", format_count),
    "non_embedding_parameters": ("non-embedding parameters", format_count),
    "macs": ("MACs of 64 tokens", format_macs),
    "weight_bytes": ("weights", format_bytes),
    "kv_cache_bytes": ("KV cache of 64 tokens", format_bytes),
    "peak_bytes": ("peak memory of 64 tokens", format_bytes),
    "prefill_seconds": ("prefill of 64 tokens", format_seconds),
    "decode_tokens_per_second": ("decode", format_rate),
}


def cost_rows(profiles: Sequence[Profile], names: str) -> list[list[str]]:
    """Costs that are known of both models: what it is, each model's, and the second's share of the first's."""
    a, b = (profile.to_json() for profile in profiles)
    known = [(name, *COSTS[name]) for name in names.split() if a.get(name) and b.get(name)]
    return [[label, text(a[name]), text(b[name]), f"{b[name] / a[name]:.2f}"] for name, label, text in known]


def profile_tables(rows: Sequence[Profile]) -> Iterator[RenderableType]:
    """A row for every model; where the work lies; the grid, if it has several cells; the cuts that do not pay."""
    columns = ["model", "parameters", "non-embedding", "MACs", "weights", "cache"]
    measured = any(row.speed is not None for row in rows)
    beside = any(row.first_model is not None for row in rows)
    columns += ["peak memory", "prefill", "decode"] if measured else []
    columns += [f"prefill, beside {rows[0].model}", f"decode, beside {rows[0].model}"] if beside else []
    table = make_table(columns)
    for row in rows:
        sizes = [row.parameters, row.non_embedding_parameters]
        cells = [row.model, *map(format_count, sizes), format_macs(row.macs), format_bytes(row.weight_bytes)]
        cells += [_cache(row), *_speed(row.speed), *_speed_up(row.grid[0])]
        if (against := row.grid[0].against) is not None:
            cells.append(f"{against.decode_speedup:.2f} x for {row.weight_bytes_ratio:.2f} of the weights")
        table.add_row(*cells)
    yield from titled("Size and speed" if measured else "Size", table)
    if rows:
        first = rows[0].grid[0]
        read = "1 token" if first.seq_len == 1 else f"{first.seq_len:,} tokens"
        yield f"MACs and cache are of one sequence of {read}" + (
            f"; memory and speed of a batch of {first.batch}" if measured and first.batch > 1 else ""
        )
        yield from titled("Where the MACs are", _macs(rows))
        if len(rows[0].grid) > 1:
            yield from titled("Batch and length", _grid(rows))
    yield from verdicts(rows)


def _cache(cost: Profile | BatchCost) -> str:
    return "unknown" if cost.kv_cache_bytes is None else format_bytes(cost.kv_cache_bytes)


def _speed(speed: Speed | None) -> list[str]:
    """Peak memory, prefill and decode; nothing where nothing was measured."""
    if speed is None:
        return []
    prefill, decode = f"{speed.prefill_seconds * 1000:.1f} ms", format_rate(speed.decode_tokens_per_second)
    return [format_bytes(speed.peak_bytes), prefill, decode]


def _speed_up(cost: BatchCost) -> list[str]:
    against = cost.against
    return [] if against is None else [f"{against.prefill_speedup:.2f} x for {against.macs_ratio:.2f} of the MACs"]


def _macs(rows: Sequence[Profile]) -> Table:
    """MACs by kind of group, then by kind of operator; with several models, the share of the first that is left."""
    table = make_table(["", *(row.model for row in rows)], text=("",))
    for by in ([row.macs_by_kind for row in rows], [row.macs_by_operator for row in rows]):
        for kind in dict.fromkeys(kind for each in by for kind in each):
            counts = [(each.get(kind, 0), row.macs) for each, row in zip(by, rows, strict=True)]
            table.add_row(kind, *(f"{format_macs(n)} ({format_percent(n / whole)})" for n, whole in counts))
        table.add_section()
    return table


def _grid(rows: Sequence[Profile]) -> Table:
    measured = rows[0].speed is not None
    columns = ["model", "batch", "tokens", "MACs", "cache"]
    columns += ["peak memory", "prefill", "quartiles", "decode"] if measured else []
    columns += ["speed-up"] if measured and len(rows) > 1 else []
    table = make_table(columns)
    for row in rows:
        for cost in row.grid:
            sizes = [f"{cost.batch:,}", f"{cost.seq_len:,}", format_macs(cost.macs), _cache(cost)]
            speed = _speed(cost.speed)
            if cost.speed is not None:
                low, high = cost.speed.prefill_quartiles
                speed.insert(2, f"{low * 1000:.1f} to {high * 1000:.1f}")
            table.add_row(row.model, *sizes, *speed, *_speed_up(cost))
        table.add_section()
    return table


def verdicts(rows: Sequence[Profile]) -> Iterator[str]:
    """A line for every model whose prefill is clearly less faster than its MACs promise, with where that is so.

    0.8 of the MACs promise 1.25 x. A cut that brings less than half of that gain does not pay. It is only said where it
    holds for the slow quartile of the first model beside the fast quartile of this one, so that noise says nothing.
    """
    for row in rows[1:]:
        poor = []
        for cost, first in zip(row.grid, rows[0].grid, strict=True):
            if cost.against is not None and cost.speed is not None and first.speed is not None:
                best = first.speed.prefill_quartiles[1] / cost.speed.prefill_quartiles[0]
                if pays_little(cost.against.macs_ratio, best):
                    poor.append((cost, cost.against))
        if poor:
            where = ", ".join(
                f"{against.prefill_speedup:.2f} x at batch {cost.batch} x {cost.seq_len}" for cost, against in poor
            )
            ratio = poor[0][1].macs_ratio
            yield (
                f"{row.model}: {ratio:.2f} of the MACs promise {1 / ratio:.2f} x, and reading a prompt is {where}: in "
                "time, this cut does not pay here. Widths that are multiples of 64 (--round-to 64), or fewer layers "
                "(--axes layers), may"
            )


def pays_little(macs_ratio: float, speedup: float) -> bool:
    """Whether a speed-up is less than half of the gain that the MACs promise.

    >>> pays_little(0.8, 1.10), pays_little(0.8, 1.15), pays_little(0.99, 1.0)
    (True, False, False)
    """
    return macs_ratio < SMALL and speedup < 1 + PAYS * (1 / macs_ratio - 1)
