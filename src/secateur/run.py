"""MODEL -> plan or pruned folder, stage by stage; what a stage made is kept, so that a killed run can go on.

While `prune` works, its values lie in a folder beside the output (`.OUT.secateur`): the scores, once they are made,
and a key that says for what. The same command with resume reads them; one that succeeds, or fails for a reason
that a repetition would meet again, removes them.

Everything that can be refused is refused before the first weight is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from secateur import __version__
from secateur.axes import Discovery, count_parameters, discover
from secateur.calibration import SELF, CalibrationOptions, calibration_windows, check_positions
from secateur.checkpoint import atomic_folder, check_stock, check_vacant, make_record, save, unwritable, write_json
from secateur.errors import CheckpointError, ModelError, PlanError, ScoreError, SecateurError
from secateur.models import check_finite, has_weights, load, load_config, load_tokenizer, resolve
from secateur.plan import CutOptions, Plan, groups_to_cut, options_for, plan
from secateur.prune import check_plan, prune
from secateur.scores import SCORES, Scores, read_scores, score, write_scores
from secateur.settings import stock_settings
from secateur.statistics import Progress

SCORES_FILE = "scores.safetensors"
Watch = Callable[[str], AbstractContextManager[Progress | None]]  # a stage's name -> its progress bar


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a model: see `models.load`."""

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a run made: the plan, where the folder lies, seconds by stage, the most memory it held in bytes."""

    plan: Plan
    out: Path
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    resumed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur prune --json` writes it."""
        return {
            **self.plan.to_json(),
            "out": str(self.out),
            "seconds": dict(self.seconds),
            "peak_rss_bytes": self.peak_rss_bytes,
            "resumed": self.resumed,
        }


@dataclass(slots=True)
class Clock:
    """Seconds by stage; each stage shows its own progress bar."""

    watch: Watch = field(default=lambda stage: nullcontext())
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress | None]:
        """Time a stage; gives its progress callback."""
        start = time.perf_counter()
        with self.watch(name) as progress:
            yield progress
        self.seconds[name] = time.perf_counter() - start


def plan_model(
    model: str,
    *,
    preset: str = "best",
    cut: Mapping[str, Any] | None = None,
    calibration: CalibrationOptions | None = None,
    loading: LoadOptions | None = None,
    sizes_only: bool = False,
    watch: Watch | None = None,
) -> Plan:
    """Plan a cut of a MODEL argument; sizes only, if asked or where there are no weights to score.

    Raises `SecateurError`.
    """
    loading = loading or LoadOptions()
    clock = Clock(watch) if watch else Clock()
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    with clock.stage("discover"):
        discovery = discover(model, trust_remote_code=loading.trust_remote_code)
    options = options_for(preset, discovery, cut or {})
    sizes = plan(discovery, options, config=config, trust_remote_code=loading.trust_remote_code)
    if sizes_only or not has_weights(model):
        return sizes
    _check_unpacked(model, config)
    calibration = calibration or CalibrationOptions()
    windows = _windows(model, config, options, calibration, loading)
    with clock.stage("load"):
        loaded = _load(model, loading)
    scores = _scores(loaded, discovery, options, calibration, windows, clock)
    return plan(discovery, options, config=config, scores=scores, trust_remote_code=loading.trust_remote_code)


def prune_model(
    model: str,
    out: str | Path,
    *,
    preset: str = "best",
    cut: Mapping[str, Any] | None = None,
    given: Plan | None = None,
    calibration: CalibrationOptions | None = None,
    loading: LoadOptions | None = None,
    overwrite: bool = False,
    resume: bool = False,
    command: str | None = None,
    watch: Watch | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> Pruned:
    """Discover, score, plan, cut and save a MODEL argument; `given` is a plan made before, instead of options.

    With `resume`, the scores of a run that was killed are used if they were made for the very same. `announce` is
    called with the sizes that the cut will leave, when all is read and before it is scored. Raises `SecateurError`.
    """
    out = Path(out)
    loading = loading or LoadOptions()
    calibration = calibration or CalibrationOptions()
    clock = Clock(watch) if watch else Clock()
    check_vacant(out, overwrite=overwrite)
    _check_apart(model, out)
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    if not has_weights(model):
        raise ModelError(
            f"{model!r} has a config and no weights to cut; `secateur plan {model}` says what a cut leaves"
        )
    _check_unpacked(model, config)
    with clock.stage("discover"):
        discovery = discover(model, trust_remote_code=loading.trust_remote_code)
    if given is not None:
        given = _fitted(given, discovery, config, trust_remote_code=loading.trust_remote_code)
        options = given.options
    else:
        options = options_for(preset, discovery, cut or {})
    sizes = given or plan(discovery, options, config=config, trust_remote_code=loading.trust_remote_code)
    check_stock(sizes)

    def loaded_now() -> PreTrainedModel:
        with clock.stage("load"):
            found = _load(model, loading)
        if announce is not None:
            announce(sizes)
        return found

    with _work_folder(out, _key(model, options, calibration, loading), resume=resume) as work:
        scores = _kept(work) if given is None else None
        resumed = scores is not None
        loaded = None
        if given is None and scores is None:
            windows = _windows(model, config, options, calibration, loading)
            loaded = loaded_now()
            scores = _scores(loaded, discovery, options, calibration, windows, clock)
            _keep(work, scores)
        decided = given or plan(
            discovery, options, config=config, scores=scores, trust_remote_code=loading.trust_remote_code
        )
        if loaded is None:
            loaded = loaded_now()
        tokenizer = load_tokenizer(model, trust_remote_code=loading.trust_remote_code)
        with clock.stage("cut"):
            pruned = prune(loaded, decided, discovery=discovery)
        with clock.stage("save"):
            record = make_record(
                loaded,
                name=model,
                calibration=decided.scored.get("calibration"),
                calibration_options=decided.scored.get("calibration_options"),
                seed=decided.scored.get("seed", calibration.seed),
                command=command,
            )
            save(pruned, out, plan=decided, tokenizer=tokenizer, record=record, overwrite=overwrite)
    return Pruned(decided, out, clock.seconds, peak_rss(), resumed)


def _check_apart(model: str, out: Path) -> None:
    """Raise `CheckpointError` when to write the folder would be to delete the model."""
    path = resolve(model).path
    if path is not None and out.resolve() in (path.resolve(), *path.resolve().parents):
        raise CheckpointError(f"{out} holds the MODEL itself, which would be deleted; name another folder")


def _check_unpacked(model: str, config: PreTrainedConfig) -> None:
    """Raise `ModelError` for a quantised model: the packed weights of most formats cannot be cut."""
    about = getattr(config, "quantization_config", None)
    if about is not None:
        method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
        raise ModelError(
            f"{model!r} is quantised ({getattr(method, 'value', method)}), and packed weights cannot be scored or cut. "
            f"Prune the model that it was made from and quantise the result; `secateur plan {model} --sizes-only` "
            "says what a cut leaves"
        )


def _fitted(given: Plan, discovery: Discovery, config: PreTrainedConfig, *, trust_remote_code: bool) -> Plan:
    """The plan with the settings that this config needs for it. Raises `PlanError` when it is of another model."""
    check_plan(given, discovery)
    planned, found = given.parameters.get("dense"), count_parameters(discovery)
    if planned != found:
        raise PlanError(
            f"the plan is of another model: of one with {planned} parameters ({given.model}), and {discovery.model} "
            f"has {found}; plan again with `secateur plan {discovery.model} --out plan.json`"
        )
    if given.settings is None:
        return given
    return replace(given, settings=stock_settings(config, discovery, given.cut, trust_remote_code=trust_remote_code))


def _load(model: str, loading: LoadOptions) -> PreTrainedModel:
    loaded = load(model, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
    check_finite(loaded)
    return loaded


def _windows(
    model: str, config: PreTrainedConfig, options: CutOptions, calibration: CalibrationOptions, loading: LoadOptions
) -> Tensor | None:
    """The calibration tokens that the score needs, if it needs any and the model is not to write them."""
    if SCORES[options.score].needs == "weights":
        return None
    check_positions(config, calibration.length)
    if calibration.text == SELF:
        return None
    return calibration_windows(load_tokenizer(model, trust_remote_code=loading.trust_remote_code), calibration)


def _scores(
    loaded: PreTrainedModel,
    discovery: Discovery,
    options: CutOptions,
    calibration: CalibrationOptions,
    windows: Tensor | None,
    clock: Clock,
) -> Scores:
    with clock.stage("score") as progress:
        return score(
            loaded,
            discovery=discovery,
            name=options.score,
            reduce=options.reduce,
            calibration=calibration,
            windows=windows,
            groups=[group.name for groups in groups_to_cut(discovery, options).values() for group in groups],
            progress=progress,
        )


def _kept(work: Path) -> Scores | None:
    """The scores that an earlier run left, if they can be read."""
    try:
        return read_scores(work / SCORES_FILE)
    except ScoreError:
        return None


def _keep(work: Path, scores: Scores) -> None:
    try:
        write_scores(work / SCORES_FILE, scores)
    except (OSError, SafetensorError) as error:
        raise unwritable(work / SCORES_FILE, error) from error


def _key(model: str, options: CutOptions, calibration: CalibrationOptions, loading: LoadOptions) -> str:
    """What scores depend on, as a hash: a run may only go on from scores made for the same."""
    about = [
        _stamp(resolve(model).path or model),
        _stamp(calibration.text),
        options.score,
        options.reduce,
        options.axes,
        options.layers,
        asdict(calibration),
        asdict(loading),
        __version__,
        torch.__version__,
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _stamp(name: str | Path) -> list[Any]:
    """What tells one state of a file or folder from another without reading it; a name that is no path is itself."""
    path = Path(name).resolve()
    if not path.exists():
        return [str(name)]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


@contextmanager
def _work_folder(out: Path, key: str, *, resume: bool) -> Iterator[Path]:
    """The folder of a run's values: emptied unless it is to be resumed and was made for the same key."""
    work = out.absolute().with_name(f".{out.absolute().name}.secateur")
    if not (resume and _read_key(work) == key):
        shutil.rmtree(work, ignore_errors=True)
        with atomic_folder(work) as fresh:
            write_json(fresh / "key.json", {"key": key})
    try:
        yield work
    except BaseException as error:
        if isinstance(error, SecateurError) or not (work / SCORES_FILE).exists():
            shutil.rmtree(work, ignore_errors=True)  # it would fail again, or nothing is worth keeping
        raise
    shutil.rmtree(work, ignore_errors=True)


def _read_key(work: Path) -> Any:
    try:
        return json.loads((work / "key.json").read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # there is none, or it is damaged


def peak_rss() -> int:
    """The most memory this process has held, in bytes.

    >>> peak_rss() > 10_000_000
    True
    """
    try:
        import resource
    except ImportError:  # Windows counts it elsewhere
        return int(getattr(psutil.Process().memory_info(), "peak_wset", psutil.Process().memory_info().rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if psutil.MACOS else peak * 1024)
