"""Trackers see what a command has measured; one that is not there is refused before any work."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from secateur.cli.main import run
from secateur.errors import TrackingError
from secateur.pipeline.tracking import numbers_in, track

RESULT = {
    "options": {"ratio": 0.2},
    "parameters": {"dense": 10, "pruned": 8},
    "groups": [{"name": "a", "kept": 1}],
    "results": [
        {"model": "a", "perplexity": [{"data": "t", "protocol": "p@1", "ppl": 3.5}], "curve": [1, 2]},
        {"model": "b", "perplexity": [{"data": "t", "protocol": "p@1", "ppl": float("inf")}]},
    ],
}
NUMBERS = {"parameters/dense": 10.0, "parameters/pruned": 8.0, "results/a/perplexity/t p@1/ppl": 3.5}


def test_numbers_have_names_and_only_measurements_are_numbers() -> None:
    assert dict(numbers_in(RESULT)) == NUMBERS


def test_tensorboard_can_read_what_a_command_measured(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="that events can be read needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    assert run(["profile", "tiny", "--sizes-only", "--quiet", "--track", "tensorboard"]) == 0
    (events,) = tmp_path.glob("profile-*/events.*")
    read: Any = EventAccumulator(str(events))
    read.Reload()
    scalars = {name: read.Scalars(name)[0].value for name in read.Tags()["scalars"]}
    assert scalars["results/tiny/parameters"] > 0


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_are_given_one_run(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fake: Any = types.ModuleType(name)
    fake.init = lambda **about: seen.append((about["project"], about["config"]))
    fake.log = seen.append
    fake.finish = lambda: seen.append("finished")
    monkeypatch.setitem(sys.modules, name, fake)
    track(name, "prune", RESULT, about={"command": "secateur prune"})
    assert seen == [("secateur", {"command": "secateur prune"}), NUMBERS, "finished"]

    def refuse(_: Any) -> None:
        raise ConnectionError("no such host")

    fake.log = refuse
    with pytest.raises(TrackingError, match=f"{name} does not take the result, which is printed.*no such host"):
        track(name, "prune", RESULT, about={})


def test_a_tracker_that_is_missing_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert run(["evaluate", "no/such/model", "--track", "trackio"]) == 2
    assert "track='trackio' needs the package trackio. Run: pip install trackio" in capsys.readouterr().err
