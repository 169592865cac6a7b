"""Commands that say what can be cut, plan a cut, prune, and compare many cuts.

Commands import what they call when they run, so that --help and a mistyped option need neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from secateur.cli.options import (
    CUTTING,
    MODEL,
    RUN,
    Cut,
    Fields,
    Folder,
    Given,
    Inputs,
    Loading,
    Measured,
    Quiet,
    Run,
    StartTokens,
    Trust,
    main,
    model_and_out,
    recipe_of,
    run_files,
)
from secateur.cli.output import Output, check_files, finish, print_written, run_options, show
from secateur.cli.reading import comma_separated, run_file
from secateur.cli.training import recipe_with_cut, train_and_show
from secateur.errors import PlanError
from secateur.pipeline.options import SweepOptions, ratios_in


def discover_command(
    model: Annotated[str, MODEL],
    /,
    *,
    rows: StartTokens,
    inputs: Inputs = None,
    loading: Trust,
    output: Quiet,
) -> None:
    """Show what can be cut, and what is frozen and why.

    Groups of weight dimensions that shrink together, their units and the slices of each. Reads no weights.
    """
    from secateur.discovery.coverage import coverage_as_json
    from secateur.discovery.discover import discover
    from secateur.report.tables.discovery import discovery_tables

    check_files(output.json)
    run_file("--inputs", inputs)
    discovery = discover(model, trust_remote_code=loading.trust_remote_code, **rows)
    result = discovery.to_json() | {"coverage": coverage_as_json(discovery)}
    finish(result, output, discovery_tables(discovery))


def plan_command(
    model: Annotated[str | None, MODEL] = None,
    /,
    *,
    cutting: Cut,
    out: Annotated[Path | None, main("Write the plan to this file.")] = None,
    sizes_only: Annotated[bool | None, main("Do not score: how many units stay, not which.", negative=())] = None,
    run: Folder,
    loading: Loading,
    output: Quiet,
) -> None:
    """Say what a cut would leave, before anything is cut.

    A config.json without weights is enough for the sizes; with weights, the plan says which units stay.
    """
    from secateur.pipeline.run import plan_model
    from secateur.report.tables.plan import plan_tables

    check_files(output.json, out, run=run.get("folder"))
    recipe = recipe_of(model, cutting, loading)
    if recipe.plan is not None:
        raise PlanError(
            f"{cutting['recipe']} prunes what {recipe.plan} says, so nothing is left to plan: read that file, or prune"
        )
    planned = plan_model(recipe, sizes_only=bool(sizes_only), run=run_options(run, quiet=output.quiet))
    result, folder, seed = planned.to_json(), run.get("folder"), recipe.calibration.seed
    finish(result, Output(quiet=True, json=out))
    finish(result, output, plan_tables(planned), run=folder, kind="plan", seed=seed, models=[recipe.model])


def prune_command(
    model: Annotated[str, MODEL],
    out: Annotated[Path | None, Parameter(help="Folder to write. With --recipe, OUT alone is enough.")] = None,
    /,
    *,
    cutting: Cut,
    plan: Annotated[Path | None, main("Prune what this plan says; no other options.")] = None,
    recover: Annotated[
        str | None,
        main("Then train what is left: minutes=20, tokens=400k or epochs=1, and other options of `secateur recover`."),
    ] = None,
    run: Run,
    loading: Loading,
    output: Measured,
) -> None:
    """Write a smaller model that the usual loaders read.

    Scores every unit, plans the cut, repairs and prunes, and writes a folder with the plan, the recipe and a record of
    the run beside the weights. With --recover, what is left is trained before the folder is written: on the calibration
    text, unless data=FILE is among the options.
    """
    from secateur.export.serving import serving_note, tensor_parallel_sizes
    from secateur.models.config import load_config
    from secateur.pipeline.run import prune_model
    from secateur.planning.plan import read_plan
    from secateur.report.tables.plan import plan_tables

    name, folder = model_and_out(model, out, cutting.get("recipe"), "prune")
    check_files(output.json, made=folder, run=run.get("folder"))
    if plan is not None:
        _check_alone(f"--plan {plan}", cutting)
    recipe, given = recipe_of(name, cutting, loading), None if plan is None else read_plan(plan)
    if recipe.plan is not None:
        _check_alone(f"{cutting['recipe']} prunes what {recipe.plan} says, which", cutting, beside=("recipe",))
    if recover is not None:
        if plan is not None or recipe.plan is not None:
            raise PlanError("--recover: a plan that was made before is cut alone; then run secateur recover")
        training = recipe_with_cut(recipe, recover)
        train_and_show(training, folder, run, output)
        return
    announce = None if output.quiet else lambda sizes: show(plan_tables(sizes))
    pruned = prune_model(recipe, folder, plan=given, run=run_options(run, quiet=output.quiet), announce=announce)
    result, note, seed = pruned.to_json(), None, recipe.calibration.seed
    models, trust = [recipe.model, str(pruned.out)], recipe.loading.trust_remote_code
    if pruned.plan.settings is not None:
        dense, smaller = [load_config(each, trust_remote_code=trust) for each in models]
        result["tensor_parallel_sizes"] = list(tensor_parallel_sizes(smaller))
        note = serving_note(dense, smaller)
    finish(result, output, run=run.get("folder"), kind="prune", seed=seed, models=models)
    if not output.quiet:
        if note is not None:
            print(note)
        print_written(pruned, resume=run.get("resume", False))


def _check_alone(plan: str, cutting: Given, *, beside: Sequence[str] = ()) -> None:
    """Raise `PlanError` for options of the cut beside a plan, which would be ignored."""
    given: list[str] = [name for name in ("preset", "recipe") if name in cutting and name not in beside]
    given += [f"{part}.{name}" for part in ("cut", "calibration") for name in cutting.get(part, ())]
    if given:
        raise PlanError(f"{plan} says all about the cut: leave out {CUTTING.option(given[0])}")


SWEEP = Fields(
    SweepOptions,
    main="ratios scores presets protocols max_tokens plot",
    names={"protocols": "--protocol"},
    read={"ratios": ratios_in, "scores": comma_separated, "presets": comma_separated},
)
SWEPT = replace(
    CUTTING,
    main="cut.of cut.axes cut.shape calibration.text calibration.samples",
    omit="preset recipe cut.ratio cut.target cut.score",
)


def sweep_command(
    model: Annotated[str, MODEL],
    /,
    *,
    options: Annotated[Given, SWEEP],
    ppl: Annotated[list[str] | None, main("Text to score, NAME=FILE; may be repeated.")] = None,
    cutting: Annotated[Given, SWEPT],
    run: Annotated[Given, replace(RUN, main="folder resume", omit="overwrite command bars")],
    loading: Loading,
    output: Measured,
) -> None:
    """Cut by several ratios and scores; show what each costs.

    Every cut is made and repaired in memory, and its perplexity measured. What no other cut beats in both size and
    perplexity is marked, and drawn. Points are kept in the run folder (`secateur-sweep`, unless --run names another).
    """
    from secateur.evaluation.texts import read_texts
    from secateur.pipeline.sweep import sweep
    from secateur.report.tables.evaluation import sweep_tables

    folder = run.get("folder", Path("secateur-sweep"))
    check_files(output.json, run=folder)
    run_files(cutting)
    if "ratios" not in options:
        raise PlanError("--ratios is missing: name the shares to remove, for example --ratios 0.1:0.6:0.1")
    calibration = cutting.get("calibration", {})
    wanted, texts = SweepOptions(**options), read_texts(ppl or [])
    how = run_options({**run, "folder": folder}, quiet=output.quiet)
    cut = cutting.get("cut")
    found = sweep(model, wanted, texts=texts, cut=cut, calibration=calibration, loading=loading, run=how)
    seed = calibration.get("seed", 0)
    finish(found.to_json(), output, sweep_tables(found), run=folder, kind="sweep", seed=seed, models=[model])
