"""The command that trains what a cut has left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from secateur.cli.options import MODEL, OUT, Fields, Given, Loading, Quiet, Run, model_and_out
from secateur.cli.output import check_files, finish, run_options, show
from secateur.data.options import DataOptions
from secateur.errors import DataError, PlanError, RecipeError
from secateur.models.loading import LoadOptions
from secateur.pipeline.recipe import prune_recipe
from secateur.recovery.options import RecoverOptions, options_for
from secateur.recovery.recipe import RecoverRecipe, RoundsRecipe, load_recover_recipe
from secateur.recovery.recover import recover
from secateur.recovery.rounds import prune_and_recover
from secateur.report.formatting import format_bytes
from secateur.report.tables.evaluation import recovery_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What `recover` takes besides the options of data and training."""

    preset: Literal["default", "llm-pruner"] = "default"
    """default, or llm-pruner: the paper's settings."""
    teacher: str | None = None
    """Teacher for distillation. Default: the dense model that the folder's record names."""
    texts: tuple[str, ...] = ()
    """Held-out text NAME=FILE that picks the best checkpoint; may be repeated."""
    rounds: int | None = None
    """Prune a dense model and train it in so many rounds; with --ratio or --prune-recipe."""
    ratio: float | None = None
    """Share of the non-embedding parameters that all rounds together remove."""
    recipe: Path | None = None
    """Train as this YAML file says, with OUT alone as an argument; no other options."""
    prune_recipe: Path | None = None
    """How to prune in rounds: a recipe of `prune`."""


DATA = Fields(DataOptions, main="sources samples", names={"sources": "--data"}, omit="seed")
TRAINING = Fields(RecoverOptions, main="method epochs max_steps")
RECOVERY = Fields(
    Recovery, main="recipe preset teacher texts rounds ratio prune_recipe", names={"texts": "--eval"}, build=True
)


def recover_command(
    pruned: Annotated[str, MODEL],
    out: Annotated[Path | None, OUT] = None,
    /,
    *,
    data: Annotated[Given, DATA],
    training: Annotated[Given, TRAINING],
    how: Annotated[Recovery, RECOVERY],
    run: Run,
    loading: Loading,
    output: Quiet,
) -> None:
    """Train a pruned model, with LoRA or from the dense one.

    Writes one ordinary folder; LoRA is merged into the weights. A run that was killed continues with --resume.
    With --rounds N --ratio R, a dense model is pruned and trained N times in turns, until R of it is gone.
    """
    name, out = model_and_out(pruned, out, how.recipe, "recover")
    check_files(output.json, made=out, run=run.get("folder"))
    recipe = _recipe(name, data, training, how, loading)
    how_run = run_options(run, quiet=output.quiet)
    if isinstance(recipe, RoundsRecipe):
        recovered, trained = prune_and_recover(recipe, out, run=how_run), recipe.training
    else:
        recovered, trained = recover(recipe, out, run=how_run), recipe
    pruned, seed = trained.model, trained.options.seed
    folder, models = run.get("folder"), [pruned, str(out)]
    finish(recovered.to_json(), output.json, run=folder, kind="recover", seed=seed, models=models)
    if output.quiet:
        return
    if run.get("resume"):
        print("resumed a killed run" if recovered.resumed else "no killed run of this to resume: started anew")
    show(recovery_tables(recovered))
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in recovered.seconds.items())
    print(f"wrote {recovered.out} ({stages}; peak memory {format_bytes(recovered.peak_rss_bytes)})")


def _recipe(
    pruned: str | None, data: Given, training: Given, how: Recovery, loading: LoadOptions
) -> RecoverRecipe | RoundsRecipe:
    """The recipe that a command line asks for. Raises `SecateurError`."""
    if how.recipe is not None:
        if data or training:
            odd = next(iter({**data, **training})).replace("_", "-")
            raise RecipeError(f"--recipe {how.recipe} says all about the training: leave out {odd}")
        return load_recover_recipe(how.recipe)
    assert pruned is not None
    if "sources" not in data:
        raise DataError("--data is missing: a file, a data set or `demo` to train on, for example --data alpaca.json")
    options, reading = options_for(how.preset, training, {**data, "seed": training.get("seed", 0)})
    recipe = RecoverRecipe(pruned, reading, options, how.texts, how.teacher, loading)
    if how.rounds is None and how.ratio is None and how.prune_recipe is None:
        return recipe
    if how.ratio is None and how.prune_recipe is None:
        raise PlanError("rounds: say how much is to go in all, for example --rounds 3 --ratio 0.5")
    prune = prune_recipe(pruned, file=how.prune_recipe, cut={} if how.ratio is None else {"ratio": how.ratio})
    return RoundsRecipe(recipe, prune.cut, prune.calibration, 1 if how.rounds is None else how.rounds)
