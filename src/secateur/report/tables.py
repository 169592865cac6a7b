"""Results as people read them: rich tables and lines, which the command line prints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from secateur.checkpoint.verification import Verified
from secateur.demo import PROMPT, Demonstration
from secateur.discovery.counting import count_parameters
from secateur.discovery.groups import Discovery
from secateur.discovery.summary import (
    KINDS_IN_WORDS,
    GroupFold,
    LayerFold,
    fold_layers,
    frozen_reasons,
    reach,
    reach_of_all,
    spans,
)
from secateur.evaluation.measures import Measured, differences
from secateur.evaluation.significance import Difference
from secateur.evaluation.tasks import HEADLINES, TaskResult, beside_first, mean_of
from secateur.export.gguf_file import Exported
from secateur.export.int8 import Quantised
from secateur.export.merge import Merged
from secateur.planning.plan import Plan, PlannedGroup, by_kind
from secateur.recovery.result import Recovered
from secateur.report.formatting import format_bytes, format_count, format_macs, format_percent

NEAR = 0.005  # of a budget: what is farther from it is said
UNEVEN = 3  # sizes of one kind: more are drawn, not listed
BARS = "▁▂▃▄▅▆▇█"
SCHEME_IN_WORDS = {
    "weight-only": "products in the model's dtype",
    "dynamic": "products in int8, activations rounded token by token",
}


def _titled(title: str, table: Table) -> Iterator[RenderableType]:
    """A title, which may be wider than the table, and the table."""
    yield Text(title, style="italic")
    yield table


def discovery_tables(discovery: Discovery) -> Iterator[RenderableType]:
    """The groups layer by layer, layers that are alike folded; how much they reach; what is frozen and why."""
    folds = fold_layers(discovery)
    layers = sum(len(fold.layers) for fold in folds)
    size = f"{format_count(count_parameters(discovery))} parameters, {layers} layer{'s' * (layers != 1)}"
    yield Text(f"{discovery.model}: {size}; cuts reach {format_percent(reach_of_all(discovery).share)}")
    yield ""
    yield Text("What can be cut", style="italic")
    heading = ("group", "units", "share", Text("one unit is"))
    rows = [[_group_row(group) for group in fold.groups] for fold in folds]
    columns = list(zip(heading, *itertools.chain(*rows), strict=True))
    widths = [max(map(len, column)) for column in columns[:-1]]
    yield Padding(_line(*heading, widths), (0, 0, 0, 4), expand=False)
    tree = Tree("", hide_root=True)
    for fold, lines in zip(folds, rows, strict=True):
        branch = tree.add(_layers(fold))
        for line in lines:
            branch.add(_line(*line, widths))
    yield tree
    yield ""
    yield from _titled("How much can be reached", _reach_table(discovery))
    yield (
        "A share is of the model's parameters: all those of the weights in which a group has an axis, layers that are "
        "alike together. Several kinds may reach the same parameter."
    )
    yield ""
    yield Text("What is frozen, and why", style="italic")
    yield from _frozen(discovery)


def _group_row(group: GroupFold) -> tuple[str, str, str, Text]:
    return group.name, f"{group.units:,}", format_percent(group.share), _unit(group)


def _line(name: str, units: str, share: str, unit: Text, widths: Sequence[int]) -> Table:
    """A line of columns, of which only the last may be broken."""
    line = Table.grid(padding=(0, 2, 0, 0))
    for width, justify in zip(widths, JUSTIFY, strict=True):
        line.add_column(width=width, no_wrap=True, justify=justify)
    line.add_column(overflow="fold")
    line.add_row(Text(name, style="cyan"), units, share, unit)
    return line


JUSTIFY: tuple[Literal["left", "right"], ...] = ("left", "right", "right")


def _layers(fold: LayerFold) -> Text:
    share = f"{format_percent(fold.share)} of the parameters"
    if not fold.layers:
        return Text.assemble(("the whole model", "bold"), f" ({share} lie outside the layers)")
    if len(fold.layers) == 1:
        return Text.assemble((f"layer {fold.layers[0]}", "bold"), f": {share}")
    return Text.assemble((f"layers {spans(fold.layers)}", "bold"), f" ({len(fold.layers)} alike): {share}")


def _unit(group: GroupFold) -> Text:
    """What one unit is, in words and in slices; what to know before cutting."""
    text = Text(group.unit)
    if group.slices:
        text.append(": " + "; ".join(map(str, group.slices)))
    if group.chosen:
        needed = f"; {group.least} must stay" if group.least > 1 else ""
        text.append(f". The model chooses among them{needed}", style="yellow")
    if group.normed:
        text.append(". A norm runs across them", style="yellow")
    return text


def _reach_table(discovery: Discovery) -> Table:
    table = Table()
    for column in ("kind", "groups", "units", "share", "its units are"):
        table.add_column(column, justify="left" if column in ("kind", "its units are") else "right")
    found = reach(discovery)
    for kind, row in found.items():
        table.add_row(kind, f"{row.groups:,}", f"{row.units:,}", format_percent(row.share), KINDS_IN_WORDS[kind].units)
    everything = reach_of_all(discovery)
    table.add_section()
    table.add_row("any", f"{everything.groups:,}", f"{everything.units:,}", format_percent(everything.share), "")
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
    by_axes = parameters - reach_of_all(discovery, layers=False).parameters
    by_any = parameters - reach_of_all(discovery).parameters
    if not by_axes:
        return "Every parameter is in a weight that some group has an axis in."
    outside = f", {format_percent(by_any / parameters) if by_any else 'none of them'} outside the layers" * (
        by_any != by_axes
    )
    share = format_percent(by_axes / parameters)
    return f"{share} of the parameters lie in weights that no group has an axis in{outside}."


def plan_tables(planned: Plan) -> Iterator[RenderableType]:
    """What every kind of group keeps, the sizes before and after, and how a config says it."""
    table = Table()
    for column in ("kind", "layers", "units", "kept"):
        table.add_column(column, justify="left" if column in ("kind", "layers") else "right")
    for kind, groups in by_kind(planned).items():
        sizes: dict[tuple[int, int], list[int]] = {}
        for group in groups:
            sizes.setdefault((group.units, group.kept), []).append(-1 if group.layer is None else group.layer)
        if len(sizes) > UNEVEN:
            table.add_row(kind, *_uneven(planned, kind, groups))
            continue
        for (units, kept), layers in sizes.items():
            where = "the model" if layers == [-1] else spans(layers)
            table.add_row(kind, where, str(units), str(kept))
    sizes_table = Table()
    for column in ("", "dense", "pruned", "removed"):
        sizes_table.add_column(column, justify="left" if not column else "right")
    for label, dense, pruned in (
        ("parameters", planned.parameters["dense"], planned.parameters["pruned"]),
        ("non-embedding", planned.parameters["dense_non_embedding"], planned.parameters["pruned_non_embedding"]),
        ("MACs of 64 tokens", planned.macs["dense"], planned.macs["pruned"]),
    ):
        text = format_macs if label.startswith("MACs") else format_count
        sizes_table.add_row(label, text(dense), text(pruned), f"{1 - pruned / dense:.2%}")
    yield from _titled(f"{planned.model}: what the cut leaves", table)
    yield sizes_table
    missed = _missed(planned)
    if missed is not None:
        yield missed
    rounding = planned.scored.get("rounding")
    if rounding is not None:
        yield (
            f"rounded to multiples of {planned.options.round_to}, the cut takes {rounding['planned']:.4g} "
            f"{rounding['measure']}; with any widths, {rounding['any_widths']:.4g}"
        )
    if planned.settings is not None:
        yield "config: " + ", ".join(f"{name} = {_setting(v)}" for name, v in planned.settings.items())
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


def _missed(planned: Plan) -> str | None:
    """What to say where whole units cannot come within half a percent of the share that was asked for."""
    options = planned.options
    sizes = {
        "parameters": (planned.parameters["dense"], planned.parameters["pruned"]),
        "memory": (planned.parameters["dense"], planned.parameters["pruned"]),
        "non-embedding": (planned.parameters["dense_non_embedding"], planned.parameters["pruned_non_embedding"]),
        "macs": (planned.macs["dense"], planned.macs["pruned"]),
    }
    if options.ratio is None or options.of not in sizes:
        return None
    dense, pruned = sizes[options.of]
    removed = 1 - pruned / dense
    if abs(removed - options.ratio) <= NEAR:
        return None
    return (
        f"the nearest that whole units allow: {removed:.2%} of {options.of}, for the {options.ratio:.2%} asked for. "
        "More axes or layers, or --shape free, may come nearer"
    )


def _setting(value: Any) -> str:
    return f"({len(value)} entries)" if isinstance(value, list) else str(value)


def evaluation_tables(results: Sequence[Measured]) -> Iterator[RenderableType]:
    """What was measured of every model: a row for each text and protocol, for each task; samples of text; bytes."""
    if any(measured.texts for measured in results):
        yield from _titled("Perplexity", _perplexity_table(results))
    if any(measured.tasks for measured in results):
        yield from _titled("Accuracy in tasks, %", _task_table(results))
        notes = {result.task: result.note for measured in results for result in measured.tasks.values() if result.note}
        yield from (f"{task}: {note}" for task, note in notes.items())
        if len(results) > 1:
            yield f"in brackets: beside {results[0].model}, question by question, and how likely so much is by chance"
    for measured in results:
        for prompt, text in measured.samples.items():
            yield Text.assemble(f"{measured.model}: {prompt}", (" ".join(["", *text.split()]), "bold"))
    for measured in results:
        if measured.weight_bytes is not None:
            files = "" if measured.file_bytes is None else f", {format_bytes(measured.file_bytes)} in files"
            yield f"{measured.model}: {format_bytes(measured.weight_bytes)} of weights{files}"


def _perplexity_table(results: Sequence[Measured]) -> Table:
    """A row for every model, text and protocol; beside the first model, the nats per token that one is worse by."""
    table = Table()
    beside = ("nats beside the first",) * (len(results) > 1)
    columns = ("model", "text", "protocol", "tokens scored", "nats/token", "bits/byte", "perplexity", "95 % interval")
    for column in (*columns, *beside):
        table.add_column(column, justify="left" if column in ("model", "text", "protocol") else "right")
    for measured in results:
        for p, worse in zip(measured.perplexity, differences(measured, results[0]), strict=True):
            ends = "" if p.ppl_low is None or p.ppl_high is None else f"{p.ppl_low:.2f} to {p.ppl_high:.2f}"
            bits = "" if p.bits_per_byte is None else f"{p.bits_per_byte:.4f}"
            scored = (p.data, p.protocol, f"{p.tokens:,}", f"{p.nll:.4f}", bits, f"{p.ppl:.2f}", ends)
            shown = (
                "" if worse is None or measured is results[0] else with_error(worse.difference, worse.stderr, "+.4f")
            )
            table.add_row(measured.model, *scored, *((shown,) if beside else ()))
    return table


def _task_table(results: Sequence[Measured]) -> Table:
    """A row for every task and one for their mean, a column for every model."""
    table = Table()
    for column in ("task", "metric", "questions", *(measured.model for measured in results)):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    first = results[0]
    for name in dict.fromkeys(name for measured in results for name in measured.tasks):
        found = [measured.tasks.get(name) for measured in results]
        shown = next(result for result in found if result is not None)
        cells = []
        for result in found:
            beside = beside_first(result, first.tasks[name]) if result is not None and name in first.tasks else None
            cells.append("" if result is None else _accuracy(result, None if result is found[0] else beside))
        table.add_row(name, shown.metric, f"{shown.documents:,}", *cells)
    means = [mean_of(measured.tasks, first.tasks) for measured in results]
    if means[0] is not None and len(means[0]["tasks"]) > 1:
        table.add_section()
        cells = []
        for number, mean in enumerate(means):
            text = "" if mean is None else with_error(100 * mean["value"], _hundred(mean["stderr"]), ".2f")
            if number and mean is not None and "difference" in mean:
                error = _hundred(mean["difference_stderr"])
                text += f" ({with_error(100 * mean['difference'], error, '+.2f')}, p {chance(mean['p'])})"
            cells.append(text)
        table.add_row("mean", f"of {len(means[0]['tasks'])}", "", *cells)
    return table


def _accuracy(result: TaskResult, beside: Difference | None) -> str:
    """A value in per cent where it is an accuracy, and its difference to the first model's."""
    scale = 100.0 if result.metric in HEADLINES else 1.0
    text = with_error(scale * result.value, None if result.stderr is None else scale * result.stderr, ".2f")
    if beside is None:
        return text
    error = None if beside.stderr is None else scale * beside.stderr
    return f"{text} ({with_error(scale * beside.difference, error, '+.2f')}, p {chance(beside.p)})"


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value


def with_error(value: float, error: float | None, form: str) -> str:
    """A value and its standard error.

    >>> with_error(0.25, 0.01, "+.2f"), with_error(0.25, None, ".1f")
    ('+0.25 ± 0.01', '0.2')
    """
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def chance(p: float) -> str:
    """A p-value; what is below a thousandth is said to be.

    >>> chance(0.0312), chance(1e-9)
    ('0.031', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def verify_tables(found: Verified) -> Iterator[RenderableType]:
    """A row for every file, and what does not fit together."""
    table = Table()
    for column in ("file", "bytes", "sha256", "as it was written"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for file in found.files:
        digest = "" if file.sha256 is None else file.sha256[:12]
        table.add_row(file.name, f"{file.bytes:,}", digest, "yes" if file.problem is None else f"no: {file.problem}")
    yield from _titled(found.folder, table)
    between = [problem for problem in found.problems if not any(problem.startswith(f"{f.name} ") for f in found.files)]
    yield from (Text(problem) for problem in between)
    if not found.problems:
        built = "and the model of its config has these tensors and the plan's sizes"
        unbuilt = "no model was built of its config: the weights are packed, or custom code needs --trust-remote-code"
        yield Text(f"whole: {found.tensors:,} tensors in {len(found.files)} files, {built if found.built else unbuilt}")


def int8_tables(done: Quantised) -> Iterator[RenderableType]:
    """How many layers are int8, what was left as it is and why, and the bytes before and after."""
    table = Table()
    for column in ("weights", "tensors", "why"):
        table.add_column(column, justify="right" if column == "tensors" else "left")
    table.add_row("int8", str(len(done.layers)), f"linear layers; {SCHEME_IN_WORDS[done.scheme]}")
    reasons: dict[str, list[str]] = {}
    for name, why in done.left.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        table.add_row(names[0] + (" ..." if len(names) > 1 else ""), str(len(names)), f"as they were: {why}")
    yield from _titled("What is int8", table)
    before, after = done.weight_bytes["before"], done.weight_bytes["after"]
    yield (
        f"weights: {format_bytes(before)} before, {format_bytes(after)} after ({after / before:.2f}); "
        f"files: {format_bytes(done.file_bytes)} in {done.out}"
    )
    if done.unaligned and done.scheme == "dynamic":
        yield (
            f"{len(done.unaligned)} layers have sizes that are not multiples of 8 ({done.unaligned[0]}): on CUDA, "
            "torchao computes their dynamic products on the CPU. Prune with --round-to 8, or use weight-only"
        )


def compare_tables(url: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """What the models cost that a page compares, and where it is."""
    table = Table()
    for column in ("", "model", "parameters", "non-embedding", "MACs", "weights", "peak memory"):
        table.add_column(column, justify="left" if column in ("", "model") else "right")
    for letter, row in zip("AB", rows, strict=True):
        peak = row["peak_bytes"]
        table.add_row(
            letter,
            row["model"],
            format_count(row["parameters"]),
            format_count(row["non_embedding_parameters"]),
            format_macs(row["macs"]),
            format_bytes(row["weight_bytes"]),
            "-" if peak is None else format_bytes(peak),
        )
    yield from _titled("Compared", table)
    yield f"open {url} (Ctrl-C ends it)"


def export_tables(written: Exported) -> Iterator[RenderableType]:
    """What a file holds, and what llama.cpp computed from it beside torch."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column()
    table.add_row("file", str(written.out))
    table.add_row("architecture", written.architecture)
    table.add_row(
        "numbers", f"{written.dtype}, {format_count(written.parameters)} parameters, {format_bytes(written.bytes)}"
    )
    table.add_row("words split as", written.pre)
    checked = written.checked
    if checked is not None:
        table.add_row("checked in", f"llama.cpp, by llama-cpp-python {checked.version}")
        table.add_row("texts split alike", f"{checked.texts - len(checked.other_tokens)} of {checked.texts}")
        table.add_row("greedy tokens as torch's", f"{checked.same_tokens} of {checked.new_tokens}")
        table.add_row(
            "logits differ by",
            f"{checked.difference:.2g} of their spread ({checked.rounding:.2g} from rounding weights alone)",
        )
    yield from _titled("Written", table)
    for note in written.notes:
        yield f"note: {note}"
    if checked is None:
        yield "not compared with torch: pip install 'secateur[gguf]', and export with --check"
    elif checked.other_tokens:
        yield f"note: llama.cpp makes other tokens of {', '.join(repr(text) for text in checked.other_tokens[:3])}"


def demo_tables(shown: Demonstration) -> Iterator[RenderableType]:
    """The plan, what it cost, and a sample of text of each model."""
    yield from plan_tables(shown.plan)
    table = Table()
    for column in ("", "dense", "pruned", "pruned / dense"):
        table.add_column(column, justify="left" if not column else "right")
    dense, pruned = shown.profiles
    for label, field, text in (
        ("parameters", "parameters", format_count),
        ("MACs of 64 tokens", "macs", format_macs),
        ("weights", "weight_bytes", format_bytes),
        ("peak memory of 64 tokens", "peak_bytes", format_bytes),
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
    yield f"report: {shown.report}"


def merge_lines(merged: Merged) -> Iterator[RenderableType]:
    """What an adapter has changed."""
    yield f"merged {merged.adapter} (rank {merged.rank}) into {merged.base}"
    yield f"{len(merged.changed)} weights changed, by {100 * merged.largest:.3g} % of their norm at most"
    yield f"wrote {merged.out}"


def _round_tables(recovered: Recovered) -> Iterator[RenderableType]:
    """Of every round the size, and what was measured after the cut and after the training."""
    texts = [] if recovered.rounds[-1]["best"] is None else [*recovered.rounds[-1]["best"]["perplexity"]]
    table = Table()
    for column in ("round", "parameters", "steps", "validation, nats", *(f"perplexity, {name}" for name in texts)):
        table.add_column(column, justify="right")
    for each in recovered.rounds:
        pairs = []
        if each["before"] is not None and each["best"] is not None:
            validation = [entry["validation"] for entry in (each["before"], each["best"])]
            pairs.append("" if None in validation else "{:.3f} -> {:.3f}".format(*validation))
            for name in texts:
                pairs.append(
                    "{:.2f} -> {:.2f}".format(*(each[when]["perplexity"][name] for when in ("before", "best")))
                )
        table.add_row(str(each["round"]), format_count(each["parameters"]), str(each["steps"]), *pairs)
    yield from _titled(f"{recovered.method}, after the cut -> after the training", table)


def recovery_tables(recovered: Recovered) -> Iterator[RenderableType]:
    """What was measured while a model was trained, first and last and best; what was left out and done otherwise."""
    measured = recovered.evaluation
    best = next((entry for entry in reversed(measured) if entry["step"] == recovered.best_step), None)
    if len(recovered.rounds) > 1:
        yield from _round_tables(recovered)
    elif best is not None:
        table = Table()
        for column in ("", "before", f"best, step {recovered.best_step}", f"last, step {measured[-1]['step']}"):
            table.add_column(column, justify="left" if not column else "right")
        shown = (measured[0], best, measured[-1])
        if best["validation"] is not None:
            table.add_row("validation, nats", *(f"{entry['validation']:.3f}" for entry in shown))
        for name in best["perplexity"]:
            table.add_row(f"perplexity, {name}", *(f"{entry['perplexity'][name]:.2f}" for entry in shown))
        yield from _titled(
            f"{recovered.method}, {format_count(recovered.trained_parameters)} parameters trained", table
        )
    yield f"{recovered.steps} steps, {recovered.tokens:,} tokens of {recovered.rows:,} rows"
    for why, count in recovered.dropped.items():
        yield f"left out: {count:,} rows {why}"
    yield from recovered.notes
