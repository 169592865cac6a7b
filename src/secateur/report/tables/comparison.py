"""The demo's run -> its plan, what the cut cost, and a text by each model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from secateur.evaluation.costs import Profile
from secateur.evaluation.perplexity import Perplexity
from secateur.planning.plan import Plan
from secateur.report.formatting import format_bytes, format_count, format_macs, format_rate, format_seconds
from secateur.report.tables.layout import make_table, titled
from secateur.report.tables.plan import plan_tables


def demo_tables(
    plan: Plan,
    profiles: Sequence[Profile],
    perplexity: Mapping[str, Sequence[Perplexity]],
    *,
    prompt: str,
    samples: Mapping[str, str],
) -> Iterator[RenderableType]:
    """The plan of a cut, what it cost, and a text by each model; profiles and perplexity are of dense and pruned."""
    yield from plan_tables(plan)
    table = make_table(("", "dense", "pruned", "pruned / dense"))
    dense, pruned = (profile.to_json() for profile in profiles)
    for label, field, text in (
        ("parameters", "parameters", format_count),
        ("MACs of 64 tokens", "macs", format_macs),
        ("weights", "weight_bytes", format_bytes),
        ("peak memory of 64 tokens", "peak_bytes", format_bytes),
        ("prefill of 64 tokens", "prefill_seconds", format_seconds),
        ("decode", "decode_tokens_per_second", format_rate),
    ):
        a, b = dense[field], pruned[field]
        table.add_row(label, text(a), text(b), f"{b / a:.2f}")
    for before, after in zip(perplexity["dense"], perplexity["pruned"], strict=True):
        label = f"perplexity, {before.data} @{before.seq_len}"
        table.add_row(label, f"{before.ppl:.2f}", f"{after.ppl:.2f}", f"{after.ppl / before.ppl:.2f}")
    yield from titled("What it cost", table)
    for name, continuation in samples.items():
        yield Text.assemble(f"{name}: {prompt} ", (" ".join(continuation.split()), "bold"))
