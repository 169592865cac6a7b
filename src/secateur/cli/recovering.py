"""The command that trains what a cut has left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from secateur.cli.options import MODEL, OUT, Fields, Given, Loading, Quiet, Run
from secateur.cli.output import check_files, finish, run_options, show
from secateur.data.options import DataOptions
from secateur.errors import DataError, PlanError
from secateur.pipeline.recipe import prune_recipe
from secateur.recovery.options import RecoverOptions, options_for
from secateur.recovery.recipe import RecoverRecipe, RoundsRecipe
from secateur.recovery.recover import recover
from secateur.recovery.rounds import prune_and_recover
from secateur.report.formatting import format_bytes
from secateur.report.tables.recovery import recovery_tables


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
    prune_recipe: Path | None = None
    """How to prune in rounds: a recipe of `prune`."""


DATA = Fields(DataOptions, main="sources samples", names={"sources": "--data"}, omit="seed")
TRAINING = Fields(RecoverOptions, main="method epochs max_steps")
RECOVERY = Fields(
    Recovery, main="preset teacher texts rounds ratio prune_recipe", names={"texts": "--eval"}, build=True
)


def recover_command(
    pruned: Annotated[str, MODEL],
    out: Annotated[Path, OUT],
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
    check_files(output.json, made=out, run=run.get("folder"))
    if "sources" not in data:
        raise DataError("--data is missing: a file, a data set or `demo` to train on, for example --data alpaca.json")
    seed = training.get("seed", 0)
    options, reading = options_for(how.preset, training, {**data, "seed": seed})
    recipe = RecoverRecipe(pruned, reading, options, how.texts, how.teacher, loading)
    if how.rounds is None and how.ratio is None and how.prune_recipe is None:
        recovered = recover(recipe, out, run=run_options(run, quiet=output.quiet))
    elif how.ratio is None and how.prune_recipe is None:
        raise PlanError("rounds: say how much is to go in all, for example --rounds 3 --ratio 0.5")
    else:
        cut = {} if how.ratio is None else {"ratio": how.ratio}
        prune = prune_recipe(pruned, file=how.prune_recipe, cut=cut)
        in_rounds = RoundsRecipe(recipe, prune.cut, prune.calibration, 1 if how.rounds is None else how.rounds)
        recovered = prune_and_recover(in_rounds, out, run=run_options(run, quiet=output.quiet))
    folder, models = run.get("folder"), [pruned, str(out)]
    finish(recovered.to_json(), output.json, run=folder, command="recover", seed=seed, models=models)
    if output.quiet:
        return
    if run.get("resume"):
        print("resumed a killed run" if recovered.resumed else "no killed run of this to resume: started anew")
    show(recovery_tables(recovered))
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in recovered.seconds.items())
    print(f"wrote {recovered.out} ({stages}; peak memory {format_bytes(recovered.peak_rss_bytes)})")
