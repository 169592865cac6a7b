"""A plan -> what every kind of group keeps; the demo's run -> what the cut cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from secateur.discovery.weight_names import format_ranges
from secateur.evaluation.costs import Profile
from secateur.evaluation.perplexity import Perplexity
from secateur.planning.plan import Plan, PlannedGroup
from secateur.report.formatting import format_bytes, format_count, format_macs, format_rate, format_seconds
from secateur.report.tables.layout import make_table, titled

NEAR = 0.005  # of a budget; a plan farther from it gets a warning
UNEVEN = 3  # sizes of one kind; more are drawn as bars instead of listed
BARS = "▁▂▃▄▅▆▇█"


def plan_tables(planned: Plan) -> Iterator[RenderableType]:
    """What every kind of group keeps, the sizes before and after, and the config settings."""
    table = make_table(("kind", "layers", "units", "kept"), text=("kind", "layers"))
    for kind, groups in planned.groups_by_kind.items():
        sizes: dict[tuple[int, int], list[int]] = {}
        for group in groups:
            sizes.setdefault((group.units, group.kept), []).append(-1 if group.layer is None else group.layer)
        if len(sizes) > UNEVEN:
            table.add_row(kind, *_uneven(planned, kind, groups))
            continue
        for (units, kept), layers in sizes.items():
            where = "the model" if layers == [-1] else format_ranges(layers)
            table.add_row(kind, where, str(units), str(kept))
    sizes_table = make_table(("", "dense", "pruned", "removed"))
    for label, dense, pruned in (
        ("parameters", planned.parameters["dense"], planned.parameters["pruned"]),
        ("non-embedding", planned.parameters["dense_non_embedding"], planned.parameters["pruned_non_embedding"]),
        ("MACs of 64 tokens", planned.macs["dense"], planned.macs["pruned"]),
    ):
        text = format_macs if label.startswith("MACs") else format_count
        sizes_table.add_row(label, text(dense), text(pruned), f"{1 - pruned / dense:.2%}")
    yield from titled(f"{planned.model}: what the cut leaves", table)
    yield sizes_table
    yield from _missed(planned)
    if (rounding := planned.scored.get("rounding")) is not None:
        yield (
            f"rounded to multiples of {planned.options.round_to}, the cut takes {rounding['planned']:.4g} "
            f"share of all scores; with any widths, {rounding['any_widths']:.4g}"
        )
    if planned.settings is not None:
        short = {k: f"({len(v)} entries)" if isinstance(v, list) else str(v) for k, v in planned.settings.items()}
        yield "config: " + ", ".join(f"{name} = {value}" for name, value in short.items())
    elif planned.refusal is not None:
        yield f"no stock folder, but one with a file of code (trust_remote_code=True): {planned.refusal}"


def _uneven(planned: Plan, kind: str, groups: Sequence[PlannedGroup]) -> tuple[str, str, str]:
    """Groups of many sizes in one row, with a bar for the share that each layer keeps."""
    shares = {group.layer: group.kept / group.units for group in groups if group.layer is not None}
    last = max((layer for layer in shares), default=0)
    bars = "".join(BARS[round(shares.get(layer, 1.0) * (len(BARS) - 1))] for layer in range(last + 1))
    units = sorted({group.units for group in groups})
    kept = [group.kept for group in groups]
    return (
        f"0-{last} {bars}",
        str(units[0]) if len(units) == 1 else f"{units[0]}-{units[-1]}",
        f"{min(kept)} to {max(kept)} in {len(groups)}",
    )


def _missed(planned: Plan) -> Iterator[str]:
    """A warning where whole units cannot come within half a percent of the ratio asked for."""
    ratio, of = planned.options.ratio, planned.options.of
    both = (planned.parameters["dense"], planned.parameters["pruned"])
    inner = (planned.parameters["dense_non_embedding"], planned.parameters["pruned_non_embedding"])
    macs = (planned.macs["dense"], planned.macs["pruned"])
    sizes = {"parameters": both, "memory": both, "non-embedding": inner, "macs": macs}
    if ratio is not None and of in sizes:
        removed = 1 - sizes[of][1] / sizes[of][0]
        if abs(removed - ratio) > NEAR:
            yield (
                f"the nearest that whole units allow: {removed:.2%} of {of}, for the {ratio:.2%} asked for. "
                "More axes or layers, or --shape per-layer, may come nearer"
            )


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
