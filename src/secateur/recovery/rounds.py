"""Dense model -> a smaller one that is cut and trained in turns, for cuts that are too large for one.

Every round cuts to its share of the whole cut, as `prune` does, and trains what is left, as `recover` does; the teacher
is the dense model in all of them. The rounds lie as folders in the work folder, so a run that was killed goes on in the
round, and at the checkpoint, in which it was. What is written in the end has one plan, of the dense model.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from secateur import processes
from secateur.checkpoint.formats import check_saveable
from secateur.checkpoint.record import PLAN_FILE, make_record, read_record
from secateur.checkpoint.save import save_updated
from secateur.checkpoint.tensor_accounting import account_for_tensors
from secateur.data.calibration import CalibrationOptions
from secateur.data.options import DataOptions, split_weight
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import CheckpointError, ModelError, PlanError, one_line
from secateur.files import MODEL_MARK, write_json
from secateur.models.config import load_config
from secateur.models.loading import LoadOptions, load
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import text_files
from secateur.models.weight_files import has_weights
from secateur.pipeline.cache import recovery_key, work_folder
from secateur.pipeline.pipeline import may_be_per_layer, unplaced_in
from secateur.pipeline.recipe import PruneRecipe, RunOptions
from secateur.pipeline.run import prune_model
from secateur.planning.iterations import as_of_dense, composed, options_of_iteration, sizes_after_iteration
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, plan, plan_from_json, read_plan
from secateur.progress import Clock, ProgressBars, peak_rss
from secateur.pruning.prune import prune
from secateur.recovery.options import RecoverOptions
from secateur.recovery.preparation import Prepared, prepare
from secateur.recovery.recover import CURVES_FILE, PLOT_FILE, TEACHER_FOLDER, train_folder
from secateur.recovery.result import Recovered, draw

RESULT_FILE = "secateur_round.json"  # in the folder of a round: what its training came to


@dataclass(frozen=True, slots=True)
class Round:
    """What a round has come to: its plan is of what the round before has left."""

    plan: Plan
    recovery: Mapping[str, Any]  # as the record of its folder has it
    result: Mapping[str, Any]  # of its training, as plain data


def prune_and_recover(
    recipe: PruneRecipe,
    out: str | Path,
    *,
    rounds: int,
    data: DataOptions,
    options: RecoverOptions | None = None,
    texts: Mapping[str, str] | None = None,
    teacher: str | None = None,
    plot: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    command: str | None = None,
    bars: ProgressBars | None = None,
) -> Recovered:
    """Prune a model and train what is left, so many times, and write one ordinary folder.

    `recipe` is that of the whole cut. Round i of `rounds` leaves what the dense model has but for i shares of what the
    whole cut takes, so the end has the size that one cut would have had. Every round is trained as the options say, the
    order of its rows another one each time. The other arguments are those of `recover`; the teacher is the dense
    model, unless another is named. With `resume`, a killed run continues to the same weights. Raises `SecateurError`.
    """
    processes.join()
    out, options, texts = Path(out), options or RecoverOptions(), texts or {}
    model, loading, calibration = recipe.model, recipe.loading, recipe.calibration
    clock = Clock(bars) if bars else Clock()
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    if not has_weights(model):
        raise ModelError(f"{model!r} has a config and no weights to cut and train; name a folder with weights")
    with clock.stage("discover"):
        dense = discover(model, trust_remote_code=loading.trust_remote_code)
    whole = replace(recipe.cut, iterations=rounds)
    if whole.shape == "per-layer" and not may_be_per_layer(config):
        whole = replace(whole, shape="uniform")
    shares = [_of_round(whole, dense, number) for number in range(1, rounds + 1)]
    for number, (share, kept) in enumerate(shares, start=1):  # what cannot be cut is known before the first is
        _check_sizes(dense, _from_dense(share, whole), kept, config, loading, f"round {number} of {rounds}")
    ready = prepare(
        model,
        out,
        data,
        options,
        texts=texts,
        teacher=teacher or model,
        loading=loading,
        save_adapter=False,
        plot=plot,
        overwrite=overwrite,
        clock=clock,
    )
    key = recovery_key(
        [
            model,
            calibration.text,
            *(split_weight(source)[0] for source in data.sources),
            *filter(None, [ready.teacher]),
        ],
        [
            *(asdict(whole), asdict(calibration), asdict(options), asdict(data), asdict(loading)),
            *(asdict(ready.settings), sorted(texts.items())),
        ],
    )
    with work_folder(out, key, resume=resume, worth_keeping=_has_begun) as work:
        resumed = _has_begun(work)
        processes.wait()
        done: list[Round] = []
        for number, (share, kept) in enumerate(shares, start=1):
            found = _read_round(work, number)
            if processes.largest(int(found is None)):
                found = _round(ready, work, out, number, rounds, share, kept, dense, done, calibration, texts, clock)
            assert found is not None
            done.append(found)
        result = _joined(out, ready, done, clock, resumed=resumed)
        if processes.is_first():
            with clock.stage("save"):
                last = work / f"round-{rounds}" / "trained"
                _save(ready, dense, whole, done, last, result, plot=plot, overwrite=overwrite, command=command)
        processes.wait()
    return replace(result, seconds={**result.seconds, **clock.seconds}, peak_rss_bytes=peak_rss())


def _of_round(whole: CutOptions, dense: Discovery, number: int) -> tuple[CutOptions, dict[str, int] | None]:
    """The options of a round's cut, as they are for what the round before has left, and units by group if known."""
    if whole.iterations == 1:
        return whole, None
    return options_of_iteration(whole, dense, number), sizes_after_iteration(whole, dense, number)


def _from_dense(share: CutOptions, whole: CutOptions) -> CutOptions:
    """The options of a round as they are for the dense model, of which sizes can be told."""
    return share if share.target is not None else replace(share, ratio=whole.ratio)


def _check_sizes(
    dense: Discovery,
    share: CutOptions,
    kept: Mapping[str, int] | None,
    config: PreTrainedConfig,
    loading: LoadOptions,
    name: str,
) -> None:
    """Raise `PlanError` or `CheckpointError` for sizes that cannot be cut, or that no folder can hold."""
    trust = loading.trust_remote_code
    try:
        sizes = plan(dense, share, config=config, fixed_sizes=kept, trust_remote_code=trust)
        check_saveable(sizes, config=config, discovery=dense, trust_remote_code=trust)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from error


def _round(
    ready: Prepared,
    work: Path,
    out: Path,
    number: int,
    rounds: int,
    share: CutOptions,
    kept: Mapping[str, int] | None,
    dense: Discovery,
    before: Sequence[Round],
    calibration: CalibrationOptions,
    texts: Mapping[str, str],
    clock: Clock,
) -> Round:
    """Cut and train; what is there already is not done again."""
    folder = work / f"round-{number}"
    source = ready.pruned if number == 1 else str(work / f"round-{number - 1}" / "trained")
    pruned, trained = folder / "pruned", folder / "trained"
    if processes.is_first():
        folder.mkdir(exist_ok=True)
    processes.wait()
    own = Clock(lambda stage: clock.bars(f"{stage}, round {number} of {rounds}"))
    is_cut, is_trained = ((path / MODEL_MARK).is_file() for path in (pruned, trained))
    processes.wait()  # all have looked, so one may write
    if not is_cut and not is_trained:
        cut = prune_model(
            PruneRecipe(source, cut=share, calibration=calibration, loading=ready.loading),
            pruned,
            fixed_sizes=kept,
            run=RunOptions(resume=True, bars=own.bars),
        )
        own.seconds["prune"] = sum(cut.seconds.values())
        gc.collect()
    if not is_trained:
        seed = ready.options.seed + number - 1  # other rows first, in trainings of a few steps
        train_folder(
            replace(
                ready,
                pruned=str(pruned),
                options=replace(ready.options, seed=seed),
                settings=replace(ready.settings, seed=seed),
            ),
            trained,
            plan=_whole([*(each.plan for each in before), read_plan(pruned / PLAN_FILE)], dense),
            texts=texts,
            resume=True,
            clock=own,
            kept=work / TEACHER_FOLDER,
            beside=RESULT_FILE,
            logs=out.absolute().parent / "runs" / out.name / f"round-{number}",
        )
        gc.collect()
    clock.seconds.update({f"{stage}, round {number}": seconds for stage, seconds in own.seconds.items()})
    record = read_record(trained)
    if record is None or record.recovery is None:
        raise CheckpointError(f"{trained} has no record of its training; start without --resume")
    result = json.loads((trained / RESULT_FILE).read_text(encoding="utf-8"))
    found = Round(read_plan(trained / PLAN_FILE), record.recovery, result)
    if processes.is_first():
        about = {"plan": found.plan.to_json(), "recovery": found.recovery, "result": found.result}
        write_json(work / f"round-{number}.json", about)
        for needless in (pruned, work / f"round-{number - 1}"):
            shutil.rmtree(needless, ignore_errors=True)
    processes.wait()
    return found


def _has_begun(work: Path) -> bool:
    """Whether a run that was stopped has left anything that took time."""
    return any(work.glob("round-*.json")) or any(work.rglob("*.safetensors"))


def _read_round(work: Path, number: int) -> Round | None:
    try:
        about = json.loads((work / f"round-{number}.json").read_text(encoding="utf-8"))
        return Round(plan_from_json(about["plan"]), about["recovery"], about["result"])
    except (OSError, ValueError, LookupError, TypeError, PlanError):
        return None  # there is none, or it is damaged


def _whole(plans: Sequence[Plan], dense: Discovery) -> Plan:
    """One plan of the dense model for those of the rounds."""
    whole, *others = plans
    for each in others:
        whole = composed(whole, each, dense)
    return whole


def _joined(out: Path, ready: Prepared, rounds: Sequence[Round], clock: Clock, *, resumed: bool) -> Recovered:
    """What all rounds came to; steps are counted through."""
    results = [each.result for each in rounds]
    begins = [sum(result["steps"] for result in results[:number]) for number in range(len(results))]
    several = len(rounds) > 1
    return Recovered(
        out=out,
        method=ready.options.method,
        steps=sum(result["steps"] for result in results),
        best_step=begins[-1] + results[-1]["best_step"],
        tokens=sum(result["tokens"] for result in results),
        trained_parameters=results[-1]["trained_parameters"],
        rows=len(ready.read.train),
        dropped=ready.read.dropped,
        loss=tuple(
            (begin + step, loss) for begin, each in zip(begins, results, strict=True) for step, loss in each["loss"]
        ),
        evaluation=tuple(
            {**entry, "step": begin + entry["step"], "round": number}
            for number, (begin, each) in enumerate(zip(begins, results, strict=True), start=1)
            for entry in each["evaluation"]
        ),
        seconds={
            f"{stage}, round {number}": seconds
            for number, each in enumerate(results, start=1)
            for stage, seconds in each["seconds"].items()
        }
        | clock.seconds,
        peak_rss_bytes=0,
        notes=tuple(
            dict.fromkeys(
                note if note in ready.notes or not several else f"round {number}: {note}"
                for number, each in enumerate(results, start=1)
                for note in each["notes"]
            )
        ),
        resumed=resumed,
        rounds=tuple(
            {
                "round": number,
                "parameters": each.plan.parameters["pruned"],
                "non_embedding_parameters": each.plan.parameters["pruned_non_embedding"],
                "steps": each.result["steps"],
                "best_step": each.result["best_step"],
                "tokens": each.result["tokens"],
                "before": next(iter(each.result["evaluation"]), None),
                "best": next(
                    (entry for entry in each.result["evaluation"] if entry["step"] == each.result["best_step"]), None
                ),
            }
            for number, each in enumerate(rounds, start=1)
        ),
    )


def _save(
    ready: Prepared,
    dense: Discovery,
    whole: CutOptions,
    rounds: Sequence[Round],
    last: Path,
    found: Recovered,
    *,
    plot: bool,
    overwrite: bool,
    command: str | None,
) -> None:
    """Cut the dense model once as the rounds did together, give it the weights of the last, and write that."""
    trust = ready.loading.trust_remote_code
    model = load(ready.pruned, dtype=ready.loading.dtype, device="cpu", trust_remote_code=trust)
    decided = as_of_dense(_whole([each.plan for each in rounds], dense), whole, dense, model)
    smaller = prune(model, decided, discovery=dense)
    trained = load(str(last), device="cpu", trust_remote_code=trust)
    try:
        smaller.load_state_dict(trained.state_dict(), assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the rounds together give another model than one cut by their plans ({one_line(error)})"
        ) from error
    smaller.tie_weights()
    check_finite(smaller)
    record = make_record(
        model,
        name=ready.pruned,
        calibration=decided.scored.get("calibration"),
        calibration_options=decided.scored.get("calibration_options"),
        seed=decided.scored.get("seed", ready.options.seed),
        command=command,
        tensors=account_for_tensors(model, smaller, decided, dense, unplaced=unplaced_in(ready.pruned, ready.loading)),
    )
    with save_updated(
        smaller,
        found.out,
        plan=decided,
        tokenizer=ready.tokenizer,
        record=replace(record, recovery=_chained(rounds, command)),
        files=text_files(ready.pruned, ready.tokenizer),
        overwrite=overwrite,
    ) as unfinished:
        curves = {"loss": found.loss, "evaluation": [dict(entry) for entry in found.evaluation]}
        write_json(unfinished / CURVES_FILE, curves)
        if plot:
            draw(found, unfinished / PLOT_FILE)


def _chained(rounds: Sequence[Round], command: str | None) -> dict[str, Any]:
    """The trainings of all rounds, the last first, each with the size that it had."""
    chain: dict[str, Any] | None = None
    for number, each in enumerate(rounds, start=1):
        chain = {
            **each.recovery,
            "command": command,
            "round": number,
            "parameters": each.plan.parameters["pruned"],
            "before": chain if chain is not None else each.recovery.get("before"),
        }
    assert chain is not None
    return chain
