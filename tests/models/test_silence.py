"""What packages log while they are imported is left out, and nothing else."""

from __future__ import annotations

import logging

import pytest

from secateur.models.silence import silence_imports


@pytest.mark.parametrize(
    ("name", "message", "heard"),
    [
        ("torchao", "Failed to load /x/_C.so: no such library", False),
        ("torch.utils._pytree", "<enum 'A'> is an Enum subclass", False),
        ("torchao", "A kernel gives wrong numbers", True),
        ("torchao.other", "Failed to load", True),
    ],
)
def test_only_what_is_logged_on_import_is_left_out(
    name: str, message: str, heard: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger(name).addHandler(caplog.handler)
    try:
        with silence_imports():
            logging.getLogger(name).warning(message)
        assert bool(caplog.records) == heard
        caplog.clear()
        logging.getLogger(name).warning(message)
        assert caplog.records
    finally:
        logging.getLogger(name).removeHandler(caplog.handler)
