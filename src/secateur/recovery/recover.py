"""Recipe -> one ordinary folder with the trained model: a pruned one, or a dense one that is cut in rounds."""

from __future__ import annotations

from pathlib import Path

from secateur import processes
from secateur.pipeline.recipe import RunOptions
from secateur.progress import Clock
from secateur.recovery.recipe import RecoverRecipe
from secateur.recovery.result import RecoverResult
from secateur.recovery.rounds import recover_in_rounds
from secateur.recovery.setup import plan_of, prepare
from secateur.recovery.training import train_folder


def recover(recipe: RecoverRecipe, out: str | Path, *, run: RunOptions | None = None) -> RecoverResult:
    """Train a model and write the result as one ordinary folder; LoRA is merged into the weights.

    With `recipe.rounds`, a dense model is cut and trained in rounds. With `run.resume`, a killed run goes on from its
    last checkpoint, to the same weights. Raises `SecateurError`.
    """
    processes.join()
    out, run = Path(out), run or RunOptions()
    clock = Clock(run.bars)
    if recipe.rounds is not None:
        return recover_in_rounds(recipe, recipe.rounds, out, run, clock)
    plan = plan_of(recipe.model) if recipe.options.hidden_states_weight else None
    setup = prepare(recipe, out, overwrite=run.overwrite, clock=clock)
    return train_folder(setup, out, plan=plan, run=run, clock=clock)
