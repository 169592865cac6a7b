"""The name of a perplexity protocol -> the windows in which it reads a text, and the tokens that each window scores.

- `llm-pruner@N` (arXiv 2305.11627, `LLMPruner/evaluator/ppl.py`): windows of N tokens that do not overlap, the tail
  dropped, the first token of a window unscored; exp of the mean over all scored tokens.
- `gptq@N` (arXiv 2210.17323, the function `opt_eval` and its copies in most papers on quantisation and pruning): the
  same windows. It takes the mean over a window's N - 1 scored tokens, multiplies it by N, sums over the windows and
  divides by windows x N. The two N cancel, and as all windows score as many tokens this is the mean over all of them:
  the same number as `llm-pruner@N`.
- `sliding@N/S` (the guide "Perplexity of fixed-length models" of transformers): a window of N tokens starts every S
  tokens, and only tokens that no window before it has read are scored. So every token of the text but the first is
  scored once, with at least N - S tokens before it once N have been read. Nothing is dropped: the last window ends
  with the text and may be shorter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.errors import DataError

LLM_PRUNER = "llm-pruner"
GPTQ = "gptq"
SLIDING = "sliding"
NAMES = (LLM_PRUNER, GPTQ, SLIDING)
EXAMPLES = "llm-pruner@128, gptq@2048 or sliding@1024/512"

_WRITTEN = re.compile(r"(?P<name>[a-z-]+)@(?P<window>\d+)(?:/(?P<stride>\d+))?")


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a text is cut into windows.

    >>> str(Protocol("llm-pruner", 128, 128)), str(Protocol("sliding", 1024, 512))
    ('llm-pruner@128', 'sliding@1024/512')
    """

    name: str  # llm-pruner, gptq or sliding
    window: int  # tokens that are read at once
    stride: int  # tokens from one window's start to the next's

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise DataError(f"protocol={self.name!r} is unknown. Expected {EXAMPLES}: --protocol gptq@2048")
        if self.window < 2:
            raise DataError(
                f"{self}: a window of {self.window} scores nothing, because the first token of a window is unscored; "
                f"expected at least 2. --protocol {self.name}@128{'/64' if self.slides else ''} reads 128 at once."
            )
        if not self.slides and self.stride != self.window:
            raise DataError(
                f"{self.name}@{self.window}/{self.stride}: these windows do not overlap, so they have no stride. "
                f"Expected {self.name}@{self.window}, or --protocol sliding@{self.window}/{self.stride}"
            )
        if not 1 <= self.stride <= self.window:
            raise DataError(
                f"{self}: a stride of {self.stride} does not read every token. Expected 1 to {self.window}: "
                f"--protocol sliding@{self.window}/{self.window // 2}"
            )

    def __str__(self) -> str:
        return f"{self.name}@{self.window}" + (f"/{self.stride}" if self.slides else "")

    @property
    def slides(self) -> bool:
        """Whether windows may overlap, and the tail of a text is read."""
        return self.name == SLIDING


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are read at once, by their places in the text; of these, `scored` to `end` are scored.

    >>> Window(512, 1536, 1024).tokens
    512
    """

    start: int
    end: int  # the first that is not read
    scored: int  # the first that is scored

    @property
    def tokens(self) -> int:
        """How many are scored."""
        return self.end - self.scored


def read_protocol(text: str) -> Protocol:
    """Read a protocol as the command line writes it. Raises `DataError` for anything else.

    >>> read_protocol("sliding@1024/512")
    Protocol(name='sliding', window=1024, stride=512)
    >>> read_protocol("gptq")
    Traceback (most recent call last):
    secateur.errors.DataError: protocol='gptq' is none. Expected a name and the tokens of a window, for example ...
    """
    written = _WRITTEN.fullmatch(text.strip())
    if written is None or (written["name"] == SLIDING and written["stride"] is None):
        raise DataError(
            f"protocol={text!r} is none. Expected a name and the tokens of a window, for example {EXAMPLES}: "
            "--protocol gptq@2048"
        )
    window = int(written["window"])
    return Protocol(written["name"], window, window if written["stride"] is None else int(written["stride"]))


def windows(protocol: Protocol, tokens: int, *, data: str = "text") -> Sequence[Window]:
    """The windows of a text of so many tokens, in order. Raises `DataError` where there is none to score.

    >>> windows(Protocol("llm-pruner", 4, 4), 10)
    [Window(start=0, end=4, scored=1), Window(start=4, end=8, scored=5)]
    >>> windows(Protocol("sliding", 4, 2), 7)
    [Window(start=0, end=4, scored=1), Window(start=2, end=6, scored=4), Window(start=4, end=7, scored=6)]
    """
    least = 2 if protocol.slides else protocol.window
    if tokens < least:
        fits = max(tokens, 2)
        smaller = f"--seq-len {fits}" if protocol.name == LLM_PRUNER else f"--protocol {protocol.name}@{fits}"
        raise DataError(
            f"{data}: {tokens} tokens are fewer than one window of {least}. Give a longer text, or {smaller} or less."
        )
    if not protocol.slides:
        size = protocol.window
        return [Window(start, start + size, start + 1) for start in range(0, tokens - size + 1, size)]
    found = []
    read = 0
    for start in range(0, tokens, protocol.stride):
        end = min(start + protocol.window, tokens)
        # A window has nothing before its first token; it is the first of all, or its stride is the whole window.
        scored = max(read, start + 1)
        if scored < end:
            found.append(Window(start, end, scored))
        read = end
        if end == tokens:
            break
    return found
