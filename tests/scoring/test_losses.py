"""What models of each class are scored by: their loss and its gradients are what autograd makes of the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from class_models import VOCABULARY, class_model, class_tokenizer
from secateur import CalibrationOptions, discover
from secateur.data.encoder_windows import between_special_tokens, mask_tokens
from secateur.errors import DataError, ScoreError
from secateur.models.inputs import masked_tokens, token_ids
from secateur.scoring.collect_backward import gradient_statistics
from secateur.scoring.passes.loss import loss_of, outputs_of, predictions, summed_loss
from secateur.scoring.scores import score

PLAIN = torch.randint(5, VOCABULARY, (4, 14), generator=torch.Generator().manual_seed(0))
LABELLED = ("BertForMaskedLM", "T5ForConditionalGeneration")
OF_ITSELF = ("BertForSequenceClassification", "BertModel")


def windows_for(architecture: str) -> Tensor:
    return mask_tokens(PLAIN, class_tokenizer()) if architecture == "BertForMaskedLM" else PLAIN


def plain_loss(model: Any, window_1T: Tensor) -> Any:
    """The summed loss of one window, by transformers' own labels where it has such."""
    name = type(model).__name__
    if name == "BertForMaskedLM":
        labels = masked_tokens(window_1T)
        loss = model(input_ids=token_ids(window_1T), labels=labels.masked_fill(labels < 0, -100)).loss
        return loss * int((labels >= 0).sum())
    if name == "T5ForConditionalGeneration":
        return model(input_ids=window_1T[:, :7], labels=window_1T[:, 7:]).loss * 7
    output = model(input_ids=window_1T)
    return loss_of(model, output.logits if hasattr(output, "logits") else output[0], window_1T, 1.0)


@pytest.mark.parametrize("architecture", [*LABELLED, *OF_ITSELF])
def test_gradients_and_their_squares_are_autograds(architecture: str) -> None:
    model, windows = class_model(architecture), windows_for(architecture)
    found = gradient_statistics(
        model,
        windows,
        {"first": lambda evidence: evidence.first.abs(), "squared": lambda evidence: evidence.squared},
        second_order=True,
    )
    count = predictions(model, windows)
    total, squared = 0.0, dict[str, Tensor]()
    used = {name: p for name, p in model.named_parameters() if name in found.sums["squared"]}
    for window_T in windows:
        loss = plain_loss(model, window_T[None]) * len(windows) / count
        total += float(loss.detach()) / len(windows)
        gradients = torch.autograd.grad(loss, [*used.values()])
        for name, gradient in zip(used, gradients, strict=True):
            squared[name] = squared.get(name, 0) + gradient.square() / len(windows)
    assert found.loss == pytest.approx(total, rel=1e-4)
    assert {name for name in used if name.endswith("weight")} >= {n for n in found.sums["first"] if "dense.weight" in n}
    largest = max(float(expected.max()) for expected in squared.values())
    for name, expected in squared.items():
        rows = expected.reshape(len(expected), -1).sum(1)
        assert torch.allclose(found.sums["squared"][name][0], rows, rtol=1e-3, atol=1e-6 * largest), name


def test_drawn_labels_depend_on_the_window_alone() -> None:
    for architecture in OF_ITSELF:
        model = class_model(architecture)
        output = outputs_of(model, PLAIN)
        assert output is not None
        whole = loss_of(model, torch.cat(output), PLAIN, 1.0)
        parts = sum(loss_of(model, each, ids_T[None], 1.0) for each, ids_T in zip(output, PLAIN, strict=True))
        assert float(whole) == pytest.approx(float(parts), rel=1e-5)


def test_squared_gradients_of_drawn_labels_are_the_true_fisher_information() -> None:
    """Of a classifier, the expectation over its own prediction, which for one window can be written out."""
    logits = torch.tensor([[0.5, -1.0, 0.2]])
    model = class_model("BertForSequenceClassification")
    draws = torch.arange(2000)[:, None]
    leaf = logits.repeat(len(draws), 1).requires_grad_(True)
    loss_of(model, leaf, draws, 1.0).backward()
    assert leaf.grad is not None
    p = functional.softmax(logits[0], -1)
    assert torch.allclose(leaf.grad.square().mean(0), p * (1 - p), atol=0.03)


def test_a_model_is_as_far_from_itself_as_nothing() -> None:
    for architecture in OF_ITSELF:
        model, other = class_model(architecture), class_model(architecture, seed=1)
        dense = outputs_of(model, PLAIN)
        assert float(summed_loss(model, PLAIN, dense)) == pytest.approx(0, abs=1e-6)
        assert float(summed_loss(other, PLAIN, dense)) > 0.01
    with pytest.raises(ScoreError, match=r"BertModel: windows have no labels; give outputs_of"):
        summed_loss(model, PLAIN)


def test_a_model_that_predicts_at_random_loses_ln_v() -> None:
    model: Any = class_model("BertForMaskedLM")
    with torch.no_grad():
        model.cls.predictions.decoder.weight.zero_()
        model.cls.predictions.decoder.bias.zero_()
    windows = windows_for("BertForMaskedLM")
    assert float(summed_loss(model, windows)) / predictions(model, windows) == pytest.approx(math.log(VOCABULARY))


def test_windows_without_masks_are_refused() -> None:
    model = class_model("BertForMaskedLM")
    with pytest.raises(ScoreError, match=r"BertForMaskedLM predicts masked tokens, and none of the windows is masked"):
        score(model, name="param_first", windows=PLAIN)
    options = CalibrationOptions(samples=4, length=16)
    scores = score(model, class_tokenizer(), name="fisher", calibration=options)
    assert scores.units["layers.0.mlp"].min() > 0


def test_a_model_that_reads_sound_is_refused_text() -> None:
    model = class_model("WhisperForConditionalGeneration")
    with pytest.raises(
        DataError, match=r"^WhisperForConditionalGeneration reads input_features, and calibration gives"
    ):
        score(model, name="fisher", windows=PLAIN, discovery=discover(model))


def test_masks_and_special_tokens() -> None:
    tokenizer = class_tokenizer()
    framed = between_special_tokens(PLAIN, tokenizer)
    assert framed[:, 0].tolist() == [1] * 4
    assert framed[:, -1].tolist() == [2] * 4
    assert torch.equal(framed[:, 1:-1], PLAIN[:, 1:-1])
    windows = mask_tokens(framed, tokenizer)
    masked = token_ids(windows) == tokenizer.mask_token_id
    assert masked.sum(1).tolist() == [2] * 4
    assert not masked[:, [0, -1]].any()
    assert torch.equal(masked_tokens(windows)[masked], framed[masked])
    assert torch.equal(mask_tokens(framed, tokenizer), windows)
    assert not torch.equal(mask_tokens(framed, tokenizer, seed=1), windows)
    tokenizer.mask_token = None
    with pytest.raises(DataError, match=r"has no mask token"):
        mask_tokens(framed, tokenizer)
