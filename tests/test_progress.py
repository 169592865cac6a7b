"""The clock of stages and the memory of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from secateur.progress import Clock


def test_a_stage_that_fails_has_no_seconds() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="no"), clock.stage("bad"):
        raise ValueError("no")
    with clock.stage("good"):
        pass
    assert list(clock.seconds) == ["good"]


def test_the_peak_of_memory_is_that_of_the_process() -> None:
    program = """
from secateur.progress import peak_rss
before = peak_rss()
block = bytearray(256 * 2**20)
block[:: 2**12] = b"x" * len(block[:: 2**12])
print(peak_rss() - before)
del block
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 200 * 2**20 < int(done.stdout) < 300 * 2**20
