"""MODEL -> plan or pruned folder: the whole way, resumable. Read `prune_model` first, then `pipeline.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import processes
from secateur.errors import ModelError
from secateur.files import check_apart, check_space, check_vacant
from secateur.models.config import check_not_quantized, load_config
from secateur.models.loading import DTYPES
from secateur.models.sources import resolve
from secateur.models.weight_files import has_weights
from secateur.pipeline.cache import Cache, StatisticsFolder, has_begun, run_key, work_folder
from secateur.pipeline.options import RunOptions
from secateur.pipeline.pipeline import Pipeline
from secateur.pipeline.recipe import PruneRecipe
from secateur.planning.plan import Plan, read_plan
from secateur.progress import Clock, ProgressBars, peak_rss
from secateur.scoring.registry import SCORES


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune_model` made."""

    plan: Plan  # of the dense model
    out: Path  # the folder
    seconds: Mapping[str, float]  # by stage
    peak_rss_bytes: int  # the most memory that the process held
    resumed: bool = False  # whether anything of a killed run was used

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur prune --json` writes it."""
        about = {"seconds": dict(self.seconds), "peak_rss_bytes": self.peak_rss_bytes, "resumed": self.resumed}
        return {**self.plan.to_json(), "out": str(self.out), **about}


def plan_model(recipe: str | PruneRecipe, *, sizes_only: bool = False, run: RunOptions | None = None) -> Plan:
    """Plan a cut; a model's name alone stands for the default recipe.

    With `sizes_only`, or where there are no weights to score, the plan says how many units stay and not which. The run
    folder keeps the statistics: where it has those of the same model and text, the model is not loaded. Raises
    `SecateurError`.
    """
    processes.join()
    recipe, run = _as_recipe(recipe), run or RunOptions()
    pipeline = Pipeline(recipe, clock=Clock(run.bars))
    sizes = pipeline.sizes(pipeline.start())
    if sizes_only or not has_weights(recipe.model):
        return sizes
    check_not_quantized(pipeline.config, name=recipe.model)
    if run.folder is not None:
        pipeline.statistics = StatisticsFolder(run.folder, recipe.model, pipeline.calibration, recipe.loading)
    return pipeline.plan(pipeline.start()) if pipeline.iterations == 1 else pipeline.cut()[1]


def prune_model(
    recipe: str | PruneRecipe,
    out: str | Path,
    *,
    plan: Plan | None = None,
    run: RunOptions | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> Pruned:
    """Discover, score, plan, repair, prune and save; a model's name alone stands for the default recipe.

    `plan` is a plan made before, in place of the recipe's options. `announce` is called with the plan as soon as its
    sizes are known. What can be refused is refused before the first weight is read. Raises `SecateurError`.
    """
    processes.join()
    recipe, run, out = _as_recipe(recipe), run or RunOptions(), Path(out)
    check_vacant(out, overwrite=run.overwrite)
    check_apart(resolve(recipe.model).path, out)
    config = load_config(recipe.model, trust_remote_code=recipe.loading.trust_remote_code)
    if not has_weights(recipe.model):
        instead = f"`secateur plan {recipe.model}` says what a cut leaves"
        raise ModelError(f"{recipe.model!r} has a config and no weights to cut; {instead}")
    check_not_quantized(config, name=recipe.model)
    given = plan if plan is not None else read_plan(Path(recipe.plan)) if recipe.plan is not None else None
    pipeline = Pipeline(recipe, given=given, clock=Clock(run.bars))
    if run.folder is not None:
        pipeline.statistics = StatisticsFolder(run.folder, recipe.model, pipeline.calibration, recipe.loading)
    sizes = pipeline.sizes(pipeline.start())
    pipeline.check_folder(sizes)
    dtype = DTYPES.get(recipe.loading.dtype) or getattr(config, "dtype", None) or torch.float32
    check_space(out, sizes.parameters.get("pruned", 0) * dtype.itemsize)
    if pipeline.options.repairs or (given is None and SCORES[pipeline.options.score].needs != "weights"):
        pipeline.reader.check_reads_text()
    known = given is not None or pipeline.options.scope == "local"  # else the scores decide on the sizes, too
    if announce is not None and known:
        announce(sizes)
    # Stages 4 to 8 for each iteration, 9 and 10 once; what is finished is kept until the folder is written.
    with work_folder(out, run_key(pipeline.recipe), resume=run.resume) as work:
        pipeline.cache = Cache(work)
        resumed = has_begun(work)
        decision = pipeline.decide()
        pipeline.check_folder(decision.plan)
        if announce is not None and not known:
            announce(decision.plan)
        decided = decision.plan
        if processes.is_first():
            pruned, decided = pipeline.apply(decision, room=out.absolute().parent)
            pipeline.save(pruned, decided, out, run)
        processes.wait()
    return Pruned(decided, out, pipeline.clock.seconds, peak_rss(), resumed)


def prune_as_planned(
    model: PreTrainedModel, plan: Plan, tokenizer: PreTrainedTokenizerBase | None, *, bars: ProgressBars | None = None
) -> PreTrainedModel:
    """The model that `prune --plan` would write, in memory: pruned, and repaired on the plan's calibration text.

    Raises `PlanError` when the plan is of another model.
    """
    recipe = PruneRecipe(plan.model, cut=plan.options)
    return Pipeline(recipe, given=plan, model=model, tokenizer=tokenizer, clock=Clock(bars)).cut()[0]


def _as_recipe(recipe: str | PruneRecipe) -> PruneRecipe:
    return PruneRecipe(recipe) if isinstance(recipe, str) else recipe
