"""How the run was made: commands, seeds, versions, what went in and what lies on the disk, by its hashes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from secateur.checkpoint.record import PLAN_FILE, RECORD_FILE, Record, read_record
from secateur.errors import CheckpointError
from secateur.files import read_json
from secateur.models.manifest import WEIGHTS, read_manifest
from secateur.report.blocks import Block, Cell, Commands, Paragraph, Section, Subheading, Table
from secateur.report.formatting import format_bytes
from secateur.report.models import Facts, Model, folder_of, same_model


def provenance_section(facts: Facts) -> Section:
    """The record of the run, from which it can be repeated."""
    entries = facts.run.entries
    lines = [(entry.time.strftime("%Y-%m-%d %H:%M UTC"), entry.command, entry.seed) for entry in entries]
    blocks: list[Block] = [Subheading("Commands"), Commands(tuple(dict.fromkeys(lines)))]  # the demo's is one for all
    blocks.extend(Paragraph(note) for note in facts.run.notes)
    blocks += [Subheading("Versions"), _versions(facts)]
    inputs = list(_inputs(facts))
    if inputs:
        table = Table("What went in, by its SHA-256", ("What", "SHA-256"), tuple(inputs), words=(0, 1))
        blocks += [Subheading("Inputs"), table]
    blocks += [Subheading("Folders"), *_folders(facts)]
    return Section("provenance", "How it was made", tuple(blocks))


def _versions(facts: Facts) -> Table:
    """A row for each package; a column for each set of versions that entries were made with."""
    sets: list[dict[str, str]] = []
    for entry in facts.run.entries:
        if dict(entry.versions) not in sets:
            sets.append(dict(entry.versions))
    names = list(dict.fromkeys(name for each in sets for name in each))
    rows = tuple((Cell(name), *(Cell(each.get(name, "")) for each in sets)) for name in names)
    columns = ["Version"] if len(sets) == 1 else [f"Version, set {i + 1}" for i in range(len(sets))]
    return Table("What the run was made with", ("Package", *columns), rows, words=tuple(range(len(sets) + 1)))


def _inputs(facts: Facts) -> Iterator[tuple[Cell, ...]]:
    """Calibration tokens as the plans name them, and the dense weights as the records do."""
    seen: set[tuple[str, str]] = set()
    for cut in facts.run.cuts:
        digest = cut.scored.get("calibration")
        about = cut.scored.get("calibration_options") or {}
        if isinstance(digest, str) and isinstance(about, dict):
            told = f"{about.get('samples')} windows of {about.get('length')} tokens, seed {about.get('seed')}"
            row = (f"calibration tokens: {about.get('text')}, {told}", digest)
            if row not in seen:
                seen.add(row)
                yield Cell(row[0]), Cell(row[1])
    for model in facts.models:
        record = _record(facts, model)
        row = (f"weights of {record.model}", record.weights) if record is not None else ("", "")
        if record is not None and row not in seen:
            seen.add(row)
            yield Cell(row[0]), Cell(row[1])


def _folders(facts: Facts) -> Iterator[Block]:
    told = False
    for model in facts.models:
        folder = _made_folder(facts, model)
        if folder is None:
            if model.role in ("pruned", "recovered") and " + " not in model.name:
                told = True
                yield Paragraph(f"{model.name}: not there any more, or another model now.")
            continue
        try:
            manifest = read_manifest(folder) or {}
        except CheckpointError as error:
            told = True
            yield Paragraph(f"{model.name}: {error}")
            continue
        told = True
        rows = tuple(
            (Cell(name), Cell(format_bytes(entry.bytes)), Cell(entry.sha256))
            for name, entry in manifest.items()
            if name.endswith(WEIGHTS) or name in (PLAN_FILE, RECORD_FILE, "config.json")
        )
        yield Table(model.name, ("File", "Size", "SHA-256"), rows, words=(0, 2))
    if told:
        yield Paragraph("The hashes are those of the folders' manifests; secateur verify FOLDER compares every byte.")
    else:
        yield Paragraph("No folder was written in this run.")


def _made_folder(facts: Facts, model: Model) -> Path | None:
    """The folder of a model that this run made, where it still holds what was written."""
    folder = folder_of(facts.run, model.name)
    if folder is None or model.role not in ("pruned", "recovered"):
        return None
    try:
        for training in reversed(facts.run.trainings):
            if same_model(training.out, model.name):
                recovery = (read_record(folder) or Record("", "", None, 0, "", {}, None)).recovery
                same = recovery is not None and recovery.get("command") == training.entry.command
                return folder if same else None
        for cut in reversed(facts.run.cuts):
            if cut.out is not None and same_model(cut.out, model.name):
                written = [(g["name"], g["keep"]) for g in read_json(folder / PLAN_FILE)["groups"]]
                planned = [(g.name, None if g.keep is None else list(g.keep)) for g in cut.groups]
                return folder if written == planned else None
    except (CheckpointError, KeyError, TypeError):
        return None
    return None


def _record(facts: Facts, model: Model) -> Record | None:
    folder = _made_folder(facts, model)
    try:
        return read_record(folder) if folder is not None else None
    except CheckpointError:
        return None
