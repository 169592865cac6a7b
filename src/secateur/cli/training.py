"""Training for the commands that train: `recover`, and `prune --recover`."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.options import Given
from secateur.cli.output import Output, finish, print_written, run_options
from secateur.cli.reading import count, named_values
from secateur.data.options import DataOptions
from secateur.decoding import decode, values_by_field
from secateur.errors import RecipeError
from secateur.pipeline.recipe import PruneRecipe
from secateur.recovery.options import BUDGETS, LoraOptions, RecoverOptions

if TYPE_CHECKING:
    from secateur.recovery.recipe import RecoverRecipe


def recipe_with_cut(cut: PruneRecipe, text: str) -> RecoverRecipe:
    """A recipe that cuts and then trains: `text` has options of a training, with commas between them.

    Raises `RecipeError` for what is no such option, and what the options raise.

    >>> recipe = recipe_with_cut(PruneRecipe("demo"), "minutes=20, data=self, rank=8")
    >>> recipe.options.minutes, recipe.options.lora.rank, recipe.data.sources, recipe.cut.ratio
    (20, 8, ('self',), 0.2)
    """
    from secateur.recovery.recipe import recover_recipe

    try:
        given = named_values(text)
        sources, teacher = (decode(str | None, given.pop(name, None), name) for name in ("data", "teacher"))
        if "tokens" in given:
            given["tokens"] = count(str(given["tokens"]))
        parts: dict[type, Given] = {DataOptions: {}, LoraOptions: {}, RecoverOptions: {}}
        kind_of = {each.name: kind for kind in parts for each in fields(kind)}
        for name, value in given.items():
            kind = kind_of.get(name, RecoverOptions)
            parts[kind] |= values_by_field(kind, {name: value})
    except ValueError as error:
        raise RecipeError(
            f"--recover {text}: {error}. Expected, for example, --recover minutes=20,data=FILE"
        ) from error
    if not set(BUDGETS) & set(given):
        raise RecipeError(
            f"--recover {text}: for how long is not said. Expected one of {', '.join(BUDGETS)}: minutes=20"
        )
    data = parts[DataOptions] | ({} if sources is None else {"sources": (sources,)})
    options = parts[RecoverOptions] | {"lora": parts[LoraOptions]}
    how: dict[str, Any] = {"cut": cut.cut, "calibration": cut.calibration, "loading": asdict(cut.loading)}
    return recover_recipe(cut.model, data=data, options=options, teacher=teacher, **how)


def train_and_show(recipe: RecoverRecipe, out: Path, run: Given, output: Output) -> None:
    """Train as the recipe says; print what it gave and write it as JSON where that was asked for."""
    from secateur.recovery.recover import recover
    from secateur.report.tables.evaluation import recovery_tables

    trained = recover(recipe, out, run=run_options(run, quiet=output.quiet))
    models, seed = [recipe.model, str(out)], recipe.options.seed
    tables = recovery_tables(trained)
    finish(trained.to_json(), output, tables, run=run.get("folder"), kind="recover", seed=seed, models=models)
    if not output.quiet:
        print_written(trained, resume=run.get("resume", False))
