"""Windows of every protocol equal what is counted token by token, and every protocol that cannot be is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import DataError
from secateur.evaluation.protocols import Protocol, Window, read_protocol, windows

SIZES = st.tuples(st.integers(2, 12), st.integers(1, 12)).filter(lambda sizes: sizes[1] <= sizes[0])


def guide(tokens: int, window: int, stride: int) -> list[Window]:
    """The loop of transformers' guide to perplexity, with the tokens whose label is not masked and not shifted away."""
    found = []
    before = 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        target = end - before
        scored = [place for place in range(begin, end) if place >= end - target and place > begin]
        if scored:
            found.append(Window(begin, end, scored[0]))
        before = end
        if end == tokens:
            break
    return found


@given(st.integers(2, 60), SIZES)
def test_sliding_windows_are_the_guides(tokens: int, sizes: tuple[int, int]) -> None:
    assert list(windows(Protocol(*sizes), tokens)) == guide(tokens, *sizes)


@given(st.integers(2, 60), SIZES)
def test_a_sliding_window_scores_every_token_once_with_enough_before_it(tokens: int, sizes: tuple[int, int]) -> None:
    window, stride = sizes
    cut = windows(Protocol(window, stride), tokens)
    scored = [place for each in cut for place in range(each.scored, each.end)]
    if stride < window:
        assert scored == list(range(1, tokens))
    else:  # nothing is before the first token of a window
        assert scored == [place for place in range(tokens) if place % window]
    for each in cut:
        assert each.end - each.start <= window
        assert each.scored - each.start >= min(max(window - stride, 1), each.scored)


@given(st.integers(2, 60), st.integers(2, 12))
def test_windows_that_do_not_overlap_are_a_sliding_window_of_their_own_stride(tokens: int, window: int) -> None:
    whole = tokens // window * window
    if whole == 0:
        return
    assert list(windows(Protocol(window), tokens)) == windows(Protocol(window, window), whole)


@pytest.mark.parametrize("text", ["served@128", "llm-pruner@128", "sliding@1024/512", "sliding@8/8"])
def test_a_protocol_is_written_as_it_is_read(text: str) -> None:
    assert str(read_protocol(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"protocol='' is unknown\. Expected served@N, llm-pruner@N or sliding@N/STRIDE, for example",
        ),
        ("llm-pruner", r"protocol='llm-pruner' is unknown"),
        ("sliding@1024", r"protocol='sliding@1024' is unknown"),
        ("llm-pruner@128/64", r"protocol='llm-pruner@128/64' is unknown"),
        ("llm-pruner@-3", r"protocol='llm-pruner@-3' is unknown"),
        ("gptq@128", r"protocol='gptq@128' is unknown"),
        ("llm-pruner@1", r"llm-pruner@1: a window of 1 scores nothing, .*example --protocol served@128"),
        ("sliding@1/1", r"sliding@1/1: a window of 1 scores nothing"),
        ("sliding@8/9", r"sliding@8/9: a stride of 9 does not read every token\. Expected 1 to 8: .*sliding@8/4"),
        ("sliding@8/0", r"sliding@8/0: a stride of 0 does not read every token"),
    ],
)
def test_what_is_no_protocol(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_protocol(text)


@pytest.mark.parametrize(
    ("protocol", "tokens", "message"),
    [
        ("llm-pruner@9", 8, r"wiki: 8 tokens are fewer than one window of 9\. .*--protocol served@8 or less"),
        ("sliding@9/3", 1, r"wiki: 1 tokens are fewer than one window of 2\. .*served@2 or less"),
    ],
)
def test_texts_that_are_too_short(protocol: str, tokens: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        windows(read_protocol(protocol), tokens, data="wiki")
