"""How a stage tells how far it is, and how long each stage took.

A stage takes `progress` and calls it; who shows it, as a bar or not at all, decides the caller, by `bars`.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import psutil

Progress = Callable[..., None]  # progress(done, total), or with a note on what was measured: (done, total, note)
ProgressBars = Callable[[str], AbstractContextManager[Progress | None]]  # name of a stage -> its bar, while it is open


class Clock:
    """Seconds by stage, each shown with its own progress bar.

    >>> clock = Clock()
    >>> with clock.stage("score") as progress:
    ...     assert progress is None  # without `bars` nothing is shown
    >>> list(clock.seconds)
    ['score']
    """

    def __init__(self, bars: ProgressBars | None = None) -> None:
        self.bars: ProgressBars = bars or (lambda stage: nullcontext())
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress | None]:
        """Time a stage; gives what it calls to show its progress. A stage that comes again is added up.

        The memory that a stage has freed goes back to the system, for the next may need other sizes.
        """
        start = time.perf_counter()
        with self.bars(name) as progress:
            yield progress
        with suppress(AttributeError, OSError, TypeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_rss() -> int:
    """The most memory this process has held, in bytes.

    >>> peak_rss() > 10_000_000
    True
    """
    try:
        import resource
    except ImportError:  # Windows counts it elsewhere
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if psutil.MACOS else peak * 1024)
