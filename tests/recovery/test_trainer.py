"""Training lowers the loss; how a step is computed does not change its weights; it stops where nothing improves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from trainings import distance, place_fixture, train, weights  # noqa: F401 - the fixture `place`
from transformers import LlamaForCausalLM

from secateur.data.rows import Rows
from secateur.errors import TrainingError
from secateur.models.options import LoadOptions
from secateur.recovery import setup, trainer, training
from secateur.recovery.adapter_products import fuse_adapters
from secateur.recovery.distillation import nll_loss
from tiny import names


def test_the_loss_falls_on_the_rows_and_on_others(place: Path) -> None:
    found = train(method="full", max_steps=20, eval_steps=5, learning_rate=2e-2, data={"validation": 0.1})
    values = [entry["validation"] for entry in found.evaluation]
    assert found.loss[-1][1] < 0.7 * found.loss[0][1]
    assert min(values) < 0.75 * values[0]


def test_gpus_that_are_seen_get_no_copies_of_the_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = trainer._training_arguments

    def seeing_two(*given: Any, **others: Any) -> Any:
        arguments = make(*given, **others)
        arguments._n_gpu = 2
        return arguments

    monkeypatch.setattr(trainer, "_training_arguments", seeing_two)
    assert train(method="full", max_steps=1).steps == 1


def test_options_reach_the_optimizer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = trainer._training_arguments, list[Any]()

    def noting(*given: Any, **others: Any) -> Any:
        made.append(make(*given, **others))
        return made[-1]

    monkeypatch.setattr(trainer, "_training_arguments", noting)
    train(method="full", max_steps=4, warmup_steps=1, weight_decay=0.25, lr_scheduler="linear", learning_rate=3e-4)
    (arguments,) = made
    assert (arguments.weight_decay, arguments.warmup_steps, arguments.learning_rate) == (0.25, 1, 3e-4)
    assert arguments.lr_scheduler_type == "linear"


def test_another_gpu_than_the_first_is_refused() -> None:
    setup.check_trains_on(torch.device("cuda"))
    with pytest.raises(TrainingError, match=r"cuda:1: a training runs on the first GPU .* CUDA_VISIBLE_DEVICES=1"):
        setup.check_trains_on(torch.device("cuda:1"))


@pytest.mark.parametrize(
    # An adapter does not reach the output layer, by which alone this teacher is surer.
    ("method", "left"),
    [("distill", 0.5), pytest.param("lora+distill", 0.98, marks=pytest.mark.slow)],
)
def test_a_teacher_is_approached(method: str, left: float, place: Path) -> None:
    shutil.copytree(Path("dense").resolve(), place / "sharp")  # surer than random weights are
    sharp = weights(place / "sharp")
    sharp["lm_head.weight"] *= 8
    save_file(sharp, place / "sharp" / "model.safetensors", {"format": "pt"})
    data = {"validation": 0.1, "loss_on": "all"}
    found = train(method=method, teacher="here/sharp", data=data, max_steps=40, eval_steps=40, teacher_weight=1.0)
    first, last = (found.evaluation[i]["validation"] for i in (0, -1))
    assert first > 0.1
    assert last < left * first


def test_micro_batches_and_gradient_checkpointing_do_not_change_the_weights(place: Path) -> None:
    train(out="here/one", model="hidden", method="distill", micro_batch_size=8)
    parts: dict[str, Any] = {"micro_batch_size": 2, "gradient_checkpointing": True}
    train(out="here/other", model="hidden", method="distill", **parts)
    assert distance("here/one", "here/other") < 2e-5


def test_a_model_without_gradient_checkpointing_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(TrainingError, match=r"LlamaForCausalLM has no gradient .*leave out --gradient-checkpointing"):
        train(gradient_checkpointing=True)
    assert names(place) == []


@pytest.mark.parametrize("by_products", [True, False])
def test_in_bfloat16_the_loss_falls_alike_and_reads_the_logits_as_they_are(
    by_products: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[torch.dtype, bool]] = set()
    fused = functional.scaled_dot_product_attention

    def watched(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        seen.add((logits_BTV.dtype, functional.scaled_dot_product_attention is fused))
        return nll_loss(logits_BTV, labels_BT)

    expected = train(method="full")
    monkeypatch.setattr(trainer, "nll_loss", watched)
    monkeypatch.setattr(setup, "PRODUCTS_LENGTH", 128 if by_products else 127)  # the rows have 128 tokens
    rounded = LoadOptions(dtype="bfloat16", device="cpu")
    found = train(out="here/rounded", loading=rounded, method="full")
    assert seen == {(torch.bfloat16, not by_products)}
    assert [loss for _, loss in found.loss] == pytest.approx([loss for _, loss in expected.loss], rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_trains_alike_in_one_step_of_autograd(
    dtype: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the matrix that it belongs to, as it does without."""
    fused: list[int] = []
    monkeypatch.setattr(training, "fuse_adapters", lambda model, **how: fused.append(fuse_adapters(model, **how)))
    loading = LoadOptions(dtype=dtype, device="cpu")
    found = train(out="here/fused", loading=loading, method="lora")
    assert fused
    assert all(fused)
    monkeypatch.setattr(training, "fuse_adapters", lambda model, **how: 0)
    expected = train(out="here/apart", loading=loading, method="lora")
    assert [loss for _, loss in found.loss] == pytest.approx([loss for _, loss in expected.loss], rel=0.01)
    assert distance("here/fused", "here/apart") < (1e-5 if dtype == "float32" else 0.02)


def test_packed_rows_train(place: Path) -> None:
    rows = [{"text": f"It is {i}, is it not?"} for i in range(60)]
    Path("short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"sources": ("short.jsonl",), "packing": True, "max_length": 100}
    found = train(method="full", data=data, global_batch_size=4)
    assert found.rows < 60 / 3
    assert found.loss[-1][1] < found.loss[0][1]


def test_it_stops_early_and_says_where_nothing_became_better(place: Path) -> None:
    given: dict[str, Any] = {"learning_rate": 1.0, "max_steps": 60, "eval_steps": 1, "patience": 2}
    found = train(method="full", eval_texts=("reference=held.txt",), data={"loss_on": "answers"}, **given)
    assert found.steps < 60
    scores = [entry["score"] for entry in found.evaluation]
    assert found.steps == found.evaluation[-1]["step"]
    assert len(scores) - 1 - scores.index(min(scores)) == 2
    assert any("no checkpoint is better than the pruned model was" in note for note in found.notes)


def test_unless_asked_to_it_goes_on_to_the_last_step(place: Path) -> None:
    given: dict[str, Any] = {"learning_rate": 1.0, "max_steps": 8, "eval_steps": 1}
    found = train(method="full", eval_texts=("reference=held.txt",), data={"loss_on": "answers"}, **given)
    scores = [entry["score"] for entry in found.evaluation]
    assert len(scores) - 1 - scores.index(min(scores)) > 3  # nothing became better for long
    assert found.steps == found.evaluation[-1]["step"] == 8


@pytest.mark.parametrize(("multiple", "width"), [(64, 64), (1, 40)])
def test_batches_may_have_few_widths(multiple: int, width: int) -> None:
    ids_T = torch.zeros(140, dtype=torch.int32)
    rows = Rows(ids_T, ids_T == 0, torch.tensor([0, 40, 140]), ids_T[:2])
    assert trainer._batch(rows, [0], None, pad=0, multiple=multiple)["input_ids"].shape == (1, width)
