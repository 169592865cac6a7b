"""The log of a run folder -> what it says, checked: measurements by model, plans, trainings, sweeps, samples of text.

Results are read as the commands write them; keys that some version does not write yet are left out of the page. What
has another form than the commands give it is an error that names the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, ScoreError
from secateur.files import read_json
from secateur.pipeline.run_log import LogEntry, load_entries
from secateur.scoring.scores import Scores, read_scores

DISCOVERY_FILE = "discovery.json"  # that a run of the demo keeps


@dataclass(frozen=True, slots=True)
class PerplexityRow:
    """How well a model predicts a text; `low` and `high` bound 95 %. None where it is not known, or infinite."""

    model: str
    data: str
    protocol: str
    seq_len: int
    tokens: int
    ppl: float | None
    low: float | None = None
    high: float | None = None
    bits_per_byte: float | None = None

    @property
    def test(self) -> str:
        """What tells it from other measurements of the same model."""
        return f"{self.data} ({self.protocol})"


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A model's share of right answers, and its paired difference to the first model that was asked."""

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None = None
    documents: int | None = None
    difference: float | None = None
    p: float | None = None


@dataclass(frozen=True, slots=True)
class GridRow:
    """A model's speed at one batch size and length."""

    batch: int
    seq_len: int
    prefill_seconds: float | None
    decode_tokens_per_second: float | None
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """What a model costs; None where it was not measured."""

    model: str
    parameters: int | None = None
    non_embedding_parameters: int | None = None
    macs: int | None = None
    weight_bytes: int | None = None
    file_bytes: int | None = None
    peak_bytes: int | None = None
    kv_cache_bytes: int | None = None
    prefill_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    macs_by_operator: Mapping[str, int] | None = None
    grid: tuple[GridRow, ...] = ()


@dataclass(frozen=True, slots=True)
class KeptGroup:
    """How many units of a group stay, and which where the plan says so."""

    name: str
    kind: str
    layer: int | None
    units: int
    kept: int
    keep: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class CutRow:
    """A plan, and the folder that was written by it; None where it was only planned."""

    entry: LogEntry
    model: str
    out: str | None
    groups: tuple[KeptGroup, ...]
    axes: tuple[str, ...]
    parameters: Mapping[str, int]
    macs: Mapping[str, int]
    scored: Mapping[str, Any]
    settings: Mapping[str, Any]  # how the cut was asked for


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """How a training went: (step, nats) of the loss and of the validation, perplexity by text."""

    entry: LogEntry
    out: str
    method: str
    steps: int
    best_step: int
    tokens: int
    loss: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]
    perplexity: Mapping[str, tuple[tuple[int, float], ...]]


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One cut of a sweep; ratio 0 is the dense model."""

    model: str
    score: str
    ratio: float
    parameters: int
    perplexity: tuple[PerplexityRow, ...]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What a model wrote after a prompt."""

    model: str
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Run:
    """All that a run folder says, and what of it no longer holds."""

    folder: Path
    entries: tuple[LogEntry, ...]
    cuts: tuple[CutRow, ...] = ()
    trainings: tuple[TrainingRow, ...] = ()
    exports: tuple[tuple[LogEntry, str, str], ...] = ()  # entry, from, to
    perplexity: tuple[PerplexityRow, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    task_means: tuple[TaskRow, ...] = ()
    speeds: tuple[SpeedRow, ...] = ()
    sweeps: tuple[tuple[SweepRow, ...], ...] = ()
    samples: tuple[SampleRow, ...] = ()
    scores: tuple[Scores, ...] = ()
    groups: tuple[tuple[str, str, int | None, int], ...] = ()  # of the discovery: name, kind, layer, units
    notes: tuple[str, ...] = ()


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises `CheckpointError` where there is none, it holds nothing, or a file of it is damaged.

    Of several measurements of one thing the last counts. A model's measurements do not count when its folder was
    written anew after them.

    >>> read_run(Path("no-such-folder"))
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
    collected = _Collected(entries)
    for entry in entries:
        try:
            collected.add(entry)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{entry.path} is damaged (the result of {entry.kind}: {told}). Remove it, and the report is made of "
                f"the other entries: rm {entry.path}"
            ) from error
    return collected.run(folder)


class _Collected:
    """What the entries say, as they are read one after the other. Final."""

    def __init__(self, entries: Sequence[LogEntry]) -> None:
        self.entries = tuple(entries)
        self.cuts: list[CutRow] = []
        self.trainings: list[TrainingRow] = []
        self.exports: list[tuple[LogEntry, str, str]] = []
        self.perplexity: dict[tuple[str, ...], PerplexityRow] = {}
        self.tasks: dict[tuple[str, ...], TaskRow] = {}
        self.means: dict[str, TaskRow] = {}
        self.speeds: dict[str, dict[str, Any]] = {}
        self.sweeps: list[tuple[SweepRow, ...]] = []
        self.samples: dict[tuple[str, str], SampleRow] = {}
        self.stale: dict[str, None] = {}

    def add(self, entry: LogEntry) -> None:
        result = entry.result
        match entry.kind:
            case "plan" | "prune":
                self.cuts.append(_cut(entry))
            case "recover":
                self.trainings.append(_training(entry))
            case "export":
                if len(entry.models) > 1:
                    self.exports.append((entry, entry.models[0], entry.models[-1]))
            case "evaluate":
                for row in _rows(result["results"]):
                    self._evaluated(row)
            case "profile":
                for row in _rows(result["results"]):
                    self._profiled(row)
            case "sweep":
                name = _text(result["model"])
                self.sweeps.append(tuple(_sweep(name, row) for row in _rows(result["rows"])))
            case _:
                pass  # of a later version; its command is listed
        if entry.kind in ("prune", "recover", "export") and len(entry.models) > 1:
            self._written(entry.models[-1])

    def _written(self, out: str) -> None:
        """A folder was written: what was measured there before was measured of another model."""
        before = len(self.perplexity) + len(self.tasks) + len(self.means) + len(self.samples)
        self.perplexity = {key: row for key, row in self.perplexity.items() if row.model != out}
        self.tasks = {key: row for key, row in self.tasks.items() if row.model != out}
        self.means = {key: row for key, row in self.means.items() if row.model != out}
        self.samples = {key: row for key, row in self.samples.items() if row.model != out}
        after = len(self.perplexity) + len(self.tasks) + len(self.means) + len(self.samples)
        if self.speeds.pop(out, None) is not None or after < before:
            self.stale[out] = None

    def _evaluated(self, row: Mapping[str, Any]) -> None:
        model = _text(row["model"])
        for about in _rows(row.get("perplexity") or []):
            found = _perplexity(model, about)
            self.perplexity[model, found.test] = found
        for task, about in dict(row.get("tasks") or {}).items():
            self.tasks[model, task] = _task(model, _text(task), about)
        if row.get("tasks_mean"):
            self.means[model] = _task(model, "mean", {"metric": "mean", **row["tasks_mean"]})
        for sample in _rows(row.get("samples") or []):
            found_sample = SampleRow(model, _text(sample["prompt"]), _text(sample["text"]))
            self.samples[model, found_sample.prompt] = found_sample
        bytes_of = {key: _whole(row[key]) for key in ("weight_bytes", "file_bytes") if row.get(key) is not None}
        self.speeds.setdefault(model, {}).update(bytes_of)

    def _profiled(self, row: Mapping[str, Any]) -> None:
        model = _text(row["model"])
        whole = "parameters non_embedding_parameters macs weight_bytes peak_bytes kv_cache_bytes".split()
        found: dict[str, Any] = {key: _whole(row[key]) for key in whole if row.get(key) is not None}
        for key in ("prefill_seconds", "decode_tokens_per_second"):
            if row.get(key) is not None:
                found[key] = _number(row[key])
        if row.get("macs_by_operator"):
            found["macs_by_operator"] = {_text(k): _whole(v) for k, v in dict(row["macs_by_operator"]).items()}
        if row.get("grid"):
            found["grid"] = tuple(_grid(each) for each in _rows(row["grid"]))
        self.speeds.setdefault(model, {}).update(found)

    def run(self, folder: Path) -> Run:
        notes = [
            f"What was measured of {name} before it was last written is left out: it was another model."
            for name in self.stale
        ]
        return Run(
            folder=folder,
            entries=self.entries,
            cuts=tuple(self.cuts),
            trainings=tuple(self.trainings),
            exports=tuple(self.exports),
            perplexity=tuple(self.perplexity.values()),
            tasks=tuple(self.tasks.values()),
            task_means=tuple(self.means.values()),
            speeds=tuple(SpeedRow(name, **about) for name, about in self.speeds.items()),
            sweeps=tuple(sweep for sweep in self.sweeps if sweep),
            samples=tuple(self.samples.values()),
            scores=_scores(folder),
            groups=_discovered(folder),
            notes=tuple(notes),
        )


def _cut(entry: LogEntry) -> CutRow:
    result = entry.result
    options = dict(result["options"])
    _maybe(options.get("ratio"))
    _maybe(options.get("target"))
    out = result.get("out")
    return CutRow(
        entry=entry,
        model=_text(result["model"]),
        out=None if out is None else _text(out),
        groups=tuple(_group(group) for group in _rows(result["groups"])),
        axes=tuple(_text(axis) for axis in options.get("axes") or ()),
        parameters={_text(k): _whole(v) for k, v in dict(result["parameters"]).items()},
        macs={_text(k): _whole(v) for k, v in dict(result["macs"]).items()},
        scored=dict(result.get("scored") or {}),
        settings=options,
    )


def _group(data: Mapping[str, Any]) -> KeptGroup:
    units, kept = _whole(data["units"]), _whole(data["kept"])
    if not 0 <= kept <= units or not units:
        raise ValueError(f"{data['name']} keeps {kept} of {units} units")
    layer, keep = data.get("layer"), data.get("keep")
    return KeptGroup(
        name=_text(data["name"]),
        kind=_text(data["kind"]),
        layer=None if layer is None else _whole(layer),
        units=units,
        kept=kept,
        keep=None if keep is None else tuple(_whole(unit) for unit in keep),
    )


def _training(entry: LogEntry) -> TrainingRow:
    result = entry.result
    measured = _rows(result["evaluation"])
    texts = dict.fromkeys(_text(name) for each in measured for name in dict(each.get("perplexity") or {}))
    return TrainingRow(
        entry=entry,
        out=_text(result["out"]),
        method=_text(result.get("method", "")),
        steps=_whole(result["steps"]),
        best_step=_whole(result.get("best_step", result["steps"])),
        tokens=_whole(result["tokens"]),
        loss=_points((step, value) for step, value in result["loss"]),
        validation=_points((each["step"], each.get("validation")) for each in measured),
        perplexity={
            name: _points((each["step"], dict(each.get("perplexity") or {}).get(name)) for each in measured)
            for name in texts
        },
    )


def _points(pairs: Any) -> tuple[tuple[int, float], ...]:
    """The points of a curve; one that is missing or infinite (null) leaves a gap."""
    return tuple((_whole(step), _number(value)) for step, value in pairs if value is not None)


def _perplexity(model: str, about: Mapping[str, Any]) -> PerplexityRow:
    seq_len = _whole(about["seq_len"])
    return PerplexityRow(
        model=model,
        data=_text(about["data"]),
        protocol=_text(about.get("protocol") or f"windows of {seq_len}"),
        seq_len=seq_len,
        tokens=_whole(about["tokens"]),
        ppl=_maybe(about["ppl"]),
        low=_maybe(about.get("ppl_low")),
        high=_maybe(about.get("ppl_high")),
        bits_per_byte=_maybe(about.get("bits_per_byte")),
    )


def _task(model: str, task: str, about: Mapping[str, Any]) -> TaskRow:
    metric = about.get("metric") or next((name for name in ("acc_norm", "acc") if name in about), None)
    if "value" in about:
        value, stderr = about["value"], about.get("stderr")
    elif metric is not None:
        value, stderr = about[metric], about.get(f"{metric}_stderr")
    else:
        numbers = [(name, number) for name, number in about.items() if type(number) in (int, float)]
        if not numbers:
            raise ValueError(f"{task} has no value")
        (metric, value), stderr = numbers[0], None
    against = about.get("against") or about
    documents = about.get("documents")
    return TaskRow(
        model=model,
        task=task,
        metric=_text(metric or "value"),
        value=_number(value),
        stderr=_maybe(stderr),
        documents=None if documents is None else _whole(documents),
        difference=_maybe(against.get("difference")),
        p=_maybe(against.get("p")),
    )


def _grid(about: Mapping[str, Any]) -> GridRow:
    peak = about.get("peak_bytes")
    return GridRow(
        batch=_whole(about["batch"]),
        seq_len=_whole(about["seq_len"]),
        prefill_seconds=_maybe(about.get("prefill_seconds")),
        decode_tokens_per_second=_maybe(about.get("decode_tokens_per_second")),
        peak_bytes=None if peak is None else _whole(peak),
    )


def _sweep(model: str, about: Mapping[str, Any]) -> SweepRow:
    return SweepRow(
        model=model,
        score=_text(about.get("score") or ""),
        ratio=_number(about["ratio"]),
        parameters=_whole(about["parameters"]),
        perplexity=tuple(_perplexity(model, each) for each in _rows(about.get("perplexity") or [])),
    )


def _rows(data: Any) -> list[Mapping[str, Any]]:
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise ValueError(f"expected a list of objects, found {data!r:.60}")
    return data


def _text(data: Any) -> str:
    if not isinstance(data, str):
        raise ValueError(f"expected a text, found {data!r:.60}")
    return data


def _whole(data: Any) -> int:
    if type(data) is not int:
        raise ValueError(f"expected a whole number, found {data!r:.60}")
    return data


def _number(data: Any) -> float:
    if type(data) not in (int, float) or not math.isfinite(data):
        raise ValueError(f"expected a number, found {data!r:.60}")
    return float(data)


def _maybe(data: Any) -> float | None:
    return None if data is None else _number(data)


def _scores(folder: Path) -> tuple[Scores, ...]:
    """The scores that the run folder keeps; a file that is damaged is an error that names it."""
    try:
        return tuple(read_scores(path) for path in sorted(folder.glob("scores*.safetensors")))
    except ScoreError as error:
        raise CheckpointError(f"{error}. Remove it, and the report is made without") from error


def _discovered(folder: Path) -> tuple[tuple[str, str, int | None, int], ...]:
    """The groups of the discovery that a run of the demo keeps; without one the plans say less."""
    if not (folder / DISCOVERY_FILE).is_file():
        return ()
    with suppress(CheckpointError, KeyError, TypeError, ValueError):
        groups = _rows(read_json(folder / DISCOVERY_FILE)["groups"])
        return tuple((_text(g["name"]), _text(g["kind"]), g["layer"], _whole(g["units"])) for g in groups)
    return ()
