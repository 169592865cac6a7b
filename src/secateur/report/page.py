"""A run folder -> one HTML page, written whole or not at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.files import atomic_file
from secateur.report.blocks import Figure, KeyFigure, Section
from secateur.report.curves import frontier_section, recovery_section
from secateur.report.headline import headline
from secateur.report.measurements import models_section, quality_section, samples_section, speed_section
from secateur.report.models import Facts
from secateur.report.provenance import provenance_section
from secateur.report.reading import Run, read_run
from secateur.report.units import cut_section, scores_section

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    models_section,
    quality_section,
    speed_section,
    frontier_section,
    cut_section,
    scores_section,
    recovery_section,
    samples_section,
    provenance_section,
)


@dataclass(frozen=True, slots=True)
class Report:
    """What a page says: the headline and the sections that a run has something for."""

    out: Path
    title: str
    figures: tuple[KeyFigure, ...]
    sentences: tuple[str, ...]
    sections: tuple[Section, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur report --json` writes it."""
        return {
            "out": str(self.out),
            "title": self.title,
            "headline": list(self.sentences),
            "sections": [section.id for section in self.sections],
            "charts": sum(isinstance(block, Figure) for section in self.sections for block in section.blocks),
        }


def write_report(run: str | Path, out: str | Path, *, overwrite: bool = False) -> Report:
    """Write the page of a run folder as one file that needs no other, no network and no JavaScript.

    Raises `CheckpointError` where there is no run folder, it holds nothing, a file of it is damaged, or the page cannot
    be written.

    >>> import tempfile
    >>> from secateur.pipeline.run_log import append_entry
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = {"results": [{"model": "demo", "parameters": 134515008}]}
    ...     _ = append_entry(Path(folder), "secateur profile demo", "profile", result, seed=0, models=["demo"])
    ...     report = write_report(folder, Path(folder) / "report.html")
    ...     (Path(folder) / "report.html").read_text()[:15], [section.id for section in report.sections]
    ('<!DOCTYPE html>', ['models', 'provenance'])
    """
    found = read_run(Path(run))
    report = report_of(found, Path(out))
    page = render(report, found)
    with atomic_file(Path(out), overwrite=overwrite) as file:
        file.write_text(page, encoding="utf-8")
    return report


# What HTML does not hold (control characters, lone surrogates), and what turns the direction of all that follows it.
_ODD = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)


def _printable(value: Any) -> Any:
    if type(value) is not str:
        return value
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", _ODD.sub("\N{REPLACEMENT CHARACTER}", value))


def report_of(run: Run, out: Path) -> Report:
    """What the page of a run says."""
    facts = Facts.of(run)
    figures, sentences = headline(facts)
    result = facts.result
    base = facts.baseline(result) if result is not None else None
    about = base or result or next(iter(facts.models), None)
    title = f"{about.name}: pruning report" if about is not None else "Pruning report"
    sections = tuple(found for section in SECTIONS if (found := section(facts)) is not None)
    return Report(out, title, figures, sentences, sections)


def render(report: Report, run: Run) -> str:
    """The page itself. What comes from the log is text, whatever it holds: the templates escape all of it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("page.html.j2")
    first, last = run.entries[0].time, run.entries[-1].time
    return template.render(
        report=report,
        first=first.strftime("%Y-%m-%d"),
        last=last.strftime("%Y-%m-%d"),
        versions=run.entries[-1].versions,
    )
