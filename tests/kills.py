"""Real commands, killed with SIGKILL at chosen moments; what they leave is compared with an undisturbed run's."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Moment = Callable[[float], bool]  # seconds since the start -> whether to kill now


@dataclass(frozen=True)
class Command:
    """A command that writes `out`, a file or a folder, and the command that goes on after a kill."""

    arguments: Sequence[str]
    out: Path

    def run(self, *more: str) -> float:
        """Run it to its end; how many seconds it took."""
        start = time.monotonic()
        done = subprocess.run([*self.arguments, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return time.monotonic() - start

    def killed(self, moment: Moment, *more: str) -> bool:
        """Run it until the moment; whether it was still running then."""
        start = time.monotonic()
        process = subprocess.Popen([*self.arguments, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not moment(time.monotonic() - start):
            time.sleep(0.0002)
        process.kill()
        return process.wait() == -signal.SIGKILL


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
