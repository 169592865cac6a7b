"""Recipe -> a dense model that is cut and trained in rounds, for cuts that are too large for one.

Each round cuts as `prune` does and trains what is left as `recover` does; the teacher is the dense model in all rounds.
The rounds lie as folders in the work folder, so a killed run resumes in its round, at its checkpoint. The output has
one plan, of the dense model.
"""

from __future__ import annotations

import functools
import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from secateur import processes
from secateur.checkpoint.formats import check_saveable
from secateur.checkpoint.record import make_record, read_record
from secateur.checkpoint.save import save_updated
from secateur.checkpoint.tensor_accounting import account_for_tensors
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import CheckpointError, ModelError, PlanError, TrainingError, one_line
from secateur.files import MODEL_MARK, PLAN_FILE, read_json
from secateur.models.config import is_custom, load_config
from secateur.models.loading import load, unplaced_in
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import text_files
from secateur.models.weight_files import has_weights
from secateur.pipeline.cache import has_begun, work_folder
from secateur.pipeline.options import RunOptions
from secateur.pipeline.recipe import PruneRecipe, write_recipe
from secateur.pipeline.run import prune_model
from secateur.planning.iterations import as_of_dense, composed, options_of_iteration, sizes_after_iteration
from secateur.planning.options import TOKENS, CutOptions
from secateur.planning.plan import Plan, plan, read_plan
from secateur.progress import Clock, peak_rss
from secateur.pruning.prune import prune
from secateur.recovery.recipe import RecoverRecipe, RoundOptions
from secateur.recovery.result import RecoverResult, write_curves
from secateur.recovery.round_results import Round, chain_records, join_results, read_round, write_round
from secateur.recovery.setup import TrainingSetup, prepare, training_key
from secateur.recovery.training import TEACHER_FOLDER, Places, train_folder

RESULT_FILE = "secateur_round.json"  # the result of a training, in the folder of its round


@dataclass(frozen=True, slots=True)
class _Cut:
    """The cut of one round."""

    number: int  # from 1
    options: CutOptions  # for the model that the round before left
    sizes: Mapping[str, int] | None  # units of each group that stay, where the budget counts units


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
        dense = discover(recipe.model, start_tokens=rounds.calibration.start_tokens, trust_remote_code=trust)
    whole, cuts = _plan_rounds(rounds, dense, config, trust_remote_code=trust)
    taught = replace(recipe, teacher=recipe.teacher or recipe.model)
    key = training_key(taught, rounds.calibration.names, asdict(whole))
    with work_folder(out, key, resume=run.resume) as work:
        resumed = has_begun(work)
        processes.wait()
        setup = replace(prepare(taught, work, clock), recipe=recipe)
        shared = _Rounds(rounds, setup, dense, whole, work, out, clock)
        finished = [_run_round(shared, cut) for cut in cuts]
        result = join_results(out, setup, finished, clock.seconds, resumed=resumed)
        if processes.is_first():
            with clock.stage("save"):
                _save(shared, finished, result, run)
        processes.wait()
    return replace(result, seconds={**result.seconds, **clock.seconds}, peak_rss_bytes=peak_rss())


def _plan_rounds(
    rounds: RoundOptions, dense: Discovery, config: PreTrainedConfig, *, trust_remote_code: bool
) -> tuple[CutOptions, list[_Cut]]:
    """Return the options of the whole cut, and the cut of every round.

    Raises `PlanError` or `CheckpointError` where a round cannot be cut, or no folder can hold what it leaves.
    """
    if TOKENS in rounds.cut.axes:
        raise PlanError(
            f"axes={','.join(rounds.cut.axes)}: a vocabulary is not cut and trained in one command. Cut it first, then "
            "train: `secateur prune MODEL OUT --axes ...`, `secateur recover OUT TRAINED`"
        )
    whole = replace(rounds.cut, iterations=rounds.count) if rounds.count != 1 else rounds.cut
    if whole.shape == "per-layer" and is_custom(config):
        whole = replace(whole, shape="uniform")
    cuts = [_Cut(1, whole, None)]
    if rounds.count > 1:
        numbers = range(1, rounds.count + 1)
        cuts = [_Cut(n, options_of_iteration(whole, dense, n), sizes_after_iteration(whole, dense, n)) for n in numbers]
    for cut in cuts:
        of_dense = cut.options if cut.options.target is not None else replace(cut.options, ratio=whole.ratio)
        try:
            sizes = plan(dense, of_dense, config=config, fixed_sizes=cut.sizes, trust_remote_code=trust_remote_code)
            check_saveable(sizes, config=config, discovery=dense, trust_remote_code=trust_remote_code)
        except PlanError as error:
            raise PlanError(f"round {cut.number} of {rounds.count}: {error}") from error
    return whole, cuts


def _run_round(shared: _Rounds, cut: _Cut) -> Round:
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
        loading, calibration = shared.setup.recipe.loading, shared.options.calibration
        recipe = PruneRecipe(source, cut=cut.options, calibration=calibration, loading=loading)
        result = prune_model(recipe, pruned, fixed_sizes=cut.sizes, run=RunOptions(resume=True, bars=clock.bars))
        clock.seconds["prune"] = sum(result.seconds.values())
        gc.collect()
    if not is_trained:
        _train_round(shared, cut, pruned, trained, clock)
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


def _train_round(shared: _Rounds, cut: _Cut, pruned: Path, trained: Path, clock: Clock) -> None:
    setup, out = shared.setup, shared.out
    seed = setup.options.seed + cut.number - 1  # a training of few steps does not read all rows: read others
    layers_first = setup.recipe.options.layers_first if shared.options.count == 1 else False
    options = replace(setup.recipe.options, seed=seed, layers_first=layers_first)
    recipe = replace(setup.recipe, model=str(pruned), rounds=None, options=options)
    with work_folder(trained, training_key(recipe), resume=True) as work:
        places = Places(
            trained,
            work,
            teacher=shared.work / TEACHER_FOLDER if shared.options.count > 1 else None,
            logs=out.absolute().parent / "runs" / out.name / f"round-{cut.number}",
            result_file=RESULT_FILE,
        )
        result = train_folder(
            replace(setup, recipe=recipe, options=replace(setup.options, seed=seed)),
            places,
            run=RunOptions(resume=True),
            clock=clock,
        )
    if result.diverged is not None and cut.number < shared.options.count:
        raise TrainingError(f"round {cut.number} of {shared.options.count}: {result.diverged}")


def _merged(plans: Sequence[Plan], dense: Discovery) -> Plan:
    """One plan of the dense model for those of the rounds, each of what the round before left."""
    return functools.reduce(lambda first, second: composed(first, second, dense), plans)


def _save(shared: _Rounds, rounds: Sequence[Round], result: RecoverResult, run: RunOptions) -> None:
    """Cut the dense model as all rounds together did, give it the weights of the last, and write the folder."""
    setup = shared.setup
    recipe = setup.recipe
    trust = recipe.loading.trust_remote_code
    dense = load(recipe.model, dtype=recipe.loading.dtype, device="cpu", trust_remote_code=trust)
    merged = _merged([each.plan for each in rounds], shared.dense)
    whole = as_of_dense(merged, shared.whole, shared.dense, dense)
    last = shared.work / f"round-{len(rounds)}" / "trained"
    pruned = _prune_with_weights(dense, whole, shared.dense, last, trust_remote_code=trust)
    unplaced, seed = unplaced_in(recipe.model, recipe.loading), recipe.options.seed
    fates = account_for_tensors(dense, pruned, whole, shared.dense, unplaced=unplaced)
    record = make_record(dense, name=recipe.model, scored=whole.scored, seed=seed, command=run.command, tensors=fates)
    with save_updated(
        pruned,
        result.out,
        plan=whole,
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
