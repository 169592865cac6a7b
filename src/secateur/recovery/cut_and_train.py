"""Recipe with a cut -> one ordinary folder: a dense model is cut, and what is left is trained, in one command.

It is cut as `prune` does and trained as `recover` does. The folder that the cut makes lies in the work folder, so a
killed run goes on where it was.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from secateur import processes
from secateur.checkpoint.formats import check_saveable
from secateur.data.calibration import CalibrationOptions
from secateur.discovery.discover import discover
from secateur.errors import ModelError, PlanError, TrainingError
from secateur.files import MODEL_MARK
from secateur.models.config import is_custom, load_config
from secateur.models.weight_files import has_weights
from secateur.pipeline.cache import has_begun, work_folder
from secateur.pipeline.options import RunOptions
from secateur.pipeline.recipe import PruneRecipe
from secateur.pipeline.run import prune_model
from secateur.planning.options import TOKENS, CutOptions
from secateur.planning.plan import plan
from secateur.progress import Clock
from secateur.recovery.recipe import RecoverRecipe
from secateur.recovery.result import RecoverResult
from secateur.recovery.setup import prepare, training_key
from secateur.recovery.training import train_folder


def cut_and_train(
    recipe: RecoverRecipe, cut: CutOptions, calibration: CalibrationOptions, out: Path, run: RunOptions, clock: Clock
) -> RecoverResult:
    """Cut a dense model, train what is left, and write one ordinary folder. Raises `SecateurError`.

    What can be refused is refused, and the data are read (or written, by the dense model), before anything is cut.
    """
    if recipe.options.save_adapter:
        raise TrainingError(
            "--save-adapter: the folder that an adapter belongs to is not kept where one command cuts and trains. "
            "Expected two: `secateur prune MODEL CUT`, `secateur recover CUT OUT --save-adapter`"
        )
    trust = recipe.loading.trust_remote_code
    config = load_config(recipe.model, trust_remote_code=trust)
    if not has_weights(recipe.model):
        raise ModelError(f"{recipe.model!r} has a config and no weights to cut and train; name a folder with weights")
    with clock.stage("discover"):
        _check_cut(recipe, cut, calibration, config)
    taught = replace(recipe, teacher=recipe.teacher or recipe.model)
    with work_folder(out, training_key(taught), resume=run.resume) as work:
        resumed = has_begun(work)
        processes.wait()
        setup = prepare(taught, work, clock)
        pruned = work / "pruned"
        is_cut = (pruned / MODEL_MARK).is_file()
        processes.wait()  # all have looked, so one may write
        if not is_cut:
            to_cut = PruneRecipe(recipe.model, cut=cut, calibration=calibration, loading=recipe.loading)
            made = prune_model(to_cut, pruned, run=RunOptions(resume=True, bars=clock.bars, command=run.command))
            clock.seconds["prune"] = sum(made.seconds.values())
            gc.collect()
        of_pruned = replace(setup, recipe=replace(recipe, model=str(pruned), cut=None, calibration=None))
        result = train_folder(of_pruned, out, work, made_by=recipe, run=run, clock=clock)
    return replace(result, resumed=resumed)


def _check_cut(
    recipe: RecoverRecipe, cut: CutOptions, calibration: CalibrationOptions, config: PreTrainedConfig
) -> None:
    """Raise `PlanError` or `CheckpointError` where it cannot be cut, or no folder can hold what is left."""
    if TOKENS in cut.axes:
        raise PlanError(
            f"axes={','.join(cut.axes)}: a vocabulary is not cut and trained in one command. Cut it first, then train: "
            "`secateur prune MODEL OUT --axes ...`, `secateur recover OUT TRAINED`"
        )
    trust = recipe.loading.trust_remote_code
    dense = discover(recipe.model, start_tokens=calibration.start_tokens, trust_remote_code=trust)
    shape = "uniform" if is_custom(config) else cut.shape  # only what its config can say
    sizes = plan(dense, replace(cut, shape=shape), config=config, trust_remote_code=trust)
    check_saveable(sizes, config=config, discovery=dense, trust_remote_code=trust)
