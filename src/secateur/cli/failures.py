"""An exception that no check has foreseen -> one line for the user, unless it is a failure of ours."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

TRACEBACK = "SECATEUR_TRACEBACK"  # set in the environment: the traceback of every such exception is printed
PACKAGE = str(Path(__file__).parents[1]) + os.sep
MODEL_CODE = (f"{os.sep}transformers{os.sep}models{os.sep}", f"{os.sep}transformers_modules{os.sep}")
LESS_MEMORY = {  # command -> options that take less memory
    **dict.fromkeys(("plan", "prune", "sweep"), "--preset fast"),
    "recover": "--micro-batch-size 1 --gradient-checkpointing",
    "evaluate": "--batch-size 1 and shorter windows (--protocol served@512)",
    "profile": "--batch 1 --seq-len 128",
}


def explained(error: Exception, command: str) -> str | None:
    """What an exception means to the user of a command, on one line; None where it is a failure of ours.

    Two kinds are not ours: no memory is left, and the code of the model itself fails, transformers' or what came with
    the model.

    >>> explained(MemoryError("4 GiB"), "recover")[:80]
    'no memory is left (4 GiB); recover takes less with --micro-batch-size 1 --gradie'
    >>> explained(ValueError("a bug of ours"), "recover") is None
    True
    """
    text = " ".join(str(error).split())
    of_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported for a message
    if of_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        said = ". ".join(re.sub(r"^.*DefaultCPUAllocator: ", "", text).rstrip(".").split(". ")[:3])
        less = [LESS_MEMORY.get(command, ""), "--dtype bfloat16", "--device cpu" if of_gpu else ""]
        return f"no memory is left ({said}); {command} takes less with {', with '.join(filter(None, less))}"
    if (place := _in_model_code(error)) is not None:
        return (
            f"the model's own code fails, in {place}: {type(error).__name__}: {text.rstrip('.')}. Where it was called "
            f"is printed with {TRACEBACK}=1 in the environment"
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
