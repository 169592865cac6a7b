"""Groups, options and scores -> the Plan: how many units each group keeps, and which.

Sizes come from the discovery alone, so a plan without scores (for a model of which only the config is here) still
says exactly what a cut would leave.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from secateur.data.calibration import recorded_options
from secateur.decoding import build
from secateur.discovery.config_settings import stock_settings, with_settings
from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.groups import Discovery
from secateur.discovery.sizes import PrunedSizes
from secateur.errors import CheckpointError, PlanError, ScoreError, check_known
from secateur.files import read_json
from secateur.models.manifest import check_as_written
from secateur.planning.budget import Sizes, counter
from secateur.planning.engines import check_engine
from secateur.planning.latency import LatencyTable
from secateur.planning.options import TOKENS, CutOptions, with_repair
from secateur.planning.selection import groups_to_cut, units_to_keep
from secateur.planning.sizes import SizeSearch, candidate_sizes, format_budget, rounding_cost
from secateur.scoring.registry import SCORES
from secateur.scoring.scores import Scores
from secateur.vocabulary.token_ids import token_id_settings

FORMAT = 2
MOST_WIDTHS = 256  # on each side of a width that the config refuses, tried to name the nearest that it accepts


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """What one group keeps."""

    name: str
    kind: str
    layer: int | None
    """None where it runs through all layers."""
    units: int
    """Units of the dense model."""
    kept: int
    """How many stay."""
    keep: tuple[int, ...] | None = None
    """Which stay, ascending; None where nothing was scored."""
    spare: tuple[int, ...] | None = None
    """Those of them that repair may cut instead of others, ascending: the next cheapest. None: it chooses none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A cut, decided: plain data that can be printed, compared, saved and repeated."""

    model: str
    options: CutOptions
    groups: tuple[PlannedGroup, ...]
    """Those that lose units."""
    parameters: Mapping[str, int]
    """`dense`, `pruned`, `dense_non_embedding`, `pruned_non_embedding`."""
    macs: Mapping[str, int]
    """`dense`, `pruned`: one pass over 64 tokens."""
    settings: Mapping[str, Any] | None = None
    """The config settings that say the cut; None where none can."""
    refusal: str | None = None
    """Why none can."""
    scored: Mapping[str, Any] = field(default_factory=dict)
    """Score, reduction, seed, loss in nats per token, calibration options and the hash of the text's tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", with_repair(self.options))

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
    def kept_tokens(self) -> tuple[int, ...] | None:
        """The ids of the tokens that stay, ascending; None where the vocabulary stays whole, or is not decided."""
        return next((group.keep for group in self.groups if group.kind == TOKENS), None)

    def without_vocabulary(self) -> Plan:
        """The rest of the plan, that of a model whose vocabulary is cut already (its settings say so, too)."""
        return replace(self, groups=tuple(group for group in self.groups if group.kind != TOKENS))

    @property
    def decided(self) -> bool:
        """Whether the plan says which units stay, not only how many."""
        return all(group.keep is not None for group in self.groups)

    @property
    def groups_by_kind(self) -> dict[str, list[PlannedGroup]]:
        """The groups that lose units, by kind."""
        kinds = dict.fromkeys(group.kind for group in self.groups)
        return {kind: [group for group in self.groups if group.kind == kind] for kind in kinds}

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur plan --json` and `plan.json` hold it."""
        return {"format": FORMAT, **asdict(self), "groups": [asdict(group) for group in self.groups]}


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """Read back what `Plan.to_json` wrote. Raises `PlanError` for unknown keys, another format or other values."""
    if data.get("format") != FORMAT:
        raise PlanError(f"the plan has format {data.get('format')!r}, this version reads {FORMAT}: plan again")
    try:
        plan = build(Plan, {name: value for name, value in data.items() if name != "format"})
        recorded_options(plan.scored)
        return plan
    except ValueError as error:
        raise PlanError(f"the plan is damaged ({error}): plan again") from error


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


def check_score(options: CutOptions) -> None:
    """Raise an error when the score is unknown, or cannot score such axes.

    Plans that are read are not held to it: which units stay is decided, and the score may be one that its maker has.
    """
    check_known(ScoreError, "score", options.score, SCORES)
    if SCORES[options.score].needs in ("layers", "losses") and options.axes != ("layers",):
        raise PlanError(f"score={options.score} compares whole layers: use axes=layers with it")
    if SCORES[options.score].needs == "experts" and options.axes != ("experts",):
        raise PlanError(f"score={options.score} compares whole experts: use axes=experts with it")
    if SCORES[options.score].needs in ("grams", "masks") and options.axes == ("layers",):
        raise PlanError(f"score={options.score} is not for whole layers: use score=block_influence with axes=layers")


def plan(
    discovery: Discovery,
    options: CutOptions,
    *,
    config: PreTrainedConfig | None = None,
    scores: Scores | None = None,
    latency: LatencyTable | None = None,
    fixed_sizes: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Decide how many units each group keeps and, with scores, which.

    With a config, the settings that describe the result are found as well; where none can, the plan carries the
    reason. The custom code that a config names runs only with `trust_remote_code`. A budget of latency needs a latency
    table. `fixed_sizes` are units kept by group that were decided before; groups that it does not name stay whole.
    Raises `PlanError` when the budget cannot be met: nothing would be cut, or a group emptied.

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
    # 1. The groups that the options cut.
    search = SizeSearch(discovery, groups_to_cut(discovery, options), options, scores, latency)
    # 2. How many units each keeps: the candidate nearest to the budget that a stock config can say.
    candidates: Iterable[Sizes] = candidate_sizes(search)
    if fixed_sizes is not None:
        candidates = [{group.name: fixed_sizes.get(group.name, group.units) for group in search.groups}]
    # 3. Which units stay: the best by their scores.
    draft = _first_described(search, candidates, config, trust_remote_code=trust_remote_code)
    if config is not None and draft.settings is None and options.shape == "uniform" and fixed_sizes is None:
        draft = _in_layers(search, config, trust_remote_code=trust_remote_code) or draft
    if config is not None and options.engine is not None:
        # Sizes before scores are the same share of every layer; one ranking of all units makes them differ.
        differ = options.shape == "per-layer" and options.scope == "global" and scores is None and fixed_sizes is None
        stock = draft.settings is not None and not differ
        check_engine(options.engine, config, stock=stock, trust_remote_code=trust_remote_code)
    # 4. What is left, and what the scores were made from.
    return counted(discovery, replace(draft, scored=_provenance(search, draft)))


def _in_layers(search: SizeSearch, config: PreTrainedConfig, *, trust_remote_code: bool) -> Plan | None:
    """A plan that a config can say, which cuts only what lies in layers: the width of a pooler often has no setting."""
    groups = {axis: [group for group in each if group.layer is not None] for axis, each in search.axes.items()}
    if not all(groups.values()) or sum(map(len, groups.values())) == len(search.groups):
        return None
    inside = SizeSearch(search.discovery, groups, search.options, search.scores, search.latency)
    try:
        draft = _first_described(inside, candidate_sizes(inside), config, trust_remote_code=trust_remote_code)
    except PlanError:  # the budget cannot be met by these alone
        return None
    return draft if draft.settings is not None else None


def _first_described(
    search: SizeSearch, candidates: Iterable[Sizes], config: PreTrainedConfig | None, *, trust_remote_code: bool
) -> Plan:
    """The first candidate that a config can say as a plan; else the very first, with the reason of the refusal."""
    refused: Plan | None = None
    for kept in candidates:
        groups = _planned_groups(search, kept)
        if not groups:
            continue
        draft = Plan(search.discovery.model, search.options, groups, {}, {})
        if config is None:
            return draft
        try:
            settings = settings_of(draft, config, search.discovery, trust_remote_code=trust_remote_code)
        except PlanError as error:
            refused = refused or replace(draft, refusal=str(error))
        else:
            return replace(draft, settings=settings)
    if refused is None or config is None:
        raise PlanError(_nothing_removed(search))
    hint = _accepted_widths(config, search.discovery, refused, trust_remote_code=trust_remote_code)
    return replace(refused, refusal=f"{refused.refusal}{hint}")


def settings_of(
    decided: Plan, config: PreTrainedConfig, discovery: Discovery, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The config settings that say the sizes of a plan, and the new ids of special tokens. Raises `PlanError`."""
    sizes = decided.sizes
    tokens = next((group for group in decided.groups if group.kind == TOKENS), None)
    renamed: dict[str, Any] = {}
    if tokens is not None:  # a table must have room for the padding token
        keep = decided.kept_tokens or range(tokens.kept)
        renamed = token_id_settings(config.to_dict(), keep, size=tokens.units)
        config = with_settings(config, renamed)
    return renamed | stock_settings(config, discovery, sizes, trust_remote_code=trust_remote_code)


def _planned_groups(search: SizeSearch, kept: Sizes) -> tuple[PlannedGroup, ...]:
    """The groups that lose units; with scores, which stay."""
    return tuple(
        PlannedGroup(
            name=group.name,
            kind=group.kind,
            layer=group.layer,
            units=group.units,
            kept=kept[group.name],
            **({} if search.scores is None else units_to_keep(group, kept[group.name], search.scores, search.options)),
        )
        for group in search.groups
        if kept[group.name] < group.units
    )


def _accepted_widths(config: PreTrainedConfig, discovery: Discovery, draft: Plan, *, trust_remote_code: bool) -> str:
    """The nearest hidden widths below and above that the config accepts, where the planned one was refused."""
    if len(draft.groups) != 1 or draft.groups[0].kind != "hidden":
        return ""
    group = draft.groups[0]
    nearest = []
    for widths in (range(group.kept - 1, 0, -1), range(group.kept + 1, group.units)):
        for width in itertools.islice(widths, MOST_WIDTHS):
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


def _nothing_removed(search: SizeSearch) -> str:
    options = search.options
    widest = max(search.groups, key=lambda group: group.units)
    sizes = ", ".join(sorted({f"{group.kind} {group.units}" for group in search.groups}))
    return (
        f"{format_budget(options)} of {options.of} removes no unit of any group (units: {sizes}); "
        f"ratio={1 / widest.units:.4f} of=units removes one unit of {widest.name}"
    )


def counted(discovery: Discovery, draft: Plan) -> Plan:
    """The plan with the parameters and MACs of the dense and the pruned model."""
    sizes, dropped = draft.sizes.sizes, draft.sizes.dropped_layers
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
    )


def _provenance(search: SizeSearch, draft: Plan) -> dict[str, Any]:
    """What the scores were made from, and what rounded widths cost; empty without scores."""
    scores = search.scores
    if scores is None:
        return {}
    return {
        "score": scores.score,
        "reduce": scores.reduce,
        "seed": scores.seed,
        "calibration": scores.calibration,
        "calibration_options": None if scores.options is None else scores.options.to_json(),
        "loss": scores.loss,
        "by_kind": _by_kind(search, scores, draft),
        **rounding_cost(search, scores, draft.sizes.sizes),
    }


def _by_kind(search: SizeSearch, scores: Scores, draft: Plan) -> dict[str, dict[str, float]]:
    """What each kind of group gives to the budget (of units: parameters), by itself, and the scores that go with it.

    Of Fisher scores that sum is an estimate, in nats per token, of what the cut costs before repair.
    """
    count = search.count if search.options.of != "units" else counter("parameters", search.discovery)
    found = {}
    for kind, groups in draft.groups_by_kind.items():
        given = count({}) - count({group.name: group.kept for group in groups})
        gone = sum(
            float(scores.units[group.name].double().sum() - scores.units[group.name].double()[list(group.keep)].sum())
            for group in groups
            if group.keep is not None
        )
        found[kind] = {"given": given, "score": gone}
    return found
