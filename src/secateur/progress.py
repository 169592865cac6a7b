"""How a stage tells how far it is, how long each stage took, and what memory the process holds.

A stage takes `progress` and calls it; who shows it, as a bar or not at all, decides the caller, by `bars`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

Progress = Callable[..., None]  # progress(done, total), or with a note on what was measured: (done, total, note)
ProgressBars = Callable[[str], AbstractContextManager[Progress | None]]  # name of a stage -> its bar, while it is open
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # which PyTorch reads when it makes its first tensor
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


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
        return_freed_memory()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_rss() -> int:
    """The most memory this process has held, in bytes.

    On Linux it is the kernel's count for the program that runs: getrusage's begins with what the process that started
    it held at that time.

    >>> peak_rss() > 10_000_000
    True
    """
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows counts it elsewhere
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if psutil.MACOS else peak * 1024)


def keep_freed_memory() -> None:
    """Have the C library keep what a tensor frees for the next one, and PyTorch lay large tensors on large pages.

    Pages fresh from the system cost more than most operators that write to them: a cast of logits takes a twentieth of
    the time in memory that was used before, and a tensor of 320 MB is filled in half the time on pages of 2 MB. Nothing
    where the system has no such setting, or PyTorch has made a tensor before.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
    _mallopt(M_MMAP_THRESHOLD, 2**27)
    _mallopt(M_TRIM_THRESHOLD, 2**28)


def free_at_once(size: int) -> None:
    """Have tensors of so many bytes and more go back to the system when they are freed; the heap keeps no holes then.

    Nothing where the C library is not glibc.
    """
    _mallopt(M_MMAP_THRESHOLD, size)


def _mallopt(parameter: int, value: int) -> None:
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(parameter, value)


def return_freed_memory() -> None:
    """Have the C library give back to the system what it keeps. Nothing where it is not glibc."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def without_collection() -> Iterator[None]:
    """While open, Python looks for no garbage: where much is made that stays, the search takes a third of the time.

    >>> with without_collection():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
