"""A run -> what each plan keeps, layer by layer, and how the scores it was made from are distributed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from secateur.discovery.descriptions import KIND_DESCRIPTIONS
from secateur.evaluation.significance import quantiles
from secateur.planning.plan import PlannedGroup
from secateur.report.charts import heat_map, histogram, line_chart
from secateur.report.content import Cell, Figure, Section, Table
from secateur.report.entries import Cut
from secateur.report.formatting import format_change
from secateur.report.run import Run
from secateur.scoring.scores import Scores

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_CUTS = 12  # the latest
MOST_LAYERS = 10_000
_NAME = re.compile(r"(?:.*\.)?(\d+)\.([a-z_]+)(?:\.\d+)?")  # of a group of one layer: layers.3.mlp, layers.3.mlp.1


def cuts_section(run: Run) -> Section | None:
    """A heat map for each plan: kinds below each other, layers side by side."""
    written = [cut for cut in run.cuts if cut.out is not None]
    cuts = [*{cut.out or i: cut for i, cut in enumerate(written or run.cuts)}.values()]
    blocks: list[str | Table | Figure] = []
    for cut in cuts[-MOST_CUTS:]:
        blocks += [_summary(run, cut), *_kept_units(run, cut)]
    return Section("units", "What was cut" if written else "What is to be cut", tuple(blocks)) if blocks else None


def _label(run: Run, cut: Cut) -> str:
    model = run.model(cut.out) if cut.out is not None else None
    return model.label if model is not None else f"plan of {cut.model}"


def _summary(run: Run, cut: Cut) -> str:
    """What a cut took, and the options it was made with."""
    names = ("score", "scope", "shape", "choose", "repair")
    options = [f"{name} {cut.options[name]}" for name in ("ratio", "target") if cut.options.get(name) is not None]
    options = [f"{each} of {cut.options.get('of')}" for each in options]
    options += [f"{name} {cut.options[name]}" for name in names if cut.options.get(name)]
    inner = format_change(cut.parameters.get("dense_non_embedding"), cut.parameters.get("pruned_non_embedding"))
    parameters = format_change(cut.parameters.get("dense"), cut.parameters.get("pruned"))
    macs = format_change(cut.macs.get("dense"), cut.macs.get("pruned"))
    sizes = f"parameters {parameters}, outside the embeddings {inner}, MACs {macs}"
    return f"{_label(run, cut)}: {sizes}. Options: {', '.join(options)}."


def _kept_units(run: Run, cut: Cut) -> Iterator[Figure | Table]:
    by_kind = _by_kind(run, cut)
    if by_kind:
        layers = sorted({layer for found in by_kind.values() for layer in found})
        texts = {kind: {n: f"{kept:,} of {of:,}" for n, (kept, of) in found.items()} for kind, found in by_kind.items()}
        rows = tuple((Cell(str(n)), *(Cell(found.get(n, "")) for found in texts.values())) for n in layers)
        title = f"Units kept in {_label(run, cut)}: the darker, the larger the share"
        names = {_words(kind): found for kind, found in by_kind.items()}
        yield Figure(title, heat_map(names), Table("Units kept", ("Layer", *by_kind), rows))
    whole = [group for group in cut.groups if group.layer is None and group.kind != "layer"]
    if whole:
        rows = tuple((Cell(group.name), Cell(f"{group.kept:,}"), Cell(f"{group.units:,}")) for group in whole)
        yield Table("Units that run through the model", ("Group", "Kept", "Of"), rows)


def _words(kind: str) -> str:
    return KIND_DESCRIPTIONS[kind].units.partition(";")[0] if kind in KIND_DESCRIPTIONS else kind


def _by_kind(run: Run, cut: Cut) -> dict[str, dict[int, tuple[int, int]]]:
    """Kind -> layer -> (units kept, units); groups that lose nothing are known from the scores."""
    kept = {group.name: (group.kind, group.layer, group.kept, group.units) for group in cut.groups}
    for scores in run.scores:
        if _made_from(cut, scores):
            for name, units in scores.units.items():
                kept.setdefault(name, (*_kind_and_layer(name), len(units), len(units)))
    by_kind: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    for kind, layer, stay, of in kept.values():
        if layer is not None and 0 <= layer < MOST_LAYERS:
            before = by_kind[kind].get(layer, (0, 0))
            by_kind[kind][layer] = (before[0] + stay, before[1] + of)
    for group in cut.groups:
        if group.kind == "layer":
            stays = set(range(group.kept) if group.keep is None else group.keep)
            by_kind["layer"] = {layer: (int(layer in stays), 1) for layer in range(min(group.units, MOST_LAYERS))}
    order = [*KIND_DESCRIPTIONS, *by_kind]
    return {kind: by_kind[kind] for kind in order if kind in by_kind}


def _kind_and_layer(name: str) -> tuple[str, int | None]:
    """A group's kind and layer: ("mlp", 3) of layers.3.mlp, ("hidden", None) of hidden."""
    match = _NAME.fullmatch(name)
    return (match[2], int(match[1])) if match is not None and int(match[1]) < MOST_LAYERS else (name, None)


def _made_from(cut: Cut, scores: Scores) -> bool:
    """Whether a cut was decided by these scores, as far as what is known of both tells: of models of one size."""
    names = ("score", "reduce", "calibration")
    units = scores.units
    fit = all(len(units[group.name]) == group.units for group in cut.groups if group.name in units)
    return fit and [cut.scored.get(name) for name in names] == [getattr(scores, name) for name in names]


def scores_section(run: Run) -> Section | None:
    """How the scores of each kind are distributed: over units that stay and go, and from layer to layer."""
    blocks: list[str | Figure] = []
    for scores in run.scores:
        cut = next((cut for cut in reversed(run.cuts) if _made_from(cut, scores)), None)
        beside = f" Units that stay and go are those of {_label(run, cut)}." if cut is not None else ""
        blocks.append(f"The score is {scores.score}, over a group's axes: {scores.reduce}. Higher stays.{beside}")
        kept = {} if cut is None else {group.name: group for group in cut.groups}
        by_kind: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, units in scores.units.items():
            if len(units) and units.isfinite().all():
                by_kind[kept[name].kind if name in kept else _kind_and_layer(name)[0]][name] = units.double()
        for kind, found in by_kind.items():
            blocks.append(_histogram(kind, found, kept))
            by_layer: dict[int, list[Tensor]] = defaultdict(list)
            for name, units in found.items():
                if (layer := _kind_and_layer(name)[1]) is not None:
                    by_layer[layer].append(units)
            layers = sorted((layer, torch.cat(each)) for layer, each in by_layer.items())
            if len(layers) > 2:
                blocks.append(_by_layer(kind, layers))
    return Section("scores", "Scores", tuple(blocks)) if blocks else None


def _histogram(kind: str, found: Mapping[str, Tensor], kept: Mapping[str, PlannedGroup]) -> Figure:
    """Units by score; those that go are apart where the plan says which."""
    stay: list[float] = []
    gone: list[float] = []
    for name, units in found.items():
        group = kept.get(name)
        keep = set(range(len(units)) if group is None or group.keep is None else group.keep)
        for unit, score in enumerate(units.tolist()):
            (stay if unit in keep else gone).append(score)
    stacks = {"stay": stay, "go": gone} if gone else {"units": stay}
    svg = histogram(stacks, log_x=min(stay + gone) > 0)
    spread = {name: quantiles(values, QUANTILES) for name, values in stacks.items() if values}
    rows = tuple((Cell(name), *(Cell(f"{value:.3g}") for value in values)) for name, values in spread.items())
    title = f"Scores of {_words(kind)}"
    return Figure(title, svg, Table(title, ("Units", *_QUANTILE_NAMES), rows))


def _by_layer(kind: str, layers: Sequence[tuple[int, Tensor]]) -> Figure:
    """The median of each layer's scores, and their spread."""
    spread = [(layer, quantiles(units, QUANTILES)) for layer, units in layers]
    medians = {"median": [(layer, values[2]) for layer, values in spread]}
    bands = [[(layer, values[low], values[high]) for layer, values in spread] for low, high in ((0, 4), (1, 3))]
    log_y = all(values[0] > 0 for _, values in spread)
    svg = line_chart(medians, x_label="layer", y_label="score", log_y=log_y, bands=bands)
    rows = tuple((Cell(str(layer)), *(Cell(f"{value:.3g}") for value in values)) for layer, values in spread)
    title = f"Scores of {_words(kind)} by layer: median, middle half, and 5 to 95 %"
    return Figure(title, svg, Table(title, ("Layer", *_QUANTILE_NAMES), rows))


_QUANTILE_NAMES = tuple(f"{100 * share:.0f} %" for share in QUANTILES)
