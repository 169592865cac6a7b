"""MODEL -> plan or pruned folder, stage by stage; what a stage made is kept, so that a killed run can go on.

While `prune` works, its values lie in a folder beside the output (`.OUT.secateur`): the scores, once they are made,
and a key that says for what. The same command with resume reads them; one that succeeds, or fails for a reason
that a repetition would meet again, removes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.axes import Discovery, discover
from secateur.calibration import CalibrationOptions
from secateur.checkpoint import atomic_folder, check_stock, check_vacant, make_record, save, write_json
from secateur.errors import SecateurError
from secateur.models import check_finite, has_weights, load, load_config, load_tokenizer
from secateur.plan import CutOptions, Plan, options_for, plan
from secateur.prune import check_plan, prune
from secateur.scores import SCORES, Scores, read_scores, score, write_scores
from secateur.statistics import Progress

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
        extra = {"out": str(self.out), "seconds": dict(self.seconds), "peak_rss_bytes": self.peak_rss_bytes}
        return {**self.plan.to_json(), **extra}


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
    """Plan a cut of a MODEL argument; sizes only, if asked or where there are no weights to score."""
    loading = loading or LoadOptions()
    clock = Clock(watch) if watch else Clock()
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    with clock.stage("discover"):
        discovery = discover(model, trust_remote_code=loading.trust_remote_code)
    options = options_for(preset, discovery, cut or {})
    sizes = plan(discovery, options, config=config)
    if sizes_only or not has_weights(model):
        return sizes
    scores, _ = _scores(model, discovery, options, calibration or CalibrationOptions(), loading, clock)
    return plan(discovery, options, config=config, scores=scores)


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
) -> Pruned:
    """Discover, score, plan, cut and save a MODEL argument; `given` is a plan made before, instead of options.

    Everything that can be refused is refused before the first weight is read. Raises `SecateurError`.
    """
    out = Path(out)
    loading = loading or LoadOptions()
    calibration = calibration or CalibrationOptions()
    clock = Clock(watch) if watch else Clock()
    check_vacant(out, overwrite=overwrite)
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    with clock.stage("discover"):
        discovery = discover(model, trust_remote_code=loading.trust_remote_code)
    if given is not None:
        check_plan(given, discovery)
        options, sizes = given.options, given
    else:
        options = options_for(preset, discovery, cut or {})
        sizes = plan(discovery, options, config=config)
    check_stock(sizes)
    with _work_folder(out, _key(model, options, calibration, loading), resume=resume) as work:
        kept = work / "scores.safetensors"
        resumed = kept.exists()
        if given is not None:
            decided, scores, loaded = given, None, None
        elif resumed:
            scores, loaded = read_scores(kept), None
            decided = plan(discovery, options, config=config, scores=scores)
        else:
            scores, loaded = _scores(model, discovery, options, calibration, loading, clock)
            write_scores(kept, scores)
            decided = plan(discovery, options, config=config, scores=scores)
        if loaded is None:
            with clock.stage("load"):
                loaded = _load(model, loading)
        tokenizer = load_tokenizer(model, trust_remote_code=loading.trust_remote_code)
        with clock.stage("cut"):
            pruned = prune(loaded, decided, discovery=discovery)
        with clock.stage("save"):
            record = make_record(
                loaded,
                name=model,
                calibration=decided.scored.get("calibration"),
                seed=decided.scored.get("seed", calibration.seed),
                command=command,
            )
            save(pruned, out, plan=decided, tokenizer=tokenizer, record=record, overwrite=overwrite)
    return Pruned(decided, out, clock.seconds, peak_rss(), resumed)


def _load(model: str, loading: LoadOptions) -> PreTrainedModel:
    loaded = load(model, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
    check_finite(loaded)
    return loaded


def _scores(
    model: str,
    discovery: Discovery,
    options: CutOptions,
    calibration: CalibrationOptions,
    loading: LoadOptions,
    clock: Clock,
) -> tuple[Scores, PreTrainedModel]:
    with clock.stage("load"):
        loaded = _load(model, loading)
    tokenizer: PreTrainedTokenizerBase | None = None
    if SCORES[options.score].needs != "weights":
        tokenizer = load_tokenizer(model, trust_remote_code=loading.trust_remote_code)
    with clock.stage("score") as progress:
        scores = score(
            loaded,
            tokenizer,
            discovery=discovery,
            name=options.score,
            reduce=options.reduce,
            calibration=calibration,
            progress=progress,
        )
    return scores, loaded


def _key(model: str, options: CutOptions, calibration: CalibrationOptions, loading: LoadOptions) -> str:
    """What scores depend on, as a hash: a run may only go on from scores made for the same."""
    text = calibration.text
    stamp = Path(text).stat().st_mtime_ns if Path(text).is_file() else 0
    about = [model, options.score, options.reduce, asdict(calibration), stamp, asdict(loading), torch.__version__]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


@contextmanager
def _work_folder(out: Path, key: str, *, resume: bool) -> Iterator[Path]:
    """The folder of a run's values: emptied unless it is to be resumed and was made for the same key."""
    work = out.absolute().with_name(f".{out.name}.secateur")
    key_file = work / "key.json"
    same = key_file.is_file() and json.loads(key_file.read_text(encoding="utf-8")) == {"key": key}
    if not (resume and same):
        shutil.rmtree(work, ignore_errors=True)
        with atomic_folder(work) as fresh:
            write_json(fresh / "key.json", {"key": key})
    try:
        yield work
    except SecateurError:
        shutil.rmtree(work, ignore_errors=True)  # it would fail again
        raise
    shutil.rmtree(work, ignore_errors=True)


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
