"""Calibration windows are random places of a text, each drawn once."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    PreTrainedTokenizerBase,
)

import secateur.data.windows
from letters import LETTERS, letter_tokenizer, spell
from secateur.data.calibration import CalibrationOptions
from secateur.data.text import demo_texts, read_calibration
from secateur.data.windows import calibration_windows, digest, held_out_windows, sample_windows
from secateur.errors import DataError

WORDS = st.text("abcdefghijklmnopqrstuvwxyz", max_size=30)


class TestWindows:
    @given(st.one_of(WORDS, st.lists(WORDS, max_size=5)), st.integers(1, 12), st.integers(2, 9), st.integers(0, 99))
    def test_windows_are_different_places_of_the_text_or_an_error_says_why_not(
        self, text: str | list[str], samples: int, length: int, seed: int
    ) -> None:
        documents = [text] if isinstance(text, str) else text
        options = CalibrationOptions(samples=samples, length=length, seed=seed)
        places = sum(max(len(document) - length + 1, 0) for document in documents)
        if places < samples:
            with pytest.raises(DataError, match=r"tokens, but one window needs|tiny calibration text"):
                sample_windows(text, LETTERS, options)
            return
        windows = sample_windows(text, LETTERS, options)
        assert windows.dtype == torch.int64
        assert windows.shape == (samples, length)
        assert torch.equal(windows, sample_windows(text, LETTERS, options))
        assert all(any(spell(row) in document for document in documents) for row in windows.tolist())

    @given(st.integers(1, 9), st.integers(2, 6), st.floats(0, 1, exclude_max=True), st.integers(0, 99))
    def test_the_last_windows_have_the_same_tokens_in_another_order(
        self, samples: int, length: int, shuffled: float, seed: int
    ) -> None:
        text = "the quick brown fox jumps over the lazy dog".replace(" ", "")
        options = CalibrationOptions(samples=samples, length=length, seed=seed)
        mixing = replace(options, shuffled=shuffled)
        plain, mixed = (sample_windows(text, LETTERS, each) for each in (options, mixing))
        kept = len(mixing.in_order(plain))
        assert kept == samples - int(samples * shuffled) >= 1
        assert torch.equal(mixed[:kept], plain[:kept])
        assert mixed.shape == plain.shape
        assert torch.equal(mixed[kept:].flatten().sort().values, plain[kept:].flatten().sort().values)
        assert torch.equal(mixed, sample_windows(text, LETTERS, mixing))

    def test_tokens_change_places_between_windows_and_scores_see_none_of_it(self) -> None:
        options = CalibrationOptions(samples=20, length=20, score_samples=15, shuffled=0.5)
        text = "abcdefghijklmnopqrstuvwxyz" * 9
        plain, mixed = (sample_windows(text, LETTERS, each) for each in (replace(options, shuffled=0.0), options))
        assert not any(spell(row) in text for row in mixed[10:].tolist())
        assert torch.equal(options.scored(mixed), plain[:10])

    def test_all_places_are_drawn_before_one_is_drawn_twice(self) -> None:
        windows = sample_windows("abcdefgh", LETTERS, CalibrationOptions(samples=6, length=3))
        assert sorted(map(spell, windows.tolist())) == ["abc", "bcd", "cde", "def", "efg", "fgh"]

    @given(st.lists(WORDS, min_size=1, max_size=6), st.integers(2, 5), st.integers(0, 99))
    def test_no_document_is_drawn_again_before_all_were(self, documents: list[str], length: int, seed: int) -> None:
        capitals = [f"{chr(65 + i)}{document}" for i, document in enumerate(documents)]
        places = [max(len(document) - length + 1, 0) for document in capitals]
        if not sum(places):
            return

        def tokenizer(texts: list[str], **_: Any) -> SimpleNamespace:  # 100 i + place in document i
            return SimpleNamespace(input_ids=[[100 * i + j for j in range(len(t))] for i, t in enumerate(texts)])

        options = CalibrationOptions(samples=sum(places), length=length, seed=seed)
        windows = sample_windows(capitals, cast(PreTrainedTokenizerBase, tokenizer), options)
        drawn = [int(token) // 100 for token in windows[:, 0]]
        assert sorted(windows[:, 0].tolist()) == [100 * i + j for i, n in enumerate(places) for j in range(n)]
        for count in range(len(drawn)):
            before = Counter(drawn[:count])
            assert all(before[drawn[count]] <= before[i] for i, n in enumerate(places) if before[i] < n)

    def test_another_seed_gives_other_windows(self) -> None:
        text = "abcdefghijklmnopqrstuvwxyz" * 20
        first, second = (sample_windows(text, LETTERS, CalibrationOptions(seed=seed, length=8)) for seed in (0, 1))
        assert not torch.equal(first, second)

    def test_short_documents_are_passed_over_and_the_others_drawn_evenly(self) -> None:
        documents = ["ab", "c" + "d" * 99, "e" * 400]
        # Windows at different places have the same letters here; what counts is the document.
        windows = sample_windows(documents, LETTERS, CalibrationOptions(samples=90, length=3))
        letters = [spell(row)[-1] for row in windows.tolist()]
        assert set(letters) == {"d", "e"}
        assert 30 <= letters.count("d") <= 60

    def test_only_the_first_characters_are_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(secateur.data.windows, "MAX_CHARACTERS", 7)
        options = CalibrationOptions(samples=2, length=4)
        for text in ("aaaaabbzzzz", ["aaaaa", "bbzzzz", "zzzzzz"]):
            assert "z" not in "".join(map(spell, sample_windows(text, LETTERS, options).tolist()))

    def test_a_text_longer_than_the_context_is_no_reason_to_warn(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        tokenizer = letter_tokenizer()
        sample_windows("abc" * 50, tokenizer, CalibrationOptions(samples=2, length=20))
        assert caplog.text == ""
        tokenizer("abc" * 50)
        assert "longer than the specified maximum" in caplog.text

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (
                "",
                r"the calibration text has 0 tokens, but one window needs 4.*CalibrationOptions\(length=2, samples=1\)",
            ),
            ("abc", r"the calibration text has 3 tokens, .* shorter window: CalibrationOptions\(length=3, samples=1\)"),
            ([], r"the longest calibration document has 0 tokens, but one window needs 4"),
            (["ab", "abc"], r"the longest calibration document has 3 tokens, but one window needs 4"),
            ("abcde", r"tiny calibration text: 5 tokens hold 2 different windows of 4, but 3 samples.*\(samples=2\)"),
            (["abcd", "abc", "abcd"], r"tiny calibration text: 8 tokens hold 2 different windows of 4, but 3 samples"),
        ],
    )
    def test_too_little_text(self, text: str | list[str], match: str) -> None:
        with pytest.raises(DataError, match=match):
            sample_windows(text, LETTERS, CalibrationOptions(samples=3, length=4))

    def test_the_tokenizer_is_asked_for_no_special_tokens(self) -> None:
        asked: dict[str, Any] = {}

        def tokenizer(texts: list[str], **options: Any) -> SimpleNamespace:
            asked.update(options)
            return SimpleNamespace(input_ids=[[1, 2, 3] for _ in texts])

        sample_windows("abc", cast(PreTrainedTokenizerBase, tokenizer), CalibrationOptions(samples=1, length=3))
        assert asked["add_special_tokens"] is False
        assert LETTERS("a").input_ids == [0, 1]  # where the property test above would see them

    def test_held_out_windows_are_at_other_places(self, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("abcdefgh")
        options = CalibrationOptions(str(text), samples=4, length=3, held_out=2, shuffled=0.5)
        rows = [*options.in_order(calibration_windows(LETTERS, options)), *held_out_windows(LETTERS, options)]
        spelled = [spell(row.tolist()).removeprefix("`") for row in rows]  # of a held-out one, behind the start token
        assert [len(row) for row in rows] == [3, 3, 4, 4]
        assert len(set(spelled)) == 4
        assert all(window in "abcdefgh" for window in spelled)
        with pytest.raises(DataError, match=r"but 7 samples need as many"):
            held_out_windows(LETTERS, replace(options, held_out=3))

    @pytest.mark.demo_model
    def test_the_demo_calibration(self, demo_tokenizer: PreTrainedTokenizerBase) -> None:
        windows = sample_windows(read_calibration("demo"), demo_tokenizer, CalibrationOptions(samples=4, length=128))
        assert windows.shape == (4, 128)
        decoded = cast(str, demo_tokenizer.decode(windows[0, 1:-1]))
        assert decoded.strip("\ufffd") in demo_texts()[0]


class TestDigest:
    @given(st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=8))
    def test_it_depends_on_values_and_shape_alone(self, values: list[int]) -> None:
        tokens = torch.tensor([values, values])
        assert digest(tokens) == digest(tokens.T.contiguous().T)
        assert digest(tokens) != digest(tokens.flatten())
        changed = tokens.clone()
        changed[0, 0] += 1
        assert digest(tokens) != digest(changed)

    def test_it_never_changes(self) -> None:
        expected = "1ae380e7c104b3c4"
        assert digest(torch.tensor([[1, 2], [3, 4]]))[:16] == expected
        assert len(digest(torch.zeros(0, 4, dtype=torch.int64))) == 64
