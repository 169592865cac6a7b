"""Pruned folder and data -> the same model, trained to do again what the dense one did: LoRA, all weights, a teacher.

What is trained lies in checkpoints beside the output, from which a run that was killed goes on; the best of them
becomes one ordinary folder.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from secateur import __version__, processes
from secateur.checkpoint.record import make_record, read_record
from secateur.checkpoint.save import save_updated
from secateur.data.options import DataOptions, split_weight
from secateur.files import write_json
from secateur.models.loading import LoadOptions, load
from secateur.models.sources import resolve
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import text_files
from secateur.pipeline.cache import recovery_key, work_folder
from secateur.planning.plan import Plan
from secateur.progress import Clock, ProgressBars, peak_rss
from secateur.recovery.distillation import KeptTeacher, keep_teacher
from secateur.recovery.hidden_states import Counterparts
from secateur.recovery.lora import FOLDER, merged, stacked_weights, with_adapter, write_adapter
from secateur.recovery.options import EVAL_WINDOW, RecoverOptions
from secateur.recovery.preparation import Prepared, compared_states, plan_of, prepare
from secateur.recovery.result import Recovered, draw

if TYPE_CHECKING:
    from secateur.recovery.course import Trained

CURVES_FILE = "secateur_curves.json"
PLOT_FILE = "secateur_curves.png"
TRAINING_FOLDER = "training"
TEACHER_FOLDER = "teacher"


def recover(
    pruned: str,
    out: str | Path,
    *,
    data: DataOptions,
    options: RecoverOptions | None = None,
    texts: Mapping[str, str] | None = None,
    teacher: str | None = None,
    loading: LoadOptions | None = None,
    save_adapter: bool = False,
    plot: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    command: str | None = None,
    bars: ProgressBars | None = None,
) -> Recovered:
    """Train a pruned folder and write the result as one ordinary folder.

    `texts` (name -> text) are held-out texts of another kind than the data: the checkpoint on which they have the least
    perplexity is kept, and training stops where it rises. Without any, the loss on validation rows decides. The teacher
    is by default the dense model that the folder's record names. With `resume`, a run that was killed goes on from its
    last checkpoint, to the same weights. Raises `SecateurError`.
    """
    processes.join()
    clock = Clock(bars) if bars else Clock()
    out, options = Path(out), options or RecoverOptions()
    plan = plan_of(pruned) if options.hidden_states_weight else None
    ready = prepare(
        pruned,
        out,
        data,
        options,
        texts=texts or {},
        teacher=teacher,
        loading=loading or LoadOptions(),
        save_adapter=save_adapter,
        plot=plot,
        overwrite=overwrite,
        clock=clock,
    )
    return train_folder(
        ready,
        out,
        plan=plan,
        texts=texts or {},
        save_adapter=save_adapter,
        plot=plot,
        overwrite=overwrite,
        resume=resume,
        command=command,
        clock=clock,
    )


def train_folder(
    ready: Prepared,
    out: Path,
    *,
    plan: Plan | None,
    texts: Mapping[str, str],
    save_adapter: bool = False,
    plot: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    command: str | None = None,
    clock: Clock,
    kept: Path | None = None,
    beside: str | None = None,
    logs: Path | None = None,
) -> Recovered:
    """Do what is prepared; `plan` is that of the teacher, by which hidden states are compared.

    `kept` is a folder in which the teacher's logits stay, instead of going with this training; `beside` is the name of
    a file in the folder for what is returned; trackers write into `logs`.
    """
    options, settings, read, teacher = ready.options, ready.settings, ready.read, ready.teacher
    states = compared_states(ready, plan) if plan is not None else None
    key = recovery_key(
        [ready.pruned, *(split_weight(source)[0] for source in ready.data.sources), *([teacher] if teacher else [])],
        [asdict(options), asdict(ready.data), asdict(ready.loading), asdict(settings), sorted(texts.items())],
    )
    with work_folder(out, key, resume=resume, worth_keeping=has_begun) as work:
        resumed = has_begun(work)
        trained, parameters, more = _train(
            ready, states, work, kept or work / TEACHER_FOLDER, logs or out.absolute().parent / "runs" / out.name, clock
        )
        tokens = int(read.train.lengths[ready.order[: trained.steps]].sum())
        found = Recovered(
            out,
            options.method,
            trained.steps,
            trained.best_step,
            tokens,
            parameters,
            len(read.train),
            read.dropped,
            trained.loss,
            trained.evaluations,
            clock.seconds,
            0,
            (*ready.notes, *more, *_disappointment(trained)),
            resumed,
        )
        if processes.is_first():
            with clock.stage("save"):
                _save(ready, trained, found, save_adapter, plot, overwrite, command, beside)
        processes.wait()
    return replace(found, peak_rss_bytes=peak_rss())


def has_begun(work: Path) -> bool:
    """Whether a run that was stopped has left a checkpoint, or some of what the teacher gave.

    >>> has_begun(Path("no-such-folder"))
    False
    """
    patterns = (f"{TRAINING_FOLDER}/checkpoint-*", f"{TEACHER_FOLDER}/*/*.safetensors")
    return any(any(work.glob(pattern)) for pattern in patterns)


def _train(
    ready: Prepared, states: Counterparts | None, work: Path, kept_in: Path, logs: Path, clock: Clock
) -> tuple[Trained, int, list[str]]:
    """Let the teacher read, then train; returns what came of it, how many parameters were trained, and what to say."""
    from secateur.recovery.course import Course
    from secateur.recovery.loop import train

    read, options, notes = ready.read, ready.options, []
    parts = {"train": read.train, "validation": read.validation}
    kept: dict[str, KeptTeacher] = {}
    if ready.teacher is not None:
        with clock.stage("teacher") as progress:
            loaded: list[PreTrainedModel] = []

            def teacher() -> PreTrainedModel:
                if not loaded:
                    assert ready.teacher is not None
                    loaded.append(_load(ready.teacher, ready.loading))
                return loaded[0]

            for name, rows in parts.items():
                folder = kept_in / name
                if states is not None and name == "train":  # of other layers or channels in a round before
                    folder = kept_in / f"{name}-{states.key}"
                    if processes.is_first():
                        for other in {*kept_in.glob(f"{name}-*")} - {folder}:
                            shutil.rmtree(other, ignore_errors=True)
                keep_teacher(
                    teacher,
                    rows,
                    folder,
                    top_k=options.top_k,
                    temperature=options.temperature,
                    states=states if name == "train" else None,
                    progress=progress,
                )
                kept[name] = KeptTeacher(folder, rows)
            loaded.clear()
            gc.collect()
        if states is not None:
            size = states.bytes_for(int(read.train.learned_T.sum())) / 2**20
            notes.append(
                f"hidden states of {len(states.layers)} layers were compared ({', '.join(states.layers)}); the "
                f"teacher's took {size:,.1f} MiB on the disk meanwhile"
            )
    with clock.stage("load"):
        model = _trainable(ready)
    if options.has_lora and options.lora.dropout and stacked_weights(model):
        notes.append(f"there is no dropout, though {options.lora.dropout:g} was asked for: peft has none for experts")
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    course = Course(
        read.train,
        ready.order,
        read.validation,
        ready.held_out,
        EVAL_WINDOW,
        kept.get("train"),
        kept.get("validation"),
        pad=ready.tokenizer.pad_token_id or 0,
        compared=states.layers if states is not None else (),
    )
    with clock.stage("train") as report:
        told: Any = report  # it takes a line beside the numbers, where `bars` is one of ours
        trained = train(model, course, ready.settings, work / TRAINING_FOLDER, logs=logs, report=told)
    return trained, parameters, notes


def _trainable(ready: Prepared) -> torch.nn.Module:
    """The pruned model with an adapter, or with all its weights in float32, ready to be trained."""
    model = _load(ready.pruned, ready.loading)
    torch.manual_seed(ready.options.seed)  # of the adapter's first values
    if ready.options.has_lora:
        adapted: torch.nn.Module = with_adapter(model, ready.options.lora)
        return adapted
    exact = torch.float64 if model.dtype == torch.float64 else torch.float32
    for parameter in model.parameters():
        # Small steps vanish in weights of few digits; and mapped from a file they are not ours to write.
        parameter.data = parameter.data.to(exact, copy=True)
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _save(
    ready: Prepared,
    trained: Trained,
    found: Recovered,
    save_adapter: bool,
    plot: bool,
    overwrite: bool,
    command: str | None,
    beside: str | None,
) -> None:
    """Put the weights of the best checkpoint into the pruned model, as it was loaded anew, and write that."""
    from secateur.recovery.checkpoints import put_weights_in_place, read_weights

    options = ready.options
    gc.collect()  # the trained model is in cycles with its Trainer
    model = load(ready.pruned, device="cpu", trust_remote_code=ready.loading.trust_remote_code)
    folder = resolve(ready.pruned).path
    before = read_record(folder) if folder is not None else None
    record = before or make_record(model, name=ready.pruned, seed=options.seed)
    about = {
        "method": options.method,
        "options": asdict(options),
        "data": asdict(ready.data),
        "rows": ready.read.train.digest(),
        "teacher": ready.teacher,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "tokens": found.tokens,
        "evaluation": [dict(entry) for entry in trained.evaluations],
        "command": command,
        "secateur": __version__,
        "before": record.recovery,
    }
    weights = read_weights(trained.checkpoint)
    if options.has_lora:
        adapted = with_adapter(model, options.lora)
        put_weights_in_place(adapted, weights)
        model = merged(adapted)
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # mapped from the pruned folder's file
        put_weights_in_place(model, weights)
    check_finite(model)
    curves = {"loss": found.loss, "evaluation": [dict(entry) for entry in found.evaluation]}
    with save_updated(
        model,
        found.out,
        source=folder,
        tokenizer=ready.tokenizer,
        record=replace(record, recovery=about),
        files=text_files(str(ready.pruned), ready.tokenizer),
        overwrite=overwrite,
    ) as unfinished:
        write_json(unfinished / CURVES_FILE, curves)
        if plot:
            draw(found, unfinished / PLOT_FILE)
        if beside is not None:
            write_json(unfinished / beside, found.to_json())
        if save_adapter:
            again = load(ready.pruned, device="cpu", trust_remote_code=ready.loading.trust_remote_code)
            adapted = with_adapter(again, options.lora)
            put_weights_in_place(adapted, weights)
            write_adapter(adapted, unfinished / FOLDER, base=str(ready.pruned))


def _load(name: str, loading: LoadOptions) -> PreTrainedModel:
    """The model in its own dtype if no other is asked for; float16 becomes float32, in which nothing overflows."""
    model = load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
    if model.dtype == torch.float16:
        model = load(name, dtype="float32", device=loading.device, trust_remote_code=loading.trust_remote_code)
    check_finite(model)
    return model


def _disappointment(trained: Trained) -> list[str]:
    """What to say where the training has made the model no better."""
    scores = {entry["step"]: entry["score"] for entry in trained.evaluations}
    if 0 in scores and scores.get(trained.best_step, 0.0) >= scores[0]:
        return [
            f"no checkpoint is better than the pruned model was (score {scores[0]:.3f}, best afterwards "
            f"{scores[trained.best_step]:.3f}): train with a smaller rate, on more data, or keep what you have"
        ]
    return []
