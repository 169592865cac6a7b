"""The log of a run folder -> its models with all that was measured of them, its cuts, trainings and sweeps.

Models are told apart by their names and paths; two spellings of one existing path are one model. A model that `prune`,
`recover` or `export` wrote has the model it was made from as parent. Of several measurements of one thing the last
counts, and those of a folder that was written again are dropped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from secateur.decoding import build_known, decode
from secateur.errors import CheckpointError, ScoreError
from secateur.models.options import DEMO
from secateur.pipeline.run_log import LogEntry, load_entries
from secateur.report.entries import BY_LENGTH, Accuracy, Cost, Cut, Evaluated, Perplexity, Sweep, Training
from secateur.scoring.scores import Scores, load_scores

ROLES = ("dense", "pruned", "recovered", "exported", "measured")
ROWS = tuple[Mapping[str, Any], ...]  # of a result with a row for each model
PLAN_TOKENS = 64  # of the pass whose MACs a plan has
LONGEST_LABEL = 26  # characters; the table of models has the whole name


@dataclass(frozen=True, slots=True)
class Model:
    """One model of a run, and what is known of it."""

    name: str  # as the commands name it
    role: str = "measured"  # one of ROLES
    label: str = ""  # what the report calls it: unique among the models, and short
    parent: str | None = None  # name of the model that it was made from
    cost: Cost = field(default_factory=Cost)
    perplexity: Mapping[str, Perplexity] = field(default_factory=dict)  # by test
    tasks: Mapping[str, Accuracy] = field(default_factory=dict)
    tasks_mean: Accuracy | None = None
    samples: Mapping[str, str] = field(default_factory=dict)  # by prompt

    @property
    def color(self) -> int:
        """Index of its color in charts."""
        return ROLES.index(self.role)


@dataclass(frozen=True, slots=True)
class Run:
    """All that a run folder holds."""

    folder: Path
    entries: tuple[LogEntry, ...]
    models: tuple[Model, ...]
    cuts: tuple[Cut, ...]
    trainings: tuple[Training, ...]
    sweeps: tuple[Sweep, ...]
    scores: tuple[Scores, ...]
    notes: tuple[str, ...]  # what of the log no longer holds

    def model(self, name: str) -> Model | None:
        """The model of that name or path."""
        return next((model for model in self.models if model_key(model.name) == model_key(name)), None)

    def baseline(self, model: Model) -> Model | None:
        """The model to compare with: the first of the line it was made from, else the first of all; None for itself."""
        base, seen = model, {model.name}
        while base.parent is not None and (parent := self.model(base.parent)) and parent.name not in seen:
            base = parent
            seen.add(base.name)
        if base is model and model.role == "measured":
            base = self.models[0]
        return None if base is model else base

    @property
    def result(self) -> Model | None:
        """The model that the run produced: the last one trained, else the last one cut."""
        written = [*(cut.out for cut in self.cuts if cut.out), *(training.out for training in self.trainings)]
        last = self.model(written[-1]) if written else None
        return last or next((model for model in self.models if model.role == "pruned"), None)


def load_run(folder: Path) -> Run:
    """Load a run folder. Raises `CheckpointError` where there is none, it has no log, or a file of it is damaged.

    >>> load_run(Path("no-such-folder"))
    Traceback (most recent call last):
    secateur.errors.CheckpointError: no-such-folder is no folder; name one that --run was given, for example: ...
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder; name one that --run was given, for example: secateur evaluate demo --run {folder}"
        )
    entries = load_entries(folder)
    if not entries:
        raise CheckpointError(
            f"{folder} has no log, so there is nothing to report: give the commands --run {folder}, for example: "
            f"secateur evaluate demo --run {folder}"
        )
    reader = _Reader()
    for entry in entries:
        try:
            reader.add(entry)
        except ValueError as error:
            raise CheckpointError(
                f"{entry.path} is damaged (the result of {entry.kind}: {error}). Remove it to make the report from "
                f"the other entries: rm {entry.path}"
            ) from error
    try:
        scores = tuple(load_scores(path) for path in sorted(folder.glob("scores*.safetensors")))
    except ScoreError as error:
        raise CheckpointError(f"{error}. Remove it to make the report without it") from error
    stale = "Measurements of {} from before it was last written are left out: it was another model."
    return Run(
        folder,
        tuple(entries),
        tuple(_labelled([*reader.models.values()])),
        *(tuple(reader.cuts), tuple(reader.trainings), tuple(reader.sweeps)),
        scores=scores,
        notes=tuple(map(stale.format, reader.stale)),
    )


def model_key(name: str) -> str:
    """One key for each model: a path that exists is known by where it leads.

    >>> model_key("runs/small/") == model_key("./runs/small"), model_key("demo")
    (True, 'demo')
    """
    try:
        if name and name != DEMO and Path(name).exists():
            return str(Path(name).resolve())
    except (OSError, ValueError):  # not the name of a file
        pass
    return os.path.normpath(name) if name else name


class _Reader:
    """Collects the models of a run, entry by entry."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}  # by key
        self.cuts: list[Cut] = []
        self.trainings: list[Training] = []
        self.sweeps: list[Sweep] = []
        self.stale: dict[str, None] = {}  # names of models

    def add(self, entry: LogEntry) -> None:
        """Add an entry; kinds of later versions are passed over."""
        result = entry.result
        match entry.kind:
            case "plan" | "prune":
                self._add_cut(build_known(Cut, result))
            case "recover":
                training = build_known(Training, result)
                self.trainings.append(training)
                parent = self._named(entry.models[0] if entry.models else training.out)
                cost = parent.cost if parent.role == "pruned" else Cost()  # training changes no size
                sizes = Cost(cost.seq_len, cost.parameters, cost.non_embedding_parameters, cost.macs)
                self._write(training.out, parent, "recovered", sizes)
            case "export" if len(entry.models) > 1:
                self._write(entry.models[-1], self._named(entry.models[0]), "exported", Cost())
            case "evaluate":
                for row in decode(ROWS, result.get("results"), "results"):
                    self._add_evaluated(build_known(Evaluated, row))
            case "profile":
                for row in decode(ROWS, result.get("results"), "results"):
                    model = self._named(decode(str, row.get("model"), "model"))
                    self._put(replace(model, cost=_updated(model.cost, build_known(Cost, row))))
            case "sweep":
                self.sweeps.append(build_known(Sweep, result))

    def _named(self, name: str) -> Model:
        """The model of that name, which is new where nothing is known of it."""
        new, (before, plus, _) = Model(name), name.rpartition(" + ")
        if plus and model_key(before) in self.models:  # "MODEL + plan.json", which `evaluate --plan` measures
            new = Model(name, "pruned", parent=self._as_parent(before).name)
        return self.models.setdefault(model_key(name), new)

    def _put(self, model: Model) -> None:
        self.models[model_key(model.name)] = model

    def _as_parent(self, name: str) -> Model:
        model = self._named(name)
        if model.role == "measured":
            self._put(model := replace(model, role="dense"))
        return model

    def _write(self, out: str, parent: Model, role: str, cost: Cost) -> None:
        """A folder or file was written: earlier measurements at its name were of another model."""
        parent = self._as_parent(parent.name)
        old = self.models.get(model_key(out))
        if old is not None and (old.perplexity or old.tasks or old.samples or old.cost.weight_bytes):
            self.stale[old.name] = None
        self._put(Model(old.name if old else out, role, parent=parent.name, cost=cost))

    def _add_cut(self, cut: Cut) -> None:
        self.cuts.append(cut)
        sizes = {
            side: Cost(
                PLAN_TOKENS, cut.parameters.get(side), cut.parameters.get(f"{side}_non_embedding"), cut.macs.get(side)
            )
            for side in ("dense", "pruned")
        }
        dense = self._named(cut.model)
        self._put(replace(dense, cost=_updated(sizes["dense"], dense.cost)))
        if cut.out is not None:
            self._write(cut.out, dense, "pruned", sizes["pruned"])

    def _add_evaluated(self, row: Evaluated) -> None:
        model = self._named(row.model)
        self._put(
            replace(
                model,
                perplexity={**model.perplexity, **{each.test: each for each in row.perplexity}},
                tasks={**model.tasks, **row.tasks},
                tasks_mean=row.tasks_mean or model.tasks_mean,
                samples={**model.samples, **{each.prompt: each.text for each in row.samples}},
                cost=_updated(model.cost, Cost(weight_bytes=row.weight_bytes, file_bytes=row.file_bytes)),
            )
        )


def _updated(cost: Cost, newer: Cost) -> Cost:
    """A cost with all that a newer one knows; of passes of another length the older one's are left out."""
    if newer.seq_len not in (None, cost.seq_len):
        of_other_passes: dict[str, Any] = dict.fromkeys(BY_LENGTH)
        cost = replace(cost, **of_other_passes)
    return replace(cost, **{f.name: getattr(newer, f.name) for f in fields(Cost) if getattr(newer, f.name)})


def _labelled(models: list[Model]) -> Iterator[Model]:
    """Label a model by its role where no other has it, else by the end of its name; numbered where these are alike."""
    roles = [model.role for model in models]
    taken: dict[str, int] = {}
    for model in models:
        name = Path(os.path.normpath(model.name)).name or model.name
        short = name if len(name) <= LONGEST_LABEL else f"{name[:14]}…{name[-11:]}"
        label = model.role if model.role != "measured" and roles.count(model.role) == 1 else short
        taken[label] = taken.get(label, 0) + 1
        yield replace(model, label=label if taken[label] == 1 else f"{label} ({taken[label]})")
