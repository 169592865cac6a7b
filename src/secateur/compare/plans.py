"""A model and the options of a cut -> its sizes at once, and the plan when the units have been scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.compare.models import Side
from secateur.discovery.groups import Discovery
from secateur.models.loading import LoadOptions
from secateur.pipeline.recipe import PruneRecipe, RunOptions, prune_recipe
from secateur.pipeline.run import plan_model
from secateur.planning.options import AXES
from secateur.planning.plan import Plan, plan
from secateur.planning.selection import groups_to_cut
from secateur.progress import ProgressBars


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans cuts of the models of a page."""

    run: Path
    """Folder for statistics, which serve the next plan, too."""
    loading: LoadOptions = field(default_factory=LoadOptions)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """Calibration options by name; the preset has the others."""

    def recipe(self, side: Side, preset: str, cut: Mapping[str, Any]) -> PruneRecipe:
        """The preset's recipe, with the options of a cut by name. Raises `SecateurError`."""
        recipe = prune_recipe(side.name, preset=preset, cut=cut, calibration=self.calibration)
        return replace(recipe, loading=self.loading)

    def sizes(self, side: Side, preset: str, cut: Mapping[str, Any]) -> Plan:
        """The sizes of a cut, at once: from the discovery, which is made once. Raises `SecateurError`."""
        return plan(side.discovery, self.recipe(side, preset, cut).cut)

    def units(self, side: Side, preset: str, cut: Mapping[str, Any], bars: ProgressBars | None = None) -> Plan:
        """The plan of a cut, as `secateur plan` makes it; `prune --plan` takes it. Raises `SecateurError`."""
        return plan_model(self.recipe(side, preset, cut), run=RunOptions(folder=self.run, bars=bars))


def possible_axes(discovery: Discovery) -> list[str]:
    """The axes of which a model has groups: attention, mlp, ..."""
    kinds = {group.kind for group in discovery.groups}
    return [axis for axis, wanted in AXES.items() if kinds & set(wanted)]


def kept_by_layer(side: Side, planned: Plan) -> dict[str, dict[str, tuple[int, int]]]:
    """Layer -> kind -> (units kept, units), of all kinds that the plan cuts."""
    kept = {group.name: group.kept for group in planned.groups}
    found: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for groups in groups_to_cut(side.discovery, replace(planned.options, layers=None)).values():
        for group in groups:
            layer = "model" if group.layer is None else f"layer {group.layer}"
            before = found[layer].get(group.kind, (0, 0))
            found[layer][group.kind] = (before[0] + kept.get(group.name, group.units), before[1] + group.units)
    return found
