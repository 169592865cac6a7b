"""Recipe -> all that a training needs; everything that can be refused is refused here, before weights are read."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur import processes
from secateur.checkpoint.record import read_record
from secateur.data.calibration import SELF, CalibrationOptions
from secateur.data.generated import generate_windows
from secateur.data.overlap import OVERLAP_WORDS, overlap
from secateur.data.rows import Rows, steps_for_epochs, training_order
from secateur.data.training_data import TrainingData, read_training_data
from secateur.errors import CheckpointError, DataError, ModelError, TrainingError, check_installed
from secateur.evaluation.inference import vocabulary_size
from secateur.evaluation.texts import decode, decode_rows, encode, read_texts
from secateur.files import PLAN_FILE, check_apart, check_vacant, read_json, write_json
from secateur.models.config import check_not_quantized, check_positions, check_writes_text, load_config
from secateur.models.loading import load
from secateur.models.options import LoadOptions
from secateur.models.sources import resolve
from secateur.models.tensor_files import read_tensors, write_tensors
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.cache import state_key
from secateur.pipeline.tracking import Tracker, check_tracker
from secateur.planning.plan import read_plan
from secateur.progress import Clock
from secateur.pruning.prune import cut_vocabulary
from secateur.recovery.distillation import check_teacher
from secateur.recovery.lora import check_peft
from secateur.recovery.options import EVAL_WINDOW, RecoverOptions
from secateur.recovery.recipe import RecoverRecipe
from secateur.vocabulary.tokenizer import cut_tokenizer

logger = logging.getLogger(__name__)

WARMUP_FRACTION = 0.06  # of all steps, by default
MOST_WARMUP = 0.25  # a longer warmup that was asked for is shortened to the default
EVALUATIONS = (2, 10)  # of a training, by default: the fewest and the most
EVALUATION_SHARE = 0.1  # of the time of a training, which evaluations may take
READING = 1 / 3  # of the time of a token that is trained on, which one takes that is only read
WRITTEN_ROWS = 256  # by the dense model, by default
WRITTEN_FILE, BF16_FILE = "written.safetensors", "bf16.json"  # in the work folder
PRODUCTS_LENGTH = 512  # of rows, up to which attention on CPUs is taken by matrix products: their memory grows squared
BF16_FASTER = 1.5  # than float32 are products in bfloat16, where they are taken by default


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSetup:
    """All that is known before the weights are read."""

    recipe: RecoverRecipe
    options: RecoverOptions  # of the recipe, with every default resolved
    data: TrainingData
    held_out: Mapping[str, Tensor]  # name -> ids_T of a text
    teacher: str | None
    tokenizer: PreTrainedTokenizerBase
    bf16: bool
    width: int | None  # of the hidden states, where the config says it
    notes: tuple[str, ...]  # what is done differently than asked, and why

    def with_steps(self, steps: int) -> TrainingSetup:
        """The same with so many steps, and with what follows from their number."""
        asked, evaluated = self.recipe.options, self.evaluated
        options, notes = resolve_options(asked, self.data, evaluated=evaluated, width=self.width, steps=steps)
        return replace(self, options=options, notes=tuple(dict.fromkeys([*self.notes, *notes])))

    def load_teacher(self) -> PreTrainedModel:
        """The teacher, in the dtype in which products are taken."""
        assert self.teacher is not None
        return load_teacher(self.recipe, self.teacher, bf16=self.bf16)

    @property
    def attends_by_products(self) -> bool:
        """Whether attention is faster by matrix products than fused: on CPUs, of short rows."""
        on_gpu = self.recipe.loading.device != "cpu" and torch.cuda.is_available()
        return self.bf16 and not on_gpu and self.recipe.data.max_length <= PRODUCTS_LENGTH

    @property
    def evaluated(self) -> int:
        """The tokens that each evaluation reads."""
        return evaluated_tokens(self.data, self.held_out)

    @property
    def order_SB(self) -> Tensor:
        """The rows that each step reads: int64, steps x rows of a step."""
        assert self.options.max_steps is not None
        return training_order(
            self.data.train,
            steps=self.options.max_steps,
            batch_size=self.options.global_batch_size,
            seed=self.options.seed,
            weights=self.data.weights,
            group_by_length=self.recipe.data.group_by_length,
        )

    @property
    def tokens(self) -> float:
        """The tokens that are trained on, about."""
        assert self.options.max_steps is not None
        return self.options.max_steps * self.options.global_batch_size * self.data.tokens_per_row

    def rows_read(self) -> tuple[Rows, Tensor]:
        """The rows that any step reads, and their numbers among these by step, as `order_SB`."""
        numbers = self.order_SB.unique()
        return self.data.train.select(numbers), torch.searchsorted(numbers, self.order_SB)


def training_key(recipe: RecoverRecipe) -> str:
    """What a training depends on, as a hash; of a model that is cut first, the cut and its texts as well."""
    texts = () if recipe.calibration is None else recipe.calibration.names
    held_out = [text.partition("=")[2] for text in recipe.eval_texts]
    paths = [recipe.model, *recipe.data.source_names, _dense_model(recipe), *held_out, *texts]
    return state_key([path for path in paths if path is not None], asdict(recipe))


def with_method(recipe: RecoverRecipe) -> RecoverRecipe:
    """The recipe with its method chosen, where that is left open: by whether a dense model is known."""
    if recipe.options.method != "auto":
        return recipe
    known = recipe.cut is not None or _dense_model(recipe) is not None
    return replace(recipe, options=replace(recipe.options, method="lora+distill" if known else "lora"))


def check_recipe(recipe: RecoverRecipe, out: Path, *, overwrite: bool) -> None:
    """Raise `SecateurError` for what can be refused before anything is read."""
    options = recipe.options
    check_vacant(out, overwrite=overwrite)
    check_apart(resolve(recipe.model).path, out)
    with suppress(RuntimeError):  # auto, balanced or streamed
        check_trains_on(torch.device(recipe.loading.device))
    if options.has_lora:
        check_peft()
    elif options.save_adapter:
        raise TrainingError(f"method={options.method!r} has no adapter to save; leave out --save-adapter")
    if options.plot:
        check_installed(TrainingError, "matplotlib", extra="plot", what="plot")
    if options.minutes is not None and processes.sharded():
        raise TrainingError(
            f"minutes={options.minutes:g}: a step is timed with the whole model in one process, and FSDP shards it. "
            "Expected a number of tokens: --tokens 400k"
        )
    _check_environment(options.track)


def check_trains_on(device: torch.device) -> None:
    """Raise `TrainingError` for another GPU than the first, to which Trainer would bring the model.

    >>> check_trains_on(torch.device("cuda:0"))
    """
    if device.type == "cuda" and device.index and processes.count() == 1:
        raise TrainingError(
            f"device {device}: a training runs on the first GPU that is seen. Expected --device cuda, and "
            f"CUDA_VISIBLE_DEVICES={device.index} before the command"
        )


def prepare(recipe: RecoverRecipe, work: Path, clock: Clock) -> TrainingSetup:
    """Check the rest, and read the data; what the dense model writes is kept in the work folder.

    Raises `SecateurError`; `recover` shows a run.
    """
    options, model = recipe.options, recipe.model
    trust = recipe.loading.trust_remote_code
    config = load_config(model, trust_remote_code=trust)
    check_not_quantized(config, name=model)
    check_writes_text(config, name=model, doing="recover")
    check_positions(config, recipe.data.max_length, name="max_length")
    bf16 = _use_bf16(recipe.loading, work)
    tokenizer = load_tokenizer(model, trust_remote_code=trust)
    writes = SELF in recipe.data.source_names
    dense = _find_teacher(recipe, tokenizer, config) if options.has_teacher or writes else None
    texts = read_texts(recipe.eval_texts, option="--eval") if recipe.eval_texts else {}
    written_RT = _written_rows(recipe, dense, work, clock, bf16=bf16) if dense is not None and writes else None
    with clock.stage("read"):
        data = read_training_data(tokenizer, recipe.data, written_RT)
        held_out = {name: encode(tokenizer, text, max_tokens=options.eval_tokens) for name, text in texts.items()}
        for name, ids_T in held_out.items():
            if len(ids_T) < EVAL_WINDOW:
                raise DataError(
                    f"{name}: {len(ids_T)} tokens are fewer than one window of {EVAL_WINDOW}. Expected a longer text: "
                    "--eval NAME=FILE"
                )
        overlaps = _find_overlaps(tokenizer, data, held_out)
    width = getattr(config.get_text_config(), "hidden_size", None)
    resolved, notes = resolve_options(options, data, evaluated=evaluated_tokens(data, held_out), width=width)
    teacher = dense if options.has_teacher else None
    return TrainingSetup(recipe, resolved, data, held_out, teacher, tokenizer, bf16, width, (*notes, *overlaps))


def _written_rows(recipe: RecoverRecipe, dense: str, work: Path, clock: Clock, *, bf16: bool) -> Tensor:
    """What the dense model writes, int64, rows x `max_length`: read where an earlier run has kept it."""
    file, data = work / WRITTEN_FILE, recipe.data
    try:
        kept = read_tensors(file)[0]["rows"]
    except CheckpointError:  # missing or damaged
        kept = None
    if processes.largest(int(kept is None)):
        options = CalibrationOptions(SELF, samples=data.samples or WRITTEN_ROWS, length=data.max_length, seed=data.seed)
        with clock.stage("write") as progress:
            kept = generate_windows(load_teacher(recipe, dense, bf16=bf16), options, progress=progress)
            if processes.is_first():
                write_tensors(file, {"rows": kept})
        processes.wait()
    assert kept is not None
    return kept


def evaluated_tokens(data: TrainingData, held_out: Mapping[str, Tensor]) -> int:
    """The tokens that an evaluation reads: of the validation rows and the texts that choose the checkpoint."""
    return int(data.validation.lengths_R.sum()) + sum(len(ids_T) for ids_T in held_out.values())


def evaluations_of(trained: float, evaluated: float) -> int:
    """How many evaluations a training has, by what training and one evaluation take, in seconds or in tokens trained.

    >>> [evaluations_of(trained, 1000) for trained in (1_000, 50_000, 1_000_000)]
    [2, 5, 10]
    """
    fewest, most = EVALUATIONS
    return max(fewest, min(most, int(EVALUATION_SHARE * trained / max(evaluated, 1e-9))))


def resolve_options(
    options: RecoverOptions,
    data: TrainingData,
    *,
    evaluated: int = 0,
    width: int | None = None,
    steps: int | None = None,
) -> tuple[RecoverOptions, list[str]]:
    """Return the options with every default resolved for the data, and notes on what differs from what was asked.

    `evaluated` are the tokens that an evaluation reads, `width` is that of the hidden states. Where minutes are to
    decide, the steps are those of the epochs until they are given. Raises `TrainingError` where a step cannot be shared
    by the processes.

    >>> ids = torch.zeros(8000, dtype=torch.int32)
    >>> rows = Rows(ids, ids == 0, torch.arange(0, 8001, 8), torch.zeros(1000, dtype=torch.int32))
    >>> options, _ = resolve_options(RecoverOptions(), TrainingData(rows, rows, None))
    >>> options.max_steps, options.warmup_steps, options.eval_steps
    (250, 15, 25)
    """
    notes = []
    batch_size, count, rows = options.global_batch_size, processes.count(), len(data.train)
    if batch_size > rows:
        multiple = options.micro_batch_size * count
        batch_size = rows // multiple * multiple or rows // count * count or count
        notes.append(f"a step takes {batch_size} of the {rows} rows that there are, not {options.global_batch_size}")
    if batch_size % count or batch_size > rows:
        raise TrainingError(
            f"a step of {min(batch_size, rows)} rows cannot be shared by {count} processes. Expected a multiple: "
            f"--global-batch-size {-(-batch_size // count) * count}"
        )
    steps = steps or options.max_steps
    if steps is None and options.tokens is not None:
        steps = max(1, round(options.tokens / (batch_size * data.tokens_per_row)))
    steps = steps or steps_for_epochs(rows, options.epochs, batch_size)
    warmup = int(WARMUP_FRACTION * steps)  # its first step has a learning rate of 0: no warmup for few steps
    if options.warmup_steps is not None and options.warmup_steps <= MOST_WARMUP * steps:
        warmup = options.warmup_steps
    elif options.warmup_steps is not None:
        notes.append(
            f"warmup takes {warmup} steps, not {options.warmup_steps}: of {steps} steps in all, most would have a "
            "learning rate near 0"
        )
    evaluations = evaluations_of(steps * batch_size * data.tokens_per_row, evaluated * READING)
    divisors = [n for n in range(1, options.micro_batch_size + 1) if batch_size % (n * count) == 0]
    resolved = replace(
        options,
        max_steps=steps,
        tokens=None,
        minutes=None,
        learning_rate=options.rate(width),
        global_batch_size=batch_size,
        micro_batch_size=max(divisors),
        warmup_steps=warmup,
        eval_steps=options.eval_steps or max(1, steps // evaluations),
    )
    return resolved, notes


def _dense_model(recipe: RecoverRecipe) -> str | None:
    """The name of the dense model: the teacher that was named, or what the record names."""
    record = read_record(resolve(recipe.model).path) if recipe.teacher is None else None
    return record.model if record is not None else recipe.teacher


def _find_teacher(recipe: RecoverRecipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> str:
    """Return the name of the teacher, after checking its vocabulary."""
    teacher = _dense_model(recipe)
    if teacher is None:
        raise ModelError(
            f"{recipe.model!r} has no record that names the dense model it was cut from. Name a teacher: "
            "--teacher MODEL"
        )
    trust = recipe.loading.trust_remote_code
    teacher_config = load_config(teacher, trust_remote_code=trust)
    known, size = load_tokenizer(teacher, trust_remote_code=trust), teacher_config.get_text_config().vocab_size
    keep = kept_tokens(recipe.model)
    if keep is not None and keep[-1] < size and len(known) > len(tokenizer):  # as the teacher is read, too
        known, size = cut_tokenizer(known, keep), len(keep)
    check_teacher((recipe.model, tokenizer, config.get_text_config().vocab_size), (teacher, known, size))
    return teacher


def kept_tokens(model: str) -> tuple[int, ...] | None:
    """The ids of the dense model's tokens that a pruned folder has; None where it has all, or nothing says."""
    path = resolve(model).path
    return read_plan(path / PLAN_FILE).kept_tokens if path is not None and (path / PLAN_FILE).is_file() else None


def load_teacher(recipe: RecoverRecipe, name: str, *, bf16: bool) -> PreTrainedModel:
    """The dense model with the vocabulary of the pruned one, in bfloat16 or as `load_finite` has it."""
    model = load_finite(name, replace(recipe.loading, dtype="bfloat16") if bf16 else recipe.loading)
    keep = kept_tokens(recipe.model)
    same = keep is None or vocabulary_size(model) <= len(keep)
    return model if keep is None or same else cut_vocabulary(model, keep)


def load_finite(name: str, loading: LoadOptions) -> PreTrainedModel:
    """Load a model in its own dtype if no other is asked for; float16 becomes float32, which does not overflow."""
    model = load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
    if model.dtype == torch.float16:
        model = load(name, dtype="float32", device=loading.device, trust_remote_code=loading.trust_remote_code)
    check_finite(model)
    return model


def _check_environment(track: Tracker | None) -> None:
    """Raise `TrackingError` for a tracker that is missing, `TrainingError` for DeepSpeed or fp16 by accelerate."""
    check_tracker(track)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise TrainingError(
            "DeepSpeed keeps its state in pickles, which are neither written nor read here. Expected FSDP2, which "
            "shards the same: accelerate launch --config_file docs/accelerate/fsdp2.yaml"
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise TrainingError(
            "accelerate is configured for fp16, which overflows in training. Expected no precision there, since "
            "--dtype sets it: accelerate launch --mixed_precision no ..."
        )


def _use_bf16(loading: LoadOptions, work: Path) -> bool:
    """Whether products are taken in bfloat16; a run that goes on takes what it took.

    Raises `TrainingError` for float16, in which gradients overflow.
    """
    if loading.dtype == "float16":
        raise TrainingError(
            "dtype='float16' overflows in training, and the loss becomes NaN. Expected bfloat16, which has float32's "
            "range, or float32: --dtype auto takes bfloat16 where it is faster"
        )
    if loading.dtype != "auto":
        return loading.dtype == "bfloat16"
    file, fast = work / BF16_FILE, _has_fast_bf16(loading.device)
    try:
        return bool(read_json(file)["bf16"])
    except (CheckpointError, LookupError, TypeError):
        if processes.is_first():
            write_json(file, {"bf16": fast})
        return fast


def _has_fast_bf16(device: str) -> bool:
    """Whether the machine multiplies bfloat16 clearly faster than float32.

    On a CPU that is measured, once, in some 50 ms: processors with the same instructions differ by a factor of four.
    """
    if device != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    float32, bfloat16 = _product_seconds()
    return processes.largest(int(float32 > BF16_FASTER * bfloat16)) == 1  # the same in all


@functools.cache
def _product_seconds() -> tuple[float, float]:
    """The least seconds of a product of two matrices in float32 and in bfloat16.

    They take turns: of one after the other, what else the machine does could slow down one alone, and the same recipe
    would not give the same weights.
    """
    operands = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds: list[list[float]] = [[], []]
    for _ in range(32):
        for each, found in zip(operands, seconds, strict=True):
            start = time.perf_counter()
            functional.linear(each, each)
            found.append(time.perf_counter() - start)
    return min(seconds[0]), min(seconds[1])


def _find_overlaps(tokenizer: PreTrainedTokenizerBase, data: TrainingData, held_out: Mapping[str, Tensor]) -> list[str]:
    """Return and log a note for every held-out text that shares text with the rows."""
    notes = []
    for name, ids_T in held_out.items():
        windows = [decode(tokenizer, part.tolist()) for part in ids_T.split(EVAL_WINDOW)]
        if fraction := overlap(windows, decode_rows(tokenizer, data.train)):
            notes.append(
                f"{100 * fraction:.3g} % of the held-out text {name} has {OVERLAP_WORDS} words in a row in common with "
                "the data; this flatters its perplexity, which picks the checkpoint: hold out another text"
            )
            logger.warning("%s", notes[-1])
    return notes
