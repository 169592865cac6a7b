"""A side and the settings of a cut -> its sizes at once; which units stay, when they are scored; the plan to download.

Sizes need the discovery alone, which is made once. Units need scores: from statistics that a run folder keeps, or from
scoring, as `secateur plan` does it.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from secateur.compare.sides import Side
from secateur.compare.turns import TURNS
from secateur.discovery.groups import Discovery
from secateur.errors import SecateurError
from secateur.models.loading import LoadOptions
from secateur.pipeline.cache import StatisticsFolder
from secateur.pipeline.recipe import PruneRecipe, RunOptions, prune_recipe
from secateur.pipeline.run import plan_model
from secateur.planning.options import AXES, BudgetName, settled
from secateur.planning.plan import Plan, plan
from secateur.planning.selection import groups_to_cut
from secateur.progress import Progress
from secateur.scoring.scores import Scores, scores_from
from secateur.scoring.statistics import Statistics, load_statistics
from secateur.scoring.unit_scores import covers

SHARES_OF = tuple(name for name in get_args(BudgetName) if name != "latency")  # which a machine has to measure first


class Stopped(SecateurError):
    """The user has stopped what was going on."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a page asks for; None and nothing mean what the preset says."""

    preset: str = "best"
    ratio: float = 0.2
    of: str | None = None
    axes: tuple[str, ...] = ()
    score: str | None = None
    shape: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by name.

        >>> Wish(ratio=0.3, score="l2").given
        {'ratio': 0.3, 'score': 'l2'}
        """
        found = {"ratio": self.ratio, "of": self.of, "axes": self.axes, "score": self.score, "shape": self.shape}
        return {name: value for name, value in found.items() if value or name == "ratio"}


@dataclass(frozen=True, slots=True)
class Workplace:
    """What planning works with: where statistics are kept, how models are loaded, the calibration asked for."""

    run: Path
    loading: LoadOptions = field(default_factory=LoadOptions)
    calibration: Mapping[str, Any] | None = None  # options by name

    def recipe(self, model: str, wish: Wish) -> PruneRecipe:
        """The preset's recipe, with what was asked for.

        >>> Workplace(Path("runs")).recipe("demo", Wish(preset="llm-pruner")).calibration.samples
        10
        """
        recipe = prune_recipe(model, preset=wish.preset, cut=wish.given, calibration=self.calibration)
        return replace(recipe, loading=self.loading)


def cuttable(discovery: Discovery) -> list[str]:
    """The axes of which a model has groups, as `--axes` names them.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> cuttable(discover(AutoConfig.for_model("opt", num_hidden_layers=2, **sizes)))
    ['attention', 'mlp', 'hidden', 'layers']
    """
    kinds = {group.kind for group in discovery.groups}
    return [axis for axis, wanted in AXES.items() if kinds & set(wanted)]


def sketch(side: Side, wish: Wish, place: Workplace) -> Plan:
    """The cut at once: its sizes, and which units stay where the run folder has what the score needs.

    The settings that would say it in a config are not looked for, which takes seconds for a large model; where a config
    refuses some number of heads, the plan that `decide` makes may have another. Raises `SecateurError` for a cut that
    cannot be done.
    """
    recipe = place.recipe(side.name, wish)
    return plan(side.discovery, recipe.cut, scores=_kept_scores(side, recipe, place))


def decide(
    side: Side,
    wish: Wish,
    place: Workplace,
    *,
    said: Callable[[str, float | None], None] = lambda stage, share: None,
) -> Plan:
    """The plan as `secateur plan` makes it: which units stay, and the settings of the config; `prune --plan` takes it.

    The model is scored where the run folder does not have what the score needs; models answer in between. `said` is
    told the stage and, where it is known, the share of it that is done; it may raise `Stopped`. Raises `SecateurError`.
    """

    @contextmanager
    def bars(stage: str) -> Iterator[Progress | None]:
        said(stage, None)

        def progress(done: int, total: int, _: str = "") -> None:
            TURNS.pass_on()
            said(stage, done / total if total else None)

        yield progress

    with TURNS:
        return plan_model(place.recipe(side.name, wish), run=RunOptions(folder=place.run, bars=bars))


@dataclass(frozen=True, slots=True)
class Kept:
    """What one layer keeps of one kind of units; layer None is the model as a whole."""

    layer: int | None
    kind: str
    units: int
    kept: int


def by_layer(side: Side, planned: Plan) -> list[Kept]:
    """What every layer keeps of each kind that the plan cuts, those it leaves alone, too; groups of one kind together.

    Layers that go as a whole keep nothing, once it is known which they are.
    """
    kept = {group.name: group.kept for group in planned.groups}
    found: dict[tuple[int | None, str], list[int]] = defaultdict(lambda: [0, 0])
    for groups in groups_to_cut(side.discovery, replace(planned.options, layers=None)).values():
        for group in groups:
            sizes = found[group.layer, group.kind]
            sizes[0] += group.units
            sizes[1] += kept.get(group.name, group.units)
    whole = [group for group in planned.groups if group.kind == "layer" and group.keep is not None]
    if whole:
        stay = set(whole[0].keep or ())
        return [Kept(layer, "layer", 1, int(layer in stay)) for layer in range(whole[0].units)]
    return [Kept(layer, kind, units, left) for (layer, kind), (units, left) in found.items()]


def about(side: Side, planned: Plan) -> str:
    """What a plan covers, and what can be done with it, in one or two sentences."""
    options = planned.options
    if not planned.decided:
        moves = options.scope != "local" and options.shape == "per-layer"
        ranked = " The ranking will move units between layers; the totals stay as they are." if moves else ""
        return f"Sizes only: how many units stay, not which.{ranked}"
    text = planned.scored.get("calibration_options")
    on = f" on {text['samples']} windows of {text['length']} tokens ({text['text']})" if text else ""
    then = {
        "none": "",
        "bias": ", and fits biases to make up for them",
        "least-squares": ", and fits by least squares what reads them",
        "reconstruct": ", and trains every layer to give what the dense one gives",
    }[options.repair]
    chosen = " (of those, within each layer, optimal brain surgeon may then choose others)" * (options.choose == "obs")
    return (
        f"The plan says which units of {len(planned.groups)} groups stay, chosen by the score {options.score}{on}"
        f"{chosen}. `secateur prune {side.name} OUT --plan plan.json` cuts the others{then}."
    )


def _kept_scores(side: Side, recipe: PruneRecipe, place: Workplace) -> Scores | None:
    """The scores of the groups to cut, where they can be had without the model."""
    options = recipe.cut
    calibration = settled(recipe.calibration, options)
    folder = StatisticsFolder(place.run, side.name, calibration, place.loading)
    if not folder.path.exists():
        return None
    statistics = _read(folder.path, folder.path.stat().st_mtime_ns, folder.key)
    groups = [group for each in groups_to_cut(side.discovery, options).values() for group in each]
    if statistics is None or not covers(statistics, options.score, side.discovery, groups):
        return None
    return scores_from(
        side.discovery,
        statistics,
        groups=groups,
        name=options.score,
        reduce=None if options.reduce == "auto" else options.reduce,
        options=calibration,
    )


@functools.lru_cache(maxsize=4)
def _read(path: Path, _changed: int, key: str) -> Statistics | None:
    try:
        return load_statistics(path, about=key)
    except SecateurError:
        return None  # there are none, or they are damaged
