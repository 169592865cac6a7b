"""Recipe -> a dense model that is cut and trained in rounds, for cuts that are too large for one.

Each round cuts as `prune` does and trains what is left as `recover` does; the teacher is the dense model in all rounds.
The rounds lie as folders in the work folder, so a killed run resumes in its round, at its checkpoint. The output has
one plan, of the dense model.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from secateur import processes
from secateur.checkpoint.record import PLAN_FILE, make_record, read_record
from secateur.checkpoint.save import save_updated
from secateur.checkpoint.tensor_accounting import account_for_tensors
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import CheckpointError, ModelError, TrainingError, one_line
from secateur.files import MODEL_MARK, read_json
from secateur.models.config import load_config
from secateur.models.loading import load
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import text_files
from secateur.models.weight_files import has_weights
from secateur.pipeline.cache import work_folder
from secateur.pipeline.pipeline import unplaced_in
from secateur.pipeline.recipe import RunOptions, write_recipe
from secateur.planning.iterations import as_of_dense
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, read_plan
from secateur.progress import Clock, peak_rss
from secateur.pruning.prune import prune
from secateur.recovery.recipe import RecoverRecipe, RoundOptions
from secateur.recovery.result import RecoverResult, write_curves
from secateur.recovery.round_cuts import RoundCut, merge_plans, plan_rounds, prune_round
from secateur.recovery.round_results import Round, chain_records, join_results, read_round, write_round
from secateur.recovery.setup import TrainingSetup, prepare
from secateur.recovery.training import TEACHER_FOLDER, train_folder

RESULT_FILE = "secateur_round.json"  # the result of a training, in the folder of its round


@dataclass(frozen=True, slots=True, eq=False)
class _Rounds:
    """What all rounds share."""

    options: RoundOptions
    setup: TrainingSetup  # of the dense model
    dense: Discovery
    whole: CutOptions
    work: Path
    out: Path
    clock: Clock


def recover_in_rounds(
    recipe: RecoverRecipe, rounds: RoundOptions, out: Path, run: RunOptions, clock: Clock
) -> RecoverResult:
    """Cut a dense model and train what is left, in several rounds, and write one ordinary folder.

    Round i of n removes i/n of what the whole cut removes, so the end has the size of one cut. Each round trains as
    long as one training, with the rows in another order. Raises `SecateurError`.
    """
    if recipe.options.save_adapter:
        raise TrainingError(
            "--save-adapter: in rounds, the model that an adapter belongs to is cut again; leave it out"
        )
    trust = recipe.loading.trust_remote_code
    config = load_config(recipe.model, trust_remote_code=trust)
    if not has_weights(recipe.model):
        raise ModelError(f"{recipe.model!r} has a config and no weights to cut and train; name a folder with weights")
    with clock.stage("discover"):
        dense = discover(recipe.model, trust_remote_code=trust)
    whole, cuts = plan_rounds(rounds, dense, config, trust_remote_code=trust)
    taught = replace(recipe, teacher=recipe.teacher or recipe.model)
    setup = prepare(taught, out, overwrite=run.overwrite, clock=clock)
    setup = replace(setup, recipe=recipe)
    key = setup.key(rounds.calibration.text, asdict(whole))
    with work_folder(out, key, resume=run.resume, worth_keeping=_has_begun) as work:
        resumed = _has_begun(work)
        processes.wait()
        shared = _Rounds(rounds, setup, dense, whole, work, out, clock)
        finished: list[Round] = []
        for cut in cuts:
            finished.append(_run_round(shared, cut, finished))
        result = join_results(out, setup, finished, clock.seconds, resumed=resumed)
        if processes.is_first():
            with clock.stage("save"):
                _save(shared, finished, result, run)
        processes.wait()
    return replace(result, seconds={**result.seconds, **clock.seconds}, peak_rss_bytes=peak_rss())


def _has_begun(work: Path) -> bool:
    """Whether a stopped run has left anything that took time."""
    return any(work.glob("round-*.json")) or any(work.rglob("*.safetensors"))


def _run_round(shared: _Rounds, cut: RoundCut, before: Sequence[Round]) -> Round:
    """Cut and train; what an earlier run has finished is not done again."""
    work, number = shared.work, cut.number
    finished = read_round(work / f"round-{number}.json")
    if not processes.largest(int(finished is None)):
        assert finished is not None
        return finished
    folder = work / f"round-{number}"
    pruned, trained = folder / "pruned", folder / "trained"
    if processes.is_first():
        folder.mkdir(exist_ok=True)
    processes.wait()
    clock = Clock(lambda stage: shared.clock.bars(f"{stage}, round {number} of {shared.options.count}"))
    is_cut, is_trained = ((path / MODEL_MARK).is_file() for path in (pruned, trained))
    processes.wait()  # all have looked, so one may write
    if not is_cut and not is_trained:
        source = shared.setup.recipe.model if number == 1 else str(work / f"round-{number - 1}" / "trained")
        loading = shared.setup.recipe.loading
        clock.seconds["prune"] = prune_round(source, pruned, cut, shared.options.calibration, loading, clock.bars)
        gc.collect()
    if not is_trained:
        _train_round(shared, cut, pruned, trained, before, clock)
        gc.collect()
    shared.clock.seconds.update({f"{stage}, round {number}": seconds for stage, seconds in clock.seconds.items()})
    record = read_record(trained)
    if record is None or record.recovery is None:
        raise CheckpointError(f"{trained} has no record of its training; start without --resume")
    finished = Round(read_plan(trained / PLAN_FILE), record.recovery, read_json(trained / RESULT_FILE))
    if processes.is_first():
        write_round(work / f"round-{number}.json", finished)
        for done in (pruned, work / f"round-{number - 1}"):
            shutil.rmtree(done, ignore_errors=True)
    processes.wait()
    return finished


def _train_round(
    shared: _Rounds, cut: RoundCut, pruned: Path, trained: Path, before: Sequence[Round], clock: Clock
) -> None:
    setup, out = shared.setup, shared.out
    seed = setup.options.seed + cut.number - 1  # a training of few steps does not read all rows: read others
    recipe = replace(setup.recipe, model=str(pruned), rounds=None, options=replace(setup.recipe.options, seed=seed))
    train_folder(
        replace(setup, recipe=recipe, options=replace(setup.options, seed=seed)),
        trained,
        plan=merge_plans([*(each.plan for each in before), read_plan(pruned / PLAN_FILE)], shared.dense),
        run=RunOptions(resume=True),
        clock=clock,
        teacher_folder=shared.work / TEACHER_FOLDER,
        logs=out.absolute().parent / "runs" / out.name / f"round-{cut.number}",
        result_file=RESULT_FILE,
    )


def _save(shared: _Rounds, rounds: Sequence[Round], result: RecoverResult, run: RunOptions) -> None:
    """Cut the dense model as all rounds together did, give it the weights of the last, and write the folder."""
    setup = shared.setup
    recipe = setup.recipe
    trust = recipe.loading.trust_remote_code
    dense = load(recipe.model, dtype=recipe.loading.dtype, device="cpu", trust_remote_code=trust)
    merged = merge_plans([each.plan for each in rounds], shared.dense)
    plan = as_of_dense(merged, shared.whole, shared.dense, dense)
    last = shared.work / f"round-{len(rounds)}" / "trained"
    pruned = _prune_with_weights(dense, plan, shared.dense, last, trust_remote_code=trust)
    scored = plan.scored
    unplaced = unplaced_in(recipe.model, recipe.loading)
    record = make_record(
        dense,
        name=recipe.model,
        calibration=scored.get("calibration"),
        calibration_options=scored.get("calibration_options"),
        seed=scored.get("seed", recipe.options.seed),
        command=run.command,
        tensors=account_for_tensors(dense, pruned, plan, shared.dense, unplaced=unplaced),
    )
    with save_updated(
        pruned,
        result.out,
        plan=plan,
        tokenizer=setup.tokenizer,
        record=replace(record, recovery=chain_records(rounds, run.command)),
        files=text_files(recipe.model, setup.tokenizer),
        overwrite=run.overwrite,
    ) as unfinished:
        write_curves(result, unfinished, plot=setup.options.plot)
        write_recipe(unfinished, "recover", recipe)


def _prune_with_weights(
    dense: PreTrainedModel, plan: Plan, discovery: Discovery, trained: Path, *, trust_remote_code: bool
) -> PreTrainedModel:
    pruned = prune(dense, plan, discovery=discovery)
    weights = load(str(trained), device="cpu", trust_remote_code=trust_remote_code).state_dict()
    try:
        pruned.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the rounds together give another model than one cut by their plans: {one_line(error)}"
        ) from error
    pruned.tie_weights()
    check_finite(pruned)
    return pruned
