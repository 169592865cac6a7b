"""What a run keeps: its finished stages, so that a killed run resumes, and statistics, for other plans.

While `prune` works, the results of its stages lie in a folder beside the output (`.OUT.secateur`), with a key that says
for what. The same command with `resume` reads them; a run that succeeds, or that fails for a reason that a repetition
would meet again, removes them. A run folder that the user names keeps the statistics of a model on a text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur import __version__, processes
from secateur.data.calibration import CalibrationOptions
from secateur.data.documents import visible_files
from secateur.errors import CheckpointError, DiskError, PlanError, ScoreError, SecateurError
from secateur.files import MODEL_MARK, atomic_folder, make_folder, read_json, write_json
from secateur.models.options import LoadOptions
from secateur.models.sources import resolve
from secateur.models.tensor_files import read_tensors, write_tensors
from secateur.pipeline.recipe import PruneRecipe
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, plan_from_json
from secateur.pruning.repair import Repaired
from secateur.scoring.registry import SCORES
from secateur.scoring.scores import Scores, load_scores, save_scores
from secateur.scoring.statistics import Statistics, load_statistics, save_statistics

Value = TypeVar("Value")
DAMAGED = (CheckpointError, ScoreError, KeyError, ValueError, TypeError, AttributeError, PlanError)


@dataclass(frozen=True, slots=True)
class Iteration:
    """What a pruning iteration left: the plan of the dense model so far, and the weights of the smaller one."""

    number: int
    plan: Plan
    weights: Mapping[str, Tensor]


class Cache:
    """The finished stages of one run, as files; without a folder nothing is kept, and nothing is there.

    Every `load_*` gives None where there is nothing, or where it is damaged or of other options. Of several processes
    the first writes (`save_*`), and either all load a stage or none.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @property
    def _target(self) -> Path | None:
        """The folder to write to: of several processes, for the first."""
        return self.folder if processes.is_first() else None

    def layers(self, iteration: int) -> Path | None:
        """The folder of layers that have been scored."""
        return None if self.folder is None else self.folder / f"layers-{iteration}"

    def load_scores(self, iteration: int) -> Scores | None:
        """The scores of an iteration."""
        return _by_all(self._read(lambda folder: load_scores(folder / f"scores-{iteration}.safetensors")))

    def save_scores(self, iteration: int, scores: Scores) -> None:
        """Keep the scores; the layers that led to them are needed no more."""
        if self._target is not None:
            save_scores(self._target / f"scores-{iteration}.safetensors", scores)
            shutil.rmtree(self._target / f"layers-{iteration}", ignore_errors=True)

    def load_repair(self, plan: Plan) -> Repaired | None:
        """The repaired weights of a plan."""

        def read(folder: Path) -> Repaired | None:
            weights, about = read_tensors(folder / "repaired.safetensors")
            if about["plan"] != _hash(plan.to_json()):
                return None
            return Repaired(plan_from_json(about["repaired"]), weights)

        return self._read(read)

    def save_repair(self, plan: Plan, repaired: Repaired) -> None:
        """Keep the repaired weights."""
        if self._target is not None:
            about = {"plan": _hash(plan.to_json()), "repaired": repaired.plan.to_json()}
            write_tensors(self._target / "repaired.safetensors", repaired.weights, about)

    def load_iteration(self, options: CutOptions) -> Iteration | None:
        """The last iteration that was finished with these options."""

        def read(folder: Path) -> Iteration | None:
            weights, about = read_tensors(folder / "iteration.safetensors")
            if about["options"] != _hash(asdict(options)):
                return None
            return Iteration(int(about["number"]), plan_from_json(about["plan"]), weights)

        return _by_all(self._read(read))

    def save_iteration(self, options: CutOptions, iteration: Iteration) -> None:
        """Keep what an iteration left; scores of later ones, which a run of other options has left, are removed."""
        if self._target is not None:
            for number in range(iteration.number + 1, options.iterations + 1):
                (self._target / f"scores-{number}.safetensors").unlink(missing_ok=True)
                shutil.rmtree(self._target / f"layers-{number}", ignore_errors=True)
            about = {"options": _hash(asdict(options)), "number": iteration.number, "plan": iteration.plan.to_json()}
            weights = {name: weight.detach() for name, weight in iteration.weights.items()}
            write_tensors(self._target / "iteration.safetensors", weights, about)

    def load_windows(self) -> Tensor | None:
        """The calibration windows that the model wrote itself."""
        return self._read(lambda folder: read_tensors(folder / "windows.safetensors")[0]["windows"])

    def save_windows(self, windows: Tensor) -> None:
        """Keep them: a resumed run must not have others."""
        if self._target is not None:
            write_tensors(self._target / "windows.safetensors", {"windows": windows})

    def _read(self, read: Callable[[Path], Value | None]) -> Value | None:
        try:
            return None if self.folder is None else read(self.folder)
        except DAMAGED:
            return None


def _by_all(found: Value | None) -> Value | None:
    """The value where every process has loaded one, else None."""
    return None if processes.largest(int(found is None)) else found


def has_begun(work: Path) -> bool:
    """Whether a stopped run has left what took time: scores, windows, weights, a checkpoint, a teacher's outputs."""
    return any(work.rglob("*.safetensors"))


@contextmanager
def work_folder(out: Path, key: str, *, resume: bool) -> Iterator[Path]:
    """The folder beside OUT for what a run keeps: emptied unless the run resumes one of the same key.

    A run that is stopped, or has no room on the disk, leaves it where it has begun. Of several processes, the first
    prepares and removes it.
    """
    work = out.absolute().with_name(f".{out.absolute().name}.secateur")
    if processes.is_first() and not (resume and _key_in(work) == key):
        shutil.rmtree(work, ignore_errors=True)
        with atomic_folder(work) as fresh:
            write_json(fresh / "key.json", {"key": key})
    processes.wait()
    try:
        yield work
    except BaseException as error:
        in_vain = isinstance(error, SecateurError) and not isinstance(error, DiskError)  # it would fail again
        if in_vain or not has_begun(work):
            if processes.is_first():
                shutil.rmtree(work, ignore_errors=True)
        elif isinstance(error, DiskError):
            error.add_note("what was done so far is kept: make room, and go on with --resume (resume=True)")
        raise
    if processes.is_first():
        shutil.rmtree(work, ignore_errors=True)


def run_key(recipe: PruneRecipe) -> str:
    """What scores and their prices depend on, as a hash: a run may only resume from those made for the same."""
    cut = recipe.cut
    about = _about(recipe.model, recipe.calibration, recipe.loading)
    of_units = [cut.score, cut.reduce, cut.prices, cut.axes, cut.layers, cut.within]
    return _hash([about, of_units, _code(cut.score), [(name, _stamp(name)) for name in cut.keep_text]])


def _code(score: str) -> Any:
    """The state of the code of a score of the user's own: its file, or where there is none the code itself."""
    if score not in SCORES or not SCORES[score].own:
        return None
    code: Any = getattr(SCORES[score].salience, "__code__", None)
    if code is None:  # an object that is called
        return None
    return _stamp(code.co_filename) if Path(code.co_filename).is_file() else [code.co_code.hex(), repr(code.co_consts)]


def state_key(paths: Sequence[str], about: Any) -> str:
    """What a training depends on, as a hash: the state of the files and folders named, and plain data."""
    return _hash([[_stamp(path) for path in paths], about, __version__, torch.__version__])


def _key_in(work: Path) -> Any:
    try:
        return read_json(work / "key.json")["key"]
    except DAMAGED:
        return None


class StatisticsFolder:
    """A run folder that the user names: one file of statistics for each model and calibration, and the scores."""

    def __init__(self, folder: Path, model: str, calibration: CalibrationOptions, loading: LoadOptions) -> None:
        self.key = _hash([_about(model, calibration.as_scored(), loading)])
        self.path = folder / f"statistics-{self.key[:16]}.safetensors"
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(
                f"{folder} is a file, and a folder is to hold the statistics: name another with --run"
            )
        make_folder(folder)

    def load(self) -> Statistics | None:
        """The statistics; None where there are none. By all processes or none."""
        try:
            return _by_all(load_statistics(self.path, about=self.key))
        except ScoreError:
            return _by_all(None)

    def save(self, statistics: Statistics) -> None:
        """Keep statistics, but for those of the user's own scores, whose code may change."""
        own = {name for name, how in SCORES.items() if how.own}
        ours = {name: sums for name, sums in statistics.sums.items() if name not in own}
        if processes.is_first():
            save_statistics(self.path, replace(statistics, sums=ours), about=self.key)

    def save_scores(self, scores: Scores) -> None:
        """Keep the scores, which the report shows: one file for each score, reduction and choice of groups."""
        if processes.is_first():
            key = _hash([self.key, scores.reduce, sorted(scores.units)])
            save_scores(self.path.with_name(f"scores-{scores.score}-{key[:16]}.safetensors"), scores)


def _about(model: str, calibration: CalibrationOptions, loading: LoadOptions) -> list[Any]:
    """What statistics depend on."""
    states = [_stamp(resolve(model).path or model), *map(_stamp, calibration.names)]
    return [*states, asdict(calibration), asdict(loading), __version__, torch.__version__]


def _hash(about: Any) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _stamp(name: str | Path) -> list[Any]:
    """What tells one state of a file or folder from another without reading it; a name that is no path is itself.

    Of a model's folder its own files count, since what is made of it may lie below; of a folder of data all that are
    read, which are not hidden.
    """
    path = Path(name).resolve()
    if not path.exists():
        return [str(name)]
    if not path.is_dir():
        files = [path]
    elif (path / MODEL_MARK).is_file():
        files = sorted(path.iterdir())
    else:
        files = visible_files(path)
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
