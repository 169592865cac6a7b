"""Other libraries are silenced for a while, and left as they were."""

from __future__ import annotations

import logging
from contextlib import suppress

import pytest
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from secateur.models.silence import quiet, silence_imports


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("hub_bars", [True, False])
def test_quiet_restores_what_it_found(*, bars: bool, hub_bars: bool) -> None:
    def switch(*, own: bool, hub: bool) -> None:
        if own:
            transformers_logging.enable_progress_bar()
        else:
            transformers_logging.disable_progress_bar()
        if hub:
            enable_progress_bars()
        else:
            disable_progress_bars()

    def state() -> tuple[int, int, bool, bool]:
        return (
            transformers_logging.get_verbosity(),
            hub_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
            not are_progress_bars_disabled(),
        )

    first = state()
    try:
        switch(own=bars, hub=hub_bars)
        transformers_logging.set_verbosity_info()
        before = state()
        assert before[2:] == (bars, hub_bars)
        with quiet():
            assert state() == (logging.ERROR, logging.ERROR, False, False)
        assert state() == before
        with suppress(KeyError), quiet():
            raise KeyError
        assert state() == before
    finally:
        transformers_logging.set_verbosity(first[0])
        switch(own=first[2], hub=first[3])
    assert state() == first


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
        silence_imports()
        logging.getLogger(name).warning(message)
        assert bool(caplog.records) == heard
    finally:
        logging.getLogger(name).removeHandler(caplog.handler)
