"""A weight that is not finite is named."""

from __future__ import annotations

import copy

import pytest
from transformers import (
    PreTrainedModel,
)

from model_folders import DOWN, fails
from secateur.models.tensors import check_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found(value: float, plain_model: PreTrainedModel) -> None:
    check_finite(plain_model)
    model = copy.deepcopy(plain_model)
    model.get_parameter(DOWN).data[3, :5] = value
    with fails(f"{DOWN}: 5 of 384 values are NaN or Inf. Expected finite weights"):
        check_finite(model)
