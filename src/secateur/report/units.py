"""What each plan keeps, layer by layer, and how the scores it was made from are distributed."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.discovery.summary import KINDS_IN_WORDS
from secateur.errors import CheckpointError
from secateur.files import read_json
from secateur.report.blocks import Block, Cell, Figure, Paragraph, Section, Subheading, Table
from secateur.report.charts import Band, Series, heat_map, histogram, line_plot
from secateur.report.formatting import format_change
from secateur.report.models import Facts, folder_of, same_model
from secateur.report.reading import CutRow, KeptGroup
from secateur.scoring.scores import Scores

BINS = 32
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_CUTS = 12  # that are drawn: those of the latest plans
MOST_LAYERS = 10_000
_NAME = re.compile(r"(?:.*\.)?(\d+)\.([a-z_]+)(?:\.\d+)?")  # of a group of one layer: layers.3.mlp, layers.3.mlp.1


def cut_section(facts: Facts) -> Section | None:
    """A heat map for each plan: kinds below each other, layers side by side."""
    written = [cut for cut in facts.run.cuts if cut.out is not None]
    cuts = list({(cut.out or cut.entry.path.name): cut for cut in (written or facts.run.cuts)}.values())
    blocks: list[Block] = []
    if len(cuts) > MOST_CUTS:
        blocks.append(Paragraph(f"The latest {MOST_CUTS} of {len(cuts)} plans."))
    for cut in cuts[-MOST_CUTS:]:
        label = _label(facts, cut)
        if len(cuts) > 1:
            blocks.append(Subheading(label))
        blocks.append(Paragraph(_asked(cut)))
        blocks.extend(_drawn(facts, cut, label))
    return Section("units", "What was cut" if written else "What is to be cut", tuple(blocks)) if blocks else None


def _label(facts: Facts, cut: CutRow) -> str:
    if cut.out is None:
        return f"plan of {cut.model}"
    return next((model.label for model in facts.models if same_model(model.name, cut.out)), cut.out)


def _asked(cut: CutRow) -> str:
    """How the cut was asked for, and what it took."""
    asked, told = cut.settings, []
    if asked.get("ratio") is not None:
        told.append(f"ratio {asked['ratio']:g} of {asked.get('of')}")
    if asked.get("target") is not None:
        told.append(f"target {asked['target']:,} of {asked.get('of')}")
    told += [f"{name} {asked[name]}" for name in ("score", "scope", "shape", "choose", "repair") if asked.get(name)]
    dense, pruned = cut.parameters.get("dense"), cut.parameters.get("pruned")
    inner = format_change(cut.parameters.get("dense_non_embedding"), cut.parameters.get("pruned_non_embedding"))
    macs = format_change(cut.macs.get("dense"), cut.macs.get("pruned"))
    took = f"Parameters {format_change(dense, pruned)}, outside the embeddings {inner}, multiply-accumulates {macs}."
    return f"{took} Asked for: {', '.join(told)}."


def _drawn(facts: Facts, cut: CutRow, label: str) -> Iterable[Block]:
    by_kind, whole = _by_kind(facts, cut)
    if by_kind:
        layers = _layers(facts, cut, by_kind)
        names = {kind: _heading(kind, found) for kind, found in by_kind.items()}
        chart = heat_map(
            f"Units that {label} keeps, by kind and layer",
            f"{len(by_kind)} rows of {layers} layers; the darker a cell, the larger the share of its units that stays. "
            "The numbers are in the table below.",
            {names[kind]: found for kind, found in by_kind.items()},
            layers,
        )
        rows = tuple(
            (Cell(str(layer)), *(_kept(found.get(layer)) for found in by_kind.values())) for layer in range(layers)
        )
        yield Figure(chart, Table("Units kept", ("Layer", *by_kind), rows), wide=True)
    if whole:
        rows = tuple((Cell(g.name), Cell(f"{g.kept:,}"), Cell(f"{g.units:,}")) for g in whole)
        yield Table("Units that run through the model", ("Group", "Kept", "Of"), rows)


def _kept(found: tuple[int, int] | None) -> Cell:
    return Cell("") if found is None else Cell(f"{found[0]:,} of {found[1]:,}")


def _heading(kind: str, found: Mapping[int, tuple[int, int]]) -> str:
    words = KINDS_IN_WORDS[kind].units if kind in KINDS_IN_WORDS else kind
    words = words.partition(";")[0]
    sizes = {units for _, units in found.values()}
    if kind == "layer":
        return words
    return f"{words}, {min(sizes):,} in a layer" if len(sizes) == 1 else words


def _by_kind(facts: Facts, cut: CutRow) -> tuple[dict[str, dict[int, tuple[int, int]]], list[KeptGroup]]:
    """Kind -> layer -> units kept and units, with the groups that lose none; and the groups of no layer."""
    found: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    whole = []

    def put(kind: str, layer: int, kept: int, units: int) -> None:
        before = found[kind].get(layer, (0, 0))
        found[kind][layer] = (before[0] + kept, before[1] + units)

    for group in cut.groups:
        if group.kind == "layer":
            stay = set(group.keep) if group.keep is not None else set(range(min(group.kept, MOST_LAYERS)))
            for layer in range(min(group.units, MOST_LAYERS)):
                put("layer", layer, int(layer in stay), 1)
        elif group.layer is None or not 0 <= group.layer < MOST_LAYERS:
            whole.append(group)
        else:
            put(group.kind, group.layer, group.kept, group.units)
    kinds = set(found) | set(cut.axes)
    losing = {group.name for group in cut.groups}
    for name, kind, at, units in _known(facts, cut):
        if name not in losing and at is not None and kind in kinds:
            put(kind, at, units, units)
    order = [*KINDS_IN_WORDS, *sorted(set(found) - set(KINDS_IN_WORDS))]
    return {kind: found[kind] for kind in order if found.get(kind)}, whole


def _known(facts: Facts, cut: CutRow) -> list[tuple[str, str, int | None, int]]:
    """The groups of the model that was cut, as far as the run folder says: by its discovery, or by its scores."""
    names = {group.name: group.units for group in cut.groups}
    for groups in (facts.run.groups, [_named(name, len(units)) for s in _scored(facts, cut) for name, units in s]):
        sizes = {name: units for name, _, _, units in groups}
        if all(sizes.get(name) == units for name, units in names.items()):
            return list(groups)
    return []


def _scored(facts: Facts, cut: CutRow) -> list[Iterable[tuple[str, Tensor]]]:
    return [scores.units.items() for scores in facts.run.scores if _made_from(cut, scores)]


def _named(name: str, units: int) -> tuple[str, str, int | None, int]:
    """A group's kind and layer, which its name says.

    >>> _named("layers.3.mlp", 84), _named("hidden", 48)
    (('layers.3.mlp', 'mlp', 3, 84), ('hidden', 'hidden', None, 48))
    """
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) >= MOST_LAYERS:
        return name, name, None, units
    return name, match[2], int(match[1]), units


def _layers(facts: Facts, cut: CutRow, by_kind: Mapping[str, Mapping[int, tuple[int, int]]]) -> int:
    """How many layers the dense model has: as its config says where it is at hand, but all that are named."""
    named = 1 + max(layer for found in by_kind.values() for layer in found)
    configs = [folder / "config.json" for name in (cut.out, cut.model) if (folder := _folder(facts, name)) is not None]
    for config in configs:
        try:
            number = read_json(config).get("num_hidden_layers")
        except (CheckpointError, AttributeError):
            continue
        if type(number) is int and named <= number < MOST_LAYERS:
            return number
    return named


def _folder(facts: Facts, name: str | None) -> Path | None:
    return None if name is None else folder_of(facts.run, name)


# --- scores -----------------------------------------------------------------------------------------------------------


def scores_section(facts: Facts) -> Section | None:
    """How the scores of each kind are distributed: over units that stay and go, and from layer to layer."""
    blocks: list[Block] = []
    for scores in facts.run.scores:
        cut = next((cut for cut in reversed(facts.run.cuts) if _made_from(cut, scores)), None)
        if len(facts.run.scores) > 1:
            blocks.append(Subheading(f"Score {scores.score}"))
        meaning = f"The score is {scores.score} (over a group's axes: {scores.reduce}); higher is worth more."
        beside = (
            f" Shown beside the plan of {_label(facts, cut)}." if cut is not None and len(facts.run.cuts) > 1 else ""
        )
        blocks.append(Paragraph(meaning + beside))
        kept = {} if cut is None else {group.name: group for group in cut.groups}
        kinds = {group.name: (group.kind, group.layer) for group in (cut.groups if cut else ())}
        kinds |= {name: (kind, layer) for name, kind, layer, _ in facts.run.groups}
        grouped: dict[str, dict[str, list[float]]] = defaultdict(dict)
        for name, units in scores.units.items():
            values = units.double().flatten().tolist()
            if all(map(math.isfinite, values)) and values:
                grouped[kinds.get(name, _named(name, 0)[1:3])[0]][name] = values
        for kind, found in grouped.items():
            blocks.append(_histogram(kind, found, kept if cut is not None else None))
            layers = {(kinds.get(name) or _named(name, 0)[1:3])[1]: values for name, values in found.items()}
            by_layer = {layer: values for layer, values in layers.items() if layer is not None}
            if len(by_layer) > 2:
                blocks.append(_by_layer(kind, dict(sorted(by_layer.items()))))
    return Section("scores", "Scores", tuple(blocks)) if blocks else None


def _made_from(cut: CutRow, scores: Scores) -> bool:
    about: Mapping[str, Any] = cut.scored
    return (about.get("score"), about.get("reduce"), about.get("calibration")) == (
        scores.score,
        scores.reduce,
        scores.calibration,
    )


def _histogram(kind: str, found: Mapping[str, Sequence[float]], kept: Mapping[str, KeptGroup] | None) -> Figure:
    """Units by score; those that go are apart where the plan says which."""
    stay: list[float] = []
    gone: list[float] = []
    for name, values in found.items():
        group = kept.get(name) if kept else None
        if group is None or group.keep is None or group.units != len(values):
            stay += values
        else:
            keep = set(group.keep)
            for unit, value in enumerate(values):
                (stay if unit in keep else gone).append(value)
    every = stay + gone
    log = min(every) > 0
    ends = [math.log10(min(every)), math.log10(max(every))] if log else [min(every), max(every)]
    if ends[1] - ends[0] < 1e-9 * max(abs(ends[0]), abs(ends[1]), 1e-12):
        margin = max(abs(ends[0]) * 0.01, 1e-9)
        ends = [ends[0] - margin, ends[1] + margin]
    width = (ends[1] - ends[0]) / BINS
    edges = [ends[0] + i * width for i in range(BINS + 1)]

    def counts(values: Sequence[float]) -> list[int]:
        done = [0] * BINS
        for value in values:
            place = int(((math.log10(value) if log else value) - ends[0]) / width)
            done[min(max(place, 0), BINS - 1)] += 1
        return done

    decided = kept is not None
    stacks = [("stay" if decided else "units", 0, counts(stay)), *([("go", 1, counts(gone))] if gone else [])]
    words = KINDS_IN_WORDS[kind].units.partition(";")[0] if kind in KINDS_IN_WORDS else kind
    chart = histogram(
        f"Scores of {words}",
        f"A histogram of {len(every):,} units. The numbers are in the table below.",
        edges,
        stacks,
        x_label="score, logarithmic" if log else "score",
        y_label="units",
        log_x=log,
    )
    real = [10**edge for edge in edges] if log else edges
    rows = tuple(
        (Cell(f"{real[i]:.3g}"), Cell(f"{real[i + 1]:.3g}"), *(Cell(f"{each[i]:,}") for _, _, each in stacks))
        for i in range(BINS)
    )
    table = Table(f"Scores of {words}", ("From", "To", *(label for label, _, _ in stacks)), rows)
    return Figure(chart, table, words[:1].upper() + words[1:])


def _by_layer(kind: str, found: Mapping[int, Sequence[float]]) -> Figure:
    """The middle of each layer's scores, and how far they spread."""
    spread = {layer: [_quantile(sorted(values), share) for share in QUANTILES] for layer, values in found.items()}
    log = all(values[0] > 0 for values in spread.values())
    bands = [
        Band("5 % to 95 %", 1, tuple((layer, v[0], v[4]) for layer, v in spread.items())),
        Band("25 % to 75 %", 2, tuple((layer, v[1], v[3]) for layer, v in spread.items())),
    ]
    words = KINDS_IN_WORDS[kind].units.partition(";")[0] if kind in KINDS_IN_WORDS else kind
    chart = line_plot(
        f"Scores of {words} by layer",
        "Medians, with bands of 25 to 75 and 5 to 95 percent of the units. The numbers are in the table below.",
        [Series("median", 0, tuple((layer, v[2]) for layer, v in spread.items()))],
        x_label="layer",
        y_label="score, logarithmic" if log else "score",
        log_y=log,
        bands=bands,
    )
    rows = tuple((Cell(str(layer)), *(Cell(f"{value:.3g}") for value in v)) for layer, v in spread.items())
    columns = ("Layer", *(f"{share:.0%}".replace("%", " %") for share in QUANTILES))
    caption = f"{words[:1].upper()}{words[1:]} by layer: median, the middle half, and 5 to 95 %"
    return Figure(chart, Table(f"Scores of {words} by layer", columns, rows), caption)


def _quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, between the two nearest.

    >>> _quantile([1, 2, 4], 0.75)
    3.0
    """
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)
