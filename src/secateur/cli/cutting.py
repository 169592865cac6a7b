"""Commands that say what can be cut, plan a cut, cut, and cut in many ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    Calibration,
    Common,
    Cut,
    MaxTokens,
    ModelArgument,
    OutFolder,
    Overwrite,
    Statistics,
    Texts,
    Without,
    option,
    option_names,
)
from secateur.cli.output import check_files, finish, show
from secateur.cli.reading import run_own_scores
from secateur.discovery.discover import discover
from secateur.discovery.summary import reach_as_json
from secateur.errors import PlanError
from secateur.evaluation.texts import read_texts
from secateur.export.serving import serving_note, tensor_parallel_sizes
from secateur.models.config import load_config
from secateur.pipeline.run import plan_model, prune_model
from secateur.pipeline.sweep import ratios_in, sweep
from secateur.planning.plan import read_plan
from secateur.report.formatting import format_bytes
from secateur.report.tables.discovery import discovery_tables
from secateur.report.tables.plan import plan_tables
from secateur.report.tables.sweep import sweep_tables


def discover_command(model: ModelArgument, common: Common) -> None:
    """Show what can be cut, and what is frozen and why.

    Groups of weight dimensions that shrink together, their units and the slices of each. Reads no weights.
    """
    check_files(common.json_file)
    discovery = discover(model, trust_remote_code=common.trust_remote_code)
    finish(discovery.to_json() | {"reach": reach_as_json(discovery)}, common.json_file)
    if not common.quiet:
        show(discovery_tables(discovery))


def plan_command(
    context: typer.Context,
    model: ModelArgument,
    *,
    out: Annotated[Path | None, typer.Option("--out", metavar="plan.json", help="Write the plan here.")] = None,
    cut: Cut,
    calibration: Calibration,
    run_folder: Statistics = None,
    sizes_only: Annotated[bool, typer.Option("--sizes-only", help="Do not score: say how many, not which.")] = False,
    common: Common,
) -> None:
    """Say what a cut would leave, before anything is cut.

    A config without weights is enough for the sizes; with weights, the plan says which units stay.
    """
    check_files(common.json_file, out, run=run_folder)
    run_own_scores(cut.own_scores)
    planned = plan_model(
        model,
        preset=cut.preset,
        cut=cut.options(),
        calibration=calibration.of_preset(cut.preset, common.seed),
        loading=common.loading,
        sizes_only=sizes_only,
        run=run_folder,
        bars=common.bars,
    )
    finish(planned.to_json(), common.json_file, context, [model])
    finish(planned.to_json(), out)
    if not common.quiet:
        show(plan_tables(planned))


def prune_command(
    context: typer.Context,
    model: ModelArgument,
    out: OutFolder,
    *,
    plan_file: Annotated[Path | None, option("--plan", "Cut what this plan says.", metavar="plan.json")] = None,
    cut: Cut,
    calibration: Calibration,
    run_folder: Statistics = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what a killed run has kept.")] = False,
    common: Common,
) -> None:
    """Write a smaller model that the usual loaders read.

    Scores every unit, plans the cut, cuts, and writes a folder with the plan and a record of the run beside the
    weights.
    """
    check_files(common.json_file, made=out, run=run_folder)
    run_own_scores(cut.own_scores)
    if plan_file is not None:
        _check_alone(context, plan_file)
    pruned = prune_model(
        model,
        out,
        preset=cut.preset,
        cut=cut.options(),
        given=read_plan(plan_file) if plan_file is not None else None,
        calibration=calibration.of_preset(cut.preset, common.seed),
        loading=common.loading,
        overwrite=overwrite,
        resume=resume,
        run=run_folder,
        command=context.obj,
        bars=common.bars,
        announce=None if common.quiet else lambda sizes: show(plan_tables(sizes)),
    )
    result, note = pruned.to_json(), None
    if pruned.plan.settings is not None:
        dense, smaller = [load_config(name, trust_remote_code=common.trust_remote_code) for name in (model, str(out))]
        result["tensor_parallel_sizes"] = list(tensor_parallel_sizes(smaller))
        note = serving_note(dense, smaller)
    finish(result, common.json_file, context, [model, str(out)])
    if not common.quiet:
        if note is not None:
            print(note)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in pruned.seconds.items())
        if resume:
            print("went on from what was kept" if pruned.resumed else "nothing was kept of this cut: started anew")
        print(f"wrote {pruned.out} ({stages}; peak memory {format_bytes(pruned.peak_rss_bytes)})")


def sweep_command(
    context: typer.Context,
    model: ModelArgument,
    *,
    ratios: Annotated[str, option("--ratios", "From A to B, or numbers with commas.", metavar="A:B:STEP")],
    scores: Annotated[
        str | None, option("--scores", "Scores to compare. [default: the preset's]", metavar="a,b")
    ] = None,
    presets: Annotated[str, typer.Option("--presets", metavar="a,b", help="Presets to compare.")] = "best",
    ppl: Texts = None,
    seq_len: Annotated[
        list[int] | None,
        typer.Option("--seq-len", metavar="N", help="Tokens of a window; may be repeated. [default: 128]"),
    ] = None,
    max_tokens: MaxTokens = None,
    cut: Annotated[Cut, Without("preset", "ratio", "target", "score")],
    calibration: Calibration,
    run_folder: Annotated[
        Path, typer.Option("--run", metavar="FOLDER", help="Keep statistics, points and the picture here.")
    ] = Path("secateur-sweep"),
    plot: Annotated[
        bool | None,
        option("--plot/--no-plot", "Draw the frontier. [default: where matplotlib is installed]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the points that are done.")] = False,
    common: Common,
) -> None:
    """Cut by several ratios and scores; show what each costs.

    Every cut is made and repaired in memory, and its perplexity measured. What no other cut beats in both size and
    perplexity is marked, and drawn.
    """
    check_files(common.json_file, run=run_folder)
    run_own_scores(cut.own_scores)
    found = sweep(
        model,
        ratios=ratios_in(ratios),
        scores=() if scores is None else [name.strip() for name in scores.split(",")],
        presets=[name.strip() for name in presets.split(",")],
        cut=cut.options(),
        calibration=calibration.about(common.seed),
        texts=read_texts(ppl or []),
        seq_lens=seq_len or [128],
        max_tokens=max_tokens,
        run=run_folder,
        loading=common.loading,
        resume=resume,
        plot=plot,
        bars=common.bars,
    )
    finish(found.to_json(), common.json_file, context, [model])
    if not common.quiet:
        show(sweep_tables(found))


def _check_alone(context: typer.Context, plan_file: Path) -> None:
    """Raise `PlanError` for options of the cut beside a plan, which would be ignored."""
    for name in (*option_names(Cut), *option_names(Calibration)):
        source = context.get_parameter_source(name)
        if name != "own_scores" and source is not None and source.name == "COMMANDLINE":
            raise PlanError(f"--plan {plan_file} says all about the cut: leave out --{name.replace('_', '-')}")
