"""Layers that are trained one by one before the whole model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainings import (
    FLOAT32,
    TEXT,
    counted_steps,
    distance,
    interrupt,
    interrupted_at,
    options,
    place_fixture,  # noqa: F401 - the fixture `place`
    train,
)

from recipes import recipe
from secateur import CalibrationOptions, CutOptions, DataOptions, prune_model, recover
from secateur.checkpoint.record import read_record
from secateur.data.rows import Rows, row_starts
from secateur.errors import PlanError, TrainingError
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.options import RunOptions
from secateur.pruning.reconstruct import LayerTraining
from secateur.recovery.layers_first import COST, JUDGED_TOKENS, SHARE, layer_batch_tokens, windows_for, windows_of
from secateur.recovery.recipe import RecoverRecipe
from tiny import write_tiny

TAUGHT: dict[str, Any] = {"method": "lora+distill", "data": {"sources": ("text.txt",), "max_length": 16}}
MANY = 250_000  # tokens: a training that is long enough for layers
RESUME = RunOptions(resume=True)


def layers_of(folder: str | Path) -> Any:
    """What the record of a trained folder says of layers."""
    record = read_record(Path(folder))
    assert record is not None
    assert record.recovery is not None
    return record.recovery["layers"]


@pytest.fixture(name="brief")
def brief_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are trained for 3 steps."""
    monkeypatch.setattr("secateur.recovery.layers_first.LayerTraining", partial(LayerTraining, steps=3))


@pytest.fixture(name="cut")
def cut_fixture(place: Path, brief: None) -> str:
    """A cut of a dense model, `here/dense`, whose weights are large enough that its loss shows what was cut."""
    write_tiny(place / "dense", initializer_range=0.2)
    text = CalibrationOptions("text.txt", 4, 16)
    prune_model(recipe("here/dense", cut={"ratio": 0.3, "repair": "none"}, calibration=text), "here/cut")
    return "here/cut"


@torch.no_grad()
def error(folder: str) -> float:
    """How far what the last layer gives is from the dense model's, on text of the training."""
    ids_BT = torch.tensor(load_tokenizer("dense")(TEXT)["input_ids"][:16])[None]
    dense, pruned = (load(name, device="cpu").get_decoder()(ids_BT)[0] for name in ("here/dense", folder))
    return float((dense - pruned).norm() / dense.norm())


@pytest.fixture(name="long")
def long_fixture(brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps count as a training that is long enough."""
    monkeypatch.setattr("secateur.recovery.setup.TrainingSetup.tokens", MANY)


@pytest.mark.parametrize("method", ["lora+distill", "distill"])
def test_the_layers_come_close_to_the_dense_ones(method: str, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.recovery.layers_first.LayerTraining", partial(LayerTraining, steps=20))
    train(cut, learning_rate=1e-9, layers_first=True, **{**TAUGHT, "method": method})
    found = layers_of("here/out")
    assert found["batch_tokens"] == 512
    assert found["losses"].keys() == {"before", "reconstructed"}
    assert found["taken"] in (1, 2, 3)  # of three layers
    assert error("here/out") < 0.8 * error(cut)


@pytest.mark.usefixtures("long")
class TestByDefault:
    def test_a_cut_model_beside_its_dense_one(self, place: Path) -> None:
        train(**TAUGHT)
        assert layers_of("here/out")["batch_tokens"] == layer_batch_tokens(MANY)

    @pytest.mark.parametrize(
        "changed",
        [{"layers_first": False}, {"method": "lora"}, {"save_adapter": True}],
        ids=["not wanted", "no teacher", "an adapter to keep"],
    )
    def test_not_where(self, changed: dict[str, Any], place: Path) -> None:
        train(**{**TAUGHT, **changed})
        assert layers_of("here/out") is None

    @pytest.mark.parametrize("model", ["layers", "hidden"])
    def test_not_where_layers_do_not_match(self, model: str, place: Path) -> None:
        train(model, **TAUGHT)
        assert layers_of("here/out") is None
        with pytest.raises(PlanError, match="reconstruction needs"):
            train(model, "here/asked", layers_first=True, **TAUGHT)

    def test_not_where_memory_does_not_hold_both_models(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("secateur.recovery.layers_first.checked_reconstruction", full)
        train(**TAUGHT)
        assert layers_of("here/out") is None
        with pytest.raises(torch.OutOfMemoryError):
            train(out="here/asked", layers_first=True, **TAUGHT)

    def test_not_of_a_model_that_was_trained(self, place: Path) -> None:
        train(out="here/first", layers_first=False, **TAUGHT)
        train("here/first", **TAUGHT)
        assert layers_of("here/out") is None

    def test_not_where_the_cut_trained_them(self, place: Path) -> None:
        text = CalibrationOptions("text.txt", 4, 16)
        prune_model(recipe("dense", cut={"ratio": 0.3, "repair": "reconstruct"}, calibration=text), "here/cut")
        train("here/cut", **TAUGHT)
        assert layers_of("here/out") is None


def test_not_before_a_short_training(place: Path) -> None:
    train(**TAUGHT)
    assert layers_of("here/out") is None


@pytest.mark.usefixtures("long", "place")
def test_of_a_model_that_is_cut_first() -> None:
    first = {"cut": CutOptions(ratio=0.3, repair="none"), "calibration": CalibrationOptions("text.txt", 4, 16)}
    data = DataOptions(("text.txt",), max_length=16)
    how: dict[str, Any] = {**first, "loading": FLOAT32}
    recover(RecoverRecipe("dense", data, options(method="lora+distill"), **how), "here/out")
    assert layers_of("here/out") is not None


def test_of_less_text_than_a_row_may_have(cut: str) -> None:
    train(cut, max_steps=1, global_batch_size=1, layers_first=True, **{**TAUGHT, "data": {"max_length": 128}})
    assert layers_of("here/out") is not None


@pytest.mark.usefixtures("brief")
def test_minutes_count_them(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of the time here."""
    seconds = iter((60, 30, 30))  # of each minute: before and after layers, and when the teacher has read
    monkeypatch.setattr("secateur.recovery.time_budget._seconds_per_token", lambda run, rows: (run(), 4e-5)[1])
    monkeypatch.setattr("secateur.recovery.time_budget.LOADS", 0)
    monkeypatch.setattr("secateur.recovery.training._seconds_left", lambda minutes, began: next(seconds) * minutes)
    given: dict[str, Any] = {"minutes": 0.005, "max_steps": None, "eval_steps": 1000, "patience": None}
    half = train(layers_first=True, **{**TAUGHT, **given}).steps
    assert layers_of("here/out") is not None
    seconds = iter((60, 60, 60))
    whole = train(out="here/whole", layers_first=False, **{**TAUGHT, **given}).steps
    assert half == pytest.approx(whole / 2, rel=0.1)


class TestStopped:
    def test_in_a_step_it_goes_on_to_the_same_weights(self, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
        train(cut, "here/whole", layers_first=True, **TAUGHT)
        with interrupted_at(3):
            train(cut, layers_first=True, **TAUGHT)
        monkeypatch.setattr(
            "secateur.recovery.layers_first.checked_reconstruction", lambda *_, **__: pytest.fail("trained again")
        )
        with counted_steps() as steps:
            assert train(cut, layers_first=True, run=RESUME, **TAUGHT).resumed
        assert steps == [2, 3]
        assert distance("here/out", "here/whole") == 0

    def test_in_a_layer_it_trains_them_anew(self, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
        train(cut, "here/whole", layers_first=True, **TAUGHT)
        with monkeypatch.context() as patch:
            patch.setattr("secateur.recovery.layers_first.write_tensors", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(cut, layers_first=True, **TAUGHT)
        train(cut, layers_first=True, run=RESUME, **TAUGHT)
        assert distance("here/out", "here/whole") == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "lora"}, "layers_first=True: the layers learn from the dense model, and method='lora' has none"),
        ({"save_adapter": True}, "layers_first=True changes the model that an adapter belongs to"),
        ({"method": "full"}, "and method='full' has none. Expected a method with a teacher, --method lora"),
    ],
)
def test_refused(changed: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        train(**{**TAUGHT, "layers_first": True, **changed})


@pytest.mark.usefixtures("place")
def test_refused_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options(method="lora+distill", layers_first=True)
    monkeypatch.setattr("secateur.processes.count", lambda: 2)
    with pytest.raises(TrainingError, match="layers_first=True: one process trains layers, and there are 2"):
        recover(RecoverRecipe("per-layer", DataOptions(("text.txt",)), asked), "here/out")


@given(st.integers(1, 10**7))
def test_layers_take_their_share_at_most(tokens: int) -> None:
    batch_tokens = layer_batch_tokens(tokens)
    assert batch_tokens is None or COST * 150 * batch_tokens <= SHARE * tokens


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 5), st.randoms())
def test_windows_begin_with_rows(lengths: list[int], length: int, count: int, random: Any) -> None:
    starts = row_starts(lengths)
    ids_T = torch.arange(int(starts[-1]), dtype=torch.int32)
    rows = Rows(ids_T, ids_T >= 0, starts, torch.zeros(len(lengths), dtype=torch.int32))
    numbers = list(range(len(lengths)))
    random.shuffle(numbers)
    windows = windows_of(rows, torch.tensor(numbers), length, count)
    assert windows.shape == (len(windows), length)
    assert len(windows) <= count
    assert {int(window[0]) for window in windows} <= {int(start) for start in starts[:-1]}
    assert len(windows) > 0 or sum(lengths) < length
    flat = [token for number in numbers for token in range(int(starts[number]), int(starts[number + 1]))]
    for window in windows.tolist():
        at = flat.index(window[0])
        assert flat[at : at + length] == window


@pytest.mark.parametrize(("count", "judged"), [(400, "rows"), (40, "validation"), (0, "nothing")])
def test_layers_are_judged_by_text_that_they_have_not_seen(count: int, judged: str) -> None:
    """Enough of it: rows that are trained on afterwards, where there are many; each once, though all come twice."""
    length = 64
    ids_T = torch.arange(400 * length, dtype=torch.int32)
    rows = Rows(ids_T, ids_T >= 0, length * torch.arange(401), torch.zeros(400, dtype=torch.int32))
    order_SB = torch.tensor([*range(count or 1), *range(count or 1)])[:, None]
    validation = rows.select(torch.arange(399 if judged == "validation" else 400, 400))
    setup: Any = SimpleNamespace(
        data=SimpleNamespace(train=rows, validation=validation),
        order_SB=order_SB,
        recipe=SimpleNamespace(data=SimpleNamespace(max_length=length)),
    )
    windows, held_out = windows_for(setup, 100 * length)
    if judged == "nothing":
        assert held_out is None
    else:
        assert held_out is not None
        assert len(held_out) == (JUDGED_TOKENS // length if judged == "rows" else 1)
        seen = {*windows[:, 0].tolist()}
        assert len(seen) == len(windows) == min(count, 100)
        assert not seen & {*held_out[:, 0].tolist()}
