"""What a run keeps while it works, and between runs: scores, statistics, layers of a pass that was killed.

While `prune` works, its values lie in a folder beside the output (`.OUT.secateur`), with a key that says for what. The
same command with resume reads them; one that succeeds, or fails for a reason that a repetition would meet again,
removes them. A full disk is no such reason. A run folder that the user names keeps the statistics of a model on a
text, for other plans, and the scores, for the report.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import __version__, processes
from secateur.data.calibration import CalibrationOptions
from secateur.errors import CheckpointError, DiskError, PlanError, ScoreError, SecateurError
from secateur.files import atomic_folder, make_folder, read_json, read_tensors, write_json, write_tensors
from secateur.models.loading import LoadOptions
from secateur.models.sources import resolve
from secateur.planning.allocation import DamageCurve
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, plan_from_json
from secateur.pruning.iterative import Step
from secateur.pruning.repair import Repaired
from secateur.scoring.scores import SCORES, Scores, read_scores, write_scores
from secateur.scoring.statistics import Statistics, read_statistics, write_statistics

SCORES_FILE = "scores.safetensors"
STEP_FILE = "step.safetensors"
DAMAGE_FILE = "damage.json"
REPAIRED_FILE = "repaired.safetensors"
PASS_FOLDER = "pass"
WINDOWS_FILE = "windows.safetensors"


# --- while a run works ------------------------------------------------------------------------------------------------


def has_scored(work: Path) -> bool:
    """Whether a cut that is stopped leaves something to go on from: scores, a step, a layer that has been scored.

    >>> has_scored(Path("no-such-folder"))
    False
    """
    files = [work / SCORES_FILE, work / STEP_FILE]
    return any(file.exists() for file in files) or any((work / PASS_FOLDER).glob("*.safetensors"))


@contextmanager
def work_folder(
    out: Path, key: str, *, resume: bool, worth_keeping: Callable[[Path], bool] = has_scored
) -> Iterator[Path]:
    """The folder of a run's values: emptied unless it is to be resumed and was made for the same key.

    A run that is stopped, or has no room on the disk, leaves it where it is worth keeping. Of several processes, the
    first prepares and removes it.
    """
    work = out.absolute().with_name(f".{out.absolute().name}.secateur")
    if processes.is_first() and not (resume and _read_key(work) == key):
        shutil.rmtree(work, ignore_errors=True)
        with atomic_folder(work) as fresh:
            write_json(fresh / "key.json", {"key": key})
    processes.wait()
    try:
        yield work
    except BaseException as error:
        in_vain = isinstance(error, SecateurError) and not isinstance(error, DiskError)  # it would fail again
        if in_vain or not worth_keeping(work):
            if processes.is_first():
                shutil.rmtree(work, ignore_errors=True)
        elif isinstance(error, DiskError):
            error.add_note("what was done so far is kept: make room, and go on with --resume (resume=True)")
        raise
    if processes.is_first():
        shutil.rmtree(work, ignore_errors=True)


def run_key(model: str, options: CutOptions, calibration: CalibrationOptions, loading: LoadOptions) -> str:
    """What scores depend on, as a hash: a run may only go on from scores made for the same."""
    return _hash([_about(model, calibration, loading), options.score, options.reduce, options.axes, options.layers])


def recovery_key(paths: Sequence[str], about: Any) -> str:
    """What a training depends on, as a hash: the state of the files and folders named, and plain data.

    >>> recovery_key(["organisation/model"], {"steps": 3}) == recovery_key(["organisation/model"], {"steps": 4})
    False
    """
    return _hash([[_stamp(path) for path in paths], about, __version__, torch.__version__])


def kept_scores(work: Path) -> Scores | None:
    """The scores that an earlier run left, if they can be read; by all processes or none."""
    try:
        found = read_scores(work / SCORES_FILE)
    except ScoreError:
        found = None
    return None if processes.largest(int(found is None)) else found


def keep_scores(work: Path, scores: Scores) -> None:
    """Leave the scores for a run that goes on; the layers that led to them are needed no more."""
    if processes.is_first():
        write_scores(work / SCORES_FILE, scores)
        shutil.rmtree(work / PASS_FOLDER, ignore_errors=True)


def kept_damage(work: Path | None, scores: Scores) -> dict[str, DamageCurve] | None:
    """The damage that an earlier run measured with these scores, if it can be read; by all processes or none."""
    found = None
    if work is not None:
        try:
            data = read_json(work / DAMAGE_FILE)
            if data["scores"] == _scores_hash(scores):
                found = {
                    str(name): tuple((int(kept), float(damage)) for kept, damage in points)
                    for name, points in data["damage"].items()
                }
        except (CheckpointError, ValueError, LookupError, TypeError, AttributeError):
            pass  # there is none, or it is damaged
    return None if processes.largest(int(found is None)) else found


def keep_damage(work: Path | None, scores: Scores, damage: Mapping[str, DamageCurve]) -> None:
    """Leave the damage that was measured for a run that goes on."""
    if work is not None and processes.is_first():
        write_json(work / DAMAGE_FILE, {"scores": _scores_hash(scores), "damage": dict(damage)})


def _scores_hash(scores: Scores) -> str:
    return _hash([scores.score, scores.calibration, [[n, x.tolist()] for n, x in sorted(scores.units.items())]])


def kept_repair(work: Path, decided: Plan) -> Repaired | None:
    """The repaired weights that an earlier run left for a plan, if they can be read."""
    try:
        weights, about = read_tensors(work / REPAIRED_FILE)
        if about["decided"] != _hash(decided.to_json()):
            return None
        errors = {name: (float(before), float(after)) for name, (before, after) in about["errors"].items()}
        return Repaired(plan_from_json(about["plan"]), weights, errors)
    except (CheckpointError, KeyError, ValueError, TypeError, PlanError):
        return None


def keep_repair(work: Path, decided: Plan, repaired: Repaired) -> None:
    """Leave the repaired weights for a run that goes on."""
    about = {"decided": _hash(decided.to_json()), "plan": repaired.plan.to_json(), "errors": dict(repaired.errors)}
    write_tensors(work / REPAIRED_FILE, repaired.weights, about)


def kept_step(work: Path, options: CutOptions) -> Step | None:
    """The last step that an earlier run with these options has done, if it can be read; by all processes or none."""
    found = None
    try:
        weights, about = read_tensors(work / STEP_FILE)
        if about["options"] == _hash(asdict(options)):
            found = Step(int(about["number"]), plan_from_json(about["plan"]), weights)
    except (CheckpointError, KeyError, ValueError, TypeError, PlanError):
        pass  # there is none, or it is damaged
    return None if processes.largest(int(found is None)) else found


def keep_step(work: Path, options: CutOptions, step: Step) -> None:
    """Leave a step for a run that goes on."""
    if processes.is_first():
        about = {"options": _hash(asdict(options)), "number": step.number, "plan": step.plan.to_json()}
        weights = {name: weight.detach() for name, weight in step.weights.items()}
        write_tensors(work / STEP_FILE, weights, about)


def kept_windows(work: Path | None) -> Tensor | None:
    """The tokens that the model wrote for a run that was killed, if they can be read."""
    if work is None:
        return None
    try:
        return read_tensors(work / WINDOWS_FILE)[0]["windows"].clone()
    except (CheckpointError, KeyError):
        return None  # there are none, or they are damaged


def keep_windows(work: Path | None, windows: Tensor) -> None:
    """Leave them for a run that goes on, which must not have others."""
    if work is not None and processes.is_first():
        write_tensors(work / WINDOWS_FILE, {"windows": windows})


def _read_key(work: Path) -> Any:
    try:
        return read_json(work / "key.json")["key"]
    except (CheckpointError, LookupError, TypeError):
        return None  # there is none, or it is damaged


# --- between runs -----------------------------------------------------------------------------------------------------


class RunFolder:
    """A folder of the user's in which statistics are kept, one file for each model and calibration."""

    def __init__(self, folder: Path, model: str, calibration: CalibrationOptions, loading: LoadOptions) -> None:
        self.key = _hash([_about(model, calibration.as_scored(), loading)])
        self.path = folder / f"statistics-{self.key[:16]}.safetensors"
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(
                f"{folder} is a file, and a folder is to hold the statistics: name another with --run"
            )
        make_folder(folder)

    def statistics(self) -> Statistics | None:
        """What is kept, if anything is; by all processes or none."""
        try:
            found = read_statistics(self.path, about=self.key)
        except ScoreError:
            found = None
        return None if processes.largest(int(found is None)) else found

    def keep(self, statistics: Statistics) -> None:
        """Keep statistics, but for those of the user's own scores, whose code may change."""
        own = {name for name, how in SCORES.items() if how.own}
        ours = {name: sums for name, sums in statistics.sums.items() if name not in own}
        if processes.is_first():
            write_statistics(self.path, replace(statistics, sums=ours), about=self.key)

    def keep_scores(self, scores: Scores) -> None:
        """Keep the scores, which the report shows: one file for each score, reduction and choice of groups."""
        if processes.is_first():
            key = _hash([self.key, scores.reduce, sorted(scores.units)])
            write_scores(self.path.with_name(f"scores-{scores.score}-{key[:16]}.safetensors"), scores)


def _about(model: str, calibration: CalibrationOptions, loading: LoadOptions) -> list[Any]:
    """What statistics depend on."""
    return [
        _stamp(resolve(model).path or model),
        _stamp(calibration.text),
        asdict(calibration),
        asdict(loading),
        __version__,
        torch.__version__,
    ]


def _hash(about: Any) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _stamp(name: str | Path) -> list[Any]:
    """What tells one state of a file or folder from another without reading it; a name that is no path is itself."""
    path = Path(name).resolve()
    if not path.exists():
        return [str(name)]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
