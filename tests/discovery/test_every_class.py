"""Types of every auto class keep the contract, but for what is listed in known_class_failures.json.

All of them are held to it by `make classes`; here are some of each class. Sizes of heads are left out: what is found of
them for causal language models holds for the same code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from class_types import NAMES
from contract import check_type, said, subject
from every_type import initial_model, tiny_config
from known import check_reasons, known_failures, verdict
from secateur.discovery.discover import discover_groups
from secateur.discovery.tracing import trace
from secateur.models.silence import quiet

KNOWN = Path(__file__).parents[1] / "known_class_failures.json"  # check -> [{"reason": ..., "types": [...]}]
SKIPPED = ("head_dim",)
EVERY = 40  # of all types, one in so many
SOME = (
    "AutoModelForSeq2SeqLM/t5",
    "AutoModelForSpeechSeq2Seq/whisper",
    "AutoModelForSpeechSeq2Seq/moonshine",
    "AutoModelForImageTextToText/llava",
)
BUILD = "build"


def check(name: str) -> None:
    problems = verdict(check_type(name, skip=SKIPPED), KNOWN)
    assert not problems, "\n".join(problems)


def test_an_encoder_keeps_the_contract() -> None:
    check("AutoModelForMaskedLM/bert")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*SOME, *NAMES[::EVERY]}))
def test_some_types_of_every_class_keep_the_contract(name: str) -> None:
    if BUILD in known_failures(name, KNOWN):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - no tiny model: each type fails in its own way
            subject(name)
        assert said(caught.value) == known_failures(name, KNOWN)[BUILD]
        return
    check(name)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("AutoModelForSeq2SeqLM/t5", {"input_ids", "decoder_input_ids"}),
        pytest.param("AutoModelForSequenceClassification/bart", {"input_ids"}, marks=pytest.mark.slow),
        ("AutoModelForSpeechSeq2Seq/whisper", {"input_features", "decoder_input_ids"}),
        ("AutoModelForImageTextToText/llava", {"input_ids"}),
        ("AutoModel/clip", {"input_ids", "pixel_values"}),
        ("AutoModel/vit", {"pixel_values"}),
    ],
)
def test_what_a_model_takes_is_found(name: str, inputs: set[str]) -> None:
    with quiet(), torch.device("meta"):
        model = initial_model(name, tiny_config(name)).eval()
    assert trace(model).inputs.keys() == inputs
    assert {"attention", "mlp"} <= {group.kind for group in discover_groups(model).groups}


def test_every_known_failure_names_types_and_a_reason() -> None:
    check_reasons(KNOWN, built=NAMES)
