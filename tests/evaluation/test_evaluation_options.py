"""Options that measure nothing are refused when they are made."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.evaluation.evaluate import load_inputs
from secateur.evaluation.options import EvaluationOptions, ProfileOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ("gtpq@9",)}, r"protocol='gtpq@9' is unknown"),
        ({"max_tokens": 0}, r"max_tokens=0 is too small. Expected at least 1, for example max_tokens=40000"),
        ({"tasks": ("boolq",), "limit": 0}, r"limit=0 is too small. Expected at least 1, for example limit=200"),
        ({"batch_size": 0}, r"batch_size=0 is too small. Expected at least 1"),
        ({"new_tokens": 0}, r"new_tokens=0 is too small. Expected at least 1"),
        ({"tasks_data": "questions"}, r"tasks_data=questions is about tasks, and none is named"),
        ({"limit": 8}, r"limit=8 is about tasks"),
    ],
    ids=str,
)
def test_an_evaluation_of_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        EvaluationOptions(**options)


@pytest.mark.parametrize("name", ["seq_lens", "batch_sizes", "new_tokens", "repeats"])
def test_a_profile_of_nothing(name: str) -> None:
    nothing: Any = (4, 0) if name in ("seq_lens", "batch_sizes") else 0
    with pytest.raises(SecateurError, match=f"{name}=0 is too small. Expected at least 1"):
        ProfileOptions(**{name: nothing})


def test_texts_are_read_unless_only_prompts_or_tasks_are_asked_for() -> None:
    assert list(load_inputs(EvaluationOptions()).texts) == ["python reference"]
    assert load_inputs(EvaluationOptions(prompts=("Once",))).texts == {}
    assert list(load_inputs(EvaluationOptions(prompts=("Once",), max_tokens=100)).texts) == ["python reference"]
