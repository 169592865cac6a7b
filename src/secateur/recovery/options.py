"""How to train a pruned model: the options, and the presets that stand for some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.data.options import DataOptions
from secateur.errors import TrainingError
from secateur.recovery.lora import AdapterOptions

METHODS = {  # name -> whether an adapter is trained (else all weights), and whether from a teacher
    "lora": (True, False),
    "full": (False, False),
    "distill": (False, True),
    "lora+distill": (True, True),
}
DECAYS = ("cosine", "linear")
WINDOW = 128  # tokens, of held-out text


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
    batch: int = 8  # rows of a step
    micro_batch: int = 4  # rows that are computed at once
    rate: float = 5e-4  # of learning, the highest
    warmup: int | None = None  # steps; None: 6 % of them
    decay: str = "cosine"
    weight_decay: float = 0.0
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    share: float = 1.0  # of the teacher in the loss; the rest is that of the labels
    temperature: float = 1.0
    top_k: int = 64  # tokens of the teacher's distribution that are kept
    hidden_states: float = 0.0  # the weight in the loss of the teacher's hidden states at layers that are left
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
        if not 0 <= self.hidden_states < float("inf"):
            raise TrainingError(
                f"hidden_states={self.hidden_states} is no weight in the loss. Expected 0 (none) or more: "
                "--hidden-states 1"
            )
        if self.hidden_states and not self.taught:
            raise TrainingError(
                f"method={self.method!r} has no teacher whose hidden states could be learned. Expected distill or "
                "lora+distill with --hidden-states: --method lora+distill"
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
