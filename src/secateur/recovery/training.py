"""Setup -> one ordinary folder with the pruned model, trained by LoRA, in all weights, or from a teacher.

Checkpoints lie in the work folder; a killed run resumes from the last, and the best becomes the output.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from secateur import __version__, processes
from secateur.checkpoint.record import Record, make_record, read_record
from secateur.checkpoint.save import save_updated
from secateur.data.rows import Rows
from secateur.errors import CheckpointError, TrainingError
from secateur.files import read_json, write_json
from secateur.models.attention_products import bfloat16_attention
from secateur.models.loading import load
from secateur.models.precision import half_products, matmul_precision
from secateur.models.sources import resolve
from secateur.models.streaming import streamed_layers
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import text_files
from secateur.pipeline.options import RunOptions
from secateur.pipeline.recipe import write_recipe
from secateur.progress import Clock, Progress, peak_rss
from secateur.recovery.adapter_products import fuse_adapters
from secateur.recovery.layers_first import layers_in, put_layers, train_layers_first
from secateur.recovery.lora import ADAPTER_FOLDER, add_lora, expert_weights, merge_lora, save_adapter
from secateur.recovery.recipe import RecoverRecipe
from secateur.recovery.result import RecoverResult, write_curves
from secateur.recovery.setup import TrainingSetup, load_finite
from secateur.recovery.teacher_cache import TeacherCache, TeacherOutputs, save_teacher_outputs

if TYPE_CHECKING:
    from secateur.recovery.trainer import TrainingInputs, TrainingResult

CHECKPOINTS_FOLDER = "training"  # within the work folder
STEPS_FILE, TAUGHT_FILE = "steps.json", "steps_taught.json"  # how many: planned, and when the teacher is done
TIMING = "time a step"
TEACHER_FOLDER = "teacher"


def train_folder(
    setup: TrainingSetup, out: Path, work: Path, *, made_by: RecoverRecipe, run: RunOptions, clock: Clock
) -> RecoverResult:
    """Train as set up and write the folder, with the recipe that makes it again; `work` has what is finished."""
    with matmul_precision(exact=True), bfloat16_attention(by_products=setup.attends_by_products):
        return _train_folder(setup, out, work, made_by, run, clock)


def _train_folder(
    setup: TrainingSetup, out: Path, work: Path, made_by: RecoverRecipe, run: RunOptions, clock: Clock
) -> RecoverResult:
    from secateur.recovery.trainer import TrainingInputs

    began = time.monotonic()
    setup = _with_layers_trained(setup, work, began, clock)
    rows, order_SB = setup.rows_read()
    caches = {}
    if setup.teacher is not None:
        with clock.stage("teacher") as progress:
            caches = _cache_teacher(setup, rows, work / TEACHER_FOLDER, progress)
            gc.collect()  # the teacher
        setup = _shortened(setup, work, began)
        order_SB = order_SB[: setup.options.max_steps]
    inputs = TrainingInputs(
        rows,
        order_SB,
        setup.data.validation,
        setup.held_out,
        caches.get("train"),
        caches.get("validation"),
        pad=setup.tokenizer.pad_token_id or 0,
    )
    logs = out.absolute().parent / "runs" / out.name  # of trackers
    trained, parameters, notes = _train(setup, inputs, work, logs, clock)
    result = RecoverResult(
        out,
        setup.options.method,
        trained.steps,
        trained.best_step,
        int(rows.lengths_R[order_SB[: trained.steps]].sum()),
        parameters,
        len(setup.data.train),
        setup.data.dropped,
        trained.loss,
        trained.evaluations,
        clock.seconds,
        notes=(*setup.notes, *notes, *_note_no_better(trained)),
        diverged=trained.diverged,
    )
    if processes.is_first():
        with clock.stage("save"):
            _save(setup, trained, result, work, made_by, run)
    processes.wait()
    return replace(result, peak_rss_bytes=peak_rss())


def _with_layers_trained(setup: TrainingSetup, work: Path, began: float, clock: Clock) -> TrainingSetup:
    """Train the layers; the setup with as many steps as are left: as an earlier run has found, or as is found now."""
    from secateur.recovery.time_budget import pace_of

    minutes = setup.recipe.options.minutes
    if minutes is None:
        train_layers_first(setup, work, tokens=setup.tokens, clock=clock)
        return setup

    def find() -> dict[str, Any]:
        with clock.stage(TIMING):
            teacher = None if setup.teacher is None else setup.load_teacher
            pace = pace_of(setup, lambda: _load_trainable(setup, work), teacher)
        tokens = _seconds_left(minutes, began) / (pace.training + pace.teaching)
        train_layers_first(setup, work, tokens=tokens, clock=clock)
        return {"steps": pace.steps(_seconds_left(minutes, began), setup, taught=False), "pace": asdict(pace)}

    known = _kept(work / STEPS_FILE, find)
    gc.collect()  # the models
    return setup.with_steps(known["steps"])


def _shortened(setup: TrainingSetup, work: Path, began: float) -> TrainingSetup:
    """The setup with fewer steps, where the teacher has left less time than was planned."""
    from secateur.recovery.time_budget import Pace

    minutes, planned = setup.recipe.options.minutes, setup.options.max_steps
    if minutes is None or planned is None:
        return setup

    def find() -> dict[str, Any]:
        pace = Pace(**read_json(work / STEPS_FILE)["pace"])
        return {"steps": min(planned, pace.steps(_seconds_left(minutes, began), setup, taught=True))}

    return setup.with_steps(_kept(work / TAUGHT_FILE, find)["steps"])


def _seconds_left(minutes: float, began: float) -> float:
    """How long a training that began then may still take."""
    return 60 * minutes - (time.monotonic() - began)


def _kept(file: Path, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is kept in a file, or else what is found, together with the other processes, and kept there."""
    try:
        found: dict[str, Any] | None = read_json(file)
        int(found["steps"])  # type: ignore[index]
    except (CheckpointError, LookupError, TypeError, ValueError):
        found = None
    if processes.largest(int(found is None)):
        found = find()
        if processes.is_first():
            write_json(file, found)
        processes.wait()
    assert found is not None
    return found


def _cache_teacher(
    setup: TrainingSetup, rows: Rows, folder: Path, progress: Progress | None
) -> dict[str, TeacherCache]:
    """Run the teacher on rows whose outputs are not in the folder yet; returns a cache for each part of the data."""
    teacher = functools.cache(setup.load_teacher)  # loaded once, if at all
    outputs = TeacherOutputs(setup.options.top_k, setup.options.temperature)
    parts = {"train": (rows, folder / "train"), "validation": (setup.data.validation, folder / "validation")}
    for part, part_folder in parts.values():
        save_teacher_outputs(teacher, part, part_folder, outputs, progress=progress)
    return {name: TeacherCache(part_folder, part) for name, (part, part_folder) in parts.items()}


def _train(
    setup: TrainingSetup, inputs: TrainingInputs, work: Path, logs: Path, clock: Clock
) -> tuple[TrainingResult, int, list[str]]:
    """Load the pruned model and train it; returns the result, the number of trained parameters, and notes."""
    from secateur.recovery.trainer import train

    options, notes = setup.options, []
    with clock.stage("load"):
        model = _load_trainable(setup, work)
    folder = work / CHECKPOINTS_FOLDER
    if options.has_lora and options.lora.dropout and expert_weights(model):
        notes.append(f"there is no dropout, though {options.lora.dropout:g} was asked for: peft has none for experts")
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with clock.stage("train") as progress, half_products(model):
        trained = train(model, inputs, options, folder, bf16=setup.bf16, logs=logs, progress=progress)
    return trained, parameters, notes


def _load_trainable(setup: TrainingSetup, work: Path) -> torch.nn.Module:
    """Load the pruned model with an adapter, or with all its weights in float32, ready to be trained."""
    name, options = setup.recipe.model, setup.options
    model = load_finite(name, setup.recipe.loading)
    if streamed_layers(model) is not None:
        raise TrainingError(
            f"{name!r}: its layers are brought to the GPU one by one, and training needs all of them there. Expected a "
            "device that holds the weights: --device balanced for several GPUs, or --device cpu"
        )
    put_layers(model, work)
    torch.manual_seed(options.seed)  # of the adapter's initial values
    if options.has_lora:
        adapted: torch.nn.Module = add_lora(model, options.lora)
        if model.device.type == "cpu" and not processes.sharded():
            fuse_adapters(adapted, dtype=torch.bfloat16 if setup.bf16 else None)
        return adapted
    exact = torch.float64 if model.dtype == torch.float64 else torch.float32
    for parameter in model.parameters():
        # Small steps vanish in 16 bits. Weights that are mapped from a file may not be written to; shards are copies.
        parameter.data = parameter.data.to(exact, copy=not processes.sharded())
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _save(
    setup: TrainingSetup,
    trained: TrainingResult,
    result: RecoverResult,
    work: Path,
    made_by: RecoverRecipe,
    run: RunOptions,
) -> None:
    """Put the weights of the best checkpoint into the pruned model, loaded anew, and write the folder."""
    from secateur.recovery.checkpoints import load_weights_in_place

    recipe, options = setup.recipe, setup.options
    trust = recipe.loading.trust_remote_code
    gc.collect()  # the trained model, which is in reference cycles with its Trainer
    model = load(recipe.model, device="cpu", trust_remote_code=trust)
    source = resolve(recipe.model).path
    record = _record(setup, result, model, run.command, layers_in(work))
    put_layers(model, work)
    if options.has_lora:
        adapted = add_lora(model, options.lora)
        load_weights_in_place(adapted, trained.checkpoint, alone=True)
        model = merge_lora(adapted)
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # mapped from the pruned folder's file
        load_weights_in_place(model, trained.checkpoint, alone=True)
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
        write_recipe(unfinished, "recover", made_by)
        if options.save_adapter:
            adapted = add_lora(load(recipe.model, device="cpu", trust_remote_code=trust), options.lora)
            load_weights_in_place(adapted, trained.checkpoint, alone=True)
            save_adapter(adapted, unfinished / ADAPTER_FOLDER, base=recipe.model)


def _record(
    setup: TrainingSetup, result: RecoverResult, model: PreTrainedModel, command: str | None, layers: object
) -> Record:
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
        "bf16": setup.bf16,
        "layers": layers,
        "steps": result.steps,
        "best_step": result.best_step,
        "tokens": result.tokens,
        "evaluation": [dict(entry) for entry in result.evaluation],
        "command": command,
        "secateur": __version__,
        "before": record.recovery,
    }
    return replace(record, recovery=recovery)


def _note_no_better(trained: TrainingResult) -> list[str]:
    """Return a note where the training has made the model no better."""
    scores = {entry["step"]: entry["score"] for entry in trained.evaluations}
    if 0 in scores and scores.get(trained.best_step, 0.0) >= scores[0]:
        return [
            f"no checkpoint is better than the pruned model was (score {scores[0]:.3f}, best afterwards "
            f"{scores[trained.best_step]:.3f}): train with a smaller learning rate, on more data, or keep what you have"
        ]
    return []
