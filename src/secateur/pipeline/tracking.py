"""A command's result -> an experiment tracker, a name for each number: TensorBoard, Trackio or Weights & Biases.

Training reports every step through Trainer (`RecoverOptions.track`); this is for what is measured once.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from secateur.errors import TrackingError, one_line

Tracker = Literal["tensorboard", "trackio", "wandb"]
PROJECT = "secateur"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another
NAMES = ("data", "protocol", "preset", "score", "ratio", "batch", "seq_len")  # by which items are told apart
NOT_TRACKED = ("options", "groups", "calibration_options", "settings")  # no measurements


def check_tracker(tracker: Tracker | None) -> None:
    """Raise `TrackingError` for a tracker that is not installed.

    >>> check_tracker(None)
    """
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise TrackingError(f"track={tracker!r} needs the package {tracker}. Run: pip install {tracker}")


def track(tracker: Tracker, kind: str, result: Any, *, about: Mapping[str, Any], run: Path | None = None) -> None:
    """Report the numbers of a result as one run of the tracker; `kind` is the command, `about` the run's description.

    TensorBoard's files go to RUN/tensorboard, without a run folder to `runs`; TENSORBOARD_LOGGING_DIR names another.
    """
    numbers = dict(numbers_in(result))
    name = f"{kind}-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    if tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        usual = Path("runs") if run is None else run / "tensorboard"
        with SummaryWriter(str(Path(os.environ.get("TENSORBOARD_LOGGING_DIR", usual)) / name)) as writer:
            for each, value in numbers.items():
                writer.add_scalar(each, value)
            writer.add_text("command", str(about.get("command")))
        return
    module: Any = importlib.import_module(tracker)  # both have the same functions
    project = os.environ.get(f"{tracker.upper()}_PROJECT", PROJECT)
    try:
        module.init(project=project, name=name, config=dict(about))
        module.log(numbers)
        module.finish()
    except Exception as error:  # whatever its network and its login raise
        raise TrackingError(
            f"{tracker} does not take the result, which is printed and written; {one_line(error)}. Log in there, or "
            "use --track tensorboard, which writes files here"
        ) from error


def numbers_in(result: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a result as `--json` writes it, each with a name; items of a list are named by what they are of.

    >>> dict(numbers_in({"results": [{"model": "demo", "perplexity": [{"data": "novel", "ppl": 25.5}]}], "seed": True}))
    {'results/demo/perplexity/novel/ppl': 25.5}
    """
    if isinstance(result, Mapping):
        for key, value in result.items():
            if key not in (*NOT_TRACKED, *NAMES):
                yield from numbers_in(value, f"{name}/{key}" if name else str(key))
    elif isinstance(result, Sequence) and not isinstance(result, str):
        for item in result:
            if not isinstance(item, Mapping):
                continue
            said = [str(item["model"])] if "model" in item else [str(item[key]) for key in NAMES if key in item]
            if said:
                yield from numbers_in(item, f"{name}/{' '.join(said)}")
    elif isinstance(result, (int, float)) and not isinstance(result, bool) and math.isfinite(result):
        yield name, float(result)
