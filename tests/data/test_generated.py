"""A model generates calibration text from its own distribution, and is left as it was."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
)

import secateur.data.generated
from secateur.data.calibration import CalibrationOptions
from secateur.data.generated import generate_windows
from secateur.data.text import read_calibration
from secateur.data.windows import digest
from secateur.errors import DataError
from secateur.scoring.scores import score
from tiny import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


class TestGeneratedWindows:
    OPTIONS = CalibrationOptions("self", samples=3, length=20)

    @settings(max_examples=8)
    @given(st.integers(1, 5), st.integers(2, 12), st.integers(0, 2**31))
    def test_the_shape_is_what_was_asked_and_a_seed_gives_the_same(
        self, model: PreTrainedModel, samples: int, length: int, seed: int
    ) -> None:
        options = CalibrationOptions("self", samples=samples, length=length, seed=seed)
        written = generate_windows(model, options)
        assert (written.shape, written.dtype) == ((samples, length), torch.int64)
        assert 0 <= int(written.min()) <= int(written.max()) < VOCABULARY
        assert torch.equal(written, generate_windows(model, options))

    def test_samples_and_seeds_differ(self, model: PreTrainedModel) -> None:
        written = generate_windows(model, self.OPTIONS)
        assert len({tuple(row) for row in written.tolist()}) == 3
        assert not torch.equal(written, generate_windows(model, replace(self.OPTIONS, seed=1)))

    def test_nothing_else_changes(self, model: PreTrainedModel) -> None:
        theirs = model.generation_config
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        generate_windows(model, self.OPTIONS)
        assert torch.equal(torch.rand(3), expected)
        assert model.generation_config is theirs
        assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())

    def test_tokens_follow_the_models_own_distribution(self) -> None:
        """With settings that would change it, and an end of text that would stop it."""
        model = tiny_model(vocab_size=20)
        weight = model.get_output_embeddings().weight
        with torch.no_grad():
            weight.zero_()
        model.generation_config = GenerationConfig(
            top_k=1, temperature=9.0, repetition_penalty=9.0, eos_token_id=[0, 7], bad_words_ids=[[3]], min_p=0.9
        )
        written = generate_windows(model, CalibrationOptions("self", samples=40, length=20))
        counts = torch.bincount(written.flatten(), minlength=20)  # 40 of each are expected
        assert counts.shape == (20,)
        assert 15 < int(counts.min()) <= int(counts.max()) < 70

    def test_each_token_is_drawn_given_those_before_it(self) -> None:
        """A model that is sure of itself writes what it finds most likely, with a cache and without."""
        model = tiny_model(seed=3, bos_token_id=1)  # token 0 pads: it is embedded as zeros, which say nothing
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1e5)
        written = generate_windows(model, self.OPTIONS)
        read = torch.cat([torch.ones(3, 1, dtype=torch.int64), written], dim=1)
        with torch.no_grad():
            likely = model(input_ids=read).logits.argmax(-1)
        assert torch.equal(written, likely[:, :-1])

    def test_batches(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[int, int]] = []
        row = 2 * model.config.num_hidden_layers * model.config.hidden_size * self.OPTIONS.length * model.dtype.itemsize
        monkeypatch.setattr(secateur.data.generated, "CACHE_BYTES", 2 * row + row // 2)
        written = generate_windows(model, self.OPTIONS, progress=lambda done, total: seen.append((done, total)))
        assert written.shape == (3, 20)
        assert seen == [(2, 3), (3, 3)]

    @pytest.mark.parametrize(
        ("changes", "start"),
        [
            ({"bos_token_id": 5}, 5),
            ({"bos_token_id": None, "eos_token_id": [6, 7]}, 6),
            ({"bos_token_id": VOCABULARY, "eos_token_id": 8}, 8),
            ({"bos_token_id": -1, "eos_token_id": None, "pad_token_id": None}, 0),
        ],
    )
    def test_what_it_starts_after(self, changes: dict[str, Any], start: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(**changes)
        read: list[Tensor] = []
        model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        generate_windows(model, self.OPTIONS)
        assert read[0].tolist() == [[start]] * 3

    def test_a_model_that_cannot(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        silent: Any = SimpleNamespace(config=model.config)
        match = r"text='self': SimpleNamespace writes no text by itself.*CalibrationOptions\('demo'\)"
        with pytest.raises(DataError, match=match):
            generate_windows(silent, self.OPTIONS)

        def fail(**_: object) -> None:
            raise ValueError("no\ncache")

        monkeypatch.setattr(model, "generate", fail)
        with pytest.raises(DataError, match=r"'self': \w+ writes no text \(ValueError: no cache\)\. Give a text"):
            generate_windows(model, self.OPTIONS)

    def test_nan(self) -> None:
        model = tiny_model()
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(float("nan"))
        with pytest.raises(DataError, match=r"the logits of \w+ hold NaN, so it writes no text"):
            generate_windows(model, self.OPTIONS)

    def test_it_is_no_text_to_read(self) -> None:
        with pytest.raises(DataError, match=r"'self' is no text to read: .* generate_windows\(model, options\)"):
            read_calibration("self")


class TestScore:
    def test_generated_windows_are_scored(self) -> None:
        model, options = tiny_model(), CalibrationOptions("self", samples=2, length=10)
        found = score(model, calibration=options)
        assert found.options == options
        assert found.calibration == digest(generate_windows(model, options))

    def test_windows_of_unknown_origin(self) -> None:
        windows, options = torch.ones(2, 10, dtype=torch.int64), CalibrationOptions("x.txt")
        assert score(tiny_model(), windows=windows).options is None
        assert score(tiny_model(), windows=windows, calibration=options).options == options
