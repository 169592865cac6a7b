"""Tokens before and after -> the scripts of which most tokens go, to be told before it happens."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

EXAMPLES = 5
LEAST_TOKENS = 16  # of a script that the tokenizer has tokens for, rather than stray characters
SHRINKS = 0.5


@dataclass(frozen=True, slots=True)
class LostScript:
    """A script of Unicode of which more than half of the tokens go: its texts grow longer, and cost more."""

    script: str
    before: int
    after: int
    examples: tuple[str, ...]
    """Tokens that go, the tokenizer's most frequent first."""


def lost_scripts(tokenizer: PreTrainedTokenizerBase, keep: Iterable[int]) -> list[LostScript]:
    """The scripts that lose more than half of their tokens, those with the most tokens first."""
    kept, backend = {*keep}, tokenizer.backend_tokenizer
    texts = backend.decode_batch([[number] for number in range(len(tokenizer))], skip_special_tokens=False)
    return lost_of(texts, kept)


def lost_of(texts: Sequence[str], kept: set[int]) -> list[LostScript]:
    """The same of the text of every token.

    >>> texts = [*(f"{letter}x" for letter in "abcdefghijklmnopq"), *(chr(0x430 + number) for number in range(20))]
    >>> [(lost.script, lost.before, lost.after, len(lost.examples)) for lost in lost_of(texts, {*range(17)})]
    [('CYRILLIC', 20, 0, 5)]
    """
    before, after = Counter[str](), Counter[str]()
    examples = defaultdict[str, list[str]](list)
    for number, text in enumerate(texts):
        script = script_of(text)
        if script is None:
            continue
        before[script] += 1
        if number in kept:
            after[script] += 1
        elif len(examples[script]) < EXAMPLES:
            examples[script].append(text.strip())
    return [
        LostScript(script, count, after[script], tuple(examples[script]))
        for script, count in before.most_common()
        if count >= LEAST_TOKENS and after[script] < SHRINKS * count
    ]


def script_of(text: str) -> str | None:
    """The script of the first letter, as the first word of its name in Unicode; None without a letter.

    >>> script_of(" été"), script_of("\u0436"), script_of("123")
    ('LATIN', 'CYRILLIC', None)
    """
    letter = next((character for character in text if character.isalpha()), None)
    return None if letter is None else unicodedata.name(letter, "UNNAMED").split()[0]
