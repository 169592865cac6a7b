"""How to train a pruned model: the options, and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from secateur.data.options import DataOptions
from secateur.decoding import check_choices
from secateur.errors import TrainingError, check_known, check_least
from secateur.pipeline.tracking import Tracker

Method = Literal["auto", "lora", "full", "distill", "lora+distill"]
Scheduler = Literal["cosine", "linear"]
EVAL_WINDOW = 128  # tokens per window of held-out text
WIDTH, WIDTH_POWER = 576, 0.78  # the hidden width at which learning rates were chosen, and how they fall with it
BUDGETS = ("minutes", "tokens", "epochs", "max_steps")  # of which one says when a training ends


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """Size of a LoRA adapter: W becomes W + alpha / rank * B A, with `rank` rows in A (arXiv 2106.09685).

    >>> LoraOptions(rank=0)
    Traceback (most recent call last):
    secateur.errors.TrainingError: rank=0 is too small. Expected at least 1, for example rank=8
    """

    rank: int = 16
    """Rank of the adapter."""

    alpha: float = 32.0
    """Scale of the adapter: its output is multiplied by alpha / rank."""

    dropout: float = 0.0
    """Dropout on the adapter's input."""

    def __post_init__(self) -> None:
        check_least(TrainingError, "rank", self.rank, 1, 8)
        if self.alpha <= 0:
            raise TrainingError(
                f"alpha={self.alpha} gives the adapter no weight. Expected more than 0, for example alpha=16"
            )
        if not 0 <= self.dropout < 1:
            raise TrainingError(f"dropout={self.dropout} is no fraction. Expected 0 up to 1, for example dropout=0.05")


@dataclass(frozen=True, slots=True)
class RecoverOptions:
    """How to train a pruned model. Raises `TrainingError` for values that cannot be trained with.

    >>> RecoverOptions(method="magic")
    Traceback (most recent call last):
    secateur.errors.TrainingError: method='magic' is unknown. Expected auto, lora, full, distill or lora+distill
    """

    method: Method = "auto"
    """What is trained: a LoRA adapter (merged afterwards) or all weights; distill learns from the dense model, too.
    auto: lora+distill, or lora where no dense model is known."""

    epochs: float = 1.0
    """Passes over the rows."""

    max_steps: int | None = None
    """Optimizer steps, instead of epochs."""

    tokens: int | None = None
    """Tokens to train on, instead of epochs: 400k, 1.5M or a number."""

    minutes: float | None = None
    """Minutes to train for, instead of epochs; a few steps are timed to know how many. What a teacher reads, the
    evaluations, loading and writing count."""

    global_batch_size: int = 4
    """Rows per optimizer step, over all devices."""

    micro_batch_size: int = 2
    """Rows per forward pass of one device."""

    learning_rate: float | None = None
    """Peak learning rate of AdamW. Default: 1.5e-3 for an adapter, 1e-4 for all weights, less in models that are wider
    than 576: 7e-4 and 5e-5 at 1,536, 3e-4 and 2e-5 at 4,096."""

    warmup_steps: int | None = None
    """Steps of linear warmup. Default: 6 % of all steps."""

    lr_scheduler: Scheduler = "cosine"
    """Decay of the learning rate to 0 after the warmup."""

    weight_decay: float = 0.0
    """Weight decay of AdamW."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    """Size of the adapter, for methods with LoRA."""

    teacher_weight: float = 0.5
    """Loss weight of the teacher's distribution, 0 to 1; the labels have the rest. For distill."""

    temperature: float = 1.0
    """Softmax temperature of teacher and student. For distill."""

    top_k: int = 64
    """Teacher tokens kept per position; all others count as one. For distill."""

    eval_steps: int | None = None
    """Steps between evaluations; each is a checkpoint. Default: a tenth of all steps, or more
    where evaluations would take more than a tenth of the time."""

    eval_tokens: int = 4096
    """Tokens evaluated of each held-out text."""

    patience: int | None = None
    """Early stopping: evaluations without improvement before training ends. Default: it goes on to its last step, since
    the loss falls most when the learning rate does; the best checkpoint is kept in any case."""

    layers_first: bool | None = None
    """Train each layer first, to give what the dense model's gives. Default: yes where a cut model is trained beside
    its dense one, by one process, and for so long that layers take a third of the time at most."""

    gradient_checkpointing: bool = False
    """Gradient checkpointing: less memory, more time."""

    save_adapter: bool = False
    """Also write the LoRA adapter alone, into the folder `adapter` of the output."""

    plot: bool = False
    """Also write the loss curves as a picture."""

    track: Tracker | None = None
    """Experiment tracker to report to."""

    seed: int = 0
    """Seed of the order of rows, the adapter's initial values and dropout."""

    def __post_init__(self) -> None:
        check_choices(self, TrainingError)
        self._check_numbers()
        self._check_budget()

    def _check_budget(self) -> None:
        budgets = [name for name in ("max_steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(budgets) > 1:
            both = " and ".join(f"{name}={getattr(self, name):g}" for name in budgets)
            raise TrainingError(f"{both} both say when to stop. Expected one of them: leave out {budgets[0]}")

    def _check_numbers(self) -> None:
        for name, example in (("epochs", 1), ("minutes", 20), ("learning_rate", 1e-4), ("temperature", 1)):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise TrainingError(
                    f"{name}={value} trains nothing. Expected more than 0, for example {name}={example:g}"
                )
        for name, least in _LEAST.items():
            check_least(TrainingError, name, getattr(self, name), least, least)
        if not 0 <= self.teacher_weight <= 1:
            raise TrainingError(
                f"teacher_weight={self.teacher_weight} is no fraction of the loss. Expected 0 to 1, for example "
                "teacher_weight=1"
            )

    @property
    def has_lora(self) -> bool:
        """Whether an adapter is trained, and not the weights themselves."""
        return self.method == "auto" or "lora" in self.method

    def rate(self, width: int | None = None) -> float:
        """The peak learning rate for a hidden width, or for one that is not known.

        It falls with the width as in "LoRA Without Regret" (Schulman et al., 2025), by the larger power found there.

        >>> RecoverOptions(method="full").rate(), round(RecoverOptions().rate(1536), 5)
        (0.0001, 0.0007)
        """
        usual = 1.5e-3 if self.has_lora else 1e-4
        return self.learning_rate or usual * min(1.0, WIDTH / (width or WIDTH)) ** WIDTH_POWER

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's distribution is learned; not known yet where the method is auto."""
        return "distill" in self.method


_LEAST = {
    "max_steps": 1,
    "tokens": 1,
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "warmup_steps": 0,
    "top_k": 1,
    "eval_steps": 1,
    "eval_tokens": EVAL_WINDOW,
    "patience": 1,
    "seed": 0,
}


# Preset -> the options in which it departs from the defaults. `llm-pruner` is the paper's recovery (arXiv 2305.11627,
# section 4.1, and its scripts).
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "default": {"options": {}, "data": {}},
    "llm-pruner": {
        "options": {
            "method": "lora",
            "epochs": 2.0,
            "global_batch_size": 64,
            "micro_batch_size": 4,
            "learning_rate": 1e-4,
            "warmup_steps": 100,
            "lr_scheduler": "linear",
            "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.05},
        },
        "data": {"template": "alpaca", "loss_on": "answers"},
    },
}


def with_preset(name: str, options: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[RecoverOptions, DataOptions]:
    """The options of a preset, but for those that are given by name; `data` names the `sources`.

    `options["lora"]` gives single fields of `LoraOptions`. Raises `TrainingError` for an unknown preset.

    >>> with_preset("llm-pruner", {"lora": {"rank": 4}}, {"sources": ("alpaca.json",)})[0].lora
    LoraOptions(rank=4, alpha=16.0, dropout=0.05)
    """
    check_known(TrainingError, "preset", name, PRESETS)
    usual = PRESETS[name]
    lora = LoraOptions(**{**usual["options"].get("lora", {}), **options.get("lora", {})})
    return RecoverOptions(**{**usual["options"], **options, "lora": lora}), DataOptions(**{**usual["data"], **data})
