"""A run -> how it was made: commands, seeds, versions, inputs and written folders, by their hashes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from secateur.checkpoint.record import Record, read_record
from secateur.data.calibration import recorded_options
from secateur.errors import CheckpointError
from secateur.files import PLAN_FILE, RECORD_FILE
from secateur.models.manifest import WEIGHTS, read_manifest
from secateur.report.content import Cell, Section, Table
from secateur.report.formatting import format_bytes
from secateur.report.run import Model, Run


def provenance_section(run: Run) -> Section:
    """What it takes to repeat the run."""
    lines = [(entry.command, f"{entry.time:%Y-%m-%d %H:%M} UTC", str(entry.seed)) for entry in run.entries]
    commands = tuple(tuple(map(Cell, line)) for line in dict.fromkeys(lines))  # the demo is one command
    versions: dict[str, dict[str, None]] = {}
    for entry in run.entries:
        for name, version in entry.versions.items():
            versions.setdefault(name, {})[version] = None
    rows = tuple((Cell(name), Cell(", ".join(found))) for name, found in versions.items())
    tables = (
        Table("Commands", ("Command", "Time", "Seed"), commands, text_columns=(0, 1)),
        Table("Versions", ("Package", "Version"), rows, text_columns=(0, 1)),
    )
    return Section("provenance", "How it was made", (*run.notes, *tables, *_hashes(run)))


def _hashes(run: Run) -> Iterator[str | Table]:
    """Calibration tokens as plans name them, dense weights as records do, and the files of the folders."""
    inputs: dict[tuple[str, str], None] = {}
    for cut in run.cuts:
        options = recorded_options(cut.scored)
        if isinstance(digest := cut.scored.get("calibration"), str) and options is not None:
            windows = f"{options.samples} windows of {options.length} tokens, seed {options.seed}"
            inputs[f"calibration tokens: {', '.join(options.text)}, {windows}", digest] = None
    folders: list[str | Table] = []
    for model in run.models:
        if model.role in ("pruned", "recovered") and " + " not in model.name:
            try:
                folder, record = _written_folder(run, model)
                folders.append(_folder_table(model.name, folder))
                inputs[f"weights of {record.model}", record.weights] = None
            except CheckpointError as error:
                folders.append(f"{model.name}: {error}.")
    if inputs:
        rows = tuple((Cell(what), Cell(digest)) for what, digest in inputs)
        yield Table("Inputs", ("Input", "SHA-256"), rows, text_columns=(0, 1))
    if folders:
        yield "Hashes of files are those of the folders' manifests; secateur verify FOLDER compares every byte."
    yield from folders


def _written_folder(run: Run, model: Model) -> tuple[Path, Record]:
    """The folder of a model, and its record; raises `CheckpointError` where it no longer holds what the log says."""
    for folder in (run.folder / Path(model.name).name, Path(model.name)):
        record = read_record(folder)
        if record is not None:
            command = record.command if record.recovery is None else record.recovery.get("command")
            if command in (None, *(entry.command for entry in run.entries if entry.kind in ("prune", "recover"))):
                return folder, record
    raise CheckpointError("the folder is gone, or holds another model now")


def _folder_table(name: str, folder: Path) -> Table:
    rows = tuple(
        (Cell(file), Cell(format_bytes(entry.bytes)), Cell(entry.sha256))
        for file, entry in (read_manifest(folder) or {}).items()
        if file.endswith(WEIGHTS) or file in (PLAN_FILE, RECORD_FILE, "config.json")
    )
    return Table(name, ("File", "Size", "SHA-256"), rows, text_columns=(0, 2))
