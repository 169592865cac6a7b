"""MODEL -> plan or pruned folder, stage by stage; what a stage made is kept, so that a killed run can go on.

Everything that can be refused is refused before the first weight is read. Started as several processes (by `accelerate
launch`), all of them score, each its share of the samples, and the first cuts and writes.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur import processes
from secateur.checkpoint.record import make_record
from secateur.checkpoint.save import check_saveable, save
from secateur.checkpoint.tensor_accounting import account_for_tensors
from secateur.data.calibration import SELF, CalibrationOptions
from secateur.data.generated import generate_windows
from secateur.data.windows import calibration_windows, digest
from secateur.discovery.config_settings import stock_settings
from secateur.discovery.counting import count_parameters
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import ModelError, PlanError
from secateur.evaluation.latency import latency_table
from secateur.files import check_apart, check_vacant
from secateur.models.config import check_not_quantised, check_positions, load_config, per_layer_model_class
from secateur.models.loading import LoadOptions, load, load_on_meta
from secateur.models.sources import resolve
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer, text_files
from secateur.models.weight_files import has_weights
from secateur.pipeline.cache import (
    PASS_FOLDER,
    RunFolder,
    keep_damage,
    keep_repair,
    keep_scores,
    keep_step,
    keep_windows,
    kept_damage,
    kept_repair,
    kept_scores,
    kept_step,
    kept_windows,
    run_key,
    work_folder,
)
from secateur.planning.allocation import DamageCurve
from secateur.planning.latency import LatencyTable
from secateur.planning.options import CutOptions, calibration_for, options_for, settled
from secateur.planning.plan import Plan, plan
from secateur.planning.selection import groups_to_cut
from secateur.progress import Clock, Progress, ProgressBars, peak_rss
from secateur.pruning.iterative import Step, cut_in_steps
from secateur.pruning.prune import check_plan, prune
from secateur.pruning.reconstruct import reconstruct_in_place
from secateur.pruning.repair import Repaired, repair
from secateur.pruning.sensitivity import damage_curves
from secateur.scoring.scores import SCORES, Scores, holds, scores_from, statistics_for

JOURNAL_FROM = 2**30  # bytes of weights: from here on, every layer that has been scored is kept for a run that goes on
IN_MEMORY = 0.25  # of the memory that is free: a model that takes more is cut into a file


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


def plan_model(
    model: str,
    *,
    preset: str = "best",
    cut: Mapping[str, Any] | None = None,
    calibration: CalibrationOptions | None = None,
    loading: LoadOptions | None = None,
    sizes_only: bool = False,
    run: str | Path | None = None,
    bars: ProgressBars | None = None,
) -> Plan:
    """Plan a cut of a MODEL argument; sizes only, if asked or where there are no weights to score.

    `run` is a folder that keeps the statistics: where it has those of the same model and calibration, the model is not
    loaded. Raises `SecateurError`.
    """
    processes.join()
    loading = loading or LoadOptions()
    clock = Clock(bars) if bars else Clock()
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    with clock.stage("discover"):
        discovery = discover(model, trust_remote_code=loading.trust_remote_code)
    options = options_for(preset, discovery, cut or {})
    loaded: list[PreTrainedModel] = []

    def loaded_now() -> PreTrainedModel:
        if not loaded:
            with clock.stage("load"):
                loaded.append(_load(model, loading))
        return loaded[0]

    if options.shape == "free" and not may_be_free(config):
        options = replace(options, shape="uniform")
    table = _latency(loaded_now, discovery, options, clock)
    sizes = plan(discovery, options, config=config, latency=table, trust_remote_code=loading.trust_remote_code)
    if sizes_only or not has_weights(model):
        return sizes
    check_not_quantised(config, name=model)
    calibration = settled(calibration or calibration_for(preset), options)
    windows = _windows(model, config, options, calibration, loading)

    folder = None if run is None else RunFolder(Path(run), model, calibration, loading)
    if options.steps > 1:
        return _in_steps(loaded_now(), discovery, options, windows, calibration, clock)[1]
    scores = _scores(loaded_now, discovery, options, calibration, windows, clock, folder=folder)
    return plan(
        discovery,
        options,
        config=config,
        scores=scores,
        latency=table,
        damage=_damage(loaded_now, discovery, options, scores, windows, calibration, clock),
        trust_remote_code=loading.trust_remote_code,
    )


def prune_model(
    model: str,
    out: str | Path,
    *,
    preset: str = "best",
    cut: Mapping[str, Any] | None = None,
    given: Plan | None = None,
    kept: Mapping[str, int] | None = None,
    calibration: CalibrationOptions | None = None,
    loading: LoadOptions | None = None,
    overwrite: bool = False,
    resume: bool = False,
    run: str | Path | None = None,
    command: str | None = None,
    bars: ProgressBars | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> Pruned:
    """Discover, score, plan, cut and save a MODEL argument; `given` is a plan made before, instead of options.

    With `resume`, what a run that was killed has kept is used if it was made for the very same: its scores, or the
    layers that it had scored. `run` is a folder that keeps the statistics for other plans. `announce` is called with
    the sizes that the cut will leave, when all is read and before it is scored. `kept` says how many units of each
    group stay, where that was decided before. Raises `SecateurError`.
    """
    processes.join()
    out = Path(out)
    loading = loading or LoadOptions()
    calibration = calibration or calibration_for(preset)
    clock = Clock(bars) if bars else Clock()
    check_vacant(out, overwrite=overwrite)
    check_apart(resolve(model).path, out)
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    if not has_weights(model):
        raise ModelError(
            f"{model!r} has a config and no weights to cut; `secateur plan {model}` says what a cut leaves"
        )
    check_not_quantised(config, name=model)
    with clock.stage("discover"):
        discovery = discover(model, trust_remote_code=loading.trust_remote_code)
    if given is not None:
        given = _fitted(given, discovery, config, trust_remote_code=loading.trust_remote_code)
        options = given.options
        if given.scored.get("calibration_options"):
            calibration = CalibrationOptions(**given.scored["calibration_options"])
    else:
        options = options_for(preset, discovery, cut or {})
    calibration = settled(calibration, options)
    loaded: list[PreTrainedModel] = []

    def loaded_now() -> PreTrainedModel:
        if not loaded:
            with clock.stage("load"):
                loaded.append(_load(model, loading))
        return loaded[0]

    if given is None and options.shape == "free" and not may_be_free(config):
        options = replace(options, shape="uniform")
    table = None if given is not None else _latency(loaded_now, discovery, options, clock)
    sizes = given or plan(
        discovery, options, config=config, latency=table, fixed_sizes=kept, trust_remote_code=loading.trust_remote_code
    )
    check_saveable(sizes, config=config, discovery=discovery, trust_remote_code=loading.trust_remote_code)
    if announce is not None and (given is not None or options.scope == "local"):
        announce(sizes)

    folder = None if run is None else RunFolder(Path(run), model, calibration, loading)
    if given is None and options.steps > 1:
        windows = _windows(model, config, options, calibration, loading)
        with work_folder(out, run_key(model, options, calibration, loading), resume=resume) as work:
            begun = kept_step(work, options)
            smaller, decided = _in_steps(
                loaded_now(), discovery, options, windows, calibration, clock, work=work, begun=begun
            )
            if announce is not None and options.scope != "local":
                announce(decided)
            if processes.is_first():
                _save(
                    loaded_now(),
                    smaller,
                    decided,
                    discovery,
                    out,
                    model,
                    calibration,
                    loading,
                    overwrite,
                    command,
                    clock,
                )
            processes.wait()
        return Pruned(decided, out, clock.seconds, peak_rss(), begun is not None)
    with work_folder(out, run_key(model, options, calibration, loading), resume=resume) as work:
        scores = kept_scores(work) if given is None else None
        resumed = scores is not None or any((work / PASS_FOLDER).glob("*"))
        windows = None
        if given is None and scores is None:
            windows = _windows(model, config, options, calibration, loading)
            scores = _scores(loaded_now, discovery, options, calibration, windows, clock, folder=folder, work=work)
            keep_scores(work, scores)
        damage = None
        if given is None and options.scope == "sensitivity" and scores is not None:
            if windows is None:
                windows = _windows(model, config, options, calibration, loading)
            damage = _damage(loaded_now, discovery, options, scores, windows, calibration, clock, work=work)
        decided = given or plan(
            discovery,
            options,
            config=config,
            scores=scores,
            latency=table,
            damage=damage,
            fixed_sizes=kept,
            trust_remote_code=loading.trust_remote_code,
        )
        if given is None and options.scope != "local":  # sizes that depend on the scores
            check_saveable(decided, config=config, discovery=discovery, trust_remote_code=loading.trust_remote_code)
            if announce is not None:
                announce(decided)
        if processes.is_first():
            weights: Mapping[str, Tensor] = {}
            if options.repairs:
                repaired = kept_repair(work, decided)
                resumed = resumed or repaired is not None
                if repaired is None:
                    if windows is None:
                        windows = _windows(model, config, options, calibration, loading)
                    repaired = _repaired(loaded_now(), decided, discovery, windows, calibration, clock, work=work)
                    keep_repair(work, decided, repaired)
                decided, weights = repaired.plan, repaired.weights
            with clock.stage("cut"):
                large = _bytes_of(loaded_now()) > IN_MEMORY * psutil.virtual_memory().available
                room = out.absolute().parent if large else None
                pruned = prune(loaded_now(), decided, discovery=discovery, weights=weights, room=room)
            if options.repair == "reconstruct":
                if windows is None:
                    windows = _windows(model, config, options, calibration, loading)
                _reconstruct_in_place(loaded_now(), pruned, discovery, windows, calibration, clock, work=work)
            _save(loaded_now(), pruned, decided, discovery, out, model, calibration, loading, overwrite, command, clock)
        processes.wait()
    return Pruned(decided, out, clock.seconds, peak_rss(), resumed)


def cut_as_planned(
    model: PreTrainedModel, given: Plan, tokenizer: PreTrainedTokenizerBase, *, bars: ProgressBars | None = None
) -> PreTrainedModel:
    """The model as `prune` with this plan would write it, in memory: cut, and repaired on the plan's calibration text.

    Raises `PlanError` when the plan is of another model.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, discovery = AutoModelForCausalLM.from_config(config), discover(config)
    >>> from secateur.scoring.scores import score
    >>> options = CutOptions(ratio=0.5, of="units", axes=("mlp",), score="l2")
    >>> decided = plan(discovery, options, config=config, scores=score(model, discovery=discovery, name="l2"))
    >>> cut_as_planned(model, decided, None).config.ffn_dim
    12
    """
    discovery = discover(model)
    check_plan(given, discovery)
    if given.options.repairs:
        calibration = CalibrationOptions(**(given.scored.get("calibration_options") or {}))
        windows = None if calibration.text == SELF else calibration_windows(tokenizer, calibration)
        clock = Clock(bars) if bars else Clock()
        if windows is None:
            with clock.stage("write") as progress:
                windows = _own_text(model, calibration, None, progress, alone=True)
        repaired = _repaired(model, given, discovery, windows, calibration, clock)
        pruned = prune(model, repaired.plan, discovery=discovery, weights=repaired.weights)
        if given.options.repair == "reconstruct":
            _reconstruct_in_place(model, pruned, discovery, windows, calibration, clock)
        return pruned
    return prune(model, given, discovery=discovery)


def cut_loaded(
    model: PreTrainedModel,
    name: str,
    options: CutOptions,
    *,
    discovery: Discovery,
    calibration: CalibrationOptions,
    loading: LoadOptions,
    run: Path | None = None,
    work: Path | None = None,
    clock: Clock | None = None,
) -> tuple[PreTrainedModel, Plan]:
    """A model that is loaded, cut in memory as `prune_model` would cut the MODEL argument `name`, and the plan.

    The model stays as it is. `run` is a folder that keeps its statistics, for other options; `work` one that keeps the
    damage that was measured, layers of a pass that is stopped, and what the model wrote itself. Raises `SecateurError`.
    """
    clock = clock or Clock()
    calibration = settled(calibration, options)
    if options.shape == "free" and not may_be_free(model.config):
        options = replace(options, shape="uniform")
    table = _latency(lambda: model, discovery, options, clock)
    trust = loading.trust_remote_code
    plan(discovery, options, latency=table, trust_remote_code=trust)  # a budget that cannot be met, before any pass
    windows = _windows(name, model.config, options, calibration, loading)
    if options.steps > 1:
        return _in_steps(model, discovery, options, windows, calibration, clock, work=work)
    folder = None if run is None else RunFolder(run, name, calibration, loading)
    scores = _scores(lambda: model, discovery, options, calibration, windows, clock, folder=folder, work=work)
    if work is not None:
        shutil.rmtree(work / PASS_FOLDER, ignore_errors=True)  # of layers that led to these scores
    damage = _damage(lambda: model, discovery, options, scores, windows, calibration, clock, work=work)
    decided = plan(
        discovery,
        options,
        config=model.config,
        scores=scores,
        latency=table,
        damage=damage,
        trust_remote_code=trust,
    )
    weights: Mapping[str, Tensor] = {}
    if options.repairs:
        repaired = _repaired(model, decided, discovery, windows, calibration, clock, work=work)
        decided, weights = repaired.plan, repaired.weights
    with clock.stage("cut"):
        pruned = prune(model, decided, discovery=discovery, weights=weights)
    if options.repair == "reconstruct":
        _reconstruct_in_place(model, pruned, discovery, windows, calibration, clock, work=work)
    return pruned, decided


def _latency(
    loaded_now: Callable[[], PreTrainedModel], discovery: Discovery, options: CutOptions, clock: Clock
) -> LatencyTable | None:
    """What sizes take on this machine, where the budget is of time."""
    if options.of != "latency":
        return None
    groups = [group for each in groups_to_cut(discovery, options).values() for group in each]
    model = loaded_now()
    with clock.stage("measure") as progress:
        return latency_table(model, discovery, groups, progress=progress)


def _damage(
    loaded_now: Callable[[], PreTrainedModel],
    discovery: Discovery,
    options: CutOptions,
    scores: Scores,
    windows: Tensor | None,
    calibration: CalibrationOptions,
    clock: Clock,
    *,
    work: Path | None = None,
) -> dict[str, DamageCurve] | None:
    """The damage of cutting each group to a few sizes, where the sizes are to be found by it."""
    if options.scope != "sensitivity":
        return None
    found = kept_damage(work, scores)
    if found is None:
        model = loaded_now()
        groups = [group for each in groups_to_cut(discovery, options).values() for group in each]
        with clock.stage("measure damage") as progress:
            if windows is None:
                windows = _own_text(model, calibration, work, progress)
            found = damage_curves(model, discovery, groups, scores, windows, progress=progress)
        keep_damage(work, scores, found)
    return found


def _repaired(
    model: PreTrainedModel,
    decided: Plan,
    discovery: Discovery,
    windows: Tensor | None,
    calibration: CalibrationOptions,
    clock: Clock,
    *,
    work: Path | None = None,
) -> Repaired:
    """What is left of the weights, fitted anew as the options say."""
    with clock.stage("repair") as progress:
        if windows is None:
            windows = _own_text(model, calibration, work, progress, alone=True)
        found = repair(
            model,
            decided,
            discovery,
            windows,
            method=decided.options.closed_form,
            choose=decided.options.choose == "obs",
            progress=progress,
        )
    text = {"calibration": digest(windows), "calibration_options": asdict(calibration)}
    return replace(found, plan=replace(found.plan, scored={**found.plan.scored, **text}))


def _own_text(
    model: PreTrainedModel,
    calibration: CalibrationOptions,
    work: Path | None,
    progress: Progress | None,
    *,
    alone: bool = False,
) -> Tensor:
    """The text that the model writes itself, the same all through a run; `alone`, no other process asks for it."""
    windows = kept_windows(work)
    if windows is None:
        windows = generate_windows(model, calibration, progress=progress)
        windows = windows if alone else processes.from_first(windows)
        keep_windows(work, windows)
    return windows


def _reconstruct_in_place(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    discovery: Discovery,
    windows: Tensor | None,
    calibration: CalibrationOptions,
    clock: Clock,
    *,
    work: Path | None = None,
) -> None:
    """Train every layer of the pruned model to give what the dense model's gives."""
    with clock.stage("reconstruct") as progress:
        if windows is None:
            windows = _own_text(model, calibration, work, progress, alone=True)
        reconstruct_in_place(model, pruned, discovery, windows, progress=progress)


def _in_steps(
    model: PreTrainedModel,
    discovery: Discovery,
    options: CutOptions,
    windows: Tensor | None,
    calibration: CalibrationOptions,
    clock: Clock,
    *,
    work: Path | None = None,
    begun: Step | None = None,
) -> tuple[PreTrainedModel, Plan]:
    """The model cut in steps, each kept in the folder `work`; one bar after the other."""
    keep = None if work is None else functools.partial(keep_step, work, options)
    if windows is None and calibration.text == SELF:
        with clock.stage("write") as progress:
            windows = _own_text(model, calibration, work, progress)
    with clock.stage("cut in steps"), ExitStack() as stack:
        current: list[ExitStack] = []

        def bar(stage: str) -> Progress | None:
            if current:
                current.pop().close()
            current.append(stack.enter_context(ExitStack()))
            return current[0].enter_context(clock.bars(stage))

        return cut_in_steps(
            model, discovery, options, windows, calibration=calibration, begun=begun, keep=keep, progress=bar
        )


def _save(
    loaded: PreTrainedModel,
    pruned: PreTrainedModel,
    decided: Plan,
    discovery: Discovery,
    out: Path,
    name: str,
    calibration: CalibrationOptions,
    loading: LoadOptions,
    overwrite: bool,
    command: str | None,
    clock: Clock,
) -> None:
    tokenizer = load_tokenizer(name, trust_remote_code=loading.trust_remote_code)
    with clock.stage("save"):
        record = make_record(
            loaded,
            name=name,
            calibration=decided.scored.get("calibration"),
            calibration_options=decided.scored.get("calibration_options"),
            seed=decided.scored.get("seed", calibration.seed),
            command=command,
            tensors=account_for_tensors(loaded, pruned, decided, discovery, unplaced=unplaced_in(name, loading)),
        )
        files = text_files(name, tokenizer)
        save(pruned, out, plan=decided, tokenizer=tokenizer, record=record, files=files, overwrite=overwrite)


def unplaced_in(name: str, loading: LoadOptions) -> tuple[str, ...]:
    """The tensors of a checkpoint that the model has no place for; the weights of a GGUF have other names.

    >>> unplaced_in("model.gguf", LoadOptions())
    Traceback (most recent call last):
    secateur.errors.ModelError: 'model.gguf': no such file or folder. ...
    """
    if resolve(name).kind == "gguf":
        return ()
    return load_on_meta(name, trust_remote_code=loading.trust_remote_code)[1]


def _bytes_of(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def may_be_free(config: PreTrainedConfig) -> bool:
    """Whether a folder can hold layers of different sizes: of custom code, only what its config can say.

    >>> may_be_free(PreTrainedConfig())
    True
    """
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return not custom or per_layer_model_class(config) is not None


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
    try:
        settings = stock_settings(config, discovery, given.sizes, trust_remote_code=trust_remote_code)
    except PlanError as error:
        if given.options.shape == "free":
            return replace(given, settings=None, refusal=str(error))
        raise
    return replace(given, settings=settings)


def _load(model: str, loading: LoadOptions) -> PreTrainedModel:
    loaded = load(model, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
    check_finite(loaded)
    return loaded


def _windows(
    model: str, config: PreTrainedConfig, options: CutOptions, calibration: CalibrationOptions, loading: LoadOptions
) -> Tensor | None:
    """The calibration tokens that the score needs, if it needs any and the model is not to write them."""
    alone = not options.repairs and options.scope != "sensitivity"
    if alone and SCORES[options.score].needs == "weights":
        return None
    check_positions(config, calibration.length)
    if calibration.text == SELF:
        return None
    return calibration_windows(load_tokenizer(model, trust_remote_code=loading.trust_remote_code), calibration)


def _scores(
    loaded_now: Callable[[], PreTrainedModel],
    discovery: Discovery,
    options: CutOptions,
    calibration: CalibrationOptions,
    windows: Tensor | None,
    clock: Clock,
    *,
    folder: RunFolder | None = None,
    work: Path | None = None,
) -> Scores:
    """Scores of the groups to cut, from kept statistics where they suffice, else from a pass over the model."""
    groups = [group for each in groups_to_cut(discovery, options).values() for group in each]
    statistics = None if folder is None else folder.statistics()
    if statistics is None or not holds(statistics, options.score, discovery, groups):
        model = loaded_now()
        with clock.stage("score") as progress:
            if windows is None and SCORES[options.score].needs != "weights":
                windows = _own_text(model, calibration, work, progress)
            many = processes.count() > 1 or _bytes_of(model) < JOURNAL_FROM
            new = statistics_for(
                options.score,
                model,
                discovery,
                None if windows is None else calibration.scored(windows),
                groups=groups,
                journal=None if many or work is None else work / PASS_FOLDER,
                progress=progress,
            )
        statistics = new if statistics is None else statistics.joined(new)
        if folder is not None:
            folder.keep(statistics)
    scores = scores_from(
        discovery, statistics, groups=groups, name=options.score, reduce=options.reduce, options=calibration
    )
    if folder is not None:
        folder.keep_scores(scores)
    return scores
