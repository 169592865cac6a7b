"""Words in a row that two texts share are counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from secateur.data.overlap import overlap


class TestOverlap:
    @given(
        st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=4),
        st.lists(st.sampled_from("abc"), max_size=20),
        st.integers(1, 5),
    )
    def test_it_counts_windows_with_a_run_of_the_text(
        self, windows: list[list[str]], text: list[str], words: int
    ) -> None:
        runs = {tuple(text[i : i + words]) for i in range(len(text) - words + 1)}
        hit = [any(tuple(w[i : i + words]) in runs for i in range(len(w) - words + 1)) for w in windows]
        expected = sum(hit) / len(hit) if hit else 0
        assert overlap([" ".join(window) for window in windows], " ".join(text), words=words) == expected

    def test_case_and_punctuation_do_not_count(self) -> None:
        words = [f"word{i}" for i in range(13)]
        assert overlap([" ".join(words)], "Before. " + ", ".join(words).upper()) == 1
        assert overlap([" ".join(words[:12])], " ".join(words)) == 0
