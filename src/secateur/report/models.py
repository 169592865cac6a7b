"""A run's entries -> its models: what each was made from, and how the page calls it.

Models are told apart by their names and paths as the commands were given them. What `prune`, `recover` and `export`
write is a child of what they read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.report.reading import PerplexityRow, Run, SpeedRow, TaskRow

ROLES = ("dense", "pruned", "recovered", "exported", "measured")
MOST_LETTERS = 26  # of a label; the whole name stands in the table of models


@dataclass(frozen=True, slots=True)
class Model:
    """One model of a run."""

    name: str  # as the commands name it
    role: str  # one of ROLES
    label: str  # what the page calls it, unlike that of any other
    parent: str | None = None  # the name of the model that it was made from

    @property
    def tone(self) -> int:
        """The number of its colour."""
        return ROLES.index(self.role)


def models_of(run: Run) -> tuple[Model, ...]:
    """All models that were measured or made, each followed by what was made from it.

    >>> models_of(Run(Path("runs/a"), ()))
    ()
    """
    parents: dict[str, str] = {}
    roles: dict[str, str] = {}
    for cut in run.cuts:
        if cut.out is not None:
            parents[_key(cut.out)], roles[_key(cut.out)] = _key(cut.model), "pruned"
    for training in run.trainings:
        if len(training.entry.models) > 1:
            parents[_key(training.out)], roles[_key(training.out)] = _key(training.entry.models[0]), "recovered"
    for _, source, out in run.exports:
        parents[_key(out)], roles[_key(out)] = _key(source), "exported"
    names = {_key(name): name for name in reversed(list(_named(run)))}
    for key, name in names.items():  # what `evaluate --plan` measured: "MODEL + plan.json"
        before, plus, _ = name.rpartition(" + ")
        if plus and _key(before) in names and key not in parents:
            parents[key], roles[key] = _key(before), "pruned"
    for parent in set(parents.values()):
        roles.setdefault(parent, "dense")
    ordered = _with_children([_key(name) for name in dict.fromkeys(_named(run))], parents)
    labels = _labels([(names.get(key, key), roles.get(key, "measured")) for key in ordered])
    return tuple(
        Model(
            name=names.get(key, key),
            role=roles.get(key, "measured"),
            label=label,
            parent=names.get(parents[key], parents[key]) if key in parents else None,
        )
        for key, label in zip(ordered, labels, strict=True)
    )


def baseline_of(model: Model, models: Iterable[Model]) -> Model | None:
    """What a model is compared with: the one that all it was made from comes from, else the first; None for itself.

    >>> dense, pruned = Model("a", "dense", "dense"), Model("b", "pruned", "pruned", "a")
    >>> baseline_of(pruned, [dense, pruned]).name, baseline_of(dense, [dense, pruned])
    ('a', None)
    """
    by_name = {each.name: each for each in models}
    found, seen = model, {model.name}
    while found.parent is not None and found.parent in by_name and found.parent not in seen:
        found = by_name[found.parent]
        seen.add(found.name)
    if found is model and model.role == "measured":
        found = next(iter(by_name.values()), model)
    return None if found is model else found


def same_model(a: str, b: str) -> bool:
    """Whether two names are of one model.

    >>> same_model("runs/small/", "./runs/small"), same_model("demo", "small")
    (True, False)
    """
    return _key(a) == _key(b)


@dataclass(frozen=True, slots=True)
class Facts:
    """A run with its models sorted out, which every section looks at."""

    run: Run
    models: tuple[Model, ...]

    @classmethod
    def of(cls, run: Run) -> Facts:
        """Sort out the models of a run."""
        return cls(run, models_of(run))

    def baseline(self, model: Model) -> Model | None:
        """What a model is compared with; None for itself."""
        return baseline_of(model, self.models)

    @property
    def result(self) -> Model | None:
        """The model that the run came to: the last that was trained, else cut."""
        written = [*(cut.out for cut in self.run.cuts if cut.out), *(t.out for t in self.run.trainings)]
        for name in reversed(written):
            for model in self.models:
                if same_model(model.name, name):
                    return model
        return next((model for model in self.models if model.role == "pruned"), None)

    def perplexity(self, model: Model) -> dict[str, PerplexityRow]:
        """A model's perplexities, by text and protocol."""
        return {row.test: row for row in self.run.perplexity if same_model(row.model, model.name)}

    def tasks(self, model: Model) -> dict[str, TaskRow]:
        """A model's tasks."""
        return {row.task: row for row in self.run.tasks if same_model(row.model, model.name)}

    def cost(self, model: Model) -> SpeedRow:
        """What a model costs: measured, or else as its plan says; a training leaves the sizes as they are."""
        found: dict[str, Any] = {}
        before = next((each for each in self.models if each.name == model.parent), None)
        if model.role == "recovered" and before is not None and before.role == "pruned":
            sizes = self.cost(before)
            found = {name: getattr(sizes, name) for name in ("parameters", "non_embedding_parameters", "macs")}
        for cut in self.run.cuts:
            side = "pruned" if cut.out and same_model(cut.out, model.name) else None
            side = "dense" if same_model(cut.model, model.name) else side
            if side is not None:
                found["parameters"] = cut.parameters.get(side)
                found["non_embedding_parameters"] = cut.parameters.get(f"{side}_non_embedding")
                found["macs"] = cut.macs.get(side)
        for row in self.run.speeds:
            if same_model(row.model, model.name):
                measured = {name: getattr(row, name) for name in SpeedRow.__dataclass_fields__ if name != "model"}
                found |= {name: value for name, value in measured.items() if value not in (None, ())}
        return SpeedRow(model.name, **found)


def folder_of(run: Run, name: str) -> Path | None:
    """Where the folder of a model lies now: as the command named it, or within the run folder; None if nowhere."""
    try:
        for path in (run.folder / Path(name).name, Path(name)):
            if path.is_dir():
                return path
    except (OSError, ValueError):  # no name of a file
        pass
    return None


def _key(name: str) -> str:
    """One name for each model: a path that exists is told by where it leads."""
    try:
        if os.sep in name and Path(name).exists():
            return str(Path(name).resolve())
    except (OSError, ValueError):
        pass
    return os.path.normpath(name) if name else name


def _named(run: Run) -> Iterable[str]:
    for cut in run.cuts:
        yield cut.model
        if cut.out is not None:
            yield cut.out
    for training in run.trainings:
        yield from training.entry.models[:1]
        yield training.out
    for _, source, out in run.exports:
        yield source
        yield out
    yield from (row.model for row in run.perplexity)
    yield from (row.model for row in run.tasks)
    yield from (row.model for row in run.speeds)
    yield from (row.model for row in run.samples)


def _with_children(keys: Iterable[str], parents: Mapping[str, str]) -> list[str]:
    """Every model after the one that it was made from, and before the next one made from nothing known."""
    every = list(dict.fromkeys(keys))
    found: dict[str, None] = {}

    def visit(key: str) -> None:
        if key not in found:
            found[key] = None
            for child in every:
                if parents.get(child) == key:
                    visit(child)

    for key in every:
        if parents.get(key) not in every:
            visit(key)
    for key in every:  # a folder that was made from itself, once and again
        visit(key)
    return list(found)


def _labels(named: list[tuple[str, str]]) -> list[str]:
    """The role alone where it says all, else the end of the name; longer where names end alike, numbered if need be."""
    roles = [role for _, role in named]
    labels: list[str] = []
    for name, role in named:
        if role != "measured" and roles.count(role) == 1:
            labels.append(role)
        else:
            labels.append(_short(Path(os.path.normpath(name)).name or name))
    taken: dict[str, int] = {}
    for i, label in enumerate(labels):
        taken[label] = taken.get(label, 0) + 1
        if taken[label] > 1:
            labels[i] = f"{label} ({taken[label]})"
    return labels


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[:14]}…{name[-11:]}"
