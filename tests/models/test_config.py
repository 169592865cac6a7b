"""What a config says of its model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from secateur.data.calibration import CalibrationOptions
from secateur.data.generated import generate_windows
from secateur.errors import DataError
from secateur.models.config import check_positions
from secateur.scoring.scores import score
from tiny import tiny_model, tiny_tokenizer


class TestPositions:
    @given(st.integers(1, 40), st.integers(1, 40))
    def test_a_sample_must_fit(self, positions: int, length: int) -> None:
        config = AutoConfig.for_model("opt", max_position_embeddings=positions)
        if length <= positions:
            check_positions(config, length)
            return
        match = rf"^length={length} is longer than the model's {positions} positions.*length={positions} "
        with pytest.raises(DataError, match=match):
            check_positions(config, length)

    def test_names_and_limits_of_families(self) -> None:
        check_positions(AutoConfig.for_model("bloom"), 10**9)  # has no such setting
        check_positions(AutoConfig.for_model("xlnet"), 10**9)  # says -1: no limit
        with pytest.raises(DataError, match="the model's 7 positions"):
            check_positions(AutoConfig.for_model("gpt2", n_positions=7), 8)

    def test_before_any_pass(self) -> None:
        model = tiny_model(max_position_embeddings=16)
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
        options = CalibrationOptions("self", samples=2, length=17)
        for attempt in (
            lambda: generate_windows(model, options),
            lambda: score(model, calibration=options),
            lambda: score(model, windows=torch.zeros(2, 17, dtype=torch.int64)),
            lambda: score(model, tiny_tokenizer(), calibration=replace(options, text="demo")),
        ):
            with pytest.raises(DataError, match="length=17 is longer than the model's 16 positions"):
                attempt()
