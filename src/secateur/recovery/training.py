"""Setup -> one ordinary folder with the pruned model, trained by LoRA, in all weights, or from a teacher.

Checkpoints lie in the work folder; a killed run resumes from the last, and the best becomes the output.
"""

from __future__ import annotations

import functools
import gc
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from secateur import __version__, processes
from secateur.checkpoint.record import Record, make_record, read_record
from secateur.checkpoint.save import save_updated
from secateur.files import write_json
from secateur.models.loading import LoadOptions, load
from secateur.models.sources import resolve
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import text_files
from secateur.pipeline.cache import has_begun, work_folder
from secateur.pipeline.recipe import RunOptions, write_recipe
from secateur.planning.plan import Plan
from secateur.progress import Clock, Progress, peak_rss
from secateur.recovery.hidden_states import MatchedLayers
from secateur.recovery.lora import ADAPTER_FOLDER, add_lora, expert_weights, merge_lora, save_adapter
from secateur.recovery.options import RecoverOptions
from secateur.recovery.result import RecoverResult, write_curves
from secateur.recovery.setup import TrainingSetup, compared_layers
from secateur.recovery.teacher_cache import TeacherCache, TeacherOutputs, save_teacher_outputs

if TYPE_CHECKING:
    from secateur.recovery.trainer import TrainingResult

CHECKPOINTS_FOLDER = "training"  # within the work folder
TEACHER_FOLDER = "teacher"


def train_folder(
    setup: TrainingSetup,
    out: Path,
    *,
    plan: Plan | None,
    run: RunOptions,
    clock: Clock,
    teacher_folder: Path | None = None,
    logs: Path | None = None,
    result_file: str | None = None,
) -> RecoverResult:
    """Train as set up and write the folder; `plan` matches the layers of teacher and student.

    `teacher_folder` keeps the teacher's outputs beyond this training, trackers write into `logs`, and the result goes
    into the folder as `result_file`.
    """
    layers = compared_layers(setup, plan) if plan is not None else None
    recipe, data = setup.recipe, setup.data
    with work_folder(out, setup.key(), resume=run.resume) as work:
        resumed = has_begun(work)
        caches = {}
        if setup.teacher is not None:
            with clock.stage("teacher") as progress:
                caches = _cache_teacher(setup, layers, teacher_folder or work / TEACHER_FOLDER, progress)
                gc.collect()  # the teacher
        logs = logs or out.absolute().parent / "runs" / out.name
        trained, parameters, notes = _train(setup, layers, caches, work / CHECKPOINTS_FOLDER, logs, clock)
        result = RecoverResult(
            out,
            recipe.options.method,
            trained.steps,
            trained.best_step,
            int(data.train.lengths_R[setup.order_SB[: trained.steps]].sum()),
            parameters,
            len(data.train),
            data.dropped,
            trained.loss,
            trained.evaluations,
            clock.seconds,
            notes=(*setup.notes, *_note_states(setup, layers), *notes, *_note_no_better(trained)),
            resumed=resumed,
        )
        if processes.is_first():
            with clock.stage("save"):
                _save(setup, trained, result, run, result_file)
        processes.wait()
    return replace(result, peak_rss_bytes=peak_rss())


def _cache_teacher(
    setup: TrainingSetup, layers: MatchedLayers | None, folder: Path, progress: Progress | None
) -> dict[str, TeacherCache]:
    """Run the teacher on rows whose outputs are not in the folder yet; returns a cache for each part of the data."""
    assert setup.teacher is not None
    teacher = functools.cache(functools.partial(_load, setup.teacher, setup.recipe.loading))  # loaded once, if at all
    outputs = TeacherOutputs(setup.options.top_k, setup.options.temperature)
    rows_folder = folder / "train"
    if layers is not None:
        rows_folder = folder / f"train-{layers.key}"
        if processes.is_first():  # in an earlier round other layers or channels were compared
            for other in {*folder.glob("train-*")} - {rows_folder}:
                shutil.rmtree(other, ignore_errors=True)
    parts = {
        "train": (setup.data.train, rows_folder, replace(outputs, layers=layers)),
        "validation": (setup.data.validation, folder / "validation", outputs),
    }
    for rows, part_folder, part_outputs in parts.values():
        save_teacher_outputs(teacher, rows, part_folder, part_outputs, progress=progress)
    return {name: TeacherCache(part_folder, rows) for name, (rows, part_folder, _) in parts.items()}


def _train(
    setup: TrainingSetup,
    layers: MatchedLayers | None,
    caches: dict[str, TeacherCache],
    folder: Path,
    logs: Path,
    clock: Clock,
) -> tuple[TrainingResult, int, list[str]]:
    """Load the pruned model and train it; returns the result, the number of trained parameters, and notes."""
    from secateur.recovery.trainer import TrainingInputs, train

    options, notes = setup.options, []
    with clock.stage("load"):
        model = _load_trainable(setup.recipe.model, setup.recipe.loading, options)
    if options.has_lora and options.lora.dropout and expert_weights(model):
        notes.append(f"there is no dropout, though {options.lora.dropout:g} was asked for: peft has none for experts")
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    inputs = TrainingInputs(
        setup.data.train,
        setup.order_SB,
        setup.data.validation,
        setup.held_out,
        caches.get("train"),
        caches.get("validation"),
        compared_layers=layers.pruned if layers is not None else (),
        pad=setup.tokenizer.pad_token_id or 0,
    )
    with clock.stage("train") as progress:
        trained = train(model, inputs, options, folder, bf16=setup.bf16, logs=logs, progress=progress)
    return trained, parameters, notes


def _load_trainable(name: str, loading: LoadOptions, options: RecoverOptions) -> torch.nn.Module:
    """Load the pruned model with an adapter, or with all its weights in float32, ready to be trained."""
    model = _load(name, loading)
    torch.manual_seed(options.seed)  # of the adapter's initial values
    if options.has_lora:
        adapted: torch.nn.Module = add_lora(model, options.lora)
        return adapted
    exact = torch.float64 if model.dtype == torch.float64 else torch.float32
    for parameter in model.parameters():
        # Small steps vanish in 16 bits; and weights that are mapped from a file may not be written to.
        parameter.data = parameter.data.to(exact, copy=True)
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _save(
    setup: TrainingSetup, trained: TrainingResult, result: RecoverResult, run: RunOptions, result_file: str | None
) -> None:
    """Put the weights of the best checkpoint into the pruned model, loaded anew, and write the folder."""
    from secateur.recovery.checkpoints import load_weights, set_weights_in_place

    recipe, options = setup.recipe, setup.options
    trust = recipe.loading.trust_remote_code
    gc.collect()  # the trained model, which is in reference cycles with its Trainer
    model = load(recipe.model, device="cpu", trust_remote_code=trust)
    source = resolve(recipe.model).path
    record = _record(setup, result, model, run.command)
    weights = load_weights(trained.checkpoint)
    if options.has_lora:
        adapted = add_lora(model, options.lora)
        set_weights_in_place(adapted, weights)
        model = merge_lora(adapted)
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # mapped from the pruned folder's file
        set_weights_in_place(model, weights)
    check_finite(model)
    with save_updated(
        model,
        result.out,
        source=source,
        tokenizer=setup.tokenizer,
        record=record,
        files=text_files(recipe.model, setup.tokenizer),
        overwrite=run.overwrite,
    ) as unfinished:
        write_curves(result, unfinished, plot=options.plot)
        write_recipe(unfinished, "recover", recipe)
        if result_file is not None:
            write_json(unfinished / result_file, result.to_json())
        if options.save_adapter:
            adapted = add_lora(load(recipe.model, device="cpu", trust_remote_code=trust), options.lora)
            set_weights_in_place(adapted, weights)
            save_adapter(adapted, unfinished / ADAPTER_FOLDER, base=recipe.model)


def _record(setup: TrainingSetup, result: RecoverResult, model: PreTrainedModel, command: str | None) -> Record:
    """Return the record of the pruned folder, with this training in it."""
    recipe = setup.recipe
    before = read_record(resolve(recipe.model).path)
    record = before or make_record(model, name=recipe.model, seed=recipe.options.seed)
    recovery: dict[str, Any] = {
        "method": recipe.options.method,
        "options": asdict(recipe.options),
        "data": asdict(recipe.data),
        "rows": setup.data.train.digest(),
        "teacher": setup.teacher,
        "steps": result.steps,
        "best_step": result.best_step,
        "tokens": result.tokens,
        "evaluation": [dict(entry) for entry in result.evaluation],
        "command": command,
        "secateur": __version__,
        "before": record.recovery,
    }
    return replace(record, recovery=recovery)


def _load(name: str, loading: LoadOptions) -> PreTrainedModel:
    """Load a model in its own dtype if no other is asked for; float16 becomes float32, which does not overflow."""
    model = load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
    if model.dtype == torch.float16:
        model = load(name, dtype="float32", device=loading.device, trust_remote_code=loading.trust_remote_code)
    check_finite(model)
    return model


def _note_states(setup: TrainingSetup, layers: MatchedLayers | None) -> list[str]:
    if layers is None:
        return []
    size = layers.bytes_for(int(setup.data.train.loss_mask_T.sum())) / 2**20
    return [
        f"hidden states of {len(layers.pruned)} layers were compared ({', '.join(layers.pruned)}); the teacher's took "
        f"{size:,.1f} MiB on the disk meanwhile"
    ]


def _note_no_better(trained: TrainingResult) -> list[str]:
    """Return a note where the training has made the model no better."""
    scores = {entry["step"]: entry["score"] for entry in trained.evaluations}
    if 0 in scores and scores.get(trained.best_step, 0.0) >= scores[0]:
        return [
            f"no checkpoint is better than the pruned model was (score {scores[0]:.3f}, best afterwards "
            f"{scores[trained.best_step]:.3f}): train with a smaller learning rate, on more data, or keep what you have"
        ]
    return []
