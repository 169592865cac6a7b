"""An exception that no check has foreseen -> one line for the user, unless it is a failure of ours."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

TRACEBACK = "SECATEUR_TRACEBACK"  # set in the environment: the traceback of every such exception is printed
PACKAGE = str(Path(__file__).parents[1]) + os.sep
MODEL_CODE = (f"{os.sep}transformers{os.sep}models{os.sep}", f"{os.sep}transformers_modules{os.sep}")
LESS_MEMORY = {  # command that loads weights -> options that need less memory
    **dict.fromkeys(("plan", "prune"), ("--preset fast",)),
    "sweep": ("--presets fast",),
    "recover": ("--micro-batch-size 1 --gradient-checkpointing",),
    "evaluate": ("--batch-size 1 and shorter windows (--protocol served@512)",),
    "profile": ("--batch 1 --seq-len 128",),
    **dict.fromkeys(("export", "demo", "compare"), ()),
}


def explained(error: Exception, command: str) -> str | None:
    """What an exception means to the user of a command, on one line; None where it is a failure of ours.

    Two kinds are not ours: running out of memory, and an error in the model's own code, transformers' or what came with
    the model.

    >>> explained(MemoryError("4 GiB"), "recover")[:80]
    'out of memory (4 GiB); recover needs less with --micro-batch-size 1 --gradient-c'
    >>> explained(ValueError("a bug of ours"), "recover") is None
    True
    """
    text = " ".join(str(error).split())
    of_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported for a message
    if of_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        said = ". ".join(re.sub(r"^.*DefaultCPUAllocator: ", "", text).rstrip(".").split(". ")[:3])
        if command not in LESS_MEMORY:
            return f"out of memory ({said}); {command} has no option that needs less: close other programs"
        less = [*LESS_MEMORY[command], "--dtype bfloat16", *(["--device cpu"] if of_gpu else [])]
        return f"out of memory ({said}); {command} needs less with {', with '.join(less)}"
    if (place := _in_model_code(error)) is not None:
        return (
            f"the model's own code failed in {place}: {type(error).__name__}: {text.rstrip('.')}. Set {TRACEBACK}=1 to "
            "see the traceback"
        )
    return None


def _in_model_code(error: Exception) -> str | None:
    """The file and line of the model's code that failed, or None where that was ours, or of a library that we call."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):  # from the outermost call on
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if any(part in file for part in MODEL_CODE):
            place = f"{Path(file).name}, line {line}"
        elif file.startswith(PACKAGE) and not function.startswith("__torch_"):  # these only see its operators
            place = None
    return place
