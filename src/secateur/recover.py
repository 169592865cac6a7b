"""Pruned folder and data -> the same model, trained to do again what the dense one did: LoRA, all weights, a teacher.

Everything that can be refused is refused before the first weight is read. What is trained lies in checkpoints beside
the output, from which a run that was killed goes on; the best of them becomes one ordinary folder.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur import __version__, processes
from secateur.adapters import FOLDER, AdapterOptions, check_peft, merged, save_adapter, with_adapter
from secateur.checkpoint import check_apart, check_vacant, make_record, read_record, save_again, write_json
from secateur.distill import KeptTeacher, check_teacher, keep_teacher
from secateur.errors import DataError, ModelError, TrainingError
from secateur.evaluate import encode
from secateur.models import (
    LoadOptions,
    check_finite,
    check_unpacked,
    load,
    load_config,
    load_tokenizer,
    resolve,
    text_files,
)
from secateur.run import Clock, peak_rss
from secateur.tuning_data import DataOptions, TuningData, read_tuning_data, training_order, weighted, whole_steps
from secateur.work import recovery_key, work_folder

if TYPE_CHECKING:
    from secateur.training import Report, Settings, Trained

METHODS = {  # name -> whether an adapter is trained (else all weights), and whether from a teacher
    "lora": (True, False),
    "full": (False, False),
    "distill": (False, True),
    "lora+distill": (True, True),
}
DECAYS = ("cosine", "linear")
CURVES_FILE = "secateur_curves.json"
PLOT_FILE = "secateur_curves.png"
TRAINING_FOLDER = "training"
TEACHER_FOLDER = "teacher"
WARM = 0.06  # the share of the steps over which the rate rises
ENOUGH = 4  # times its length a training has, at least, that is given a fixed warm-up
EVALUATIONS = 10  # of a training, by default
WINDOW = 128  # tokens, of held-out text
Watching = Callable[[str], "AbstractContextManager[Report | None]"]


@dataclass(frozen=True, slots=True)
class RecoverOptions:
    """How to train a pruned model.

    >>> RecoverOptions(method="magic")
    Traceback (most recent call last):
    secateur.errors.TrainingError: method='magic' is unknown. Expected lora, full, distill or lora+distill: ...
    """

    method: str = "lora"
    epochs: float = 1.0
    max_steps: int | None = None  # instead of epochs
    batch: int = 16  # rows of a step
    micro_batch: int = 4  # rows that are computed at once
    rate: float = 5e-4  # of learning, the highest
    warmup: int | None = None  # steps; None: 6 % of them
    decay: str = "cosine"
    weight_decay: float = 0.0
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    share: float = 1.0  # of the teacher in the loss; the rest is that of the labels
    temperature: float = 1.0
    top_k: int = 64  # tokens of the teacher's distribution that are kept
    evaluate_every: int | None = None  # steps; None: a tenth of them
    evaluation_tokens: int = 4096  # of every held-out text
    patience: int | None = 3  # evaluations without a better one, after which it stops
    recompute: bool = False  # layers once more in the backward pass, for less memory
    track: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            *others, last = METHODS
            raise TrainingError(
                f"method={self.method!r} is unknown. Expected {', '.join(others)} or {last}: --method lora"
            )
        if self.decay not in DECAYS:
            raise TrainingError(f"decay={self.decay!r} is unknown. Expected cosine or linear: --decay cosine")
        for name, value, good in (
            ("epochs", self.epochs, 1),
            ("rate", self.rate, 1e-4),
            ("temperature", self.temperature, 1),
        ):
            if not 0 < value < float("inf"):
                raise TrainingError(f"{name}={value} trains nothing. Expected more than 0: --{name} {good:g}")
        for name, number, least in (
            ("max_steps", self.max_steps, 1),
            ("batch", self.batch, 1),
            ("micro_batch", self.micro_batch, 1),
            ("warmup", self.warmup, 0),
            ("top_k", self.top_k, 1),
            ("evaluate_every", self.evaluate_every, 1),
            ("evaluation_tokens", self.evaluation_tokens, WINDOW),
            ("patience", self.patience, 1),
            ("seed", self.seed, 0),
        ):
            if number is not None and number < least:
                raise TrainingError(
                    f"{name}={number} is too small. Expected at least {least}: --{name.replace('_', '-')} {least}"
                )
        if not 0 <= self.share <= 1:
            raise TrainingError(f"share={self.share} is no share of the loss. Expected 0 to 1: --share 1")

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, and not the weights themselves."""
        return METHODS[self.method][0]

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return METHODS[self.method][1]


# LLM-Pruner's recovery (arXiv 2305.11627, section 4.1 and its scripts): options of the training, and of the data.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "llm-pruner": (
        {
            "method": "lora",
            "epochs": 2.0,
            "batch": 64,
            "micro_batch": 4,
            "rate": 1e-4,
            "warmup": 100,
            "decay": "linear",
            "adapter": AdapterOptions(rank=8, alpha=16.0, dropout=0.05),
        },
        {"template": "alpaca", "loss_on": "answers", "length": 256},
    ),
}


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a training came to: the folder, what was read and measured, seconds by stage, the most memory in bytes."""

    out: Path
    method: str
    steps: int  # that were done
    best_step: int  # whose weights these are
    tokens: int  # that were read in them, without padding
    trained_parameters: int
    rows: int  # to train on
    dropped: Mapping[str, int]  # rows that were left out, by reason
    loss: tuple[tuple[int, float], ...]
    evaluation: tuple[Mapping[str, Any], ...]  # step, validation, perplexity by text, score
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()  # what was done otherwise than asked, and why
    resumed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur recover --json` writes it."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "out": str(self.out),
            "dropped": dict(self.dropped),
            "seconds": dict(self.seconds),
            "evaluation": [dict(entry) for entry in self.evaluation],
        }


def options_for(preset: str, given: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[RecoverOptions, DataOptions]:
    """The options of a preset, but for those given. Raises `TrainingError` for a preset that is not there.

    >>> options_for("llm-pruner", {"epochs": 1}, {"sources": ("alpaca.json",)})[0].adapter
    AdapterOptions(rank=8, alpha=16.0, dropout=0.05)
    """
    if preset not in PRESETS:
        raise TrainingError(f"preset={preset!r} is unknown. Expected {' or '.join(PRESETS)}: --preset llm-pruner")
    training, reading = PRESETS[preset]
    given = dict(given)
    if adapter := given.pop("adapter", None):
        given["adapter"] = replace(training.get("adapter", AdapterOptions()), **adapter)
    return RecoverOptions(**{**training, **given}), DataOptions(**{**reading, **data})


def recover(
    pruned: str,
    out: str | Path,
    *,
    data: DataOptions,
    options: RecoverOptions | None = None,
    texts: Mapping[str, str] | None = None,
    teacher: str | None = None,
    loading: LoadOptions | None = None,
    keep_adapter: bool = False,
    plot: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    command: str | None = None,
    watch: Watching | None = None,
) -> Recovered:
    """Train a pruned folder and write the result as one ordinary folder.

    `texts` (name -> text) are held-out texts of another kind than the data: the checkpoint on which they have the least
    perplexity is kept, and training stops where it rises. Without any, the loss on validation rows decides. The teacher
    is by default the dense model that the folder's record names. With `resume`, a run that was killed goes on from its
    last checkpoint, to the same weights. Raises `SecateurError`.
    """
    from secateur.training import check_surroundings  # Trainer takes a second to import: other commands need not wait

    processes.join()
    out, options, loading = Path(out), options or RecoverOptions(), loading or LoadOptions()
    clock = Clock(watch) if watch else Clock()
    check_vacant(out, overwrite=overwrite)
    check_apart(pruned, out)
    if options.adapts:
        check_peft()
    elif keep_adapter:
        raise TrainingError(f"method={options.method!r} has no adapter to keep; leave out --keep-adapter")
    if plot:
        _check_plot()
    check_surroundings(options.track)
    config = load_config(pruned, trust_remote_code=loading.trust_remote_code)
    check_unpacked(config, name=pruned)
    _check_positions(config, data.length)
    tokenizer = load_tokenizer(pruned, trust_remote_code=loading.trust_remote_code)
    teacher = _teacher(pruned, teacher, tokenizer, config, loading) if options.taught else None
    with clock.stage("read"):
        read = read_tuning_data(tokenizer, data)
        held_out = {
            name: _enough(name, encode(tokenizer, text, max_tokens=options.evaluation_tokens))
            for name, text in (texts or {}).items()
        }
    settings, notes = _settings(options, data, read, _bf16(loading))
    stage = _Stage(pruned, options, loading, read, held_out, settings, teacher, tokenizer)
    key = recovery_key(
        [pruned, *(weighted(source)[0] for source in data.sources), *([teacher] if teacher else [])],
        [asdict(options), asdict(data), asdict(loading), asdict(settings), sorted(texts.items()) if texts else []],
    )
    with work_folder(out, key, resume=resume, worth_keeping=_has_begun) as work:
        resumed = _has_begun(work)
        trained, parameters = _train(stage, out, work, data.group_by_length, clock)
        tokens = int(read.train.lengths[_order(stage, data.group_by_length)[: trained.steps]].sum())
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
            tuple(notes + _disappointment(trained)),
            resumed,
        )
        if processes.is_first():
            with clock.stage("save"):
                _save(stage, trained, found, data, keep_adapter, plot, overwrite, command)
        processes.wait()
    return replace(found, peak_rss_bytes=peak_rss())


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    """What is known when the training begins."""

    pruned: str
    options: RecoverOptions
    loading: LoadOptions
    read: TuningData
    held_out: Mapping[str, Tensor]
    settings: Settings
    teacher: str | None
    tokenizer: PreTrainedTokenizerBase


def _has_begun(work: Path) -> bool:
    """Whether a run that was stopped has left a checkpoint, or some of what the teacher gave."""
    patterns = (f"{TRAINING_FOLDER}/checkpoint-*", f"{TEACHER_FOLDER}/*/*.safetensors")
    return any(any(work.glob(pattern)) for pattern in patterns)


def _train(stage: _Stage, out: Path, work: Path, group_by_length: bool, clock: Clock) -> tuple[Trained, int]:
    """Let the teacher read, then train; returns what came of it, and how many parameters were trained."""
    from secateur.training import Course, train

    read, options = stage.read, stage.options
    parts = {"train": read.train, "validation": read.validation}
    kept: dict[str, KeptTeacher] = {}
    if stage.teacher is not None:
        with clock.stage("teacher") as progress:
            loaded: list[PreTrainedModel] = []

            def teacher() -> PreTrainedModel:
                if not loaded:
                    assert stage.teacher is not None
                    loaded.append(_load(stage.teacher, stage.loading))
                return loaded[0]

            for name, rows in parts.items():
                folder = work / TEACHER_FOLDER / name
                keep_teacher(
                    teacher,
                    rows,
                    folder,
                    top_k=options.top_k,
                    temperature=options.temperature,
                    progress=progress,
                )
                kept[name] = KeptTeacher(folder, rows)
            loaded.clear()
            gc.collect()
    with clock.stage("load"):
        model = _trainable(stage)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    course = Course(
        read.train,
        _order(stage, group_by_length),
        read.validation,
        stage.held_out,
        WINDOW,
        kept.get("train"),
        kept.get("validation"),
        pad=stage.tokenizer.pad_token_id or 0,
    )
    with clock.stage("train") as report:
        told: Any = report  # it takes a line beside the numbers, where `watch` is one of ours
        logs = out.absolute().parent / "runs" / out.name
        trained = train(model, course, stage.settings, work / TRAINING_FOLDER, logs=logs, report=told)
    return trained, parameters


def _trainable(stage: _Stage) -> torch.nn.Module:
    """The pruned model with an adapter, or with all its weights in float32, ready to be trained."""
    model = _load(stage.pruned, stage.loading)
    torch.manual_seed(stage.options.seed)  # of the adapter's first values
    if stage.options.adapts:
        adapted: torch.nn.Module = with_adapter(model, stage.options.adapter)
        return adapted
    exact = torch.float64 if model.dtype == torch.float64 else torch.float32
    for parameter in model.parameters():
        # Small steps vanish in weights of few digits; and mapped from a file they are not ours to write.
        parameter.data = parameter.data.to(exact, copy=True)
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _save(
    stage: _Stage,
    trained: Trained,
    found: Recovered,
    data: DataOptions,
    keep_adapter: bool,
    plot: bool,
    overwrite: bool,
    command: str | None,
) -> None:
    """Put the weights of the best checkpoint into the pruned model, as it was loaded anew, and write that."""
    from secateur.training import put_weights_in_place, read_weights

    options = stage.options
    gc.collect()  # the trained model is in cycles with its Trainer
    model = load(stage.pruned, device="cpu", trust_remote_code=stage.loading.trust_remote_code)
    folder = resolve(stage.pruned).path
    before = read_record(folder) if folder is not None else None
    record = before or make_record(model, name=stage.pruned, seed=options.seed)
    about = {
        "method": options.method,
        "options": asdict(options),
        "data": asdict(data),
        "rows": stage.read.train.digest(),
        "teacher": stage.teacher,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "tokens": found.tokens,
        "evaluation": [dict(entry) for entry in trained.evaluations],
        "command": command,
        "secateur": __version__,
        "before": record.recovery,
    }
    weights = read_weights(trained.checkpoint)
    if options.adapts:
        adapted = with_adapter(model, options.adapter)
        put_weights_in_place(adapted, weights)
        model = merged(adapted)
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # mapped from the pruned folder's file
        put_weights_in_place(model, weights)
    check_finite(model)
    curves = {"loss": found.loss, "evaluation": [dict(entry) for entry in found.evaluation]}
    with save_again(
        model,
        found.out,
        source=folder,
        tokenizer=stage.tokenizer,
        record=replace(record, recovery=about),
        files=text_files(str(stage.pruned), stage.tokenizer),
        overwrite=overwrite,
    ) as unfinished:
        write_json(unfinished / CURVES_FILE, curves)
        if plot:
            _plot(found, unfinished / PLOT_FILE)
        if keep_adapter:
            again = load(stage.pruned, device="cpu", trust_remote_code=stage.loading.trust_remote_code)
            adapted = with_adapter(again, options.adapter)
            put_weights_in_place(adapted, weights)
            save_adapter(adapted, unfinished / FOLDER, base=str(stage.pruned))


def _order(stage: _Stage, group_by_length: bool) -> Tensor:
    return training_order(
        stage.read.train,
        steps=stage.settings.steps,
        batch=stage.settings.batch,
        seed=stage.options.seed,
        weights=stage.read.weights,
        group_by_length=group_by_length,
    )


def _settings(options: RecoverOptions, data: DataOptions, read: TuningData, bf16: bool) -> tuple[Settings, list[str]]:
    """Steps and what depends on them; and what had to be done otherwise than asked."""
    from secateur.training import Settings

    notes = []
    rows, batch, count = len(read.train), options.batch, processes.count()
    if batch > rows:
        part = options.micro_batch * count
        batch = rows // part * part or rows // count * count or count
        notes.append(f"a step takes {batch} of the {rows} rows that there are, not {options.batch}")
    if batch % count or batch > rows:
        raise TrainingError(
            f"a step of {min(batch, rows)} rows cannot be shared by {count} processes. Expected a multiple: --batch "
            f"{-(-batch // count) * count}"
        )
    micro_batch = max(size for size in range(1, options.micro_batch + 1) if batch % (size * count) == 0)
    steps = options.max_steps or whole_steps(rows, options.epochs, batch)
    warmup = int(WARM * steps)  # of which the first is at a rate of 0: none where there are few
    if options.warmup is not None and options.warmup * ENOUGH <= steps:
        warmup = options.warmup
    elif options.warmup is not None:
        notes.append(
            f"the rate rises over {warmup} steps, not {options.warmup}: of {steps} steps in all, most would train at "
            "a rate near 0"
        )
    found = Settings(
        steps=steps,
        batch=batch,
        micro_batch=micro_batch,
        rate=options.rate,
        warmup=warmup,
        decay=options.decay,
        weight_decay=options.weight_decay,
        evaluate_every=options.evaluate_every or max(1, steps // EVALUATIONS),
        patience=options.patience,
        bf16=bf16,
        recompute=options.recompute,
        share=options.share,
        temperature=options.temperature,
        seed=options.seed,
        track=options.track,
    )
    return found, notes


def _teacher(
    pruned: str,
    teacher: str | None,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    loading: LoadOptions,
) -> str:
    """The teacher's name: the one given, or the dense model that the folder's record names. It must fit the model."""
    if teacher is None:
        path = resolve(pruned).path
        record = read_record(path) if path is not None else None
        if record is None:
            raise ModelError(
                f"{pruned!r} has no record that names the dense model it was cut from. Name a teacher: --teacher MODEL"
            )
        teacher = record.model
    trust = loading.trust_remote_code
    about = load_config(teacher, trust_remote_code=trust)
    check_teacher(
        (pruned, tokenizer, config.get_text_config().vocab_size),
        (teacher, load_tokenizer(teacher, trust_remote_code=trust), about.get_text_config().vocab_size),
    )
    return teacher


def _bf16(loading: LoadOptions) -> bool:
    """Whether products are taken in bfloat16. Raises `TrainingError` for float16, in which gradients overflow."""
    if loading.dtype == "float16":
        raise TrainingError(
            "dtype='float16' overflows in training, and the loss becomes NaN. Expected bfloat16, which has float32's "
            "range, or float32: --dtype auto takes bfloat16 where the machine has it"
        )
    return loading.dtype == "bfloat16" or (loading.dtype == "auto" and _has_bf16(loading.device))


def _has_bf16(device: str) -> bool:
    """Whether the machine multiplies bfloat16 in hardware."""
    if device != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _load(name: str, loading: LoadOptions) -> PreTrainedModel:
    """The model in its own dtype if no other is asked for; float16 becomes float32, in which nothing overflows."""
    model = load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
    if model.dtype == torch.float16:
        model = load(name, dtype="float32", device=loading.device, trust_remote_code=loading.trust_remote_code)
    check_finite(model)
    return model


def _check_positions(config: PreTrainedConfig, length: int) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:  # -1 and the like: there is no limit
        raise DataError(
            f"length={length} is longer than the model's {positions} positions. Expected at most as many "
            f"tokens in a row: --length {positions}"
        )


def _enough(name: str, ids: Tensor) -> Tensor:
    if len(ids) < WINDOW:
        raise DataError(
            f"{name}: {len(ids)} tokens are fewer than one window of {WINDOW}. Expected a longer text: --eval NAME=FILE"
        )
    return ids


def _disappointment(trained: Trained) -> list[str]:
    """What to say where the training has made the model no better."""
    scores = {entry["step"]: entry["score"] for entry in trained.evaluations}
    if 0 in scores and scores.get(trained.best_step, 0.0) >= scores[0]:
        return [
            f"no checkpoint is better than the pruned model was (score {scores[0]:.3f}, best afterwards "
            f"{scores[trained.best_step]:.3f}): train with a smaller rate, on more data, or keep what you have"
        ]
    return []


def _check_plot() -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise TrainingError("plot needs the package matplotlib. Run: pip install 'secateur[plot]'")


def _plot(found: Recovered, path: Path) -> None:
    """Loss over steps, and what was measured on the way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
    axes.plot(*zip(*found.loss, strict=True), linewidth=0.8, alpha=0.7, label="loss")
    steps = [entry["step"] for entry in found.evaluation]
    if any(entry["validation"] is not None for entry in found.evaluation):
        axes.plot(steps, [entry["validation"] for entry in found.evaluation], marker="o", label="validation")
    texts = found.evaluation[0]["perplexity"] if found.evaluation else {}
    if texts:
        right = axes.twinx()
        right.set_ylabel("perplexity")
        for name in texts:
            right.plot(steps, [entry["perplexity"][name] for entry in found.evaluation], "--", marker="s", label=name)
        right.legend(loc="upper right")
    axes.axvline(found.best_step, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
