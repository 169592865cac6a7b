"""Options of a training are checked when they are made; presets give all of them."""

from __future__ import annotations

from typing import Any

import pytest

from secateur import RecoverOptions
from secateur.errors import TrainingError
from secateur.recovery.options import PRESETS, LoraOptions, with_preset


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "magic"}, "method='magic' is unknown. Expected auto, lora, full, distill or lora"),
        ({"lr_scheduler": "step"}, "lr_scheduler='step' is unknown. Expected cosine or linear"),
        ({"track": "paper"}, "track='paper' is unknown. Expected tensorboard"),
        ({"epochs": 0}, "epochs=0 trains nothing"),
        ({"learning_rate": float("inf")}, "learning_rate=inf trains nothing"),
        ({"temperature": 0}, "temperature=0 trains nothing"),
        ({"max_steps": 0}, "max_steps=0 is too small. Expected at least 1, for example max_steps=1"),
        ({"global_batch_size": 0}, "global_batch_size=0 is too small"),
        ({"top_k": 0}, "top_k=0 is too small"),
        ({"eval_tokens": 64}, "eval_tokens=64 is too small. Expected at least 128"),
        ({"patience": 0}, "patience=0 is too small"),
        ({"teacher_weight": 1.5}, "teacher_weight=1.5 is no fraction of the loss"),
    ],
)
def test_a_value_that_cannot_be_trained_with(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TrainingError, match=match):
        RecoverOptions(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank=0 is too small"),
        ({"alpha": 0}, "alpha=0 gives the adapter no weight"),
        ({"dropout": 1.0}, "dropout=1.0 is no fraction"),
    ],
)
def test_an_adapter_of_no_size(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TrainingError, match=match):
        LoraOptions(**options)


def test_the_preset_of_llm_pruner_is_the_paper_s() -> None:
    options, data = with_preset("llm-pruner", {}, {"sources": ("alpaca.json",)})
    assert options == RecoverOptions(
        method="lora",
        epochs=2.0,
        global_batch_size=64,
        micro_batch_size=4,
        learning_rate=1e-4,
        warmup_steps=100,
        lr_scheduler="linear",
        lora=LoraOptions(rank=8, alpha=16.0, dropout=0.05),
    )
    assert (data.max_length, data.template, data.loss_on) == (256, "alpaca", "answers")
    assert sorted(PRESETS) == ["default", "llm-pruner"]


def test_changes_to_a_preset_leave_the_rest() -> None:
    options, _ = with_preset("llm-pruner", {"epochs": 1, "lora": {"rank": 4}}, {"sources": ("a.json",)})
    assert (options.epochs, options.learning_rate, options.lora) == (1, 1e-4, LoraOptions(4, 16.0, 0.05))


def test_an_unknown_preset() -> None:
    with pytest.raises(TrainingError, match=r"preset='best' is unknown. Expected default or llm-pruner"):
        with_preset("best", {}, {"sources": ("a.json",)})
