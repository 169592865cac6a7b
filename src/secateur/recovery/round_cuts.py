"""The whole cut of a dense model -> the cut of each round, and one plan of the dense model for all of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig

from secateur.checkpoint.formats import check_saveable
from secateur.data.calibration import CalibrationOptions
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.models.loading import LoadOptions
from secateur.pipeline.pipeline import may_be_per_layer
from secateur.pipeline.recipe import PruneRecipe, RunOptions
from secateur.pipeline.run import prune_model
from secateur.planning.iterations import composed, options_of_iteration, sizes_after_iteration
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, plan
from secateur.progress import ProgressBars
from secateur.recovery.recipe import RoundOptions


@dataclass(frozen=True, slots=True)
class RoundCut:
    """The cut of one round."""

    number: int  # from 1
    options: CutOptions  # for the model that the round before left
    sizes: Mapping[str, int] | None  # units of each group that stay, where the budget counts units


def plan_rounds(
    rounds: RoundOptions, dense: Discovery, config: PreTrainedConfig, *, trust_remote_code: bool
) -> tuple[CutOptions, list[RoundCut]]:
    """Return the options of the whole cut, and the cut of every round.

    Raises `PlanError` or `CheckpointError` where a round cannot be cut, or no folder can hold what it leaves.
    """
    whole = replace(rounds.cut, iterations=rounds.count)
    if whole.shape == "per-layer" and not may_be_per_layer(config):
        whole = replace(whole, shape="uniform")
    cuts = [_round_cut(whole, dense, number) for number in range(1, rounds.count + 1)]
    for cut in cuts:
        of_dense = cut.options if cut.options.target is not None else replace(cut.options, ratio=whole.ratio)
        try:
            sizes = plan(dense, of_dense, config=config, fixed_sizes=cut.sizes, trust_remote_code=trust_remote_code)
            check_saveable(sizes, config=config, discovery=dense, trust_remote_code=trust_remote_code)
        except PlanError as error:
            raise PlanError(f"round {cut.number} of {rounds.count}: {error}") from error
    return whole, cuts


def _round_cut(whole: CutOptions, dense: Discovery, number: int) -> RoundCut:
    if whole.iterations == 1:
        return RoundCut(number, whole, None)
    options = options_of_iteration(whole, dense, number)
    return RoundCut(number, options, sizes_after_iteration(whole, dense, number))


def prune_round(
    source: str, out: Path, cut: RoundCut, calibration: CalibrationOptions, loading: LoadOptions, bars: ProgressBars
) -> float:
    """Prune what the round before left into a folder; a killed run resumes. Returns seconds."""
    pruning = PruneRecipe(source, cut=cut.options, calibration=calibration, loading=loading)
    pruned = prune_model(pruning, out, fixed_sizes=cut.sizes, run=RunOptions(resume=True, bars=bars))
    return sum(pruned.seconds.values())


def merge_plans(plans: Sequence[Plan], dense: Discovery) -> Plan:
    """Return one plan of the dense model for those of the rounds, each of what the round before left."""
    return functools.reduce(lambda first, second: composed(first, second, dense), plans)
