"""The name of a perplexity protocol -> the windows in which it reads a text, and the tokens that each window scores.

- `llm-pruner@N` (arXiv 2305.11627, `LLMPruner/evaluator/ppl.py`): windows of N tokens that do not overlap, the tail
  dropped, the first token of a window unscored; exp of the mean over all scored tokens. The loop of GPTQ (arXiv
  2210.17323, the function `opt_eval` and its copies in most papers on quantization and pruning) gives the same number:
  it takes the mean over a window's N - 1 scored tokens, multiplies it by N, sums over the windows and divides by
  windows x N. The two N cancel, and all windows score as many tokens.
- `served@N`: the same windows and the same scored tokens, each window after what the tokenizer puts before a text (BOS)
  as an engine serves the model. Where the tokenizer puts nothing, it is `llm-pruner@N`.
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


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a text is cut into windows. Raises `DataError` for windows that score nothing or leave tokens out.

    >>> str(Protocol(128)), str(Protocol(128, start_tokens=True)), str(Protocol(1024, 512))
    ('llm-pruner@128', 'served@128', 'sliding@1024/512')
    """

    window: int
    """Tokens that are read at once."""

    stride: int | None = None
    """Tokens from one window's start to the next's; None: windows do not overlap, and the tail is dropped."""

    start_tokens: bool = False
    """Read what the tokenizer puts before a text before each window, too; these tokens are not scored."""

    def __post_init__(self) -> None:
        if self.window < 2:
            raise DataError(
                f"{self}: a window of {self.window} scores nothing, because the first token of a window is unscored; "
                "expected at least 2, for example --protocol served@128"
            )
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise DataError(
                f"{self}: a stride of {self.stride} does not read every token. Expected 1 to {self.window}: "
                f"--protocol sliding@{self.window}/{self.window // 2}"
            )

    def __str__(self) -> str:
        if self.stride is not None:
            return f"sliding@{self.window}/{self.stride}"
        return f"{'served' if self.start_tokens else 'llm-pruner'}@{self.window}"


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are read at once, by their positions in the text; of these, `scored` to `end` are scored."""

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
    Protocol(window=1024, stride=512, start_tokens=False)
    """
    match = re.fullmatch(r"(served|llm-pruner)@(\d+)|sliding@(\d+)/(\d+)", text.strip())
    if match is None:
        raise DataError(
            f"protocol={text!r} is unknown. Expected served@N, llm-pruner@N or sliding@N/STRIDE, for example "
            "--protocol served@2048 or --protocol sliding@1024/512"
        )
    if match[1]:
        return Protocol(int(match[2]), start_tokens=match[1] == "served")
    return Protocol(int(match[3]), int(match[4]))


def windows(protocol: Protocol, tokens: int, *, data: str = "text") -> Sequence[Window]:
    """The windows of a text of so many tokens, in order. Raises `DataError` where there is none to score.

    >>> windows(Protocol(4, 2), 7)
    [Window(start=0, end=4, scored=1), Window(start=2, end=6, scored=4), Window(start=4, end=7, scored=6)]
    """
    size, stride = protocol.window, protocol.stride
    least = size if stride is None else 2
    if tokens < least:
        raise DataError(
            f"{data}: {tokens} tokens are fewer than one window of {least}. Give a longer text, or "
            f"--protocol served@{max(tokens, 2)} or less."
        )
    if stride is None:
        return [Window(start, start + size, start + 1) for start in range(0, tokens - size + 1, size)]
    found = []
    read = 0
    for start in range(0, tokens, stride):
        end = min(start + size, tokens)
        # A window has nothing before its first token; it is the first of all, or its stride is the whole window.
        scored = max(read, start + 1)
        if scored < end:
            found.append(Window(start, end, scored))
        read = end
        if end == tokens:
            break
    return found
