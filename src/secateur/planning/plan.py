"""Groups, scores and a budget -> the Plan: how many units each group keeps, and which.

Sizes come from the discovery alone, so a plan without scores (for a model of which only the config is here) still
says exactly what a cut would leave.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from secateur.discovery.config_settings import stock_settings
from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.groups import Discovery, Group
from secateur.discovery.sizes import PrunedSizes
from secateur.discovery.sublayers import may_go
from secateur.errors import CheckpointError, PlanError, ScoreError
from secateur.files import read_json
from secateur.models.manifest import check_as_written
from secateur.planning.allocation import Curve, cheapest, damage_at, families, least_damage
from secateur.planning.latency import LatencyTable
from secateur.planning.options import AXES, CutOptions, check_score
from secateur.scoring.scores import Scores

WIDE = ("mlp", "expert_mlp", "shared_mlp", "latent", "hidden")  # kinds that are cut to a width, however few units
MANY_UNITS = 64  # groups of fewer units (heads, layers) are cut first, the others take up the rest of the budget
FORMAT = 1


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """What one group keeps: how many units, and which (None while nothing is scored)."""

    name: str
    kind: str
    layer: int | None
    units: int
    kept: int
    keep: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A cut, decided: plain data that can be printed, compared, saved and repeated."""

    model: str
    options: CutOptions
    groups: tuple[PlannedGroup, ...]  # those that lose units
    parameters: Mapping[str, int]  # dense, pruned, dense_non_embedding, pruned_non_embedding
    macs: Mapping[str, int]  # dense, pruned: one pass over 64 tokens
    settings: Mapping[str, Any] | None = None  # config settings that say the cut; None when none can
    refusal: str | None = None  # why none can
    scored: Mapping[str, Any] = field(default_factory=dict)  # score, reduce, seed, loss; calibration options and hash

    @property
    def sizes(self) -> PrunedSizes:
        """The sizes that the plan leaves."""
        layers = next((g for g in self.groups if g.kind == "layer"), None)
        dropped: frozenset[int] = frozenset()
        if layers is not None:
            keep = layers.keep if layers.keep is not None else range(layers.kept)
            dropped = frozenset(range(layers.units)) - frozenset(keep)
        return PrunedSizes({g.name: g.kept for g in self.groups if g.kind != "layer"}, dropped)

    @property
    def decided(self) -> bool:
        """Whether the plan says which units stay, not only how many."""
        return all(group.keep is not None for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur plan --json` and `plan.json` hold it."""
        data = asdict(self)
        data["groups"] = [asdict(group) for group in self.groups]
        return {"format": FORMAT, **data}


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """Read back what `Plan.to_json` wrote. Raises `PlanError` for unknown keys, another format or other values."""
    if data.get("format") != FORMAT:
        raise PlanError(f"the plan has format {data.get('format')!r}, this version reads {FORMAT}: plan again")
    known = {f.name for f in fields(Plan)}
    unknown = set(data) - known - {"format"}
    if unknown or not known <= set(data):
        odd = ", ".join(sorted(unknown or known - set(data)))
        raise PlanError(f"the plan has unknown or missing keys ({odd}); expected: {', '.join(sorted(known))}")
    try:
        options = dict(data["options"])
        options["axes"] = tuple(options["axes"])
        for pair in ("layers", "schedule"):
            options[pair] = tuple(options[pair]) if options.get(pair) is not None else None
        groups = tuple(_planned_group(group) for group in data["groups"])
        for name in ("parameters", "macs", "scored"):
            dict(data[name])
        return Plan(**{**{k: data[k] for k in known}, "options": CutOptions(**options), "groups": groups})
    except (TypeError, ValueError, LookupError) as error:
        raise PlanError(f"the plan is damaged ({type(error).__name__}: {error}): plan again") from error


def _planned_group(data: Mapping[str, Any]) -> PlannedGroup:
    keep = data["keep"]
    for number in (data["units"], data["kept"], *(keep or ())):
        if type(number) is not int:
            raise ValueError(f"{data['name']}: expected whole numbers, found {number!r}")
    return PlannedGroup(**{**data, "keep": None if keep is None else tuple(keep)})


def read_plan(path: Path) -> Plan:
    """Read a plan file. Raises `PlanError` when there is none, it is not one, or not as `save` wrote it."""
    if not path.exists():
        raise PlanError(f"no plan at {path}: write one with `secateur plan MODEL --out {path}`")
    try:
        check_as_written(path.parent, lambda name: name == path.name)
        data = read_json(path)
    except CheckpointError as error:
        raise PlanError(f"{path} is not a plan: {error}") from error
    if not isinstance(data, dict):
        raise PlanError(f"{path} is not a plan: expected a JSON object, found {type(data).__name__}")
    try:
        return plan_from_json(data)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def plan(
    discovery: Discovery,
    options: CutOptions,
    *,
    config: PreTrainedConfig | None = None,
    scores: Scores | None = None,
    latency: LatencyTable | None = None,
    damage: Mapping[str, Curve] | None = None,
    kept: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Decide how many units each group keeps and, with scores, which.

    With a config, the settings that describe the result are found as well; where none can, the plan carries the
    reason. The custom code that a config names runs only with `trust_remote_code`. A budget of latency needs the table
    of what sizes take, and with scores, the scope `sensitivity` needs the damage that was measured (see
    `sensitivity`). `kept` says how many units of each group stay, where that was decided before. Raises `PlanError`
    when the budget cannot be met: nothing would be cut, or a group emptied.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover_groups
    >>> from secateur.models.loading import skeleton
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> options = CutOptions(ratio=0.5, of="units", axes=("mlp",))
    >>> decided = plan(discover_groups(skeleton(config)), options, config=config)
    >>> [(group.name, group.units, group.kept) for group in decided.groups], decided.settings
    ([('layers.0.mlp', 24, 12), ('layers.1.mlp', 24, 12)], {'ffn_dim': 12})
    """
    check_score(options)
    chosen = groups_to_cut(discovery, options)
    drafts: list[Plan] = []  # the first is nearest to what was asked
    settings = None
    candidates: Iterable[Mapping[str, int]] = _candidates(discovery, chosen, options, scores, latency, damage)
    if kept is not None:
        candidates = [{group.name: kept.get(group.name, group.units) for each in chosen.values() for group in each}]
    for sizes_left in candidates:
        groups = _planned(chosen, sizes_left, scores, options)
        if not groups:
            continue
        drafts.append(Plan(discovery.model, options, groups, {}, {}))
        if config is None:
            break
        try:
            settings = stock_settings(config, discovery, drafts[-1].sizes, trust_remote_code=trust_remote_code)
        except PlanError as error:
            drafts[-1] = replace(drafts[-1], refusal=str(error))
        else:
            drafts = drafts[-1:]
            break
    if not drafts:
        raise PlanError(_nothing_cut(discovery, chosen, options))
    draft = drafts[0]
    if draft.refusal is not None and config is not None:
        draft = replace(
            draft,
            refusal=draft.refusal + _accepted_widths(config, discovery, draft, trust_remote_code=trust_remote_code),
        )
    sizes, dropped = dict(draft.sizes.sizes), draft.sizes.dropped_layers
    return replace(
        draft,
        parameters={
            "dense": count_parameters(discovery),
            "pruned": count_parameters(discovery, sizes, dropped_layers=dropped),
            "dense_non_embedding": count_parameters(discovery, embeddings=False),
            "pruned_non_embedding": count_parameters(discovery, sizes, dropped_layers=dropped, embeddings=False),
        },
        macs={
            "dense": sum(count_macs(discovery).values()),
            "pruned": sum(count_macs(discovery, sizes, dropped_layers=dropped).values()),
        },
        settings=settings,
        scored={}
        if scores is None
        else {
            "score": scores.score,
            "reduce": scores.reduce,
            "seed": scores.seed,
            "calibration": scores.calibration,
            "calibration_options": None if scores.options is None else asdict(scores.options),
            "loss": scores.loss,
            **_rounding(discovery, chosen, options, scores, latency, damage, sizes),
        },
    )


def _rounding(
    discovery: Discovery,
    chosen: Mapping[str, Sequence[Group]],
    options: CutOptions,
    scores: Scores,
    latency: LatencyTable | None,
    damage: Mapping[str, Curve] | None,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """What widths that are multiples cost, beside any widths: in nats where damage was measured, else in scores."""
    if options.round_to == 1:
        return {}
    free = next(iter(_candidates(discovery, chosen, replace(options, round_to=1), scores, latency, damage)), {})
    groups = [group for family in chosen.values() for group in family]

    def harm(kept: Mapping[str, int]) -> float:
        left = [(group, kept.get(group.name, group.units)) for group in groups]
        if damage is not None:
            return sum(damage_at(damage[group.name], units) for group, units in left)
        whole = sum(float(scores.units[group.name].double().abs().sum()) for group in groups)
        gone = sum(
            float(scores.units[group.name].double().abs().sort().values[: group.units - units].sum())
            for group, units in left
        )
        return gone / max(whole, 1e-30)

    measure = "share of all scores" if damage is None else "nats per token"
    return {"rounding": {"measure": measure, "planned": harm(sizes), "any_widths": harm(free)}}


def _planned(
    chosen: Mapping[str, Sequence[Group]], kept: Mapping[str, int], scores: Scores | None, options: CutOptions
) -> tuple[PlannedGroup, ...]:
    """The groups that lose units; with scores, which stay."""
    return tuple(
        PlannedGroup(
            name=group.name,
            kind=group.kind,
            layer=group.layer,
            units=group.units,
            kept=kept[group.name],
            keep=None if scores is None else _keep(group, kept[group.name], scores, options),
        )
        for family in chosen.values()
        for group in family
        if kept[group.name] < group.units
    )


def _accepted_widths(config: PreTrainedConfig, discovery: Discovery, draft: Plan, *, trust_remote_code: bool) -> str:
    """The nearest widths below and above that the config accepts, where the one width of the model was refused."""
    if len(draft.groups) != 1 or draft.groups[0].kind != "hidden":
        return ""
    group = draft.groups[0]
    nearest = []
    for widths in (range(group.kept - 1, 0, -1), range(group.kept + 1, group.units)):
        for width in itertools.islice(widths, 256):
            try:
                stock_settings(config, discovery, PrunedSizes({group.name: width}), trust_remote_code=trust_remote_code)
            except PlanError:
                continue
            nearest.append(width)
            break
    if not nearest:
        return ""
    multiple = math.gcd(*nearest)
    hint = f"; --round-to {multiple} keeps to such widths" if multiple > 1 else ""
    stop = "" if (draft.refusal or "").endswith(".") else "."
    return f"{stop} The nearest widths that it accepts are {' and '.join(map(str, nearest))}{hint}."


def groups_to_cut(discovery: Discovery, options: CutOptions) -> dict[str, list[Group]]:
    """The groups that the options cut, by axis; in a layer range, those of its layers.

    Raises `PlanError` for a range outside the model, and for an axis of which it has no group.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> discovery = discover(AutoConfig.for_model("opt", num_hidden_layers=2, **sizes))
    >>> [group.name for group in groups_to_cut(discovery, CutOptions(ratio=0.5, axes=("mlp",)))["mlp"]]
    ['layers.0.mlp', 'layers.1.mlp']
    """
    total = discovery.depth
    first, last = options.layers if options.layers is not None else (0, total)
    if not 0 <= first < last <= total:
        raise PlanError(f"layers={first}:{last} is outside the model: it has layers 0:{total} (the end is left out)")
    if options.layers is not None and "hidden" in options.axes:
        raise PlanError("hidden runs through every layer: leave layers out")
    found: dict[str, list[Group]] = {}
    for axis in options.axes:
        groups = [group for group in discovery.groups if group.kind in AXES[axis]]
        if axis == "attention":
            # With one KV head there is nothing to choose from but its query heads.
            layers = {group.layer for group in groups}
            groups += [g for g in discovery.groups if g.kind == "query" and g.layer not in layers]
        found[axis] = [g for g in groups if g.layer is None or first <= g.layer < last]
        if options.sublayers:
            found[axis] = [replace(g, least=0) if may_go(discovery, g) else g for g in found[axis]]
        if not found[axis]:
            kinds = ", ".join(sorted({group.kind for group in discovery.groups}))
            raise PlanError(
                f"axes={axis}: {discovery.model} has no group of that kind in layers {first}:{last}; it has: {kinds}"
            )
    return found


def removed_units(units: int, ratio: float) -> int:
    """Units that a share takes: rounded down for few (heads, layers), up for many (channels), as LLM-Pruner does.

    LLM-Pruner keeps int(C * (1 - ratio)) of C channels and then whole heads: 60 % of 32 heads is 19, of 11008
    channels 6605.

    >>> removed_units(32, 0.6), removed_units(11008, 0.6)
    (19, 6605)
    """
    exact = units * ratio
    return math.floor(exact + 1e-9) if units < MANY_UNITS else math.ceil(exact - 1e-9)


def _weights(chosen: Mapping[str, Sequence[Group]], options: CutOptions) -> Callable[[Group], float]:
    """Each group's share in proportion to the mean of all: by a schedule a line over the layers, else 1."""
    if options.schedule is None:
        return lambda group: 1.0
    layers = [group.layer or 0 for family in chosen.values() for group in family]
    first, (low, high) = min(layers), options.schedule
    depth = max(max(layers) - first, 1)
    by_layer = {layer: low + (high - low) * (layer - first) / depth for layer in layers}
    mean = sum(by_layer[layer] for layer in layers) / len(layers)
    if mean == 0:  # one layer, whose share is the first of the two
        return lambda group: 1.0
    return lambda group: by_layer[group.layer or 0] / mean


def _kept_of_units(
    chosen: Mapping[str, Sequence[Group]], options: CutOptions, weigh: Callable[[Group], float]
) -> dict[str, int]:
    assert options.ratio is not None
    return {
        group.name: _rounded(
            group,
            max(group.least, group.units - removed_units(group.units, options.ratio * weigh(group)))
            if options.schedule is not None
            else group.units - removed_units(group.units, options.ratio),
            options,
        )
        for family in chosen.values()
        for group in family
    }


def _multiple(group: Group, options: CutOptions) -> int:
    """What the widths of a group are multiples of: as asked for, and as the kernels that read them need."""
    return math.lcm(options.round_to, group.multiple)


def _rounded(group: Group, kept: int, options: CutOptions) -> int:
    """The nearest width that is a multiple; heads and layers are not rounded."""
    multiple = _multiple(group, options)
    if group.units >= MANY_UNITS or group.kind in WIDE:
        if multiple > group.units:
            raise PlanError(f"round_to={options.round_to} is more than the {group.units} units of {group.name}")
        if multiple > 1 and kept < group.units:
            kept = min(max(multiple, round(kept / multiple) * multiple), group.units // multiple * multiple)
    if kept < group.least:
        leaves = "empty it" if group.least == 1 else f"leave fewer than the {group.least} that the model chooses"
        raise PlanError(
            f"{group.name}: removing {group.units - kept} of its {group.units} units would {leaves}; "
            f"ratio={(group.units - group.least) / group.units:.4f} is the most it can give"
        )
    return kept


def _candidates(
    discovery: Discovery,
    chosen: Mapping[str, Sequence[Group]],
    options: CutOptions,
    scores: Scores | None,
    latency: LatencyTable | None,
    damage: Mapping[str, Curve] | None,
) -> Iterator[dict[str, int]]:
    """Units kept by group, the nearest to the budget first.

    A budget takes the same share from every chosen group. Groups of few units (heads, layers) lose whole units of a
    noticeable size, so they are rounded down and the wide groups settle the difference. What follows the first
    candidate has other numbers of heads, for configs that refuse some.
    """
    weigh = _weights(chosen, options)
    if options.of == "units":
        yield _kept_of_units(chosen, options, weigh)
        return
    groups = [group for family in chosen.values() for group in family]
    count = _counter(discovery, options, latency)
    dense = count({})
    wanted = options.target if options.target is not None else round(dense * (1 - (options.ratio or 0)))
    least = count({group.name: group.least for group in groups})
    if wanted > dense:
        raise PlanError(f"target={wanted:,} is more than the dense model's {dense:,} ({options.of})")
    if wanted < least:
        raise PlanError(
            f"{_budget(options)} leaves {wanted:,} ({options.of}), but cutting {', '.join(chosen)} down to the fewest "
            f"units leaves {least:,}: at most ratio={1 - least / dense:.4f}, or more axes or layers"
        )
    few = [g for g in groups if g.units < MANY_UNITS and g.kind not in WIDE]
    many = [g for g in groups if g not in few]
    if options.scope != "local" and scores is not None:
        yield _allocated(chosen, count, wanted, options, scores, damage, few)
        if options.shape == "free":
            return
    if not many:
        yield _nearest_few(few, count, wanted, weigh)
        return
    share = (dense - wanted) / max(1, dense - least)
    most = max((g.units for g in few), default=1)
    fewest = {g.name: g.least for g in many}
    met, ends = False, []  # of what the wide groups can settle: nothing of them gone, or all that can go
    for removed in sorted(range(most), key=lambda n: (abs(n - math.floor(most * share + 1e-9)), n)):
        kept = {g.name: _without(g, removed / most * weigh(g)) for g in few}
        ends += [kept, kept | fewest]
        if count(kept | fewest) <= wanted <= count(kept):
            met = True
            yield kept | _nearest_many(many, kept, count, wanted, options, weigh)
    if not met:  # a head weighs more than all that the wide groups can give
        nearest = min(ends, key=lambda kept: abs(count(kept) - wanted))
        yield {g.name: nearest.get(g.name, g.units) for g in groups}


def _without(group: Group, share: float) -> int:
    """Units that are left without a share of them, rounded down; no fewer than the model needs."""
    return max(group.least, group.units - math.floor(group.units * share + 1e-9))


def _allocated(
    chosen: Mapping[str, Sequence[Group]],
    count: Callable[[dict[str, int]], int],
    wanted: int,
    options: CutOptions,
    scores: Scores,
    damage: Mapping[str, Curve] | None,
    few: Sequence[Group],
) -> dict[str, int]:
    """Units kept by one ranking of all, or by the damage that was measured."""
    coarse = {group.name for group in few}
    uniform, at_least = options.shape == "uniform", options.at_least

    def round_to(group: Group) -> int:
        return 1 if group.name in coarse else _multiple(group, options)

    if options.scope == "sensitivity":
        if damage is None:
            raise PlanError(
                "scope=sensitivity needs the damage of cuts: see secateur.pruning.sensitivity.damage_curves"
            )
        axes = [*chosen.values()]
        return least_damage(axes, damage, count, wanted, uniform=uniform, at_least=at_least, round_to=round_to)
    found = families([*chosen.values()], scores.units, count, uniform=uniform, at_least=at_least, round_to=round_to)
    return cheapest(found, count, wanted, coarse=lambda group: group.name in coarse)


def _counter(
    discovery: Discovery, options: CutOptions, latency: LatencyTable | None
) -> Callable[[dict[str, int]], int]:
    if options.of == "latency" and latency is None:
        raise PlanError("a budget of latency needs a latency table: see secateur.evaluation.timing.latency_table")

    def count(kept: dict[str, int]) -> int:
        kept = dict(kept)
        layers = kept.pop("layers", None)
        dropped = frozenset(range(layers, discovery.depth)) if layers is not None else frozenset()
        if options.of == "macs":
            return sum(count_macs(discovery, kept, dropped_layers=dropped).values())
        if options.of == "latency" and latency is not None:
            return round(latency.seconds(discovery, kept) * 1e6)
        if options.of == "memory":
            return options.item_bytes * count_parameters(discovery, kept, dropped_layers=dropped)
        embeddings = options.of == "parameters"
        return count_parameters(discovery, kept, dropped_layers=dropped, embeddings=embeddings)

    return count


def _nearest_many(
    groups: Sequence[Group],
    kept: Mapping[str, int],
    count: Callable[[dict[str, int]], int],
    wanted: int,
    options: CutOptions,
    weigh: Callable[[Group], float],
) -> dict[str, int]:
    """The one share of units, over all these groups, that comes nearest to the budget."""
    widest = max(group.units for group in groups)
    lightest = min((weigh(group) for group in groups if weigh(group) > 0), default=1.0)

    def at(step: int) -> dict[str, int]:
        return {g.name: _rounded(g, _without(g, step / widest * weigh(g)), options) for g in groups}

    low, high = 0, math.ceil((widest - 1) / min(lightest, 1.0))  # the fewest steps that leave no more than is wanted
    while low < high:
        middle = (low + high) // 2
        if count({**kept, **at(middle)}) <= wanted:
            high = middle
        else:
            low = middle + 1
    return min((at(step) for step in (low, max(0, low - 1))), key=lambda k: abs(count({**kept, **k}) - wanted))


def _nearest_few(
    groups: Sequence[Group],
    count: Callable[[dict[str, int]], int],
    wanted: int,
    weigh: Callable[[Group], float],
) -> dict[str, int]:
    fewest = max(group.units for group in groups)
    options = [{g.name: _without(g, step / fewest * weigh(g)) for g in groups} for step in range(fewest)]
    return min(options, key=lambda kept: abs(count(kept) - wanted))


def _budget(options: CutOptions) -> str:
    return f"target={options.target:,}" if options.target is not None else f"ratio={options.ratio:g}"


def _nothing_cut(discovery: Discovery, chosen: Mapping[str, Sequence[Group]], options: CutOptions) -> str:
    groups = [group for family in chosen.values() for group in family]
    smallest = min(groups, key=lambda group: 1 / group.units)
    sizes = ", ".join(sorted({f"{group.kind} {group.units}" for group in groups}))
    hint = f"ratio={1 / smallest.units:.4f} of=units removes one unit"
    return (
        f"{_budget(options)} of {options.of} removes no unit of any group (units: {sizes}); {hint} of {smallest.name}"
    )


def _keep(group: Group, kept: int, scores: Scores, options: CutOptions) -> tuple[int, ...]:
    """The best units, in order; in a layer range only its layers can go."""
    if group.name not in scores.units:
        raise ScoreError(f"there are no scores for {group.name}: score the model that is to be cut")
    values = scores.units[group.name]
    if len(values) != group.units:
        raise ScoreError(f"{group.name} has {group.units} units and {len(values)} scores")
    if not torch.isfinite(values).all():
        raise ScoreError(f"the scores of {group.name} hold NaN or Inf")
    if group.kind == "layer" and options.layers is not None:
        first, last = options.layers
        protected = torch.ones(group.units, dtype=torch.bool)
        protected[first:last] = False
        if kept < int(protected.sum()):
            raise PlanError(
                f"layers={first}:{last} holds {last - first} layers, fewer than the {group.units - kept} to drop"
            )
        values = values.masked_fill(protected, math.inf)
    return top_units(values, kept)


def top_units(scores: Tensor, kept: int) -> tuple[int, ...]:
    """The indices of the `kept` highest scores, ascending; of equal scores the first stays.

    >>> top_units(torch.tensor([0.5, 2.0, 0.5, 1.0]), 3)
    (0, 1, 3)
    """
    order = torch.sort(scores.double(), descending=True, stable=True).indices
    return tuple(sorted(order[:kept].tolist()))


def by_kind(plan_: Plan) -> dict[str, list[PlannedGroup]]:
    """The groups that lose units, by kind, for printing."""
    found: dict[str, list[PlannedGroup]] = defaultdict(list)
    for group in plan_.groups:
        found[group.kind].append(group)
    return dict(found)
