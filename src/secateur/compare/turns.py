"""Who may compute: one at a time, in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any


class Turns:
    """A lock that is given in the order in which it was asked for. Final.

    A plain lock goes to whoever is awake, so one that is let go and taken again at once stays with its holder; here it
    passes through the hands of all who wait.

    >>> turns = Turns()
    >>> with turns:
    ...     turns.pass_on()  # nobody waits
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> Turns:
        with self._guard:
            if not self._held:
                self._held = True
                return self
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()  # to the next, so it stays held
            else:
                self._held = False

    def pass_on(self) -> None:
        """Let all who wait by now have a turn; the caller holds it before and after."""
        self.__exit__()
        self.__enter__()


TURNS = Turns()  # of this process: a token of an answer, a stretch of scoring
