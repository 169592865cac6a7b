"""Commands that are killed with SIGKILL at chosen moments, to compare what they leave with an undisturbed run's.

Each command is a process of its own. It is forked from one that has imported everything, so that moments fall into its
work and not into imports.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Moment = Callable[[float], bool]  # seconds since the start -> whether to kill now

# Reads a folder and the arguments of a command from each line, and tells the number of its process and, at its end, its
# status.
SERVER = """
import json, os, sys, traceback
import secateur.checkpoint.save
import secateur.cli.main
import secateur.pipeline.pipeline
from secateur import *  # all that commands import
import transformers.models.llama.modeling_llama
for line in sys.stdin:
    folder, arguments = json.loads(line)
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 70
        try:
            secateur.checkpoint.save.SHARD = "20KB"  # many files, and time between the first and the last
            secateur.pipeline.pipeline.CACHE_LAYERS_FROM = 0  # as for large models, each layer is kept
            status = secateur.cli.main.run(arguments)
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
"""


@dataclass(frozen=True)
class Commands:
    """A process that starts commands."""

    server: subprocess.Popen[str]

    def run(self, arguments: Sequence[str]) -> float:
        """Run a command to its end, which must be a good one; how many seconds it took."""
        start = time.monotonic()
        self._start(arguments)
        assert self._read() == 0, arguments
        return time.monotonic() - start

    def kill(self, arguments: Sequence[str], moment: Moment) -> bool:
        """Run a command until the moment, and kill it; whether it was still running then."""
        process = self._start(arguments)
        start = time.monotonic()
        assert self.server.stdout is not None
        while not moment(time.monotonic() - start):
            if select.select([self.server.stdout], [], [], 0.0002)[0]:
                break  # it has come to its end
        else:
            os.kill(process, signal.SIGKILL)
        status = self._read()
        assert status in (0, signal.SIGKILL), arguments
        return status == signal.SIGKILL

    def _start(self, arguments: Sequence[str]) -> int:
        assert self.server.stdin is not None
        print(json.dumps([str(Path.cwd()), arguments]), file=self.server.stdin, flush=True)
        return self._read()

    def _read(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


@functools.cache
def commands() -> Commands:
    """Such a process, for all tests; a command runs in the folder that is the current one when it starts."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    atexit.register(server.kill)
    return Commands(server)


def contents(path: Path) -> dict[str, bytes] | None:
    """The bytes of every file of a folder, or of a file; None where there is none."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return {"": path.read_bytes()} if path.exists() else None


def partial(out: Path) -> list[Path]:
    """What is being written beside `out`, and has no name yet."""
    return [
        Path(entry.path)
        for entry in os.scandir(out.parent)
        if entry.name.startswith(f".{out.name}.") and entry.name.endswith(".partial")
    ]


def after(seconds: float) -> Moment:
    """So long after the start."""
    return lambda passed: passed >= seconds


def while_writing(out: Path, files: int) -> Moment:
    """As soon as so many files of `out` are there under its temporary name; for a file, 0."""

    def moment(_: float) -> bool:
        for path in partial(out):
            try:
                if not path.is_dir() or len(os.listdir(path)) >= files:  # noqa: PTH208 - the fastest there is
                    return True
            except OSError:
                continue  # it has got its name since
        return False

    return moment
