"""A text -> the same text in other forms, which models meet in use and which excite other units."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_CLITICS = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))\b", re.IGNORECASE)
_NUMBERS = re.compile(r"\d[\d.,]*")
_PUNCTUATION = re.compile(r"([^\w\s'\u2019])")
_SENTENCES = re.compile(r"[.!?]\s+")
_BLANKS = re.compile(r"[ \t]+")


def bare(text: str) -> str:
    r"""In lower case, without punctuation, every number an N, every sentence a paragraph: transcripts, old corpora.

    >>> bare("It's 9,000 km away. Isn't it?")
    "it 's N km away\n\nis n't it "
    """
    lines = _SENTENCES.sub("\n\n", _CLITICS.sub(r" \1", text.lower()))
    return _BLANKS.sub(" ", _PUNCTUATION.sub(" ", _NUMBERS.sub("N", lines)))


def spaced(text: str) -> str:
    """With a space around every punctuation mark, as tokenised corpora have it.

    >>> spaced("It's 9,000 km away, isn't it?")
    "It 's 9 , 000 km away , is n't it ? "
    """
    return _BLANKS.sub(" ", _PUNCTUATION.sub(r" \1 ", _CLITICS.sub(r" \1", text)))


FORMS: Mapping[str, Callable[[str], str]] = {"bare": bare, "spaced": spaced}
