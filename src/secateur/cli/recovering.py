"""The command that trains what a cut has left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from secateur.cli.options import MAIN, MODEL, Fields, Given, Loading, Quiet, Run, changed, model_and_out
from secateur.cli.output import check_files, finish, print_written, run_options
from secateur.data.options import DataOptions
from secateur.errors import PlanError
from secateur.pipeline.recipe import prune_recipe
from secateur.recovery.options import RecoverOptions
from secateur.recovery.recipe import RoundOptions, recover_recipe
from secateur.recovery.recover import recover
from secateur.report.tables.evaluation import recovery_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What `recover` takes besides the options of data and training."""

    preset: Literal["default", "llm-pruner"] | None = None
    """default, or llm-pruner: the paper's settings."""
    recipe: Path | None = None
    """Take options from this YAML file; options on the command line win."""
    teacher: str | None = None
    """Teacher for distillation. Default: the dense model that the folder's record names."""
    eval_texts: tuple[str, ...] = ()
    """Held-out text NAME=FILE that picks the best checkpoint; may be repeated."""
    rounds: int | None = None
    """Prune a dense model and train it in so many rounds; with --ratio or --prune-recipe."""
    ratio: float | None = None
    """Share of the non-embedding parameters that all rounds together remove."""
    prune_recipe: Path | None = None
    """How to prune in rounds: a recipe of `prune`."""


DATA = Fields(DataOptions, main="sources samples", names={"sources": "--data"}, omit="seed")
TRAINING = Fields(RecoverOptions, main="method epochs max_steps")
RECOVERY = Fields(Recovery, group=MAIN, names={"eval_texts": "--eval"})


def recover_command(
    pruned: Annotated[str, MODEL],
    out: Annotated[Path | None, Parameter(help="Folder to write. With --recipe, OUT alone is enough.")] = None,
    /,
    *,
    data: Annotated[Given, DATA],
    training: Annotated[Given, TRAINING],
    how: Annotated[Given, RECOVERY],
    run: Run,
    loading: Loading,
    output: Quiet,
) -> None:
    """Train a pruned model, with LoRA or from the dense one.

    Writes one ordinary folder; LoRA is merged into the weights. A run that was killed continues with --resume.
    With --rounds N --ratio R, a dense model is pruned and trained N times in turns, until R of it is gone.
    """
    name, made = model_and_out(pruned, out, how.get("recipe"), "recover")
    check_files(output.json, made=made, run=run.get("folder"))
    changes: dict[str, Any] = {"data": data, "options": training, "loading": changed(loading)}
    if "seed" in training:
        changes["data"] = {**data, "seed": training["seed"]}
    changes |= {option: how[option] for option in ("eval_texts", "teacher") if option in how}
    if "ratio" in how or "prune_recipe" in how:
        cut = {"ratio": how["ratio"]} if "ratio" in how else {}
        prune = prune_recipe(name or "demo", file=how.get("prune_recipe"), cut=cut)
        changes["rounds"] = RoundOptions(how.get("rounds", 1), prune.cut, prune.calibration)
    elif "rounds" in how:
        raise PlanError("rounds: say how much is to go in all, for example --rounds 3 --ratio 0.5")
    recipe = recover_recipe(name, preset=how.get("preset"), file=how.get("recipe"), **changes)
    recovered = recover(recipe, made, run=run_options(run, quiet=output.quiet))
    folder, models, seed = run.get("folder"), [recipe.model, str(made)], recipe.options.seed
    tables = recovery_tables(recovered)
    finish(recovered.to_json(), output, tables, run=folder, kind="recover", seed=seed, models=models)
    if not output.quiet:
        print_written(recovered, resume=run.get("resume", False))
