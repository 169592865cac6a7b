"""One model cut by several ratios, scores and presets -> size and perplexity of each, and which nothing else beats.

The dense model is loaded once and stays as it is; every point is pruned, and repaired, in memory. Statistics are kept
in the run folder, so that another ratio or another score of the same kind needs no pass over the model, and so is every
point that is done, so that a sweep that was killed resumes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from secateur import processes
from secateur.data.calibration import CalibrationOptions
from secateur.decoding import decode
from secateur.discovery.counting import count_macs, count_parameters
from secateur.errors import (
    CheckpointError,
    DataError,
    PlanError,
    ScoreError,
    SecateurError,
    check_known,
)
from secateur.evaluation.contamination import warn_of_overlap
from secateur.evaluation.perplexity import evaluate
from secateur.files import make_folder, read_json, write_json
from secateur.models.config import check_not_quantized, check_writes_text, load_config
from secateur.models.options import LoadOptions
from secateur.models.sources import resolve
from secateur.pipeline.cache import Cache, StatisticsFolder, run_key, state_key
from secateur.pipeline.frontier import DENSE, Point, Refused, Sweep, draw, frontier
from secateur.pipeline.options import RunOptions, SweepOptions
from secateur.pipeline.pipeline import Pipeline
from secateur.pipeline.recipe import PruneRecipe, prune_recipe
from secateur.planning.plan import Plan, check_score
from secateur.progress import Clock
from secateur.scoring.registry import SCORES

logger = logging.getLogger(__name__)

FOLDER = "sweep"  # of the points, within the run folder


def sweep(
    model: str,
    options: SweepOptions,
    *,
    texts: Mapping[str, str],
    cut: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    loading: LoadOptions | None = None,
    run: RunOptions,
) -> Sweep:
    """Cut a MODEL argument by every ratio with every score and preset, and score every text (name -> text).

    `cut` and `calibration` are options of all cuts, by name. The run folder keeps statistics, finished points and the
    picture; with `resume`, points that an earlier run has done for the very same are not done again. A cut that cannot
    be done is among the `refused`. Raises `SecateurError` for what is wrong with all points.
    """
    for score in options.scores:
        check_known(ScoreError, "score", score, SCORES)
    if processes.count() > 1:
        raise PlanError("a sweep runs in one process: start it without accelerate launch")
    if run.folder is None:
        raise CheckpointError("a sweep keeps its points in a run folder: name one with --run FOLDER")
    if not texts:
        raise DataError("there is no text to score: give one, for example --ppl wikitext2=wiki.test.raw")
    loading = loading or LoadOptions()
    make_folder(run.folder / FOLDER)
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    check_not_quantized(config, name=model)
    check_writes_text(config, name=model, doing="sweep")
    asked, refused = _cuts(model, options, cut or {}, calibration or {}, loading)
    measuring = _Measuring(model, options, texts, loading, run, start_tokens=(calibration or {}).get("start_tokens"))
    rows = [measuring.dense()]
    for each in asked:
        try:
            rows.append(measuring.point(each))
        except SecateurError as error:
            logger.debug("%s at %g: %s", each.label, each.ratio, error)
            refused.append(Refused(each.recipe.cut.score, each.preset, each.ratio, each.label, str(error)))
    if len(rows) == 1:
        raise PlanError(f"none of the {len(refused)} cuts can be done; the first: {refused[0].why}")
    size = "macs" if (cut or {}).get("of") in ("macs", "latency") else "parameters"
    on_it = frontier([(getattr(row, size), row.nll) for row in rows])
    rows = [replace(row, frontier=on) for row, on in zip(rows, on_it, strict=True)]
    found = Sweep(model, size, tuple(rows), tuple(refused), resumed=measuring.resumed)
    if options.plot or (options.plot is None and importlib.util.find_spec("matplotlib") is not None):
        found = replace(found, pictures=draw(found, run.folder / FOLDER))
    write_json(run.folder / FOLDER / "sweep.json", found.to_json())
    return found


@dataclass(frozen=True, slots=True)
class _Cut:
    """One point to measure."""

    preset: str
    label: str
    ratio: float
    recipe: PruneRecipe


def _cuts(
    model: str, options: SweepOptions, cut: Mapping[str, Any], calibration: Mapping[str, Any], loading: LoadOptions
) -> tuple[list[_Cut], list[Refused]]:
    """Every cut, the ratios of one score after the other; options that do not go together are refused one by one."""
    found, refused = [], []
    for preset in dict.fromkeys(options.presets):
        prune_recipe(model, preset=preset, calibration=calibration)  # refuses an unknown preset, and such calibration
        for score in dict.fromkeys(options.scores) or (None,):
            label = preset if score is None else score if len(options.presets) == 1 else f"{preset}, {score}"
            for ratio in dict.fromkeys(options.ratios):
                given = {**cut, "ratio": ratio, **({} if score is None else {"score": score})}
                try:
                    recipe = prune_recipe(model, preset=preset, cut=given, calibration=calibration)
                    check_score(recipe.cut)
                    found.append(_Cut(preset, label, ratio, replace(recipe, loading=loading)))
                except SecateurError as error:
                    refused.append(Refused(score or "", preset, ratio, label, str(error)))
    return found, refused


class _Measuring:
    """The dense model, loaded when the first point needs it, and what each point is measured with."""

    def __init__(
        self,
        name: str,
        options: SweepOptions,
        texts: Mapping[str, str],
        loading: LoadOptions,
        run: RunOptions,
        *,
        start_tokens: Sequence[int] | None,
    ) -> None:
        self.name, self.options, self.texts, self.loading, self.run = name, options, texts, loading, run
        assert run.folder is not None
        self.folder, self.resumed, self.bars = run.folder / FOLDER, 0, Clock(run.bars).bars
        calibration = CalibrationOptions(start_tokens=None if start_tokens is None else tuple(start_tokens))
        self.whole = Pipeline(PruneRecipe(name, calibration=calibration, loading=loading), clock=Clock(run.bars))
        self._warned: set[CalibrationOptions] = set()

    def dense(self) -> Point:
        """The model before any cut."""
        path = self._path(None)
        point = self._load_point(path, own=False)
        if point is None:
            discovery, perplexity = self.whole.discovery, self._perplexity(self.whole.model, DENSE)
            total, inner = (count_parameters(discovery, embeddings=counted) for counted in (True, False))
            point = Point(DENSE, "", 0.0, DENSE, total, inner, sum(count_macs(discovery).values()), perplexity)
            write_json(path, asdict(point))
        return point

    def point(self, each: _Cut) -> Point:
        """One cut; raises `SecateurError` when it cannot be done."""
        path, cut = self._path(each.recipe), each.recipe.cut
        point = self._load_point(path, own=SCORES[cut.score].own)
        if point is not None:
            return replace(point, label=each.label, preset=each.preset)
        title = f"{each.label} {each.ratio:g}"
        pruned, decided = self._pruned(each, title)
        if each.recipe.calibration not in self._warned:
            self._warned.add(each.recipe.calibration)
            warn_of_overlap(each.label, self.whole.tokenizer, self.texts, decided.scored)
        counts = decided.parameters["pruned"], decided.parameters["pruned_non_embedding"], decided.macs["pruned"]
        point = Point(cut.score, each.preset, each.ratio, each.label, *counts, self._perplexity(pruned, title))
        write_json(path, asdict(point))
        return point

    def _pruned(self, each: _Cut, title: str) -> tuple[PreTrainedModel, Plan]:
        """The model as `prune` would write it, in memory; the stages that a killed sweep had finished are kept."""
        whole, clock = self.whole, Clock(lambda stage: self.bars(f"{title}: {stage}"))
        model, tokenizer, discovery = whole.model, whole.tokenizer, whole.discovery
        pipeline = Pipeline(each.recipe, model=model, tokenizer=tokenizer, discovery=discovery, clock=clock)
        work = self.folder / f"work-{run_key(pipeline.recipe)[:16]}"
        make_folder(work)
        pipeline.cache = Cache(work)
        assert self.run.folder is not None
        pipeline.statistics = StatisticsFolder(self.run.folder, self.name, pipeline.calibration, self.loading)
        pipeline.sizes(pipeline.start())  # a budget that cannot be met is refused before any pass
        return pipeline.cut()

    def _perplexity(self, model: PreTrainedModel, title: str) -> tuple[dict[str, Any], ...]:
        tokenizer, protocols, most = self.whole.tokenizer, self.options.protocols, self.options.max_tokens
        with self.bars(f"{title}: evaluate") as progress:
            results = evaluate(model, tokenizer, self.texts, protocols=protocols, max_tokens=most, progress=progress)
        return tuple(result.to_json() for result in results)

    def _path(self, recipe: PruneRecipe | None) -> Path:
        """The file of a point, named by all that it depends on."""
        texts = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()}
        cut = None if recipe is None else [asdict(recipe.cut), asdict(recipe.calibration)]
        about = [cut, asdict(self.loading), texts, list(self.options.protocols), self.options.max_tokens]
        files = [
            str(resolve(self.name).path or self.name),
            *(() if recipe is None else (*recipe.calibration.names, *recipe.cut.keep_text)),
        ]
        return self.folder / f"point-{state_key(files, about)[:16]}.json"

    def _load_point(self, path: Path, *, own: bool) -> Point | None:
        """A point that an earlier run has done, if it can be read; the user's own scores may have changed since."""
        if not self.run.resume or own:
            return None
        try:
            point: Point = decode(Point, read_json(path))
            point.nll  # noqa: B018 - a damaged file has none
        except (OSError, CheckpointError, TypeError, ValueError, LookupError):
            return None  # there is none, or it is damaged
        self.resumed += 1
        return point
