"""Texts -> whether one has words in a row in common with another: calibration on what is evaluated flatters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

OVERLAP_WORDS = 13  # in a row, which two texts do not share by chance: GPT-3, arXiv 2005.14165, appendix C


def overlap(windows: Iterable[str], text: str | Iterable[str], *, words: int = OVERLAP_WORDS) -> float:
    """Return the share of the windows that have `words` words in a row in common with the text or texts, 0 to 1.

    Words are runs of letters and digits, in lower case; 13 of them in a row are GPT-3's rule (arXiv 2005.14165,
    appendix C). A window of fewer words is not counted.

    >>> overlap(["and a cat sat on", "and a dog lay on"], "A cat sat, a dog sat.", words=3)
    0.5
    """
    # The runs of a long text would fill gigabytes: only the hashes of those in windows are held.
    windows_of: dict[int, list[int]] = defaultdict(list)
    count = 0
    for window in windows:
        for run in word_runs(window, words):
            windows_of[hash(run)].append(count)
        count += 1
    texts = [text] if isinstance(text, str) else text
    hit = {number for each in texts for run in word_runs(each, words) for number in windows_of.get(hash(run), ())}
    return len(hit) / max(count, 1)


def word_runs(text: str, words: int = OVERLAP_WORDS) -> Iterator[tuple[str, ...]]:
    """Yield every run of so many words.

    >>> list(word_runs("A cat sat.", 2))
    [('a', 'cat'), ('cat', 'sat')]
    """
    in_order = re.findall(r"\w+", text.lower())
    return zip(*(in_order[first:] for first in range(words)), strict=False)
