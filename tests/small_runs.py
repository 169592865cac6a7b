"""Runs of a tiny model in a folder of their own, to be interrupted, repeated and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import pytest

from recipes import recipe
from secateur.data.calibration import CalibrationOptions
from secateur.pipeline.options import RunOptions
from secateur.pipeline.recipe import PruneRecipe
from secateur.pipeline.run import Pruned, prune_model
from secateur.planning.plan import Plan
from tiny import write_tiny

TEXT = "a cat and a dog and a bird sat on a log and sang\n" * 60
OTHER_TEXT = "one fish two fish red fish blue fish and no more\n" * 60
CALIBRATION = CalibrationOptions("in/text.txt", samples=4, length=16)
WORK = ".out.secateur"
STAGES = "secateur.pipeline.pipeline"  # the module whose names tests replace


def write_inputs(root: Path) -> Path:
    """A model of two layers and texts in root/in; what is made goes to root/here, the folder that comes back."""
    write_tiny(root / "in" / "tiny", num_hidden_layers=2)
    (root / "in" / "text.txt").write_text(TEXT)
    (root / "in" / "rows.jsonl").write_text(json.dumps({"text": TEXT, "body": OTHER_TEXT}))
    (root / "in" / "tiny" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (root / "here").mkdir()
    return root / "here"


@contextmanager
def emptied(here: Path) -> Iterator[Path]:
    """The folder `here`, empty, and the folder above it as the current one."""
    shutil.rmtree(here)
    here.mkdir()
    with chdir(here.parent):
        yield here


def small(*, model: str = "in/tiny", **choices: Any) -> PruneRecipe:
    """The default recipe of the tiny model on the text, but for these choices: see `recipe`."""
    return recipe(model, **{"calibration": CALIBRATION, **choices})


def prune(
    *,
    out: str = "here/out",
    plan: Plan | None = None,
    resume: bool = False,
    overwrite: bool = False,
    folder: str | None = None,
    **choices: Any,
) -> Pruned:
    """Prune the tiny model."""
    run = RunOptions(resume=resume, overwrite=overwrite, folder=None if folder is None else Path(folder))
    return prune_model(small(**choices), out, plan=plan, run=run)


def interrupt(at: str, **choices: Any) -> None:
    """Ctrl-C in the place of this function, in such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune(**choices)


def raiser(error: BaseException) -> Callable[..., Any]:
    """A function that raises this, whatever it is called with."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def never(what: str) -> Callable[..., Any]:
    """A function whose call is a failure."""
    return lambda *_, **__: pytest.fail(what)


def weights(folder: str | Path) -> bytes:
    """The bytes of the weights in a folder."""
    return (Path(folder) / "model.safetensors").read_bytes()


def top(folder: Path) -> list[str]:
    """The names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())
