"""What other libraries say while they are imported: nothing that the user of ours could change.

Where torchao is installed, transformers imports it. It then logs which of its extensions were not built for this
machine, and torch that two of torchao's enumerations are declared in an old way. Both are the concern of those who
build them, and the first lines that a command writes to stderr must be its own.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Logger -> how the messages begin that are left out.
SAID_ON_IMPORT = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torchao.kernel.intmm": ("Warning: Detected no triton",),
    "torch.utils._pytree": ("<enum ",),
}


@contextmanager
def hushed() -> Iterator[None]:
    """While open, the messages above are left out; all others, and all loggers, are as they were.

    >>> with hushed():
    ...     logging.getLogger("torchao").warning("Failed to load an extension")
    """

    def others(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(SAID_ON_IMPORT[record.name])

    loggers = [logging.getLogger(name) for name in SAID_ON_IMPORT]
    for logger in loggers:
        logger.addFilter(others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(others)


with hushed():
    importlib.import_module("transformers.modeling_utils")
