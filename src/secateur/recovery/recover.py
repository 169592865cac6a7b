"""Recipe -> one ordinary folder with the trained model: a pruned one, or a dense one that is cut first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from secateur import processes
from secateur.data.calibration import CalibrationOptions
from secateur.errors import TrainingError
from secateur.pipeline.cache import has_begun, work_folder
from secateur.pipeline.options import RunOptions
from secateur.progress import Clock
from secateur.recovery.cut_and_train import cut_and_train
from secateur.recovery.layers_first import check_layers_first
from secateur.recovery.recipe import RecoverRecipe
from secateur.recovery.result import RecoverResult
from secateur.recovery.setup import check_recipe, prepare, training_key, with_method
from secateur.recovery.training import train_folder


def recover(recipe: RecoverRecipe, out: str | Path, *, run: RunOptions | None = None) -> RecoverResult:
    """Train a model and write the result as one ordinary folder; LoRA is merged into the weights.

    With `recipe.cut`, a dense model is cut first. With `run.resume`, a killed run goes on from its last checkpoint, to
    the same weights. Raises `SecateurError`; where the loss becomes NaN or Inf, the folder is there and holds the best
    checkpoint before.
    """
    processes.join()
    out, run = Path(out), run or RunOptions()
    clock = Clock(run.bars)
    recipe = with_method(recipe)
    check_recipe(recipe, out, overwrite=run.overwrite)
    check_layers_first(recipe.options)
    if recipe.cut is not None:
        result = cut_and_train(recipe, recipe.cut, recipe.calibration or CalibrationOptions(), out, run, clock)
    else:
        with work_folder(out, training_key(recipe), resume=run.resume) as work:
            resumed = has_begun(work)
            setup = prepare(recipe, work, clock)
            result = train_folder(setup, out, work, made_by=recipe, run=run, clock=clock)
        result = replace(result, resumed=resumed)
    if result.diverged is not None:
        raise TrainingError(f"{result.diverged}; {out} holds step {result.best_step}, the best checkpoint before")
    return result
