"""One model cut by several ratios and scores -> size and perplexity of each, and which of them nothing else beats.

The dense model is loaded once and stays as it is; every point is cut, and repaired, in memory. Statistics are kept in
the run folder, so that another ratio or another score of the same kind needs no pass over the model, and so is every
point that is done, so that a sweep that was killed goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import processes
from secateur.data.calibration import CalibrationOptions
from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import CheckpointError, DataError, PlanError, SecateurError
from secateur.evaluation.contamination import warn_of_overlap
from secateur.evaluation.perplexity import evaluate
from secateur.evaluation.protocols import Protocol
from secateur.files import atomic_file, make_folder, read_json, write_json
from secateur.models.config import check_not_quantised, load_config
from secateur.models.loading import LoadOptions, load
from secateur.models.sources import resolve
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.cache import recovery_key, run_key
from secateur.pipeline.run import cut_loaded
from secateur.planning.options import CutOptions, calibration_for, options_for, settled
from secateur.progress import Clock, ProgressBars
from secateur.scoring.scores import SCORES, known

logger = logging.getLogger(__name__)

DENSE = "dense"
FOLDER = "sweep"  # of the points, within the run folder
PICTURES = ("frontier.png", "frontier.svg")
MOST_RATIOS = 100


@dataclass(frozen=True, slots=True)
class Point:
    """One cut: what is left of the model and how well it predicts; ratio 0 is the dense model.

    >>> Point("dense", "", 0.0, "dense", 100, 80, 6400, ({"data": "t", "seq_len": 8, "nll": 2.0},)).nll
    2.0
    """

    score: str
    preset: str
    ratio: float
    label: str  # what tells its curve from others
    parameters: int
    non_embedding_parameters: int
    macs: int  # of 64 tokens
    perplexity: tuple[Mapping[str, Any], ...]  # as `evaluate` gives them, one for each text and window
    frontier: bool = False  # whether no other point is both as small and as good, and better in one

    @property
    def nll(self) -> float:
        """Nats per token, the mean over texts and windows."""
        values = [entry["nll"] for entry in self.perplexity]
        return math.inf if any(value is None for value in values) else sum(values) / len(values)


@dataclass(frozen=True, slots=True)
class Refused:
    """A cut that cannot be done, and why.

    >>> Refused("fisher", "best", 0.99, "best", "leaves nothing").why
    'leaves nothing'
    """

    score: str
    preset: str
    ratio: float
    label: str
    why: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points of one model, the dense one first; `size` names what the frontier weighs perplexity against.

    >>> Sweep("demo", "parameters", (), ()).to_json()["size"]
    'parameters'
    """

    model: str
    size: str  # "parameters" or "macs"
    rows: tuple[Point, ...]
    refused: tuple[Refused, ...]
    pictures: tuple[Path, ...] = ()
    resumed: int = 0  # points that an earlier run had kept

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur sweep --json` writes it."""
        data = asdict(self)
        return {**data, "pictures": [str(path) for path in self.pictures]}


def sweep(
    model: str,
    *,
    ratios: Sequence[float],
    texts: Mapping[str, str],
    run: str | Path,
    scores: Sequence[str] = (),
    presets: Sequence[str] = ("best",),
    cut: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    seq_lens: Sequence[int] = (128,),
    max_tokens: int | None = None,
    loading: LoadOptions | None = None,
    resume: bool = False,
    plot: bool | None = None,
    bars: ProgressBars | None = None,
) -> Sweep:
    """Cut a MODEL argument by every ratio with every score and preset, and score every text (name -> text).

    Without scores, each preset has its own. `cut` are options for all cuts, `calibration` is what `calibration_for`
    takes. `run` is a folder: statistics, the points that are done, and a picture of the frontier are kept there; with
    `resume`, points that an earlier run has done for the very same are not done again. `plot` draws the picture (None:
    where matplotlib is installed). A cut that cannot be done is among the `refused`.

    Raises `SecateurError` for what is wrong with all points: an unknown score or preset, a model or text that cannot be
    read, and when no cut can be done at all.
    """
    if processes.count() > 1:
        raise PlanError("a sweep runs in one process: start it without accelerate launch")
    loading, run = loading or LoadOptions(), Path(run)
    _check(ratios, scores, presets, texts)
    if plot is None:
        plot = importlib.util.find_spec("matplotlib") is not None
    elif plot and importlib.util.find_spec("matplotlib") is None:
        raise DataError("the picture of a sweep needs the package matplotlib. Run: pip install 'secateur[plot]'")
    folder = _made(run / FOLDER)
    bars = bars or (lambda stage: nullcontext())
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    check_not_quantised(config, name=model)
    with bars("discover"):
        discovery = discover(model, trust_remote_code=loading.trust_remote_code)
    asked, refused = _asked(discovery, ratios, scores, presets, cut or {}, calibration or {})
    measuring = _Measuring(model, discovery, texts, seq_lens, max_tokens, loading, folder, resume, bars)
    rows = [measuring.dense()]
    for each in asked:
        try:
            rows.append(measuring.point(each, run))
        except SecateurError as error:
            logger.debug("%s at %g: %s", each.label, each.ratio, error)
            refused.append(Refused(each.options.score, each.preset, each.ratio, each.label, str(error)))
    if len(rows) == 1:
        raise PlanError(f"none of the {len(refused)} cuts can be done; the first: {refused[0].why}")
    size = "macs" if (cut or {}).get("of") in ("macs", "latency") else "parameters"
    on_it = frontier([(getattr(row, size), row.nll) for row in rows])
    rows = [replace(row, frontier=on) for row, on in zip(rows, on_it, strict=True)]
    found = Sweep(model, size, tuple(rows), tuple(refused), resumed=measuring.resumed)
    if plot:
        found = replace(found, pictures=draw(found, folder))
    write_json(folder / "sweep.json", found.to_json())
    return found


def ratios_in(text: str) -> list[float]:
    """Read `first:last:step`, both ends among them, or numbers with commas between.

    Raises `PlanError` for anything else, and for ratios outside (0, 1).

    >>> ratios_in("0.1:0.6:0.1"), ratios_in("0.2,0.5")
    ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.5])
    """
    try:
        if ":" in text:
            first, last, step = (Decimal(part) for part in text.split(":"))
            if step <= 0 or not (last - first).is_finite() or (last - first) / step >= MOST_RATIOS:
                raise ValueError
            found = [float(first + i * step) for i in range(math.floor((last - first) / step) + 1)]
        else:
            found = [float(Decimal(part)) for part in text.split(",")]
    except (ValueError, InvalidOperation):
        raise PlanError(f"--ratios {text}: expected first:last:step or numbers, for example 0.1:0.6:0.1") from None
    _check_ratios(found)
    return found


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points (size, loss) no other beats: one that is no larger and no worse, and better in one of both.

    Of points that are alike in both, all are on the frontier if one is.

    >>> frontier([(10, 2.0), (8, 2.5), (8, 3.0), (9, 2.6)])
    [True, True, False, False]
    """
    best, found = math.inf, [False] * len(points)
    order = sorted(range(len(points)), key=lambda i: points[i])
    for place, i in enumerate(order):
        same = place > 0 and points[order[place - 1]] == points[i]
        found[i] = found[order[place - 1]] if same else points[i][1] < best
        best = min(best, points[i][1])
    return found


def draw(found: Sweep, folder: Path) -> tuple[Path, ...]:
    """Draw perplexity against size, a panel for each text and window, as PNG and SVG; returns the files.

    A curve joins the cuts of one label, a grey line those that nothing beats on this text; the dense model is a star.
    Raises `CheckpointError` when a file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    panels = [(entry["data"], entry["seq_len"]) for entry in found.rows[0].perplexity]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * lines), layout="constrained")
    unit, factor = ("billion MACs of 64 tokens", 1e9) if found.size == "macs" else ("million parameters", 1e6)
    curves: dict[str, list[Point]] = {}
    for row in found.rows[1:]:
        curves.setdefault(row.label, []).append(row)
    for number, (data, seq_len) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, number + 1, xlabel=unit, ylabel="perplexity", yscale="log")
        axes.set_title(f"{data}, windows of {seq_len}")

        def at(row: Point, number: int = number) -> tuple[float, float]:
            nll = row.perplexity[number]["nll"]
            return getattr(row, found.size) / factor, math.exp(min(math.inf if nll is None else nll, 700.0))

        on_it = frontier([at(row) for row in found.rows])
        best = sorted(at(row) for row, on in zip(found.rows, on_it, strict=True) if on)
        axes.plot(*zip(*best, strict=True), color="0.75", linewidth=6, marker="o", markersize=15, zorder=1)
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        for place, (label, members) in enumerate(curves.items()):
            along = sorted(at(row) for row in members)
            axes.plot(*zip(*along, strict=True), marker="osD^vP"[place % 6], linewidth=1.2, label=label, zorder=2)
        axes.plot(*at(found.rows[0]), marker="*", markersize=13, color="black", linestyle="", label=DENSE, zorder=3)
        axes.legend()
    figure.suptitle(f"{found.model}: quality against size; what nothing beats in grey")
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "secateur"}):  # the same file from the same numbers
        for name in PICTURES:
            with atomic_file(folder / name, overwrite=True) as temporary:
                kind = Path(name).suffix[1:]
                figure.savefig(temporary, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {})
            written.append(folder / name)
    return tuple(written)


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    preset: str
    label: str
    ratio: float
    options: CutOptions
    calibration: CalibrationOptions


def _check(ratios: Sequence[float], scores: Sequence[str], presets: Sequence[str], texts: Mapping[str, str]) -> None:
    """Refuse what no point could be done with."""
    for score in scores:
        known(score, SCORES, "score")
    if not presets:
        raise PlanError("presets is empty: name one, for example --presets best")
    if not texts:
        raise DataError("there is no text to score: give one, for example --ppl wikitext2=wiki.test.raw")
    _check_ratios(ratios)


def _check_ratios(ratios: Sequence[float]) -> None:
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise PlanError(f"ratio={ratio:g} is outside (0, 1): it is the share to remove, for example 0.1:0.6:0.1")
    if not ratios:
        raise PlanError("there is no ratio: give some, for example --ratios 0.1:0.6:0.1")


def _asked(
    discovery: Discovery,
    ratios: Sequence[float],
    scores: Sequence[str],
    presets: Sequence[str],
    cut: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> tuple[list[_Asked], list[Refused]]:
    """Every cut, the ratios of one score after the other; options that do not go together are refused one by one."""
    found, refused = [], []
    for preset in dict.fromkeys(presets):
        text = calibration_for(preset, **calibration)
        options_for(preset, discovery, {})  # refuses a preset that there is not
        for score in dict.fromkeys(scores) or (None,):
            label = preset if score is None else score if len(presets) == 1 else f"{preset}, {score}"
            for ratio in dict.fromkeys(ratios):
                given = {**cut, "ratio": ratio, **({} if score is None else {"score": score})}
                try:
                    options = options_for(preset, discovery, given)
                    found.append(_Asked(preset, label, ratio, options, settled(text, options)))
                except SecateurError as error:
                    refused.append(Refused(score or "", preset, ratio, label, str(error)))
    return found, refused


# --- measuring --------------------------------------------------------------------------------------------------------


class _Measuring:
    """The dense model, loaded when the first point needs it, and what each point is measured with."""

    def __init__(
        self,
        name: str,
        discovery: Discovery,
        texts: Mapping[str, str],
        seq_lens: Sequence[int],
        max_tokens: int | None,
        loading: LoadOptions,
        folder: Path,
        resume: bool,
        bars: ProgressBars,
    ) -> None:
        self.name, self.discovery, self.loading, self.bars = name, discovery, loading, bars
        self.texts, self.seq_lens, self.max_tokens = texts, seq_lens, max_tokens
        self.folder, self.resume, self.resumed = folder, resume, 0
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._warned: set[CalibrationOptions] = set()

    def dense(self) -> Point:
        """The model before any cut."""
        path = self._path(None, None)
        kept = self._kept(path, own=False)
        if kept is None:
            model, tokenizer = self._model()
            kept = Point(
                score=DENSE,
                preset="",
                ratio=0.0,
                label=DENSE,
                parameters=count_parameters(self.discovery),
                non_embedding_parameters=count_parameters(self.discovery, embeddings=False),
                macs=sum(count_macs(self.discovery).values()),
                perplexity=self._perplexity(model, tokenizer, DENSE),
            )
            write_json(path, asdict(kept))
        return kept

    def point(self, asked: _Asked, run: Path) -> Point:
        """One cut; raises `SecateurError` when it cannot be done."""
        path = self._path(asked.options, asked.calibration)
        kept = self._kept(path, own=SCORES[asked.options.score].own)
        if kept is not None:
            return replace(kept, label=asked.label, preset=asked.preset)
        model, tokenizer = self._model()
        title = f"{asked.label} {asked.ratio:g}"
        key = run_key(self.name, asked.options, asked.calibration, self.loading)
        pruned, decided = cut_loaded(
            model,
            self.name,
            asked.options,
            discovery=self.discovery,
            calibration=asked.calibration,
            loading=self.loading,
            run=run,
            work=_made(self.folder / f"work-{key[:16]}"),
            clock=Clock(lambda stage: self.bars(f"{title}: {stage}")),
        )
        if asked.calibration not in self._warned:
            self._warned.add(asked.calibration)
            warn_of_overlap(asked.label, tokenizer, self.texts, decided.scored)
        found = Point(
            score=asked.options.score,
            preset=asked.preset,
            ratio=asked.ratio,
            label=asked.label,
            parameters=decided.parameters["pruned"],
            non_embedding_parameters=decided.parameters["pruned_non_embedding"],
            macs=decided.macs["pruned"],
            perplexity=self._perplexity(pruned, tokenizer, title),
        )
        write_json(path, asdict(found))
        return found

    def _model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            trust = self.loading.trust_remote_code
            with self.bars("load"):
                model = load(self.name, dtype=self.loading.dtype, device=self.loading.device, trust_remote_code=trust)
                check_finite(model)
                self._loaded = model, load_tokenizer(self.name, trust_remote_code=trust)
        return self._loaded

    def _perplexity(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, title: str
    ) -> tuple[dict[str, Any], ...]:
        with self.bars(f"{title}: evaluate") as progress:
            protocols = [Protocol(length) for length in self.seq_lens]
            results = evaluate(
                model, tokenizer, self.texts, protocols=protocols, max_tokens=self.max_tokens, progress=progress
            )
        return tuple(asdict(result) for result in results)

    def _path(self, options: CutOptions | None, calibration: CalibrationOptions | None) -> Path:
        """The file of a point, named by all that it depends on."""
        texts = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()}
        about = [
            None if options is None else asdict(options),
            None if calibration is None else asdict(calibration),
            asdict(self.loading),
            texts,
            list(self.seq_lens),
            self.max_tokens,
        ]
        files = [str(resolve(self.name).path or self.name), *([] if calibration is None else [calibration.text])]
        return self.folder / f"point-{recovery_key(files, about)[:16]}.json"

    def _kept(self, path: Path, *, own: bool) -> Point | None:
        """A point that an earlier run has done, if it can be read; the user's own scores may have changed since."""
        if not self.resume or own:
            return None
        try:
            data = read_json(path)
            found = Point(**{**data, "perplexity": tuple(data["perplexity"])})
            found.nll  # noqa: B018 - a damaged file has none
        except (OSError, CheckpointError, TypeError, ValueError, LookupError):
            return None  # there is none, or it is damaged
        self.resumed += 1
        return found


def _made(folder: Path) -> Path:
    make_folder(folder)
    return folder
