"""The clock of stages and the memory of the process."""

from __future__ import annotations

import pytest

from secateur.progress import Clock, peak_rss


def test_a_stage_that_fails_has_no_seconds() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="no"), clock.stage("bad"):
        raise ValueError("no")
    with clock.stage("good"):
        pass
    assert list(clock.seconds) == ["good"]


def test_the_peak_of_memory_only_grows() -> None:
    before = peak_rss()
    block = bytearray(64 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    assert peak_rss() >= before
