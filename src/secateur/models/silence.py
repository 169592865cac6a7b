"""The messages and progress bars of other libraries, switched off for a while.

`secateur/__init__` calls `silence_imports` first. Where torchao is installed, transformers imports it, and both then
log what nobody but their makers can change; the first lines that a command writes to stderr must be its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Logger -> how the messages begin that are left out: extensions that were not built for this machine, and enumerations
# of torchao that are declared in an old way.
IMPORT_MESSAGES = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torchao.kernel.intmm": ("Warning: Detected no triton",),
    "torch.utils._pytree": ("<enum ",),
}


def silence_imports() -> None:
    """Leave out the messages in `IMPORT_MESSAGES`, and no other, whenever their libraries are imported."""
    for name in IMPORT_MESSAGES:
        logging.getLogger(name).addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(IMPORT_MESSAGES[record.name])


@contextmanager
def silence_logger(name: str) -> Iterator[None]:
    """Leave out all that a logger, and those below it, say short of a critical error."""
    logger = logging.getLogger(name)
    level = logger.level
    # Setting a level clears what all loggers, of which there are thousands, have cached.
    if level == logging.CRITICAL:
        yield
        return
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off messages of transformers and the hub client and all bars of tqdm, and restore them afterwards.

    The switches belong to the process, not to a thread: other threads are silenced for that time, too.
    """
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    levels = [(each, each.get_verbosity()) for each in (transformers_logging, hub_logging)]
    levels = [(each, level) for each, level in levels if level < logging.ERROR]
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    # The hub client warns when its environment variable has the last word on progress bars.
    with warnings.catch_warnings(action="ignore"):
        transformers_logging.disable_progress_bar()  # the hub's, too
    for each, _ in levels:
        each.set_verbosity_error()
    bar: Any = tqdm
    shown = bar.__init__

    def hidden(self: Any, *given: Any, **options: Any) -> None:
        shown(self, *given, **{**options, "disable": True})

    bar.__init__ = hidden
    try:
        yield
    finally:
        bar.__init__ = shown
        for each, level in levels:
            each.set_verbosity(level)
        with warnings.catch_warnings(action="ignore"):
            if bars:
                transformers_logging.enable_progress_bar()  # the hub's, too
            (enable_progress_bars if hub_bars else disable_progress_bars)()
