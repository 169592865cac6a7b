"""A run folder -> one HTML page, written whole or not at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.files import atomic_file
from secateur.report.content import Figure, KeyFigure, Section
from secateur.report.cuts import cuts_section, scores_section
from secateur.report.formatting import printable
from secateur.report.headline import key_figures
from secateur.report.provenance import provenance_section
from secateur.report.quality import frontier_section, models_section, quality_section, recovery_section, samples_section
from secateur.report.run import Run, load_run
from secateur.report.speed import speed_section

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    models_section,
    quality_section,
    speed_section,
    frontier_section,
    cuts_section,
    scores_section,
    recovery_section,
    samples_section,
    provenance_section,
)


@dataclass(frozen=True, slots=True)
class Report:
    """What a page shows: the headline, and the sections that the run has data for."""

    out: Path
    title: str
    key_figures: tuple[KeyFigure, ...]
    sections: tuple[Section, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur report --json` writes it."""
        return {
            "out": str(self.out),
            "title": self.title,
            "headline": [str(figure) for figure in self.key_figures],
            "sections": [section.id for section in self.sections],
            "charts": sum(isinstance(block, Figure) for section in self.sections for block in section.blocks),
        }


def write_report(run: str | Path, out: str | Path, *, overwrite: bool = False) -> Report:
    """Write the page of a run folder as one file that needs no other, no network and no JavaScript.

    Charts need matplotlib; without it the page has the tables of their numbers. Raises `CheckpointError` where there is
    no run folder, it has no log, a file of it is damaged, or the page cannot be written.

    >>> import tempfile
    >>> from secateur.pipeline.run_log import append_entry
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = {"results": [{"model": "demo", "parameters": 134515008}]}
    ...     _ = append_entry(Path(folder), "secateur profile demo", "profile", result, seed=0, models=["demo"])
    ...     report = write_report(folder, Path(folder) / "report.html")
    ...     (Path(folder) / "report.html").read_text()[:15], [section.id for section in report.sections]
    ('<!DOCTYPE html>', ['models', 'provenance'])
    """
    loaded = load_run(Path(run))
    sections = tuple(section for make in SECTIONS if (section := make(loaded)) is not None)
    about = (loaded.baseline(loaded.result) if loaded.result else None) or next(iter(loaded.models), None)
    title = f"{about.name}: pruning report" if about is not None else "Pruning report"
    report = Report(Path(out), title, key_figures(loaded), sections)
    page = render(report, loaded)
    with atomic_file(Path(out), overwrite=overwrite) as file:
        file.write_text(page, encoding="utf-8")
    return report


def render(report: Report, run: Run) -> str:
    """The page itself. Whatever the log holds is text: the templates and matplotlib escape all of it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["with_ids_of"] = _with_ids_of
    return environment.get_template("page.html.j2").render(report=report, first=run.entries[0], last=run.entries[-1])


def _with_ids_of(svg: str, figure: str) -> str:
    """A chart whose ids (of clip paths and markers) no other chart of the page has."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure}-", svg)
