"""A plan -> what every kind of group keeps; the demo's run -> what the cut cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich.console import RenderableType

from secateur.discovery.weight_names import format_ranges
from secateur.evaluation.costs import Profile
from secateur.evaluation.evaluate import ModelEvaluation
from secateur.planning.plan import Plan, PlannedGroup
from secateur.report.formatting import format_bytes, format_count, format_macs
from secateur.report.tables.evaluation import sample_lines
from secateur.report.tables.layout import make_table, titled
from secateur.report.tables.profile import cost_rows

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
            table.add_row(kind, *_uneven(groups))
            continue
        for (units, kept), layers in sizes.items():
            where = "the model" if {*layers} == {-1} else format_ranges(sorted({*layers}))
            table.add_row(kind, where, str(units), str(kept))
    yield from titled(f"{planned.model}: what the cut leaves", table)
    if len(by_kind := planned.scored.get("by_kind", {})) > 1:
        yield _given_by_kind(planned, by_kind)
    sizes_table = make_table(("", "dense", "pruned", "removed"))
    for row in size_rows(planned, ("parameters", "non-embedding", "macs")):
        sizes_table.add_row(*row)
    yield sizes_table
    yield from _missed(planned)
    if (rounding := planned.scored.get("rounding")) is not None:
        yield (
            f"rounded to multiples of {rounding['multiple']}, the cut takes {rounding['planned']:.4g} "
            f"share of all scores; with any widths, {rounding['any_widths']:.4g}"
        )
    yield from _lost_tokens(planned)
    if planned.settings is not None:
        short = {k: f"({len(v)} entries)" if isinstance(v, list) else str(v) for k, v in planned.settings.items()}
        yield "config: " + ", ".join(f"{name} = {value}" for name, value in short.items())
    elif planned.refusal is not None:
        yield f"no stock folder, but one with a file of code (trust_remote_code=True): {planned.refusal}"


def _given_by_kind(planned: Plan, by_kind: Mapping[str, Mapping[str, float]]) -> RenderableType:
    """What each kind gives of what the budget counts, and the share of the scores that goes with it."""
    whole = sum(about["given"] for about in by_kind.values()) or 1
    of = "parameters" if planned.options.of == "units" else planned.options.of
    table = make_table(("kind", f"gives, {of}", "share", "sum of scores lost"), text=("kind",))
    for kind, about in by_kind.items():
        given = format_count(round(about["given"]))
        table.add_row(kind, given, f"{about['given'] / whole:.1%}", f"{about['score']:.4g}")
    return table


def _lost_tokens(planned: Plan) -> Iterator[str]:
    """What a cut of the vocabulary is expected to cost, and the scripts that lose most of their tokens."""
    about = planned.scored.get("vocabulary")
    if about is None:
        return
    yield f"tokens that go: about {about['nats_per_token']:.4f} nats per token of text like the calibration text"
    for lost in about["lost_scripts"]:
        examples = " ".join(lost["examples"])
        yield f"texts in {lost['script']} grow longer: {lost['after']:,} of {lost['before']:,} tokens stay ({examples})"


def size_rows(
    planned: Plan, budgets: Iterable[str] = ("parameters", "non-embedding", "macs", "memory")
) -> list[list[str]]:
    """What budgets count: the name, dense, pruned, and the share that is removed."""
    sizes = _sizes(planned)
    rows = (sizes[budget] for budget in budgets)
    return [[name, text(dense), text(pruned), f"{1 - pruned / dense:.2%}"] for name, text, dense, pruned in rows]


def _sizes(planned: Plan) -> dict[str, tuple[str, Callable[[int], str], int, int]]:
    """Budget -> its name in a table, how its numbers are written, and those of the dense and of the pruned model."""
    parameters, bytes_each = planned.parameters, planned.options.item_bytes
    both = (parameters["dense"], parameters["pruned"])
    inner = (parameters["dense_non_embedding"], parameters["pruned_non_embedding"])
    return {
        "parameters": ("parameters", format_count, *both),
        "non-embedding": ("non-embedding", format_count, *inner),
        "macs": ("MACs of 64 tokens", format_macs, planned.macs["dense"], planned.macs["pruned"]),
        "memory": (
            f"weights in {planned.options.memory_dtype}",
            format_bytes,
            bytes_each * both[0],
            bytes_each * both[1],
        ),
    }


def _uneven(groups: Sequence[PlannedGroup]) -> tuple[str, str, str]:
    """Groups of many sizes in one row, with a bar for the share that each layer keeps."""
    by_layer: dict[int, list[PlannedGroup]] = {}
    for group in groups:
        if group.layer is not None:
            by_layer.setdefault(group.layer, []).append(group)
    shares = {
        layer: sum(group.kept for group in mine) / sum(group.units for group in mine)
        for layer, mine in by_layer.items()
    }
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
    ratio, of, sizes = planned.options.ratio, planned.options.of, _sizes(planned)
    if ratio is not None and of in sizes:
        _, _, dense, pruned = sizes[of]
        removed = 1 - pruned / dense
        if abs(removed - ratio) > NEAR:
            shape = "" if planned.options.shape == "per-layer" else ", or --shape per-layer,"
            yield (
                f"the nearest that whole units allow: {removed:.2%} of {of}, for the {ratio:.2%} asked for. "
                f"More axes or layers{shape} may come nearer"
            )


def demo_tables(
    plan: Plan, profiles: Sequence[Profile], evaluations: Sequence[ModelEvaluation]
) -> Iterator[RenderableType]:
    """The plan of a cut, what it cost, and a text by each model; what was measured is of dense and pruned."""
    yield from plan_tables(plan)
    table = make_table(("", "dense", "pruned", "pruned / dense"))
    costs = "parameters macs weight_bytes peak_bytes prefill_seconds decode_tokens_per_second"
    for row in cost_rows(profiles, costs):
        table.add_row(*row)
    for before, after in zip(*(each.perplexity for each in evaluations), strict=True):
        label = f"perplexity, {before.data} @{before.seq_len}"
        table.add_row(label, f"{before.ppl:.2f}", f"{after.ppl:.2f}", f"{after.ppl / before.ppl:.2f}")
    yield from titled("What it cost", table)
    yield from sample_lines(evaluations)
