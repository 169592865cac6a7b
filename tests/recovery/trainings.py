"""Tiny models and short trainings that the tests of this folder share."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recipes import recipe
from secateur import CalibrationOptions, DataOptions, RecoverOptions, prune_model, recover
from secateur.data.text import demo_texts
from secateur.models.options import LoadOptions
from secateur.pipeline.options import RunOptions
from secateur.recovery.callbacks import SeedSteps
from secateur.recovery.recipe import RecoverRecipe
from secateur.recovery.result import RecoverResult
from tiny import write_tiny

TEXT = "a cat and a dog and a bird sat on a log and sang\n" * 60
HELD_OUT = demo_texts()[1][:3000]
FLOAT32 = LoadOptions(dtype="float32", device="cpu")
ROWS = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i)))} for i in range(2, 42)]
CUTS: dict[str, dict[str, Any]] = {
    "uniform": {"ratio": 0.3, "shape": "uniform"},
    "per-layer": {"ratio": 0.3, "shape": "per-layer"},
    "hidden": {"ratio": 0.34, "axes": ("hidden",), "of": "units"},
    "layers": {"ratio": 0.4, "axes": ("layers",), "of": "units", "layers": (0, 2)},
}


@functools.cache
def shelf() -> Path:
    """A folder with a dense model, cuts of it, rows to train on, and texts; for all tests, so it is only read."""
    folder = Path(_kept_until_exit().name)
    write_tiny(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    (folder / "held.txt").write_text(HELD_OUT)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    text = CalibrationOptions(str(folder / "text.txt"), 4, 16)
    for name, cut in CUTS.items():
        prune_model(recipe(folder / "dense", cut=cut, calibration=text), folder / name)
    return folder


@functools.cache
def _kept_until_exit() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@pytest.fixture(name="place")
def place_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to write in, `here`, with the shelf in reach under short names."""
    for path in shelf().iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "here"


def options(**given: Any) -> RecoverOptions:
    """Four steps of 8 rows, with an evaluation after every second, unless other options are given."""
    short = {
        "method": "lora",
        "max_steps": 4,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": 3e-3,
        "eval_steps": 2,
    }
    return RecoverOptions(**{**short, **given})


def train(
    model: str = "per-layer",
    out: str | Path = "here/out",
    *,
    data: dict[str, Any] | None = None,
    eval_texts: tuple[str, ...] = (),
    teacher: str | None = None,
    loading: LoadOptions = FLOAT32,
    run: RunOptions | None = None,
    **given: Any,
) -> RecoverResult:
    """A short training, in the folder `place`."""
    read = DataOptions(**{"sources": ("rows.json",), "max_length": 128, **(data or {})})
    return recover(
        RecoverRecipe(model, read, options(**given), eval_texts=eval_texts, teacher=teacher, loading=loading),
        out,
        run=run,
    )


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def distance(one: str | Path, other: str | Path) -> float:
    """The largest difference of any weight."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Press Ctrl-C as the optimizer step `step` begins, counted over all trainings of the block."""
    real, left = SeedSteps.on_step_begin, [step]

    def stop(self: Any, *args: Any, **others: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(self, *args, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeedSteps, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@contextmanager
def counted_steps() -> Iterator[list[int]]:
    """The optimizer steps that the block begins."""
    real = SeedSteps.on_step_begin
    begun: list[int] = []

    def count(self: Any, args: Any, state: Any, *rest: Any, **others: Any) -> None:
        begun.append(state.global_step)
        real(self, args, state, *rest, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeedSteps, "on_step_begin", count)
        yield begun


def copy_work(source: Path, out: Path) -> None:
    """Put what an interrupted run has left beside another output."""
    shutil.copytree(source.with_name(f".{source.name}.secateur"), out.with_name(f".{out.name}.secateur"))


# Forks a run from one process that has imported everything, and kills it, so often; then lets it end. It is killed a
# moment after the beginning of one of its first steps, and every second time, if that is sooner, within so many seconds
# of its start: what it gets done before depends on the steps, and on the speed of the machine hardly.
KILLING = """
import os, random, signal, sys, threading
import peft, secateur.cli.main
from secateur import *
from secateur.pipeline.options import RunOptions
from secateur.recovery.callbacks import SeedSteps
kills, early, arguments = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
chooser, begin, killed = random.Random(0), SeedSteps.on_step_begin, 0
def kill_after(seconds):
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
while True:
    steps, moment, start = chooser.randint(1, 4), chooser.uniform(0, 0.1), chooser.uniform(0, early)
    child = os.fork()
    if child == 0:
        begun = []
        def on_step_begin(self, args, state, control, **others):
            begun.append(state.global_step)
            if killed < kills and len(begun) == steps:
                kill_after(moment)
            begin(self, args, state, control, **others)
        SeedSteps.on_step_begin = on_step_begin
        if killed < kills and killed % 2:
            kill_after(start)
        os._exit(secateur.cli.main.run([*arguments, *(["--resume"] if killed else [])]))
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        print(killed)
        sys.exit(os.WEXITSTATUS(status))
    killed += 1
"""
