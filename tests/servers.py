"""A program that answers HTTP as OpenAI does, started for a test and ended after it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def serving(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """Run the command with `--port` and a free one, and give that once the server answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    whole = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as writing:
        server = subprocess.Popen(
            whole, stdout=writing, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait(port, server, log)
            yield port
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:  # one that is still starting may not hear of it
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)


def ask(port: int, path: str, **body: object) -> dict[str, Any]:
    """Post JSON to the server."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        data: dict[str, Any] = json.load(answer)
    return data
