"""A pruned folder, data and options -> all that a training needs; or why there can be none.

Everything that can be refused is refused here, before the first weight is read.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from secateur import processes
from secateur.checkpoint.record import PLAN_FILE, read_record
from secateur.data.options import DataOptions
from secateur.data.overlap import OVERLAP_WORDS, overlap
from secateur.data.reading import TuningData, read_tuning_data
from secateur.data.rows import training_order, whole_steps
from secateur.discovery.discover import discover
from secateur.errors import DataError, ModelError, TrainingError
from secateur.evaluation.texts import encode
from secateur.files import check_apart, check_vacant
from secateur.models.config import check_not_quantised, check_positions, load_config
from secateur.models.loading import LoadOptions
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.planning.plan import Plan, read_plan
from secateur.progress import Clock
from secateur.recovery.distillation import check_teacher
from secateur.recovery.hidden_states import Counterparts, counterparts
from secateur.recovery.lora import check_peft
from secateur.recovery.options import EVAL_WINDOW, RecoverOptions
from secateur.recovery.result import check_plot

if TYPE_CHECKING:
    from secateur.recovery.course import Settings

logger = logging.getLogger(__name__)

WARM = 0.06  # the share of the steps over which the rate rises
ENOUGH = 4  # times its length a training has, at least, that is given a fixed warm-up
EVALUATIONS = 10  # of a training, by default


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What is known when the training begins."""

    pruned: str
    options: RecoverOptions
    data: DataOptions
    loading: LoadOptions
    read: TuningData
    held_out: Mapping[str, Tensor]  # name -> token ids of a text
    settings: Settings
    teacher: str | None
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...]  # what is done otherwise than asked, and why

    @property
    def order(self) -> Tensor:
        """Which rows every step takes: int64, steps x batch."""
        return training_order(
            self.read.train,
            steps=self.settings.steps,
            batch_size=self.settings.global_batch_size,
            seed=self.options.seed,
            weights=self.read.weights,
            group_by_length=self.data.group_by_length,
        )


def prepare(
    pruned: str,
    out: Path,
    data: DataOptions,
    options: RecoverOptions,
    *,
    texts: Mapping[str, str],
    teacher: str | None,
    loading: LoadOptions,
    save_adapter: bool,
    plot: bool,
    overwrite: bool,
    clock: Clock,
) -> Prepared:
    """Check everything, and read the data. Raises `SecateurError`; `recover` shows a run."""
    from secateur.recovery.loop import check_surroundings  # Trainer takes a second to import: others need not wait

    check_vacant(out, overwrite=overwrite)
    check_apart(resolve(pruned).path, out)
    if options.has_lora:
        check_peft()
    elif save_adapter:
        raise TrainingError(f"method={options.method!r} has no adapter to keep; leave out --save-adapter")
    if plot:
        check_plot()
    check_surroundings(options.track)
    config = load_config(pruned, trust_remote_code=loading.trust_remote_code)
    check_not_quantised(config, name=pruned)
    check_positions(config, data.max_length, name="max_length")
    tokenizer = load_tokenizer(pruned, trust_remote_code=loading.trust_remote_code)
    teacher = _teacher(pruned, teacher, tokenizer, config, loading) if options.has_teacher else None
    with clock.stage("read"):
        read = read_tuning_data(tokenizer, data)
        held_out = {
            name: _enough(name, encode(tokenizer, text, max_tokens=options.eval_tokens)) for name, text in texts.items()
        }
        overlaps = _overlaps(tokenizer, read, held_out)
    settings, notes = _settings(options, data, read, _bf16(loading))
    return Prepared(pruned, options, data, loading, read, held_out, settings, teacher, tokenizer, (*notes, *overlaps))


def plan_of(pruned: str) -> Plan:
    """The plan that lies in a folder. Raises `ModelError` where there is none, by which layers could be compared."""
    path = resolve(pruned).path
    if path is None or not (path / PLAN_FILE).is_file():
        raise ModelError(
            f"{pruned!r} has no {PLAN_FILE}, which says what layers and channels of the teacher are left, so hidden "
            "states cannot be compared. Expected a folder that `secateur prune` wrote; or leave out "
            "--hidden-states-weight"
        )
    return read_plan(path / PLAN_FILE)


def compared_states(ready: Prepared, plan: Plan) -> Counterparts | None:
    """The layers whose hidden states are learned; None where none are to be. Raises `ModelError`."""
    if ready.teacher is None or not ready.options.hidden_states_weight:
        return None
    trust = ready.loading.trust_remote_code
    dense, cut = (discover(name, trust_remote_code=trust) for name in (ready.teacher, ready.pruned))
    config = load_config(ready.teacher, trust_remote_code=trust).get_text_config()
    width = getattr(config, "hidden_size", 0)
    return counterparts(plan, dense, cut, teacher=ready.teacher, width=width)


def _settings(options: RecoverOptions, data: DataOptions, read: TuningData, bf16: bool) -> tuple[Settings, list[str]]:
    """Steps and what depends on them; and what had to be done otherwise than asked."""
    from secateur.recovery.course import Settings

    notes = []
    rows, batch, count = len(read.train), options.global_batch_size, processes.count()
    if batch > rows:
        part = options.micro_batch_size * count
        batch = rows // part * part or rows // count * count or count
        notes.append(f"a step takes {batch} of the {rows} rows that there are, not {options.global_batch_size}")
    if batch % count or batch > rows:
        raise TrainingError(
            f"a step of {min(batch, rows)} rows cannot be shared by {count} processes. Expected a multiple: "
            f"--global-batch-size {-(-batch // count) * count}"
        )
    micro_batch = max(size for size in range(1, options.micro_batch_size + 1) if batch % (size * count) == 0)
    steps = options.max_steps or whole_steps(rows, options.epochs, batch)
    warmup = int(WARM * steps)  # of which the first is at a rate of 0: none where there are few
    if options.warmup_steps is not None and options.warmup_steps * ENOUGH <= steps:
        warmup = options.warmup_steps
    elif options.warmup_steps is not None:
        notes.append(
            f"warmup takes {warmup} steps, not {options.warmup_steps}: of {steps} steps in all, most would have a "
            "learning rate near 0"
        )
    found = Settings(
        steps=steps,
        global_batch_size=batch,
        micro_batch_size=micro_batch,
        learning_rate=options.learning_rate,
        warmup_steps=warmup,
        lr_scheduler=options.lr_scheduler,
        weight_decay=options.weight_decay,
        eval_steps=options.eval_steps or max(1, steps // EVALUATIONS),
        patience=options.patience,
        bf16=bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        teacher_weight=options.teacher_weight,
        temperature=options.temperature,
        hidden_states_weight=options.hidden_states_weight,
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
            "range, or float32: --dtype auto takes bfloat16 where it is faster"
        )
    return loading.dtype == "bfloat16" or (loading.dtype == "auto" and _has_bf16(loading.device))


def _has_bf16(device: str) -> bool:
    """Whether the machine multiplies bfloat16 faster than float32.

    Of x86 processors those with tiles do (AMX); with AVX-512's products alone a step takes longer.
    """
    if device != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_products = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return has_products and (bool(torch.cpu._is_amx_tile_supported()) if is_x86 else True)


def _enough(name: str, ids: Tensor) -> Tensor:
    if len(ids) < EVAL_WINDOW:
        raise DataError(
            f"{name}: {len(ids)} tokens are fewer than one window of {EVAL_WINDOW}. Expected a longer text: "
            "--eval NAME=FILE"
        )
    return ids


def _overlaps(tokenizer: PreTrainedTokenizerBase, read: TuningData, held_out: Mapping[str, Tensor]) -> list[str]:
    """What to say of held-out texts of which some is in the rows to train on; it is said at once, too."""
    notes = []
    for name, ids in held_out.items():
        windows = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in ids.split(EVAL_WINDOW)]
        rows = (
            str(tokenizer.decode(read.train.ids_T[read.train.slice_of(row)], skip_special_tokens=True))
            for row in range(len(read.train))
        )
        if share := overlap(windows, rows):
            notes.append(
                f"{100 * share:.3g} % of the held-out text {name} has {OVERLAP_WORDS} words in a row in common with "
                "the data; this flatters its perplexity, which picks the checkpoint: hold out another text"
            )
            logger.warning("%s", notes[-1])
    return notes
