"""A process that answers a line of JSON with a line of JSON; libraries may print others between."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from typing import IO, Any

ANSWER = "answer: "  # how the lines begin that are answers


def ask(process: subprocess.Popen[str], order: dict[str, Any], *, log: IO[str]) -> dict[str, Any]:
    """The answer to an order. Raises `AssertionError` with the end of the log where the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # it ended before it read: the log says why
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        if line.startswith(ANSWER):
            answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
            return answer
    log.seek(0)
    raise AssertionError(f"the process ended: {log.read()[-1000:]}")
