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
from secateur.data.forms import bare, spaced
from secateur.data.text import demo_texts, read_calibration
from secateur.data.windows import (
    calibration_windows,
    digest,
    held_out_windows,
    scored,
    start_tokens,
)
from secateur.errors import DataError

WORDS = st.text("abcdefghijklmnopqrstuvwxyz", max_size=30)
SENTENCES = Path(__file__).with_name("sentences.txt")


class CharacterIds(dict[str, Any]):
    """A tokenizer of bytes, called with one text or several."""

    @property
    def input_ids(self) -> Any:
        return self["input_ids"]


def character_ids(texts: str | list[str], **_: Any) -> CharacterIds:
    return CharacterIds(input_ids=[*texts.encode()] if isinstance(texts, str) else [[*text.encode()] for text in texts])


def held_out_without_start(tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions) -> torch.Tensor:
    assert start_tokens(tokenizer).numel() == 0
    return held_out_windows(tokenizer, options)


def sample_windows(
    text_or_documents: str | list[str], tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions
) -> torch.Tensor:
    """The windows of documents that are in no file; a text is one."""
    documents = [text_or_documents] if isinstance(text_or_documents, str) else text_or_documents
    return secateur.data.windows._drawn(secateur.data.windows._tokenize(documents, tokenizer), options)


CHARACTERS = cast(PreTrainedTokenizerBase, character_ids)


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
    def test_varied_windows_come_after_those_as_written(
        self, samples: int, length: int, varied: float, seed: int
    ) -> None:
        options = CalibrationOptions(str(SENTENCES), samples=samples, length=length, seed=seed)
        mixing = replace(options, varied=varied)
        plain, mixed = (calibration_windows(CHARACTERS, each) for each in (options, mixing))
        as_written, bare_ones, spaced_ones, shuffled = mixing.counts(samples)
        assert as_written == samples - int(samples * varied) >= 1
        assert max(bare_ones, spaced_ones, shuffled) - min(bare_ones, spaced_ones, shuffled) <= 1
        assert torch.equal(mixed, calibration_windows(CHARACTERS, mixing))
        assert torch.equal(mixed[:as_written], plain[:as_written])
        assert mixing.as_written(mixed).shape == (as_written, length)
        rows, text = [bytes(row).decode() for row in mixed.tolist()], SENTENCES.read_text()
        for form, count in ((str, as_written), (bare, bare_ones), (spaced, spaced_ones)):
            assert all(row in form(text) for row in rows[:count])
            rows = rows[count:]
        drawn = plain[as_written : as_written + shuffled].flatten().sort().values
        assert torch.equal(mixed[samples - shuffled :].flatten().sort().values, drawn)

    def test_tokens_change_places_between_windows_and_scores_see_none_of_it(self, tmp_path: Path) -> None:
        file, text = tmp_path / "text.txt", "abcdefghijklmnopqrstuvwxyz" * 9
        file.write_text(text)
        options = CalibrationOptions(str(file), samples=20, length=20, score_samples=15, varied=0.5)
        plain, mixed = (calibration_windows(LETTERS, each) for each in (replace(options, varied=0.0), options))
        assert options.counts(20) == [10, 4, 3, 3]
        assert not any(spell(row) in text for row in mixed[-3:].tolist())
        assert torch.equal(scored(mixed, options), plain[:10])

    @given(st.integers(1, 40), st.sampled_from([1, 2, 3, 0.5]), st.integers(0, 9))
    def test_sources_take_turns_by_their_weights(
        self, tmp_path_factory: pytest.TempPathFactory, samples: int, weight: float, seed: int
    ) -> None:
        folder = tmp_path_factory.mktemp("texts")
        for name in "abc":
            (folder / f"{name}.txt").write_text(name * 99)
        texts = (f"{folder}/a.txt", f"{folder}/b.txt@{weight}", f"{folder}/c.txt")
        options = CalibrationOptions(texts, samples=samples, length=3, seed=seed)
        drawn = [spell(row)[0] for row in calibration_windows(LETTERS, options).tolist()]
        for name, share in zip("abc", (1, weight, 1), strict=True):
            assert abs(drawn.count(name) - samples * share / (2 + weight)) < 1
        more = calibration_windows(LETTERS, replace(options, samples=samples + 5))
        assert [spell(row)[0] for row in more.tolist()][:samples] == drawn

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
        alphabet = "abcdefghijklmnopqrstuvwxyz"
        text.write_text(alphabet)
        options = CalibrationOptions(str(text), samples=2, length=3, held_out=2)
        rows = [*calibration_windows(LETTERS, options), *held_out_windows(LETTERS, options)]
        spelled = [spell(row.tolist()) for row in rows]
        assert [row.startswith("`") for row in spelled] == [False] * 2 + [True] * 2  # the start token
        assert all(len(row) == 3 and row.removeprefix("`") in alphabet for row in spelled)
        assert not set("".join(spelled[:2])) & set("".join(spelled[2:]))
        with pytest.raises(DataError, match=r"but 27 samples need as many"):
            held_out_windows(LETTERS, replace(options, held_out=25))
        text.write_text("abcdefgh")
        with pytest.raises(DataError, match=r"8 tokens hold 2 windows of 4, and 2 more would hold some of the same"):
            held_out_windows(LETTERS, replace(options, length=4))

    @given(
        st.lists(st.integers(3, 40), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 4), st.integers(0, 9)
    )
    def test_held_out_windows_share_no_token_with_the_others(
        self, tmp_path_factory: pytest.TempPathFactory, sizes: list[int], samples: int, held_out: int, seed: int
    ) -> None:
        file = tmp_path_factory.mktemp("texts") / "rows.jsonl"
        file.write_text("".join(f'{{"text": "{"a" * size}"}}\n' for size in sizes))

        def tokenizer(texts: list[str] | str, **_: Any) -> CharacterIds:  # 100 i + place in document i
            if isinstance(texts, str):
                return CharacterIds(input_ids=[])
            return CharacterIds(input_ids=[[100 * i + j for j in range(len(each))] for i, each in enumerate(texts)])

        reader = cast(PreTrainedTokenizerBase, tokenizer)
        options = CalibrationOptions(str(file), samples=samples, length=3, held_out=held_out, seed=seed)
        try:
            seen, others = calibration_windows(reader, options), held_out_windows(reader, options)
        except DataError:
            return
        assert (len(seen), len(others)) == (samples, held_out)
        assert not set(seen.flatten().tolist()) & set(others.flatten().tolist())
        assert len({tuple(row) for row in others.tolist()}) == held_out

    @pytest.mark.parametrize(
        ("behind", "bos", "expected"), [([7, 8], 8, [7, 8]), ([7, 8], 7, []), ([8], None, []), ([], 8, [])]
    )
    def test_what_stands_behind_a_text_counts_if_it_ends_with_the_begin_token(
        self, behind: list[int], bos: int | None, expected: list[int]
    ) -> None:
        class Behind:
            bos_token_id = bos

            def __call__(self, text: str) -> dict[str, list[int]]:
                return {"input_ids": [*text.encode(), *behind]}

        assert start_tokens(cast(PreTrainedTokenizerBase, Behind())).tolist() == expected

    def test_other_start_tokens_take_the_place_of_the_tokenizers(self, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("abcdefghijklmnopqrstuvwxyz")
        options = CalibrationOptions(str(text), samples=1, length=4, held_out=2)
        own, other = (
            held_out_windows(LETTERS, options),
            held_out_windows(LETTERS, options, start=torch.tensor([90, 91])),
        )
        assert other[:, :2].tolist() == [[90, 91]] * 2
        assert torch.equal(other[:, 2:], own[:, 1:3])

    def test_held_out_windows_are_in_the_same_forms(self) -> None:
        options = CalibrationOptions(str(SENTENCES), samples=8, length=6, held_out=8, varied=0.5)
        seen, held_out = (make(CHARACTERS, options).tolist() for make in (calibration_windows, held_out_without_start))
        assert options.counts(8) == [4, 2, 1, 1]
        for first, last, form in ((0, 4, str), (4, 6, bare), (6, 7, spaced)):
            rows = [bytes(row).decode() for row in (*seen[first:last], *held_out[first:last])]
            assert len(set(rows)) == 2 * (last - first)
            assert all(row in form(SENTENCES.read_text()) for row in rows)

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
